// Tiles of attention in shared memory, and what tensor cores read of them.
//
// A tile is [rows][kHead] of 16-bit elements. Its 16-byte chunks are swizzled: chunk c of row r lies at c ^ (r % 8), so
// that eight rows of one column of chunks, which is what an 8x8 matrix is, lie in different banks.
#pragma once

#include "common/gpu_launch.h"
#include "common/gpu_math.h"
#include "common/gpu_memory.h"
#include "common/gpu_warp.h"

namespace uvg::cuda {

constexpr int kAttentionWarps = 4, kAttentionThreads = kAttentionWarps * gpu::kWarp;
constexpr int kTile = kAttentionWarps * 16;  // rows that the warps of a block own, 16 each
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f, kInfinity = __builtin_huge_valf();

template <typename T, int kHead>
struct Tile {
  static constexpr int kChunks = kHead / 8;
  T* at;

  UVG_DEVICE T* chunk(int row, int c) const { return at + row * kHead + (c ^ (row & 7)) * 8; }

  // 16x16 at (row, 16 k): the first operand of `multiply`, a tile row being a row of it.
  UVG_DEVICE void load_rows(uint32_t (&to)[4], int row, int k, gpu::Where where = gpu::Where::here()) const {
    gpu::load_matrices(to, chunk(row + gpu::lane() % 16, 2 * k + gpu::lane() / 16), where);
  }

  // 16 rows at `row`, 16 columns at 16 k: second operands (to[0], to[1]) and (to[2], to[3]), a tile row being a column.
  UVG_DEVICE void load_columns(uint32_t (&to)[4], int row, int k, gpu::Where where = gpu::Where::here()) const {
    const int lane = gpu::lane();
    gpu::load_matrices(to, chunk(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2), where);
  }

  // The same with a tile row being a row of the second operand: rows are summed over, columns at 16 n stay.
  UVG_DEVICE void load_summed(uint32_t (&to)[4], int row, int n, gpu::Where where = gpu::Where::here()) const {
    gpu::load_matrices_transposed(to, chunk(row + gpu::lane() % 16, 2 * n + gpu::lane() / 16), where);
  }
};

// Copies kRows rows of one head into a tile: row r is row_of(r) of `from`, zeros where that is negative, and beyond
// width.
template <int kRows, typename T, int kHead, typename RowOf>
UVG_DEVICE void copy_tile(const Tile<T, kHead>& tile, const T* from, int64_t stride, int64_t width, RowOf row_of,
                          gpu::Where where = gpu::Where::here()) {
  constexpr int kChunks = Tile<T, kHead>::kChunks;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kAttentionThreads) {
    const int r = i / kChunks, c = i % kChunks;
    const int64_t row = row_of(r);
    const bool there = row >= 0 && c * 8 < width;
    gpu::async_copy_16(tile.chunk(r, c), from + (there ? row * stride + c * 8 : 0), there, where);
  }
}

// The rows of one sample: the union of its spans, in their order. The table lies in global memory.
struct SampleRows {
  const int32_t* spans;  // [count, 2]
  int64_t count;

  UVG_DEVICE int64_t size() const {
    int64_t total = 0;
    for (int64_t s = 0; s < count; ++s) total += gpu::load_global(spans + 2 * s + 1);
    return total;
  }

  // Row number `index` of the buffer, or -1 beyond the last.
  UVG_DEVICE int64_t row(int64_t index) const {
    for (int64_t s = 0; s < count; ++s) {
      const int64_t length = gpu::load_global(spans + 2 * s + 1);
      if (index < length) return gpu::load_global(spans + 2 * s) + index;
      index -= length;
    }
    return -1;
  }

  // Whether the sample has a row in [first, last).
  UVG_DEVICE bool meet(int64_t first, int64_t last) const {
    bool any = false;
    for (int64_t s = 0; s < count; ++s) {
      const int64_t start = gpu::load_global(spans + 2 * s), length = gpu::load_global(spans + 2 * s + 1);
      any |= length > 0 && start < last && start + length > first;
    }
    return any;
  }

