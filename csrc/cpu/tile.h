// Register tiles of matrix products, for kernels that do something of their own with the result.
//
// A tile is kTileRows rows times up to kPanel columns and stays in registers. The left operand is read one dword at a
// time and broadcast; the right one lies in panels [depth][columns] of dwords. A dword is one fp32 value (Singles) or
// two neighbours along the depth in bf16 (Pairs). Of a panel's vectors of columns, a tile may compute the first few.
#pragma once

#include "cpu/exp.h"
#include "cpu/transpose.h"

namespace uvg {
namespace UVG_ISA {

#if defined(__AVX512F__)
constexpr int kTileVecs = 4;
#else
constexpr int kTileVecs = 1;
#endif
constexpr int64_t kTileRows = 6;
constexpr int64_t kPanel = kTileVecs * kLanes;

template <int kCount>
struct Vecs {
  static constexpr int value = kCount;
};

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

UVG_INLINE VecBits load_bits(const uint32_t* p) { return from_memory<VecBits>(p); }

UVG_INLINE void store_bits(uint32_t* p, VecBits v) { to_memory(p, v); }

// Value: type of the tensor; Left: of the left operand's rows. All formats have: kPer values to a dword, depth of a row
// of `width` values, kTail dwords behind a packed row, one multiply-accumulate of Sum. Those of floats also store
// vectors of results, a multiple of kPutVecs of them, as a left operand, rounded as they will be read, and have the
// exponential that is exact enough for them: power(x) = e^(x * kUnit). kRaw: tensors lie in memory as dwords already.
// kKept: results are stored as they are, so that their sum is that of what will be read. (With AVX-512 that is summed
// apart all the same, as it was when it was timed.)
template <typename T>
struct Singles {
  using Value = T;
  using Left = T;
  using Sum = Vec;
  static constexpr int64_t kPer = 1, kTail = 0;
  static constexpr int kPutVecs = 1;
  static constexpr bool kRaw = sizeof(T) == sizeof(uint32_t);
  static constexpr bool kKept = kTileVecs == 1;
#if defined(__AVX512F__)
  static constexpr float kUnit = 1.0f;

  static UVG_INLINE Vec power(Vec x) { return exp(x); }
#else
  static constexpr float kUnit = 0.693147181f;

  static UVG_INLINE Vec power(Vec x) { return exp2(x); }
#endif

  static UVG_INLINE Vec mac(Vec sum, uint32_t left, VecBits right) {
    float value;
    std::memcpy(&value, &left, sizeof value);
    return multiply_add(splat(value), as<Vec>(right), sum);
  }

  // Sixteen dwords of a row from value i on; n values are left there.
  static UVG_INLINE VecBits dwords(const T* row, int64_t i, int64_t n) { return as<VecBits>(load(row + i, n)); }

  // Sixteen columns, n of them real, of the kPer rows that share dwords. A row that is not there is null.
  static UVG_INLINE VecBits across(const T* const* rows, int64_t i, int64_t n) {
    return as<VecBits>(rows[0] == nullptr ? Vec{} : load(rows[0] + i, n));
  }

  template <int V>
  static UVG_INLINE void put(uint32_t* row, int64_t column, const Vec (&values)[V]) {
    for (int j = 0; j < V; ++j) store_bits(row + column + j * kLanes, as<VecBits>(values[j]));
  }

  static UVG_INLINE Vec get(const uint32_t* row, int64_t column) { return as<Vec>(load_bits(row + column)); }

  template <int V>
  static UVG_INLINE Vec rounded_sum(Vec sum, const Vec (&values)[V]) {
    for (int j = 0; j < V; ++j) sum += values[j];
    return sum;
  }
};

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
struct Pairs {
  using Value = BFloat16;
  using Left = BFloat16;
  using Sum = Vec;
  static constexpr int64_t kPer = 2, kTail = 0;
  static constexpr bool kRaw = true, kKept = false;
#if defined(__AVX512BF16__)
  static constexpr int kPutVecs = 2;
  static constexpr float kUnit = 0.693147181f;

  static UVG_INLINE Vec power(Vec x) { return exp2(x); }

  static UVG_INLINE Vec mac(Vec sum, uint32_t left, VecBits right) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(left)), (__m512bh)right);
  }
