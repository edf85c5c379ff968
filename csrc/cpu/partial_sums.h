// Sums over rows that are made chunk by chunk and put together in the order of the chunks.
#pragma once

#include "common/row_chunks.h"
#include "cpu/per_thread.h"

namespace uvg {
namespace UVG_ISA {

constexpr int64_t kFewestRows = 16, kFewestColumns = 64;  // that a thread takes at once; untuned
constexpr int kManyThreads = 8;  // from which on they put sums together: few wait longer for one another; untuned

// Rows of a chunk where nothing is summed up over them: fewer where threads would be left without any.
template <typename Params>
int64_t rows_at_once(const Params& p) {
  const int threads = threads_for_rows(p.threads, p.rows, p.width);
  int64_t longest = 64;
  while (threads > 1 && longest > kFewestRows && p.rows < 4 * threads * longest) longest /= 2;
  return longest;
}

class PartialSums {
 public:
  PartialSums(const RowChunks& chunks, int64_t parts, int64_t width, int threads)
      : chunks_(chunks),
        parts_(parts),
        width_(width),
        threads_(threads < kManyThreads ? 1 : threads_for_rows(threads, chunks.size(), width)),
        data_(scratch_.floats(chunks.size() * parts * width)) {}

  // Where chunk c adds up its part, from zero on: by the thread that has the chunk, so that the memory is its own.
  float* start(int64_t c, int64_t part) {
    float* own = at(c, part);
    std::memset(own, 0, static_cast<size_t>(width_) * sizeof(float));
    return own;
  }

  // The sum that chunk c has: [width].
  float* at(int64_t c, int64_t part) const { return data_ + (c * parts_ + part) * width_; }

  // Sum of all chunks: [width].
  void total(int64_t part, float* out) const {
    by_columns([&](int64_t first, int64_t count) {
      clear(out, 1, first, count);
      for (int64_t c = 0; c < chunks_.size(); ++c) add(c, part, out, first, count);
    });
  }

  // Sum of each span's chunks: [spans, width].
  void per_span(int64_t part, float* out, int64_t num_spans) const {
    by_columns([&](int64_t first, int64_t count) {
      clear(out, num_spans, first, count);
      for (int64_t c = 0; c < chunks_.size(); ++c)
        if (chunks_[c].span >= 0) add(c, part, out + chunks_[c].span * width_, first, count);
    });
  }

  // sum(first, count) for columns that a thread has alone: it puts all chunks together there, in their order.
  template <typename Sum>
  void by_columns(Sum&& sum) const {
    const int64_t even = (width_ + threads_ - 1) / threads_, least = even < kFewestColumns ? kFewestColumns : even;
    const int64_t part = (least + kLanes - 1) / kLanes * kLanes;
#pragma omp parallel for num_threads(threads_) schedule(static) if (threads_ > 1)
    for (int64_t first = 0; first < width_; first += part) sum(first, width_ - first < part ? width_ - first : part);
  }

  // Zero in columns of [rows, width].
  void clear(float* out, int64_t rows, int64_t first, int64_t count) const {
    for (int64_t r = 0; r < rows; ++r)
      std::memset(out + r * width_ + first, 0, static_cast<size_t>(count) * sizeof(float));
  }

 private:
  void add(int64_t c, int64_t part, float* out, int64_t first, int64_t count) const {
    const float* own = at(c, part) + first;
    columns(count, [&](int64_t i, int64_t n) { add_to(out + first + i, load(own + i, n), n); });
  }

  const RowChunks& chunks_;
  int64_t parts_, width_;
  int threads_;
  Scratch scratch_;
  float* data_;
};

}  // namespace UVG_ISA
}  // namespace uvg
