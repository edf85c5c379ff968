#include "common/row_chunks.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace uvg {
namespace {

void cut(std::vector<RowChunk>& out, int64_t first, int64_t rows, int64_t span) {
  for (int64_t offset = 0; offset < rows; offset += kChunkRows)
    out.push_back({first + offset, std::min(kChunkRows, rows - offset), span, offset});
}

}  // namespace

std::vector<RowChunk> row_chunks(const int32_t* spans, int64_t num_spans, int64_t stride, int64_t num_rows) {
  std::vector<int64_t> order;
  for (int64_t s = 0; spans != nullptr && s < num_spans; ++s)
    if (spans[s * stride + 1] != 0) order.push_back(s);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return spans[a * stride] < spans[b * stride]; });
  std::vector<RowChunk> out;
  int64_t next = 0;
  for (int64_t s : order) {
    const int64_t start = spans[s * stride], length = spans[s * stride + 1];
    if (length < 0 || start < next || start + length > num_rows)
      throw std::invalid_argument("spans must lie in [0, " + std::to_string(num_rows) +
                                  ") without overlap, got start " + std::to_string(start) + ", len " +
                                  std::to_string(length));
    cut(out, next, start - next, -1);
    cut(out, start, length, s);
    next = start + length;
  }
  cut(out, next, num_rows - next, -1);
  return out;
}

}  // namespace uvg
