#include "common/cpu_features.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

namespace uvg {
namespace {

constexpr Isa kAll[] = {Isa::kGeneric, Isa::kNeon, Isa::kNeonBf16, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

bool contains(const std::vector<Isa>& isas, Isa isa) { return std::find(isas.begin(), isas.end(), isa) != isas.end(); }

template <typename Range>
std::string names(const Range& isas) {
  std::string out;
  for (Isa isa : isas) out += (out.empty() ? "" : ", ") + std::string(isa_name(isa));
  return out;
}

#if defined(__x86_64__) && defined(__GNUC__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers (xgetbv).
#define UVG_HAS(feature) (__builtin_cpu_supports(feature) != 0)
bool has_f16c() {  // clang's builtin knew no "f16c" before its version 18
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
bool has_avx2() { return UVG_HAS("avx2") && UVG_HAS("fma") && UVG_HAS("bmi2") && has_f16c(); }
bool has_avx512() {
  return has_avx2() && UVG_HAS("avx512f") && UVG_HAS("avx512bw") && UVG_HAS("avx512dq") && UVG_HAS("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && UVG_HAS("avx512bf16") && UVG_HAS("avx512vnni"); }
#elif defined(__aarch64__)
bool has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
  return false;
#endif
}
#endif

std::vector<Isa> usable_isas() {
  std::vector<Isa> usable;
  const std::vector<Isa> compiled = compiled_isas();
  for (Isa isa : supported_isas())
    if (contains(compiled, isa)) usable.push_back(isa);
  return usable;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{active_isa()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return "generic";
    case Isa::kNeon:
      return "neon";
    case Isa::kNeonBf16:
      return "neon_bf16";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas = {Isa::kGeneric};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (has_avx2()) isas.push_back(Isa::kAvx2);
  if (has_avx512()) isas.push_back(Isa::kAvx512);
  if (has_avx512_bf16()) isas.push_back(Isa::kAvx512Bf16);
#elif defined(__aarch64__)
  isas.push_back(Isa::kNeon);  // part of the base architecture
  if (has_neon_bf16()) isas.push_back(Isa::kNeonBf16);
#endif
  return isas;
}

std::vector<Isa> compiled_isas() {
  std::istringstream list(UVG_COMPILED_ISAS);
  std::vector<Isa> isas;
  for (std::string name; std::getline(list, name, ',');)
    for (Isa isa : kAll)
      if (name == isa_name(isa)) isas.push_back(isa);
  return isas;
}

Isa choose_isa(const std::string& wish, const std::vector<Isa>& usable) {
  if (wish.empty()) return usable.back();
  for (Isa isa : kAll) {
    if (wish != isa_name(isa)) continue;
    if (contains(usable, isa)) return isa;
    throw std::invalid_argument("UVG_CPU_ISA must be one that this CPU and this build have (" + names(usable) +
                                "), got '" + wish + "'");
  }
  throw std::invalid_argument("UVG_CPU_ISA must be one of " + names(kAll) + ", got '" + wish + "'");
}

Isa active_isa() {
  const char* wish = std::getenv("UVG_CPU_ISA");
  return choose_isa(wish ? wish : "", usable_isas());
}

Isa isa_in_use() { return chosen().load(std::memory_order_relaxed); }

void use_isa(const std::string& name) { chosen().store(choose_isa(name, usable_isas())); }

std::vector<std::pair<const char*, bool>> cpu_flags() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return {
      {"avx2", UVG_HAS("avx2")},
      {"fma", UVG_HAS("fma")},
      {"bmi2", UVG_HAS("bmi2")},
      {"f16c", has_f16c()},
      {"avx512f", UVG_HAS("avx512f")},
      {"avx512bw", UVG_HAS("avx512bw")},
      {"avx512dq", UVG_HAS("avx512dq")},
      {"avx512vl", UVG_HAS("avx512vl")},
      {"avx512vbmi", UVG_HAS("avx512vbmi")},
      {"avx512bf16", UVG_HAS("avx512bf16")},
      {"avx512vnni", UVG_HAS("avx512vnni")},
  };
#elif defined(__aarch64__)
  return {{"neon", true}, {"bf16", has_neon_bf16()}};
#else
  return {};
#endif
}

}  // namespace uvg
