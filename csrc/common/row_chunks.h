// Rows of a packed matrix cut into runs that one thread does alone.
//
// The cut depends on the spans only: sums over rows are made chunk by chunk, in order, so that no result depends on the
// number of threads, and a span's sum not on its neighbours.
#pragma once

#include <cstdint>
#include <vector>

namespace uvg {

constexpr int64_t kChunkRows = 64;

struct RowChunk {
  int64_t first, rows;
  int64_t span;    // index of the span that it belongs to, -1 where no span covers the rows
  int64_t offset;  // of the first row inside its span
};

// spans: num_spans entries of `stride` int32, (start, len) first; nullptr is no span at all. Chunks come in the order
// of the rows and cover all of [0, num_rows). Throws std::invalid_argument on spans that overlap or lie outside.
std::vector<RowChunk> row_chunks(const int32_t* spans, int64_t num_spans, int64_t stride, int64_t num_rows);

}  // namespace uvg
