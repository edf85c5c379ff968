// dx = dz W by the product of the forward on a weight packed across its rows; dweight = dz^T x with the rows as depth,
// both operands packed across theirs.
#include "common/row_lists.h"
#include "cpu/linear_few.h"
#include "cpu/per_thread.h"
#include "uvg/linear.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = LinearBackwardParams;

constexpr int64_t kLeft = 8 * kTileRows;  // columns of dz in a panel: whole tiles, whole vectors
// kBlock: of them that meet a panel of x in the second-level cache. kDepthAtOnce: dwords of the rows that are summed up
// in registers; without AVX-512, few enough for all of kLeft, of whose cache lines a tile reads a part, to stay in the
// first-level cache.
#if defined(__AVX512F__)
constexpr int64_t kBlock = 4 * kLeft, kDepthAtOnce = 768;
#else
constexpr int64_t kBlock = 2 * kLeft, kDepthAtOnce = 96;
#endif
constexpr int64_t kPackedWords = int64_t{4} << 20;  // of one operand at a time, where kBlock columns need no more
constexpr int64_t kMostShares = 8;                  // of them, where threads need no more (columns_at_once); untuned
constexpr int64_t kTasks = 8;                       // of kLeft columns and a panel, for each thread; untuned
constexpr int64_t kEven = 1024;                     // columns of dz that x is to meet for them, where dz has more
constexpr int64_t kWeightWords = int64_t{1} << 20;  // of a weight packed at a time, where kFewestPanels need no more
constexpr int64_t kFewestPanels = 256 / kPanel;     // untuned; that a thread takes at once (gemm.h)
constexpr int64_t kFewRows = 16;                    // for which an fp32 weight is read as it lies
constexpr int64_t kSummed = 64;                     // rows whose sum for the bias starts anew: fewer lost bits

// Columns of a matrix, whose rows lie row_step values apart, across its rows.
template <typename F>
struct Across {
  using T = typename F::Value;
  const T* data;
  int64_t row_step, rows, width;
  bool activate;  // GELU of the values

  // `wide` columns from `first` on, to rows that lie `row` dwords apart: [depth][row]. total: the columns' sums over
  // the rows, in T, or null.
  template <int64_t kWide>
  void pack(int64_t first, int64_t wide, int64_t row, int64_t depth, uint32_t* out, T* total) const {
    constexpr int64_t kVecs = kWide / kLanes;
    const int64_t left = width - first, count = left < wide ? left : wide;
    T work[F::kPer][kWide];
    Vec sum[kVecs] = {}, part[kVecs] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const T* at[F::kPer];
      for (int64_t e = 0; e < F::kPer; ++e) {
        const int64_t r = k * F::kPer + e;
        at[e] = r < rows ? data + r * row_step + first : nullptr;
        if (at[e] == nullptr) continue;
        if (r + kAhead < rows) prefetch(at[e] + kAhead * row_step), prefetch(at[e] + kAhead * row_step + count - 1);
        if (total != nullptr)
          for (int64_t j = 0; j < kVecs; ++j)
            if (j * kLanes < count) part[j] += load(at[e] + j * kLanes, count - j * kLanes);
        if (activate) {
          for (int64_t i = 0; i < count; i += kLanes) store(work[e] + i, gelu(load(at[e] + i, count - i)));
          at[e] = work[e];
        }
      }
      for (int64_t i = 0; i < wide; i += kLanes)
        store_bits(out + k * row + i, i < count ? F::across(at, i, count - i) : VecBits{});
      if (k % (kSummed / F::kPer) == 0 || k + 1 == depth)
        for (int64_t j = 0; j < kVecs; ++j) sum[j] += part[j], part[j] = Vec{};
    }
    if (total == nullptr) return;
    columns(count, [&](int64_t i, int64_t n) { store(total + first + i, sum[i / kLanes], n); });
  }

  // A piece of the panels of kWide columns that begin with `first` and are [depth][kWide] each, but for the last one,
  // which ends with column `end`: a whole panel, or a vector of it, from column `at` on.
  template <int64_t kWide>
  void pack_piece(int64_t first, int64_t at, int64_t piece, int64_t end, int64_t depth, uint32_t* out, T* total) const {
    const int64_t panel = at / kWide * kWide, row = end - panel < kWide ? end - panel : kWide;
    uint32_t* to = out + panel * depth + (at - panel);
    piece == kWide ? pack<kWide>(first + at, row, row, depth, to, total)
                   : pack<kLanes>(first + at, kLanes, row, depth, to, total);
  }
};