#else
  static constexpr int kPutVecs = 1;
  static constexpr float kUnit = 1.0f;

  static UVG_INLINE Vec power(Vec x) { return exp(x); }

  static UVG_INLINE Vec mac(Vec sum, uint32_t left, VecBits right) {
    const auto pair = vreinterpretq_bf16_u32(vdupq_n_u32(left));
    const auto dot = [&](auto four, auto pairs) {
      return decltype(four)(vbfdotq_f32(float32x4_t(four), pair, bfloat16x8_t(pairs)));
    };
    return {{dot(sum.low.low, right.low.low), dot(sum.low.high, right.low.high)},
            {dot(sum.high.low, right.high.low), dot(sum.high.high, right.high.high)}};
  }
#endif

  static UVG_INLINE VecBits dwords(const BFloat16* row, int64_t i, int64_t n) {
    if (n >= 2 * kLanes) return from_memory<VecBits>(row + i);
    BFloat16 part[2 * kLanes] = {};
    std::memcpy(part, row + i, static_cast<size_t>(n) * sizeof(BFloat16));
    return from_memory<VecBits>(part);
  }

  static UVG_INLINE VecBits across(const BFloat16* const* rows, int64_t i, int64_t n) {
    if (n >= kLanes && rows[0] != nullptr && rows[1] != nullptr) return in_pairs(rows[0] + i, rows[1] + i);
    const VecBits low = rows[0] == nullptr ? VecBits{} : as<VecBits>(load(rows[0] + i, n)) >> 16;
    return rows[1] == nullptr ? low : low | as<VecBits>(load(rows[1] + i, n));
  }

  static UVG_INLINE Vec get(const uint32_t* row, int64_t column) {
    return load(reinterpret_cast<const BFloat16*>(row) + column);
  }

#if defined(__AVX512BF16__)
  template <int V>
  static UVG_INLINE void put(uint32_t* row, int64_t column, const Vec (&values)[V]) {
    for (int j = 0; j < V; j += 2)
      store_bits(row + (column + j * kLanes) / 2,
                 (VecBits)_mm512_cvtne2ps_pbh((__m512)values[j + 1], (__m512)values[j]));
  }

  template <int V>
  static UVG_INLINE Vec rounded_sum(Vec sum, const Vec (&values)[V]) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3F803F80);
    for (int j = 0; j < V; j += 2)
      sum = (Vec)_mm512_dpbf16_ps((__m512)sum, _mm512_cvtne2ps_pbh((__m512)values[j + 1], (__m512)values[j]), ones);
    return sum;
  }
#else
  template <int V>
  static UVG_INLINE void put(uint32_t* row, int64_t column, const Vec (&values)[V]) {
    for (int j = 0; j < V; ++j) store(reinterpret_cast<BFloat16*>(row) + column + j * kLanes, values[j]);
  }

  template <int V>
  static UVG_INLINE Vec rounded_sum(Vec sum, const Vec (&values)[V]) {
    for (int j = 0; j < V; ++j) {
      BFloat16 rounded[kLanes];
      store(rounded, values[j]);
      sum += load(rounded);
    }
    return sum;
  }
#endif
};

using Halves = Pairs;
#else
using Halves = Singles<BFloat16>;
#endif

// body(the format): of tensors in this dtype. fp16 is multiplied in fp32, as bf16 is where no instruction has pairs.
template <typename Body>
UVG_INLINE void with_format(Dtype dtype, Body&& body) {
  if (dtype == Dtype::kFloat32) return body(Singles<float>{});
  dtype == Dtype::kBFloat16 ? body(Halves{}) : body(Singles<Float16>{});
}

// Calls body(a number known to the compiler) with as many vectors of a panel as hold `columns` of it.
template <typename F, int V = F::kPutVecs, typename Body>
UVG_INLINE void with_vecs(int64_t columns, Body&& body) {
  if constexpr (V >= kTileVecs) {
    body(Vecs<kTileVecs>{});
  } else {
    columns <= kLanes* V ? body(Vecs<V>{}) : with_vecs<F, V + F::kPutVecs>(columns, body);
  }
}

