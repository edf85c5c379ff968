#include "common/row_chunks.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace uvg {
namespace {

std::vector<RowChunk> all_chunks(const int32_t* spans, int64_t num_spans, int64_t stride, int64_t num_rows,
                                 int64_t longest) {
  std::vector<int64_t> order;
  for (int64_t s = 0; spans != nullptr && s < num_spans; ++s)
    if (spans[s * stride + 1] != 0) order.push_back(s);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return spans[a * stride] < spans[b * stride]; });
  std::vector<RowChunk> out;
  const auto cut = [&](int64_t first, int64_t rows, int64_t span) {
    for (int64_t offset = 0; offset < rows; offset += longest)
      out.push_back({first + offset, std::min(longest, rows - offset), span, offset});
  };
  int64_t next = 0;
  for (int64_t s : order) {
    const int64_t start = spans[s * stride], length = spans[s * stride + 1];
    if (length < 0 || start < next || start + length > num_rows)
      throw std::invalid_argument("spans must lie in [0, " + std::to_string(num_rows) +
                                  ") without overlap, got start " + std::to_string(start) + ", len " +
                                  std::to_string(length));
    cut(next, start - next, -1);
    cut(start, length, s);
    next = start + length;
  }
  cut(next, num_rows - next, -1);
  return out;
}

}  // namespace

RowChunks::RowChunks(const int32_t* spans, int64_t num_spans, int64_t stride, int64_t num_rows, int64_t longest) {
  const std::vector<RowChunk> all = all_chunks(spans, num_spans, stride, num_rows, longest);
  size_ = static_cast<int64_t>(all.size());
  chunks_ = new RowChunk[all.size()];
  std::copy(all.begin(), all.end(), chunks_);
}

RowChunks::~RowChunks() { delete[] chunks_; }

int64_t RowChunks::size() const { return size_; }

const RowChunk& RowChunks::operator[](int64_t index) const { return chunks_[index]; }

void check_rope_spans(const int32_t* spans, int64_t num_spans, int64_t positions) {
  for (int64_t s = 0; s < num_spans; ++s) {
    const int32_t* span = spans + s * 6;
    const int64_t length = span[1], kind = span[2], frames = span[3], height = span[4], width = span[5];
    if (length <= 0) continue;  // negative ones are told by RowChunks
    const bool video = kind == 0;
    const int64_t most = video ? std::max({frames, height, width}) : length;
    const bool grid = std::min({frames, height, width}) > 0 && height * width <= length &&  // which no number overflows
                      frames * height * width == length;
    if ((video && !grid) || kind < 0 || kind > 1 || most > positions)
      throw std::invalid_argument("rope_spans must be (start, len, 0, F, Y, X) with len = F*Y*X, or kind 1, within " +
                                  std::to_string(positions) + " positions, got len " + std::to_string(length) +
                                  ", kind " + std::to_string(kind));
  }
}

}  // namespace uvg