// Columns that a thread packs at once: panels, but where there are fewer of them than threads a vector's.
template <int64_t kWide>
int64_t piece_of(int64_t columns, int threads) {
  return columns < kWide * threads ? kLanes : kWide;
}

// Of kPackedWords and kWeightWords: what two threads have at once would leave many without a task.
constexpr int64_t shares(int threads) { return (threads + 3) / 4; }

// So many columns at a time that one operand stays within kPackedWords a share, in parts of like size. From kMostShares
// on only as many as give the threads tasks, with the `others` of the other operand.
int64_t columns_at_once(int64_t columns, int64_t depth, int threads, int64_t others) {
  const auto fit = [&](int64_t count) { return count * kPackedWords / (depth * kBlock + 1) * kBlock; };
  const int64_t busy = kTasks * threads * kLeft * kPanel / (others + 1), few = fit(kMostShares);
  const int64_t all = fit(shares(threads)), wanted = few < busy ? busy : few;
  const int64_t fitting = all < wanted ? all : wanted, most = fitting < kBlock ? kBlock : fitting;
  const int64_t parts = columns > most ? (columns + most - 1) / most : 1;
  return round_up(columns > 0 ? (columns + parts - 1) / parts : 1, kBlock);
}

// Of a tile, [kBlock, kPanel].
struct Sums {
  float* data;
  explicit Sums(Scratch& scratch) : data(scratch.floats(kBlock * kPanel)) {}
};

template <typename F>
struct WeightGradient {
  using T = typename F::Value;
  const Params& p;
  const Across<F> dz, x;
  const int64_t depth;  // dwords

  explicit WeightGradient(const Params& params)
      : p(params),
        dz{static_cast<const T*>(p.dz), p.width, p.rows, p.width, false},
        x{static_cast<const T*>(p.x), p.x_row, p.rows, p.depth, p.gelu},
        depth(depth_of<F>(p.rows)) {}

  // dweight of `block` columns of dz from `row` on and a panel of x from `column` on. out: [block, kPanel] to work in.
  void tile(int64_t block, const uint32_t* left, int64_t row, const uint32_t* right, int64_t column, float* out) const {
    const int64_t rest = p.depth - column, width = rest < kPanel ? rest : kPanel, out_row = round_up(width, kLanes);
    const int64_t rows = p.width - row < block ? p.width - row : block;
    const int64_t parts = depth > kDepthAtOnce ? (depth + kDepthAtOnce - 1) / kDepthAtOnce : 1;
    for (int64_t b = 0; b < parts; ++b) {
      const int64_t from = depth * b / parts, to = depth * (b + 1) / parts;
      for (int64_t r = 0; r < rows; r += kLeft)
        multiply_all<F>(out + r * out_row, rows - r < kLeft ? rows - r : kLeft, width, left + r * depth + from * kLeft,
                        1, kLeft, right, depth, from, to - from, b == 0);
    }
    for (int64_t r = 0; r < rows; ++r) {
      T* to = static_cast<T*>(p.dweight) + (row + r) * p.weight_row + column;
      columns(width, [&](int64_t i, int64_t n) { store(to + i, load(out + r * out_row + i), n); });
    }
  }

