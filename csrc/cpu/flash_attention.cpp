#include "uvg/flash_attention.h"

#include "cpu/attention_tasks.h"

namespace uvg {
namespace UVG_ISA {
namespace {

// Queries and keys in the format of the values.
template <typename F>
struct Plain {
  using Format = F;
  static constexpr bool kScaled = false;
  static constexpr bool kLies = F::kRaw && F::kKept;

  static int64_t query_words(int64_t width) { return row_words<F>(width); }
  static int64_t panel_words(int64_t width) { return kPanel * row_words<F>(width); }
  static int64_t work_words(int64_t width) {
    const int64_t packing = kLanes * row_words<F>(width), lying = kLies ? LyingKeys<Plain>::work_words(width) : 0;
    return packing > lying ? packing : lying;
  }

  static void pack_queries(const Rows<typename F::Value>& x, int64_t width, int64_t padded, uint32_t* out) {
    pack_rows<F>(x, width, padded, out);
  }

  static void pack_keys(const Rows<typename F::Value>& x, int64_t width, uint32_t* out, uint32_t* work) {
    pack_transposed<F>(x, width, out, work);
  }

  template <int V>
  static UVG_INLINE void multiply(Vec (&x)[kTileRows][V], const uint32_t* queries, const uint32_t* panel,
                                  int64_t width) {
    for (auto& row : x)
      for (Vec& value : row) value = Vec{};
    UVG_ISA::multiply<F>(x, queries, query_words(width), 1, panel, kPanel, depth_of<F>(width));
  }

  static UVG_INLINE float scale_of(const uint32_t*, int64_t) { return 1.0f; }
};

}  // namespace

void flash_attention_forward(const FlashAttentionParams& p) {
  with_format(p.dtype, [&](auto format) { attention<Plain<decltype(format)>>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
