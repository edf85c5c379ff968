#include "uvg/linear_sample.h"

#include "tests/kernel_test.h"

using namespace uvg;
using namespace uvg::test;

namespace {

// One logit of every row is made to win by far: whatever the draw, it is the result. Two tiles of words and a bit.
void check(int64_t rows, int64_t width, int64_t vocab, double temperature) {
  const auto winner = [&](int64_t row) { return (row * 797 + 13) % vocab; };
  std::vector<int64_t> names(rows);
  for (int64_t i = 0; i < rows; ++i) names[i] = 1000 * i;
  const auto run = [&](Dtype dtype, int threads) {
    Array x = Array::random(dtype, rows * width, 1), weight = Array::random(dtype, vocab * width, 2, 0.01f);
    Array bias = Array::random(dtype, vocab, 3);
    for (int64_t row = 0; row < rows; ++row) weight.copy(winner(row) * width, x, row * width, width, 40.0f);
    std::vector<int64_t> ids(rows, -7);
    LinearSampleParams p{};
    p.x = x.data(), p.weight = weight.data(), p.bias = bias.data();
    p.seeds = p.steps = p.tokens = names.data();
    p.rows = rows, p.width = width, p.vocab = vocab, p.temperature = temperature;
    p.dtype = dtype, p.threads = threads, p.ids = ids.data();
    linear_sample(p);
    Array out = Array::random(Dtype::kFloat32, rows, 0);
    for (int64_t row = 0; row < rows; ++row) out.set(row, static_cast<float>(ids[row]));
    return Arrays{out};
  };
  everywhere(run, [&](Dtype) {
    std::vector<double> ids(rows);
    for (int64_t row = 0; row < rows; ++row) ids[row] = static_cast<double>(winner(row));
    return Truth{ids};
  });
}

}  // namespace

int main() {
  check(1, 64, 1, 1.0);
  check(5, 33, 2100, 1.0);
  check(37, 40, 1030, 0.0);
  static_assert(33 * 120 * 1030 > kAloneHeadProducts);
  check(33, 120, 1030, 0.5);
  return finish("linear_sample");
}
