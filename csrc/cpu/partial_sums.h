// Sums over rows that are made chunk by chunk and put together in the order of the chunks.
#pragma once

#include "common/row_chunks.h"
#include "common/row_lists.h"
#include "common/threads.h"
#include "cpu/vec.h"

namespace uvg {
namespace UVG_ISA {

// Threads worth starting for so many rows.
inline int threads_for_rows(int threads, int64_t rows, int64_t width) {
  return rows * width <= kAloneRowValues ? 1 : threads;
}

class PartialSums {
 public:
  PartialSums(const RowChunks& chunks, int64_t parts, int64_t width)
      : chunks_(chunks), parts_(parts), width_(width), data_(scratch_.floats(chunks.size() * parts * width)) {}

  // Where chunk c adds up its part, from zero on: by the thread that has the chunk, so that the memory is its own.
  float* start(int64_t c, int64_t part) {
    float* own = at(c, part);
    std::memset(own, 0, static_cast<size_t>(width_) * sizeof(float));
    return own;
  }

  // The sum that chunk c has: [width].
  float* at(int64_t c, int64_t part) const { return data_ + (c * parts_ + part) * width_; }

  // Sum of all chunks: [width].
  void total(int64_t part, float* out) {
    std::memset(out, 0, static_cast<size_t>(width_) * sizeof(float));
    for (int64_t c = 0; c < chunks_.size(); ++c) add(c, part, out);
  }

  // Sum of each span's chunks: [spans, width].
  void per_span(int64_t part, float* out, int64_t num_spans) {
    std::memset(out, 0, static_cast<size_t>(num_spans * width_) * sizeof(float));
    for (int64_t c = 0; c < chunks_.size(); ++c)
      if (chunks_[c].span >= 0) add(c, part, out + chunks_[c].span * width_);
  }

 private:
  void add(int64_t c, int64_t part, float* out) {
    const float* own = at(c, part);
    columns(width_, [&](int64_t i, int64_t n) { add_to(out + i, load(own + i, n), n); });
  }

  const RowChunks& chunks_;
  int64_t parts_, width_;
  Scratch scratch_;
  float* data_;
};

}  // namespace UVG_ISA
}  // namespace uvg
