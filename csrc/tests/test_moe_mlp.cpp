#include "uvg/moe_mlp.h"

#include "tests/kernel_test.h"

using namespace uvg;
using namespace uvg::test;

namespace {

double gelu(double x) { return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }

void check(int64_t size) {
  const auto run = [&](Dtype dtype, int threads) {
    Array pre = Array::random(dtype, size, 1, 4.0f), dhidden = Array::random(dtype, size, 2);
    Arrays out = {Array(dtype, size), Array(dtype, size)};
    MoeMlpParams p{};
    p.pre = pre.data(), p.size = size, p.dtype = dtype, p.threads = threads;
    p.activated = out[0].data(), p.dhidden = dhidden.data(), p.dpre = out[1].data();
    moe_mlp_activate_backward(p);
    return out;
  };
  everywhere(run, [&](Dtype dtype) {
    const Array pre = Array::random(dtype, size, 1, 4.0f), dhidden = Array::random(dtype, size, 2);
    std::vector<double> hidden, dpre;
    for (int64_t i = 0; i < size; ++i) {
      hidden.push_back(gelu(pre[i]));
      dpre.push_back(dhidden[i] * (gelu(pre[i] + 1e-5) - gelu(pre[i] - 1e-5)) / 2e-5);
    }
    return Truth{hidden, dpre};
  });
}

}  // namespace

int main() {
  for (int64_t size : {1, 31, 5003}) check(size);
  return finish("moe_mlp");
}