  void run() const {
    const int64_t right_columns = columns_at_once(p.depth, depth, p.threads, p.width < kEven ? p.width : kEven);
    const int64_t left_columns = columns_at_once(p.width, depth, p.threads, right_columns);
    Scratch scratch;
    uint32_t *left = scratch.words(left_columns * depth), *right = scratch.words(right_columns * depth);
    const PerThread<Sums> sums(scratch, p.threads);
#pragma omp parallel num_threads(p.threads)
    {
      float* out = sums.own().data;
      for (int64_t column = 0; column == 0 || column < p.depth; column += right_columns) {  // once for the bias
        const int64_t right_end = p.depth - column < right_columns ? p.depth - column : right_columns;
        const int64_t panels = round_up(right_end, kPanel) / kPanel, x_piece = piece_of<kPanel>(right_end, p.threads);
#pragma omp for schedule(dynamic, 1)
        for (int64_t c = 0; c < right_end; c += x_piece)
          x.template pack_piece<kPanel>(column, c, x_piece, round_up(right_end, kLanes), depth, right, nullptr);
        for (int64_t row = 0; row < p.width; row += left_columns) {
          const int64_t left_end = p.width - row < left_columns ? p.width - row : left_columns;
          const int64_t all = round_up(left_end, kLeft), dz_piece = piece_of<kLeft>(left_end, p.threads);
          if (column == 0 || p.width > left_columns) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t r = 0; r < all; r += dz_piece)
              dz.template pack_piece<kLeft>(row, r, dz_piece, all, depth, left,
                                            column == 0 ? static_cast<T*>(p.dbias) : nullptr);
          }
          int64_t block = kBlock;
          while (block > kLeft && (left_end + block - 1) / block * panels < 3 * p.threads) block /= 2;
          const int64_t blocks = (left_end + block - 1) / block;
#pragma omp for schedule(dynamic, 1)
          for (int64_t task = 0; task < blocks * panels; ++task) {
            const int64_t r = task / panels * block, c = task % panels * kPanel;
            tile(block, left + r * depth, row + r, right + c * depth, column + c, out);
          }
        }
      }
    }
  }
};

// The weight is packed by groups of panels, each read while it still lies in the last cache. For few rows that would
// cost more than the product: an fp32 weight lies ready where vectors do not leave its rows.
template <typename F>
void x_gradient(const Params& p) {
  using T = typename F::Value;
  const bool as_it_lies = std::is_same_v<F, Singles<float>> && p.rows <= kFewRows && p.depth % kLanes == 0;
  const Across<F> weight{static_cast<const T*>(p.weight), p.weight_row, p.width, p.depth, false};
  const int64_t panel = weight_words<F>(kPanel, p.width), panels = round_up(p.depth, kPanel) / kPanel;
  const int64_t fit = shares(p.threads) * kWeightWords / (panel + 1), most = fit < kFewestPanels ? kFewestPanels : fit;
  const int64_t groups = panels > most ? (panels + most - 1) / most : 1, at_once = (panels + groups - 1) / groups;
  Scratch scratch;
  uint32_t* packed = as_it_lies ? nullptr : scratch.words(at_once * panel);
  for (int64_t first = 0; first < p.depth; first += at_once * kPanel) {
    const int64_t left = p.depth - first, width = left < at_once * kPanel ? left : at_once * kPanel;
    const int64_t piece = piece_of<kPanel>(width, p.threads);
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 1) if (!as_it_lies)
    for (int64_t c = 0; c < (as_it_lies ? 0 : width); c += piece)
      weight.template pack_piece<kPanel>(first, c, piece, round_up(width, kPanel), panel / kPanel, packed, nullptr);
    Product<F> product{static_cast<const T*>(p.dz),
                       packed,
                       nullptr,
                       p.rows,
                       p.width,
                       width,
                       p.width,
                       p.depth,
                       false,
                       nullptr,
                       nullptr};
    if (p.dx_so_far != nullptr) product.so_far = p.dx_so_far + first;
    if (p.dx_so_far == nullptr) product.out = static_cast<T*>(p.dx) + first;
    if (p.dx_before != nullptr) product.before = p.dx_before + first;
    if (p.gelu) product.slope_at = static_cast<const T*>(p.x) + first, product.slope_row = p.x_row;
    if (as_it_lies) {
      product.packed = static_cast<const uint32_t*>(p.weight) + first;
      product.across_row = p.weight_row;
    }
    gemm<F>(product, p.threads);
  }
}

// Whether there are so few rows that their products are reads and writes of the weight.
template <typename F>
bool very_few(const Params& p) {
  return std::is_same_v<F, Singles<float>> && kTileVecs == 1 && p.rows > 0 && p.rows <= kVeryFew &&
         p.depth % kLanes == 0 && !p.gelu && p.dx_before == nullptr && p.dx_so_far == nullptr;
}

template <typename F>
void backward(const Params& given) {
  if (very_few<F>(given)) return gradients_of_few(given);
  Params p = given;
  p.threads = threads_for_products(given.threads, 2 * p.rows * p.depth * p.width);
  x_gradient<F>(p);
  WeightGradient<F>(p).run();
}

}  // namespace

void linear_backward(const Params& p) {
  with_format(p.dtype, [&](auto format) { backward<decltype(format)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
