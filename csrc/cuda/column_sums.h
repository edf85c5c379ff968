// Sums over the rows of each span, column by column: what per-span parameters get as gradients.
//
// A span is cut into chunks of kChunkRows rows. One kernel sums each chunk, a second one adds the chunks in order: the
// result depends neither on who is faster nor on the span's neighbours. The grid needs no value of the table: there are
// at most max_chunks of them, and blocks beyond the last chunk have nothing to do.
#pragma once

#include "cuda/rows.h"

namespace uvg::cuda {

constexpr int kChunkRows = 64, kSumWarps = 4, kTotalThreads = 128;  // untuned

// Without a table (null): one span with all rows.
struct SpanTable {
  const int32_t* spans;  // [count] entries of `stride` int32, (start, len) first; they do not overlap
  int64_t count;
  int stride;
  int64_t rows;

  UVG_HOST_DEVICE int64_t size() const { return spans == nullptr ? 1 : count; }
  int64_t max_chunks() const { return rows / kChunkRows + size(); }
};

UVG_DEVICE int64_t span_start(const SpanTable& t, int64_t span) {
  return t.spans == nullptr ? 0 : gpu::load_global(t.spans + span * t.stride);
}

UVG_DEVICE int64_t span_length(const SpanTable& t, int64_t span) {
  return t.spans == nullptr ? t.rows : gpu::load_global(t.spans + span * t.stride + 1);
}

UVG_DEVICE int64_t chunks_of_span(const SpanTable& t, int64_t span) {
  return (span_length(t, span) + kChunkRows - 1) / kChunkRows;
}

struct Chunk {
  int64_t span, first, rows;
};

// Chunk number `index`, spans in the order of the table; no rows where there are fewer.
UVG_DEVICE Chunk find_chunk(const SpanTable& t, int64_t index) {
  for (int64_t s = 0; s < t.size(); ++s) {
    const int64_t chunks = chunks_of_span(t, s);
    if (index < chunks) {
      const int64_t offset = index * kChunkRows;
      return {s, span_start(t, s) + offset, gpu::min(kChunkRows, span_length(t, s) - offset)};
    }
    index -= chunks;
  }
  return {-1, 0, 0};
}

// partial[chunk, part, column] = sum over the chunk's rows of what terms.add(sums, span, row, column) adds.
// Terms: kParts, and add(float (&sums)[kParts][kVector], int64_t span, int64_t row, int64_t column).
template <typename Terms, int kVector>
__global__ void __launch_bounds__(kSumWarps* gpu::kWarp, 4)
    column_partials_kernel(Terms terms, SpanTable table, int64_t width, float* partial) {
  constexpr int kParts = Terms::kParts, kPiece = kVector < 4 ? kVector : 4, kPieces = kVector / kPiece;
  using Piece = gpu::Pack<float, kPiece>;
  const Chunk chunk = find_chunk(table, gpu::block_x());
  if (chunk.rows == 0) return;
  const int64_t column = (gpu::block_y() * gpu::kWarp + gpu::lane()) * kVector;
  float sums[kParts][kVector] = {};
  if (column < width) {
    for (int64_t r = gpu::warp_in_block(); r < chunk.rows; r += kSumWarps) {
      terms.add(sums, chunk.span, chunk.first + r, column);
    }
  }
  // The warps' sums meet in shared memory, piece by piece, so that lanes write neighbouring 16 bytes.
  Piece* shared = gpu::shared_memory<Piece>();
  const auto place = [](int warp, int part, int piece) {
    return ((warp * kParts + part) * kPieces + piece) * gpu::kWarp + gpu::lane();
  };
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      Piece mine;
#pragma unroll
      for (int i = 0; i < kPiece; ++i) mine.at[i] = sums[part][piece * kPiece + i];
      gpu::store_shared(shared + place(gpu::warp_in_block(), part, piece), mine);
    }
  }
  gpu::block_barrier();
  if (gpu::warp_in_block() != 0 || column >= width) return;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      Piece total = gpu::load_shared(shared + place(0, part, piece));
#pragma unroll
      for (int warp = 1; warp < kSumWarps; ++warp) {
        const Piece other = gpu::load_shared(shared + place(warp, part, piece));
#pragma unroll
        for (int i = 0; i < kPiece; ++i) total.at[i] += other.at[i];
      }
      float* to = partial + (gpu::block_x() * kParts + part) * width + column + piece * kPiece;
      gpu::store_global(reinterpret_cast<Piece*>(to), total);
    }
  }
}

template <int kParts>
struct Totals {
  float* to[kParts];  // [spans, width], or null where nobody asks
};

template <int kParts>
__global__ void __launch_bounds__(kTotalThreads)
    column_totals_kernel(SpanTable table, int64_t width, const float* partial, Totals<kParts> totals) {
  const int64_t column = gpu::block_y() * kTotalThreads + static_cast<int>(threadIdx.x), span = gpu::block_x();
  if (column >= width) return;
  int64_t first = 0;
  for (int64_t s = 0; s < span; ++s) first += chunks_of_span(table, s);
  const int64_t chunks = chunks_of_span(table, span);
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    if (totals.to[part] == nullptr) continue;
    float sum = 0.0f;
    for (int64_t c = first; c < first + chunks; ++c) {
      sum += gpu::load_global(partial + (c * kParts + part) * width + column);
    }
    gpu::store_global(totals.to[part] + span * width + column, sum);
  }
}

// totals.to[part][span, column] = sum over the span's rows of the terms. partial: [max_chunks, kParts, width] floats.
template <int kVector, typename Terms>
void column_sums(const Terms& terms, const SpanTable& table, int64_t width, float* partial,
                 const Totals<Terms::kParts>& totals, gpu::Stream stream) {
  const gpu::Grid chunks{table.max_chunks(), gpu::ceil_div(width, gpu::kWarp * kVector)};
  const size_t shared = sizeof(float) * kSumWarps * Terms::kParts * kVector * gpu::kWarp;
  gpu::launch(column_partials_kernel<Terms, kVector>, chunks, kSumWarps * gpu::kWarp, shared, stream, terms, table,
              width, partial);
  gpu::launch(column_totals_kernel<Terms::kParts>, {table.size(), gpu::ceil_div(width, kTotalThreads)}, kTotalThreads,
              0, stream, table, width, partial, totals);
}

}  // namespace uvg::cuda
