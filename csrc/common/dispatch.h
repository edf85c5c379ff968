// One kernel, compiled once per instruction set, called by one name.
#pragma once

#include "common/cpu_features.h"

#if UVG_HAVE_NEON
#define UVG_IF_NEON(...) __VA_ARGS__
#else
#define UVG_IF_NEON(...)
#endif
#if UVG_HAVE_NEON_BF16
#define UVG_IF_NEON_BF16(...) __VA_ARGS__
#else
#define UVG_IF_NEON_BF16(...)
#endif
#if UVG_HAVE_AVX2
#define UVG_IF_AVX2(...) __VA_ARGS__
#else
#define UVG_IF_AVX2(...)
#endif
#if UVG_HAVE_AVX512
#define UVG_IF_AVX512(...) __VA_ARGS__
#else
#define UVG_IF_AVX512(...)
#endif
#if UVG_HAVE_AVX512_BF16
#define UVG_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define UVG_IF_AVX512_BF16(...)
#endif

// UVG_KERNEL(name, Params): declares `void name(const Params&)` in the namespace of every instruction set that this
// build holds (csrc/cpu/*.cpp defines them) and uvg::name, which calls the one in use.
#define UVG_KERNEL(name, Params)                                                    \
  namespace generic {                                                               \
  void name(const Params&);                                                         \
  }                                                                                 \
  UVG_IF_NEON(namespace neon { void name(const Params&); })                         \
  UVG_IF_NEON_BF16(namespace neon_bf16 { void name(const Params&); })               \
  UVG_IF_AVX2(namespace avx2 { void name(const Params&); })                         \
  UVG_IF_AVX512(namespace avx512 { void name(const Params&); })                     \
  UVG_IF_AVX512_BF16(namespace avx512_bf16 { void name(const Params&); })           \
  inline void name(const Params& params) {                                          \
    switch (isa_in_use()) {                                                         \
      UVG_IF_NEON(case Isa::kNeon : return neon::name(params);)                     \
      UVG_IF_NEON_BF16(case Isa::kNeonBf16 : return neon_bf16::name(params);)       \
      UVG_IF_AVX2(case Isa::kAvx2 : return avx2::name(params);)                     \
      UVG_IF_AVX512(case Isa::kAvx512 : return avx512::name(params);)               \
      UVG_IF_AVX512_BF16(case Isa::kAvx512Bf16 : return avx512_bf16::name(params);) \
      default:                                                                      \
        return generic::name(params);                                               \
    }                                                                               \
  }
