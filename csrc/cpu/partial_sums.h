// Sums over rows that are made chunk by chunk and put together in the order of the chunks.
#pragma once

#include <algorithm>
#include <vector>

#include "common/row_chunks.h"
#include "cpu/vec.h"

namespace uvg {
namespace UVG_ISA {

class PartialSums {
 public:
  PartialSums(const std::vector<RowChunk>& chunks, int64_t parts, int64_t width)
      : chunks_(chunks), parts_(parts), width_(width), data_(chunks.size() * parts * width, 0.0f) {}

  // Where chunk c adds up its part.
  float* at(size_t c, int64_t part) { return data_.data() + (static_cast<int64_t>(c) * parts_ + part) * width_; }

  // Sum of all chunks: [width].
  void total(int64_t part, float* out) {
    std::fill(out, out + width_, 0.0f);
    for (size_t c = 0; c < chunks_.size(); ++c) add(c, part, out);
  }

  // Sum of each span's chunks: [spans, width].
  void per_span(int64_t part, float* out, int64_t num_spans) {
    std::fill(out, out + num_spans * width_, 0.0f);
    for (size_t c = 0; c < chunks_.size(); ++c)
      if (chunks_[c].span >= 0) add(c, part, out + chunks_[c].span * width_);
  }

 private:
  void add(size_t c, int64_t part, float* out) {
    const float* own = at(c, part);
    columns(width_, [&](int64_t i, int64_t n) { add_to(out + i, load(own + i, n), n); });
  }

  const std::vector<RowChunk>& chunks_;
  int64_t parts_, width_;
  std::vector<float> data_;
};

}  // namespace UVG_ISA
}  // namespace uvg
