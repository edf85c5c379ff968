// act(x W^T + b) for packed weights W, the products of `linear` and `moe_mlp`.
//
// A row of the result has the same bits whatever rows stand beside it and however many threads work: every value is the
// sum over the depth in one order, in blocks that the depth alone decides.
#pragma once

#include "cpu/gelu.h"
#include "cpu/int8.h"
#include "cpu/per_thread.h"

namespace uvg {
namespace UVG_ISA {

constexpr int64_t kRowBlock = 16 * kTileRows;  // rows that meet a panel while it stays in the second-level cache

// Whether rows are packed block by block of the depth, as they have to be packed and room for them is scarce: all
// panels of a task meet one block, which stays in the second-level cache, then the next.
#if defined(__AVX512F__)
template <typename F>
constexpr bool kStaged = false;
#else
template <typename F>
constexpr bool kStaged = F::kTail == 0 && !F::kRaw;
#endif

template <typename F>
constexpr int64_t kDepthBlock = kStaged<F> ? 336 : 768;  // dwords of the depth that are summed up in registers

// A product over some rows. Rows of x lie x_row values apart, those of slope_at slope_row, of other arrays out_row.
template <typename F>
struct Product {
  using T = typename F::Value;
  const typename F::Left* x;  // [rows, depth], with their tails
  const uint32_t* packed;     // [width, depth] by pack_weight
  const T* bias;              // [width] or null
  int64_t rows, depth, width, x_row, out_row;
  bool gelu;
  T* out;                       // [rows, width]
  T* pre;                       // [rows, width]: before the activation, or null
  const T* slope_at = nullptr;  // [rows, width]: results are multiplied by GELU's derivative there
  int64_t slope_row = 0;
  const float* before = nullptr;  // [rows, width]: added to the results
  float* so_far = nullptr;        // [rows, width]: takes the results in place of out
  int64_t across_row = 0;         // not 0: `packed` is [depth, width] as it lies, in fp32, rows so many values apart
};

// Words of a packed row with its tail, and of a packed weight.
template <typename F>
constexpr int64_t tailed_words(int64_t depth) {
  return row_words<F>(depth) + F::kTail;
}
template <typename F>
constexpr int64_t weight_words(int64_t width, int64_t depth) {
  return round_up(width, kPanel) * tailed_words<F>(depth);
}

// Whether a row of x is a row of dwords as it stands.
template <typename F>
bool lies_ready(const Product<F>& p) {
  return F::kTail != 0 || (F::kRaw && p.depth % F::kPer == 0 && p.x_row % F::kPer == 0 &&
                           reinterpret_cast<uintptr_t>(p.x) % sizeof(uint32_t) == 0);
}

// How a product is cut into tasks that threads take one by one.
struct Tasks {
  int64_t row_block, row_blocks, panels, panel_group, panel_groups;

  Tasks(int64_t rows, int64_t width, int threads, bool staged) {
    panels = round_up(width, kPanel) / kPanel;
    row_block = kRowBlock;
    while (row_block > 2 * kTileRows && blocks(rows, row_block) * panels < 4 * threads) row_block /= 2;
    row_blocks = blocks(rows, row_block);
    const int64_t most = staged ? 16 : 4, even = row_blocks * panels / ((staged ? 8 : 16) * threads);
    panel_group = staged && threads == 1 ? panels : even;
    panel_group = panel_group < 1 ? 1 : (panel_group > most ? most : panel_group);
    panel_groups = blocks(panels, panel_group);
  }

  int64_t size() const { return row_blocks * panel_groups; }

 private:
  static int64_t blocks(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
};

template <typename F>
UVG_INLINE Vec value_of(const Product<F>&, Vec sum, int64_t, int64_t) {
  return sum;
}

// A sum of byte * byte less the row's offset, times the scales of the row and of sixteen columns.
template <typename F>
UVG_INLINE Vec value_of(const Product<F>& p, VecInts sum, int64_t row, int64_t column) {
  const int64_t words = row_words<F>(p.depth), first = column / kPanel * kPanel;
  const uint32_t* tails = p.packed + first * tailed_words<F>(p.depth) + words * kPanel + (column - first);
  Tail tail;
  std::memcpy(&tail, p.x + row * p.x_row + words * F::kPer, sizeof tail);
  sum -= as<VecInts>(load_bits(tails + kPanel)) * tail.number;
  return convert<Vec>(sum) * as<Vec>(load_bits(tails)) * tail.scale;
}

// What becomes of the sums of a tile, `rows` rows kPanel apart, whose place in the product is (row, column).
template <typename F>
UVG_NOINLINE void finish(const Product<F>& p, const float* sums, int64_t rows, int64_t row, int64_t column) {
  using Sum = typename F::Sum;
  columns(p.width - column < kPanel ? p.width - column : kPanel, [&](int64_t i, int64_t n) {
    const int64_t first = column + i;
    const Vec bias = p.bias == nullptr ? Vec{} : load(p.bias + first, n);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * p.out_row + first;
      Vec value = value_of(p, as<Sum>(load(sums + r * kPanel + i)), row + r, first) + bias;
      if (p.slope_at != nullptr) {
        const GeluAndSlope gelu(load(p.slope_at + (row + r) * p.slope_row + first, n));
        value = value * gelu.slope;
      }
      if (p.before != nullptr) value += load(p.before + at, n);
      if (p.so_far != nullptr) {
        store(p.so_far + at, value, n);
        continue;
      }
      if (p.pre != nullptr) store(p.pre + at, value, n);
      store(p.out + at, p.gelu ? gelu(value) : value, n);
    }
  });
}

// What a thread works in.
template <typename F>
struct GemmRoom {
  float* sums;     // of a tile, or of a row block (staged: and each panel): carried from block to block of the depth
  uint32_t* left;  // rows of x as dwords, where they do not lie ready