// Two rows of bf16 pairs along the row to one of pairs across the rows.
template <int V = kTileVecs>
UVG_INLINE void pair_rows(const uint32_t* two, int64_t row, int64_t column, uint32_t* out) {
  const auto *low = reinterpret_cast<const BFloat16*>(two) + column,
             *high = reinterpret_cast<const BFloat16*>(two + row) + column;
  for (int j = 0; j < V; ++j) store_bits(out + j * kLanes, in_pairs(low + j * kLanes, high + j * kLanes));
}

// sum[r][j] += left row r times columns j of a panel. left(r, k) = left[r * row + k * step]; rows of the panel lie
// panel_row dwords apart. Kept in registers where little follows: see multiply_into.
template <typename F, int R, int V>
UVG_INLINE void multiply(typename F::Sum (&sum)[R][V], const uint32_t* left, int64_t row, int64_t step,
                         const uint32_t* panel, int64_t panel_row, int64_t depth) {
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    VecBits right[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) right[j] = load_bits(panel + k * panel_row + j * kLanes);
#pragma GCC unroll 6
    for (int64_t r = 0; r < R; ++r) {
      uint32_t value;
      std::memcpy(&value, left + r * row + k * step, sizeof value);  // may be values of a tensor
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sum[r][j] = F::mac(sum[r][j], value, right[j]);
    }
  }
}

// A tile of out [R, V * kLanes] (+)= left times panel. A function of its own: of sums that a longer one goes on with,
// g++ 12 stores half to the stack in every round of the loop.
template <typename F, int R, int V>
UVG_NOINLINE void multiply_into(float* out, int64_t out_row, const uint32_t* left, int64_t row, int64_t step,
                                const uint32_t* panel, int64_t panel_row, int64_t depth, bool first) {
  using Sum = typename F::Sum;
  Sum sum[R][V] = {};  // a sum of its own for every block of the depth: long ones lose fewer bits
  multiply<F>(sum, left, row, step, panel, panel_row, depth);
#pragma GCC unroll 6
  for (int64_t r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      float* to = out + r * out_row + j * kLanes;
      const Sum all = first ? sum[r][j] : as<Sum>(load(to)) + sum[r][j];
      store(to, as<Vec>(all));
    }
}

// multiply_into for R rows and `vecs` vectors of columns, kTileVecs at the most.
template <typename F, int R>
UVG_INLINE auto tile_of([[maybe_unused]] int64_t vecs) {
#if defined(__AVX512F__)
  if (vecs >= 4) return multiply_into<F, R, 4>;
  if (vecs == 3) return multiply_into<F, R, 3>;
  if (vecs == 2) return multiply_into<F, R, 2>;
#endif
  return multiply_into<F, R, 1>;
}

// The panel that comes next, asked for part by part beside the tiles of this one: panels of many keys come from far
// away, and at every page the CPU's own prefetcher begins anew (figures: AGENTS.md). With AVX-512 not timed: left out.
class Ahead {
 public:
  Ahead(const uint32_t* panel, int64_t words, int64_t tiles) : next_(panel), share_((words + tiles - 1) / tiles) {}

  // Before each tile. Lines come in pairs.
  UVG_INLINE void ask() {
    if (kTileVecs > 1) return;
    for (const uint32_t* stop = next_ + share_; next_ < stop; next_ += 2 * kLine) __builtin_prefetch(next_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(uint32_t));
  const uint32_t* next_;
  const int64_t share_;
};

// out [rows, width] (+)= left times a matrix packed by pack_columns, of which depth rows of dwords from `skip` on are
// used; `total` rows of dwords lie in it. out has round_up(rows, kTileRows) rows of round_up(width, kLanes) columns.
template <typename F>
void multiply_all(float* out, int64_t rows, int64_t width, const uint32_t* left, int64_t row, int64_t step,
                  const uint32_t* packed, int64_t total, int64_t skip, int64_t depth, bool first) {
  const int64_t out_row = round_up(width, kLanes);
  for (int64_t c = 0; c < width; c += kPanel) {
    const int64_t vecs = (width - c + kLanes - 1) / kLanes;
    const uint32_t* base = packed + c * total;
    Ahead next(base + (total + skip) * kPanel, c + kPanel < width ? depth * kPanel : 0,
               (rows + kTileRows - 1) / kTileRows);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      next.ask();
      const int64_t panel_row = (vecs < kTileVecs ? vecs : kTileVecs) * kLanes;
      tile_of<F, kTileRows>(vecs)(out + r * out_row + c, out_row, left + r * row, row, step, base + skip * panel_row,
                                  panel_row, depth, first);
    }
  }
}