  // How often the sample names a row.
  UVG_DEVICE int times(int64_t row) const {
    int n = 0;
    for (int64_t s = 0; s < count; ++s) {
      const int64_t start = gpu::load_global(spans + 2 * s);
      n += row >= start && row < start + gpu::load_global(spans + 2 * s + 1);
    }
    return n;
  }
};

// Tile number `index` of all samples' query rows, in tiles of kTile: its sample and its first row there. The grid has
// rows / kTile + samples of them at most, whatever the spans say; those too many have sample -1.
struct QueryTile {
  int64_t sample, first;

  UVG_DEVICE QueryTile(const int32_t* spans, int64_t samples, int64_t per_sample, int64_t index) {
    for (sample = 0; sample < samples; ++sample) {
      const int64_t rows = SampleRows{spans + sample * per_sample * 2, per_sample}.size();
      const int64_t tiles = (rows + kTile - 1) / kTile;
      if (index < tiles) {
        first = index * kTile;
        return;
      }
      index -= tiles;
    }
    sample = -1, first = 0;
  }
};

// to += 16 rows of `a` times kColumns rows of `b`, over the columns of both: to[n] are those against rows 8n..
template <int kColumns, typename T, int kHead>
UVG_DEVICE void add_scores(float (&to)[kColumns / 8][4], const Tile<T, kHead>& a, int row, const Tile<T, kHead>& b) {
#pragma unroll
  for (int k = 0; k < kHead / 16; ++k) {
    uint32_t fa[4];
    a.load_rows(fa, row, k);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t fb[4];
      b.load_columns(fb, 16 * n, k);
      gpu::multiply<T>(to[2 * n], fa, fb[0], fb[1]);
      gpu::multiply<T>(to[2 * n + 1], fa, fb[2], fb[3]);
    }
  }
}

template <int kColumns, typename T, int kHead>
UVG_DEVICE void scores(float (&to)[kColumns / 8][4], const Tile<T, kHead>& a, int row, const Tile<T, kHead>& b) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[n][i] = 0.0f;
  }
  add_scores<kColumns>(to, a, row, b);
}

// to += p b: 16 rows of p, held as `multiply` leaves its results, times the kColumns rows of the tile b.
template <int kColumns, typename T, int kHead>
UVG_DEVICE void accumulate(float (&to)[kHead / 8][4], const float (&p)[kColumns / 8][4], const Tile<T, kHead>& b) {
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    const uint32_t fp[4] = {gpu::pack<T>(p[2 * k][0], p[2 * k][1]), gpu::pack<T>(p[2 * k][2], p[2 * k][3]),
                            gpu::pack<T>(p[2 * k + 1][0], p[2 * k + 1][1]),
                            gpu::pack<T>(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < kHead / 16; ++n) {
      uint32_t fb[4];
      b.load_summed(fb, 16 * k, n);
      gpu::multiply<T>(to[2 * n], fp, fb[0], fb[1]);
      gpu::multiply<T>(to[2 * n + 1], fp, fb[2], fb[3]);
    }
  }
}

// Writes row `row` (negative: nowhere) of the two that a lane has part of: half 0 or 1 of each acc[n].
template <typename T, int kHead>
UVG_DEVICE void store_row(T* to, int64_t row, int64_t stride, int64_t width, const float (&acc)[kHead / 8][4], int half,
                          float factor, gpu::Where where = gpu::Where::here()) {
  if (row < 0) return;
  T* place = to + row * stride + gpu::lane() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kHead / 8; ++n) {
    if (8 * n >= width) break;
    const uint32_t both = gpu::pack<T>(acc[n][2 * half] * factor, acc[n][2 * half + 1] * factor);
    gpu::store_global(reinterpret_cast<uint32_t*>(place + 8 * n), both, where);
  }
}

// body(Tag<T>, head) for the element type and the head width that a row is padded to.
template <template <typename, int> class Run, typename Params>
void run_attention(const Params& p, gpu::Stream stream) {
  const bool narrow = p.width <= 64;
  if (p.dtype == Dtype::kBFloat16) {
    narrow ? Run<BFloat16, 64>{}(p, stream) : Run<BFloat16, 128>{}(p, stream);
  } else {
    narrow ? Run<Float16, 64>{}(p, stream) : Run<Float16, 128>{}(p, stream);
  }
}

}  // namespace uvg::cuda
