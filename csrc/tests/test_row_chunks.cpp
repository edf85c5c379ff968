// The cut of rows into chunks: covers all rows once, in order, and depends on the span alone.
#include "common/row_chunks.h"

#include <stdexcept>
#include <vector>

#include "tests/check.h"

namespace {

bool refused(std::vector<int32_t> spans, int64_t rows) {
  try {
    uvg::RowChunks(spans.data(), static_cast<int64_t>(spans.size() / 2), 2, rows);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

bool rope_refused(std::vector<int32_t> span, int64_t positions) {
  try {
    uvg::check_rope_spans(span.data(), 1, positions);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

}  // namespace

int main() {
  const std::vector<int32_t> spans = {150, 70, 0, 130, 9, 0};  // out of order, one empty; rows 130..149, 220..229 bare
  const uvg::RowChunks chunks(spans.data(), 3, 2, 230);
  int64_t next = 0;
  for (int64_t c = 0; c < chunks.size(); ++c) {
    const uvg::RowChunk& chunk = chunks[c];
    CHECK(chunk.first == next && chunk.rows > 0);
    next += chunk.rows;
    const int64_t owner = chunk.first < 130 ? 1 : chunk.first >= 150 && chunk.first < 220 ? 0 : -1;
    CHECK(chunk.span == owner);
    if (owner >= 0) CHECK(chunk.offset == chunk.first - spans[2 * owner]);
  }
  CHECK(next == 230);

  const uvg::RowChunks wide(spans.data(), 3, 2, 230, 100);  // runs of 130, 20, 70 and 10 rows
  CHECK(wide.size() == 5 && wide[0].rows == 100 && wide[1].rows == 30 && wide[1].offset == 100 && wide[3].rows == 70);

  CHECK(uvg::RowChunks(nullptr, 0, 2, 0).size() == 0);
  const uvg::RowChunks bare(nullptr, 5, 2, 10);
  CHECK(bare.size() == 1 && bare[0].span == -1 && bare[0].rows == 10);

  CHECK(refused({0, 5, 4, 5}, 10));
  CHECK(refused({0, 11}, 10));
  CHECK(refused({-1, 3}, 10));
  CHECK(refused({0, -3}, 10));
  CHECK(!refused({0, 4, 4, 6}, 10));

  CHECK(!rope_refused({0, 12, 0, 3, 2, 2}, 3));
  CHECK(rope_refused({0, 12, 0, 3, 2, 2}, 2));
  CHECK(rope_refused({0, 12, 0, 3, 2, 1}, 9));
  CHECK(rope_refused({0, 12, 0, 3, -2, -2}, 9));
  CHECK(rope_refused({0, 12, 0, 1 << 30, 1 << 30, 16}, 1 << 30));
  CHECK(!rope_refused({0, 12, 1, 0, 0, 0}, 12));
  CHECK(rope_refused({0, 12, 1, 0, 0, 0}, 11));
  CHECK(rope_refused({0, 12, 2, 0, 0, 0}, 99));
  return uvg::test::finish("row_chunks");
}
