// Rows of a packed matrix cut into runs that one thread does alone.
//
// Where sums are made over rows, the cut depends on the spans only: they are made chunk by chunk, in order, so that no
// result depends on the number of threads, and a span's sum not on its neighbours. Other loops may cut finer. Nothing
// here is inline or a template of the standard library: kernels include it in the code of several instruction sets.
#pragma once

#include <cstdint>

namespace uvg {

struct RowChunk {
  int64_t first, rows;
  int64_t span;    // index of the span that it belongs to, -1 where no span covers the rows
  int64_t offset;  // of the first row inside its span
};

// Chunks in the order of the rows; they cover all of [0, num_rows).
class RowChunks {
 public:
  // spans: num_spans entries of `stride` int32, (start, len) first; nullptr is no span at all. longest: rows of a chunk
  // at most. Throws std::invalid_argument on spans that overlap or lie outside.
  RowChunks(const int32_t* spans, int64_t num_spans, int64_t stride, int64_t num_rows, int64_t longest = 64);
  ~RowChunks();
  RowChunks(const RowChunks&) = delete;
  RowChunks& operator=(const RowChunks&) = delete;

  int64_t size() const;
  const RowChunk& operator[](int64_t index) const;

 private:
  RowChunk* chunks_;
  int64_t size_;
};

// Throws std::invalid_argument on rope spans (start, len, kind, F, Y, X) whose kind or len is wrong or whose positions
// the table lacks.
void check_rope_spans(const int32_t* spans, int64_t num_spans, int64_t positions);

}  // namespace uvg
