#include "uvg/flash_attention_int8.h"

#include "cpu/attention_tasks.h"
#include "cpu/int8.h"

namespace uvg {
namespace UVG_ISA {
namespace {

// Queries and keys as signed bytes, each row by its largest value; keys less their mean over the sample, which adds the
// same to all scores of a query. Queries are stored 128 higher, as the product takes one side without a sign. Behind a
// query stands its scale; behind a panel of keys their scales, and what the 128 have added to their products.
template <typename F>
struct InBytes {
  using Format = F;
  using T = typename F::Value;
  using B = Bytes<T>;
  static constexpr int32_t kHigher = 128;
  static constexpr bool kScaled = true, kLies = false;

  static int64_t query_words(int64_t width) { return row_words<B>(width) + 1; }
  static int64_t panel_words(int64_t width) { return kPanel * (row_words<B>(width) + 2); }
  static int64_t work_words(int64_t width) { return kLanes * row_words<B>(width) + 3 * round_up(width, kLanes); }

  static void pack_queries(const Rows<T>& x, int64_t width, int64_t padded, uint32_t* out) {
    for (int64_t i = 0; i < padded; ++i) {
      uint32_t* to = out + i * query_words(width);
      x.prefetch(i + kAhead, width);
      std::memset(to, 0, static_cast<size_t>(query_words(width)) * sizeof(uint32_t));
      if (x.at(i) == nullptr) continue;
      const Tail tail = to_signed(x.at(i), width, kHigher, reinterpret_cast<uint8_t*>(to));
      std::memcpy(to + row_words<B>(width), &tail.scale, sizeof tail.scale);
    }
  }

  // Mean of the rows, summed in double so that the reference's has the same bits; `sums` is room for it.
  static void mean_of(const Rows<T>& x, int64_t width, double* sums, float* mean) {
    std::memset(sums, 0, static_cast<size_t>(round_up(width, kLanes)) * sizeof(double));
    for (int64_t i = 0; i < x.count; ++i) {
      x.prefetch(i + kAhead, width);
      columns(width, [&](int64_t c, int64_t n) {
        float values[kLanes];
        store(values, load(x.at(i) + c, n));
        for (int64_t j = 0; j < kLanes; ++j) sums[c + j] += double{values[j]};
      });
    }
    for (int64_t c = 0; c < width; ++c) mean[c] = static_cast<float>(sums[c] / static_cast<double>(x.count));
  }

  static void pack_keys(const Rows<T>& x, int64_t width, uint32_t* out, uint32_t* work) {
    const int64_t words = row_words<B>(width), padded = round_up(width, kLanes);
    auto* sums = reinterpret_cast<double*>(work);
    auto* key = reinterpret_cast<float*>(work);
    auto* mean = reinterpret_cast<float*>(work + 2 * padded);
    uint32_t* bytes = work + 3 * padded;
    mean_of(x, width, sums, mean);
    for (int64_t i = 0; i < round_up(x.count, kPanel); i += kLanes) {
      uint32_t* panel = out + i / kPanel * panel_words(width) + i % kPanel;
      const uint32_t* rows[kLanes];
      std::memset(bytes, 0, static_cast<size_t>(kLanes * words) * sizeof(uint32_t));
      for (int64_t r = 0; r < kLanes; ++r) {
        const T* row = x.at(i + r);
        rows[r] = bytes + r * words;
        Tail tail{0.0f, 0};
        x.prefetch(i + r + kAhead, width);
        if (row != nullptr) {
          columns(width, [&](int64_t c, int64_t n) { store(key + c, load(row + c, n) - load(mean + c, n), n); });
          tail = to_signed(key, width, 0, reinterpret_cast<uint8_t*>(bytes + r * words));
        }
        tail.number *= -kHigher;
        std::memcpy(panel + words * kPanel + r, &tail.scale, sizeof tail.scale);
        std::memcpy(panel + (words + 1) * kPanel + r, &tail.number, sizeof tail.number);
      }
      for (int64_t c = 0; c < words; c += kLanes) transpose16(rows, c, panel + c * kPanel, kPanel);
    }
  }

  template <int V>
  static UVG_INLINE void multiply(Vec (&x)[kTileRows][V], const uint32_t* queries, const uint32_t* panel,
                                  int64_t width) {
    const uint32_t* tails = panel + row_words<B>(width) * kPanel;
    VecInts sum[kTileRows][V];
#pragma GCC unroll 6
    for (int64_t r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[r][j] = as<VecInts>(load_bits(tails + kPanel + j * kLanes));
    UVG_ISA::multiply<B>(sum, queries, query_words(width), 1, panel, kPanel, depth_of<B>(width));
#pragma GCC unroll 6
    for (int64_t r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) x[r][j] = convert<Vec>(sum[r][j]) * as<Vec>(load_bits(tails + j * kLanes));
  }

  static UVG_INLINE float scale_of(const uint32_t* query, int64_t width) {
    float scale;
    std::memcpy(&scale, query + row_words<B>(width), sizeof scale);
    return scale;
  }
};

}  // namespace

void flash_attention_int8_forward(const FlashAttentionParams& p) {
  with_format(p.dtype, [&](auto format) { attention<InBytes<decltype(format)>>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
