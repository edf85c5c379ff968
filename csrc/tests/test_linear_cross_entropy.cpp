#include "uvg/linear_cross_entropy.h"

#include "tests/kernel_test.h"

using namespace uvg;
using namespace uvg::test;

namespace {

void check(int64_t rows, int64_t width, int64_t vocab, bool kl) {
  std::vector<int64_t> target(rows), current(rows);
  for (int64_t i = 0; i < rows; ++i) {
    target[i] = (i * 31 + 3) % vocab;
    current[i] = i % 2 ? target[i] : (i * 17) % vocab;
  }
  Array dloss = Array::random(Dtype::kFloat32, rows, 4), rate = Array::random(Dtype::kFloat32, kl ? rows : 0, 5);
  const auto inputs = [&](Dtype dtype) {
    return Arrays{Array::random(dtype, rows * width, 1), Array::random(dtype, vocab * width, 2),
                  Array::random(dtype, vocab, 3)};
  };
  const auto run = [&](Dtype dtype, int threads) {
    Arrays in = inputs(dtype);
    Arrays out = {Array(Dtype::kFloat32, rows), Array(Dtype::kFloat32, rows), Array(Dtype::kFloat32, kl ? rows : 0),
                  Array(dtype, rows * width),   Array(dtype, vocab * width),  Array(dtype, vocab)};
    LinearCrossEntropyParams p{};
    p.x = in[0].data(), p.weight = in[1].data(), p.bias = in[2].data(), p.target = target.data();
    if (kl) p.current = current.data(), p.rate = rate.floats();
    p.rows = rows, p.width = width, p.vocab = vocab, p.dtype = dtype, p.threads = threads;
    p.loss = out[0].floats(), p.lse = out[1].floats(), p.p_current = out[2].floats(), p.dloss = dloss.floats();
    p.dx = out[3].data(), p.dweight = out[4].data(), p.dbias = out[5].data();
    linear_cross_entropy_forward(p);
    linear_cross_entropy_backward(p);
    return out;
  };
  everywhere(run, [&](Dtype dtype) {
    const Arrays in = inputs(dtype);
    std::vector<double> loss(rows), lse(rows);
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> logits(vocab);
      double sum = 0;
      for (int64_t v = 0; v < vocab; ++v) {
        logits[v] = in[2][v];
        for (int64_t i = 0; i < width; ++i) {
          logits[v] += static_cast<double>(in[0][r * width + i]) * in[1][v * width + i];
        }
        sum += std::exp(logits[v]);
      }
      lse[r] = std::log(sum);
      loss[r] = lse[r] - logits[target[r]];
      if (kl) {
        const double there = target[r] == current[r] ? 1 : 0;
        loss[r] = -rate[r] * (std::exp(logits[current[r]] - lse[r]) - there - (1 - there) * loss[r]);
      }
    }
    return Truth{loss, lse};
  });
}

}  // namespace

int main() {
  check(1, 1, 1, false);
  check(5, 0, 40, false);  // the bias alone
  check(13, 33, 700, false);
  check(13, 33, 700, true);
  static_assert(97 * 64 * 700 > kAloneHeadProducts);
  check(97, 64, 700, true);
  return finish("linear_cross_entropy");
}
