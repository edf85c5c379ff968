// Kernels over rows of a packed matrix: one warp a row, kVector elements a lane and step, 16 bytes where that fits.
#pragma once

#include <initializer_list>

#include "common/gpu_launch.h"
#include "common/gpu_math.h"
#include "common/gpu_memory.h"
#include "common/gpu_warp.h"

namespace uvg::cuda {

constexpr int kRowWarps = 8;  // of a block, at most; untuned
constexpr size_t kRowSharedBytes = 48 << 10;

// kVector elements of T as fp32, in accesses of up to 16 bytes.
template <int kVector, typename T>
UVG_DEVICE void load_vector(float (&to)[kVector], const T* from, gpu::Where where = gpu::Where::here()) {
  constexpr int kPiece = kVector * sizeof(T) <= 16 ? kVector : static_cast<int>(16 / sizeof(T));
#pragma unroll
  for (int first = 0; first < kVector; first += kPiece) {
    const auto piece = gpu::load_global(reinterpret_cast<const gpu::Pack<T, kPiece>*>(from + first), where);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) to[first + i] = gpu::to_float(piece.at[i]);
  }
}

template <int kVector, typename T>
UVG_DEVICE void store_vector(T* to, const float (&from)[kVector], gpu::Where where = gpu::Where::here()) {
  constexpr int kPiece = kVector * sizeof(T) <= 16 ? kVector : static_cast<int>(16 / sizeof(T));
#pragma unroll
  for (int first = 0; first < kVector; first += kPiece) {
    gpu::Pack<T, kPiece> piece;
#pragma unroll
    for (int i = 0; i < kPiece; ++i) piece.at[i] = gpu::from_float<T>(from[first + i]);
    gpu::store_global(reinterpret_cast<gpu::Pack<T, kPiece>*>(to + first), piece, where);
  }
}

// body(column) for the chunks of this lane.
template <int kVector, typename F>
UVG_DEVICE void lane_columns(int64_t width, F body) {
  for (int64_t c = gpu::lane() * kVector; c < width; c += gpu::kWarp * kVector) body(c);
}

// The row of this warp; it may lie beyond the last one.
UVG_DEVICE int64_t row_of_warp() {
  return gpu::block_x() * (static_cast<int>(blockDim.x) / gpu::kWarp) + gpu::warp_in_block();
}

// Index of the span that covers `row`, or -1: the whole warp looks. spans: [count] entries of `stride` int32, (start,
// len) first.
UVG_DEVICE int64_t span_of_row(const int32_t* spans, int64_t count, int stride, int64_t row) {
  int64_t found = -1;
  for (int64_t s = gpu::lane(); s < count; s += gpu::kWarp) {
    const int64_t start = gpu::load_global(spans + s * stride), length = gpu::load_global(spans + s * stride + 1);
    if (row >= start && row < start + length) found = s;
  }
  return gpu::warp_max(found);
}

// The same where lanes have rows of their own, or some lanes none.
UVG_DEVICE int64_t span_of_row_alone(const int32_t* spans, int64_t count, int stride, int64_t row) {
  int64_t found = -1;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t start = gpu::load_global(spans + s * stride), length = gpu::load_global(spans + s * stride + 1);
    if (row >= start && row < start + length) found = s;
  }
  return found;
}

// A row that a lane reads more than once: its chunks of one access stay in shared memory, where only the lane itself
// looks. Of a vector of two chunks all first ones lie before all second ones: lanes read neighbouring 16 bytes.
template <typename T, int kVector>
struct KeptRow {
  static constexpr int kPiece = kVector * sizeof(T) <= 16 ? kVector : static_cast<int>(16 / sizeof(T));
  using Chunk = gpu::Pack<T, kPiece>;

  Chunk* chunks;
  int64_t vectors;  // of a row

  UVG_DEVICE void load(float (&to)[kVector], const T* row, int64_t column) const {
#pragma unroll
    for (int piece = 0; piece < kVector / kPiece; ++piece) {
      const Chunk chunk = gpu::load_global(reinterpret_cast<const Chunk*>(row + column + piece * kPiece));
      gpu::store_shared(place(column, piece), chunk);
      convert(to, chunk, piece);
    }
  }

  // Keeps what a lane has computed, and rounds it to what it kept.
  UVG_DEVICE void keep(float (&values)[kVector], int64_t column) const {
#pragma unroll
    for (int piece = 0; piece < kVector / kPiece; ++piece) {
      Chunk chunk;
#pragma unroll
      for (int i = 0; i < kPiece; ++i) chunk.at[i] = gpu::from_float<T>(values[piece * kPiece + i]);
      gpu::store_shared(place(column, piece), chunk);
      convert(values, chunk, piece);
    }
  }

  UVG_DEVICE void again(float (&to)[kVector], int64_t column) const {
#pragma unroll
    for (int piece = 0; piece < kVector / kPiece; ++piece) convert(to, gpu::load_shared(place(column, piece)), piece);
  }

 private:
  UVG_DEVICE Chunk* place(int64_t column, int piece) const { return chunks + piece * vectors + column / kVector; }

  static UVG_DEVICE void convert(float (&to)[kVector], const Chunk& chunk, int piece) {
#pragma unroll
    for (int i = 0; i < kPiece; ++i) to[piece * kPiece + i] = gpu::to_float(chunk.at[i]);
  }
};

// Kept row number `index` of `count` that this warp has.
template <typename T, int kVector>
UVG_DEVICE KeptRow<T, kVector> kept_row(int64_t width, int index = 0, int count = 1) {
  using Chunk = typename KeptRow<T, kVector>::Chunk;
  auto* first = gpu::shared_memory<Chunk>();
  return {first + (gpu::warp_in_block() * count + index) * (width / KeptRow<T, kVector>::kPiece), width / kVector};
}

// How many warps share a block, given what each keeps in shared memory.
inline int row_warps(size_t kept_bytes) {
  int warps = kRowWarps;
  while (warps > 1 && kept_bytes * static_cast<size_t>(warps) > kRowSharedBytes) warps /= 2;
  return warps;
}

// Runs a kernel of one warp a row, each warp with kept_bytes of shared memory.
template <typename Params>
void launch_rows(void (*kernel)(Params), int64_t rows, size_t kept_bytes, gpu::Stream stream, const Params& params,
                 int64_t grid_y = 1) {
  const int warps = row_warps(kept_bytes);
  gpu::launch(kernel, {gpu::ceil_div(rows, warps), grid_y}, warps * gpu::kWarp, kept_bytes * static_cast<size_t>(warps),
              stream, params);
}

// Whether all pointers (null is fine) allow accesses of 16 bytes.
inline bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

template <typename T>
struct Tag {
  using Type = T;
};

// body(Tag<T>{}) for the element type.
template <typename F>
void with_dtype(Dtype dtype, F body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(Tag<float>{});
    case Dtype::kBFloat16:
      return body(Tag<BFloat16>{});
    case Dtype::kFloat16:
      return body(Tag<Float16>{});
  }
}

}  // namespace uvg::cuda