// Rows of a tensor [*, stride], picked by index (null: one after the other), `width` values of each.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
  const int32_t* index;
  int64_t count;

  const T* at(int64_t i) const { return i < count ? data + (index == nullptr ? i : index[i]) * stride : nullptr; }
  Rows from(int64_t first, int64_t rows) const {
    return index == nullptr ? Rows{data + first * stride, stride, nullptr, rows}
                            : Rows{data, stride, index + first, rows};
  }

  // Rows of different places come one cache line after the other only if one asks in time.
  UVG_INLINE void prefetch(int64_t i, int64_t width) const {
    const T* row = at(i);
    if (row == nullptr) return;
    for (int64_t c = 0; c < width; c += kLine) __builtin_prefetch(row + c);
  }
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
};

template <typename F>
constexpr int64_t depth_of(int64_t width) {
  return (width + F::kPer - 1) / F::kPer;
}

// Dwords of a packed row, with room to transpose.
template <typename F>
constexpr int64_t row_words(int64_t width) {
  return round_up(depth_of<F>(width), kLanes);
}

constexpr int64_t kAhead = 32;  // rows that packing asks for before it reads them

// Left operand: rows one after the other, row_words each; zeros up to `padded` rows.
template <typename F>
void pack_rows(const Rows<typename F::Value>& x, int64_t width, int64_t padded, uint32_t* out) {
  for (int64_t i = 0; i < padded; ++i) {
    const auto* row = x.at(i);
    x.prefetch(i + kAhead, width);
    for (int64_t c = 0; c < row_words<F>(width); c += kLanes)
      store_bits(out + i * row_words<F>(width) + c,
                 row == nullptr ? VecBits{} : F::dwords(row, c * F::kPer, width - c * F::kPer));
  }
}

// Right operand of x^T: panels of kPanel rows of x, [row_words][kPanel] each; zeros up to a whole panel. Needs
// kLanes * row_words dwords to work in.
template <typename F>
void pack_transposed(const Rows<typename F::Value>& x, int64_t width, uint32_t* out, uint32_t* work) {
  const int64_t words = row_words<F>(width);
  for (int64_t i = 0; i < round_up(x.count, kPanel); i += kLanes) {
    const uint32_t* rows[kLanes];
    const bool raw = F::kRaw && words * F::kPer == width && i + kLanes <= x.count;
    if (!raw) pack_rows<F>(x.from(i, x.count > i ? x.count - i : 0), width, kLanes, work);
    for (int64_t r = 0; r < kLanes; ++r) {
      rows[r] = raw ? reinterpret_cast<const uint32_t*>(x.at(i + r)) : work + r * words;
      x.prefetch(i + r + kAhead, width);
    }
    uint32_t* panel = out + i / kPanel * kPanel * words + i % kPanel;
    for (int64_t c = 0; c < words; c += kLanes) transpose16(rows, c, panel + c * kPanel, kPanel);
  }
}

// Right operand of x itself: panels of kPanel columns, [padded / kPer][columns] each, the last one of fewer vectors;
// zeros up to `padded` rows.
template <typename F>
void pack_columns(const Rows<typename F::Value>& x, int64_t width, int64_t padded, uint32_t* out) {
  const int64_t total = padded / F::kPer;
  for (int64_t k = 0; k < total; ++k) {
    const typename F::Value* rows[F::kPer];
    for (int64_t e = 0; e < F::kPer; ++e) {
      rows[e] = x.at(k * F::kPer + e);
      x.prefetch(k * F::kPer + e + kAhead, width);
    }
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t first = c / kPanel * kPanel, rest = round_up(width - first, kLanes);
      const int64_t columns = rest < kPanel ? rest : kPanel;
      store_bits(out + first * total + k * columns + (c - first), F::across(rows, c, width - c));
    }
  }
}

}  // namespace UVG_ISA
}  // namespace uvg