  GemmRoom(Scratch& scratch, const Product<F>& p, const Tasks& tasks)
      : sums(scratch.floats(carried(p) ? (kStaged<F> ? tasks.panel_group : 1) * tasks.row_block * kPanel
                                       : kTileRows * kPanel)),
        left(lies_ready(p) ? nullptr : scratch.words(tasks.row_block * left_words(p.depth))) {}

  static bool carried(const Product<F>& p) { return depth_of<F>(p.depth) > kDepthBlock<F>; }

  static int64_t left_words(int64_t depth) {
    return kStaged<F> && row_words<F>(depth) > kDepthBlock<F> ? kDepthBlock<F> : row_words<F>(depth);
  }
};

template <typename F>
void gemm_task(const Product<F>& p, const Tasks& tasks, int64_t task, const GemmRoom<F>& room) {
  const int64_t first_row = task % tasks.row_blocks * tasks.row_block;
  const int64_t rows = p.rows - first_row < tasks.row_block ? p.rows - first_row : tasks.row_block;
  const int64_t depth = depth_of<F>(p.depth);
  const int64_t depth_blocks = depth > 0 ? (depth + kDepthBlock<F> - 1) / kDepthBlock<F> : 1;
  const int64_t first_panel = task / tasks.row_blocks * tasks.panel_group;
  const int64_t end = first_panel + tasks.panel_group < tasks.panels ? first_panel + tasks.panel_group : tasks.panels;
  const auto start = [&](int64_t block) { return depth * block / depth_blocks; };
  for (int64_t first_block = 0, end_block; first_block < depth_blocks; first_block = end_block) {
    end_block = kStaged<F> ? first_block + 1 : depth_blocks;
    const typename F::Left* x = p.x + first_row * p.x_row + start(first_block) * F::kPer;
    const uint32_t* left = reinterpret_cast<const uint32_t*>(x);
    int64_t left_row = p.x_row / F::kPer;
    if constexpr (F::kTail == 0) {
      if (room.left != nullptr) {
        const int64_t stop = end_block < depth_blocks ? start(end_block) * F::kPer : p.depth;
        const int64_t width = stop - start(first_block) * F::kPer;
        pack_rows<F>({x, p.x_row, nullptr, rows}, width, rows, room.left);
        left = room.left;
        left_row = row_words<F>(width);
      }
    }
    for (int64_t panel = first_panel; panel < end; ++panel) {
      const int64_t right_row = p.across_row == 0 ? kPanel : p.across_row;
      const int64_t column = panel * kPanel, vecs = (p.width - column + kLanes - 1) / kLanes;
      float* carried = room.sums + (kStaged<F> ? (panel - first_panel) * tasks.row_block * kPanel : 0);
      for (int64_t b = first_block; b < end_block; ++b) {
        const uint32_t* right =
            p.packed + column * (p.across_row == 0 ? tailed_words<F>(p.depth) : 1) + start(b) * right_row;
        for (int64_t r = 0, count; r < rows; r += count) {
          const int64_t rest = rows - r;
          count = rest >= kTileRows ? kTileRows : (rest >= 3 ? 3 : 1);
          const auto multiply = count == 1   ? tile_of<F, 1>(vecs)
                                : count == 3 ? tile_of<F, 3>(vecs)
                                             : tile_of<F, kTileRows>(vecs);
          float* sums = depth_blocks > 1 ? carried + r * kPanel : room.sums;
          multiply(sums, kPanel, left + r * left_row + start(b) - start(first_block), left_row, 1, right, right_row,
                   start(b + 1) - start(b), b == 0);
          if (b + 1 == depth_blocks) finish(p, sums, count, first_row + r, column);
        }
      }
    }
  }
}

template <typename F>
void gemm(const Product<F>& p, int most_threads) {
  const int threads = threads_for_products(most_threads, p.rows * p.depth * p.width);
  const Tasks tasks(p.rows, p.width, threads, kStaged<F>);
  Scratch scratch;
  const PerThread<GemmRoom<F>> rooms(scratch, threads, p, tasks);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t t = 0; t < tasks.size(); ++t) gemm_task<F>(p, tasks, t, rooms.own());
}

// Where a thread packs sixteen rows of a weight before it turns them.
struct PackRoom {
  uint32_t* rows;
  PackRoom(Scratch& scratch, int64_t words) : rows(scratch.words(kLanes * words)) {}
};

// Panels of weight_words dwords from rows of `depth` values.
template <typename F>
void pack_weight(const typename F::Value* weight, int64_t width, int64_t depth, uint32_t* out, int threads) {
  const int64_t words = row_words<F>(depth), panels = round_up(width, kPanel) / kPanel;
  const Rows<typename F::Value> rows{weight, depth, nullptr, width};
  Scratch scratch;
  const PerThread<PackRoom> rooms(scratch, threads, words);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = panel * kPanel, left = width - first;
    pack_transposed<F>(rows.from(first, left < kPanel ? left : kPanel), depth, out + first * words, rooms.own().rows);
  }
}

}  // namespace UVG_ISA
}  // namespace uvg
