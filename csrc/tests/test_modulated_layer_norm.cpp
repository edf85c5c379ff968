#include "uvg/modulated_layer_norm.h"

#include "tests/kernel_test.h"

using namespace uvg;
using namespace uvg::test;

namespace {

const std::vector<int32_t> kSpans = {75, 60, 0, 70, 140, 0};  // out of order, one empty, rows of no span
constexpr int64_t kRows = 140;
constexpr float kEps = 1e-6f;

int span_of(int64_t row) { return row < 70 ? 1 : row >= 75 && row < 135 ? 0 : -1; }

struct Inputs {
  Array x, dy, shift, scale, weight, bias;

  Inputs(Dtype dtype, int64_t width, bool modulated, bool affine)
      : x(Array::random(dtype, kRows * width, 1)),
        dy(Array::random(dtype, kRows * width, 2)),
        shift(Array::random(Dtype::kFloat32, modulated ? 3 * width : 0, 3)),
        scale(Array::random(Dtype::kFloat32, modulated ? 3 * width : 0, 4)),
        weight(Array::random(Dtype::kFloat32, affine ? width : 0, 5)),
        bias(Array::random(Dtype::kFloat32, affine ? width : 0, 6)) {}
};

std::vector<double> forward(const Inputs& in, int64_t width) {
  std::vector<double> y(kRows * width);
  for (int64_t row = 0; row < kRows; ++row) {
    double mean = 0, square = 0;
    for (int64_t i = 0; i < width; ++i) mean += in.x[row * width + i] / static_cast<double>(width);
    for (int64_t i = 0; i < width; ++i)
      square += std::pow(in.x[row * width + i] - mean, 2) / static_cast<double>(width);
    for (int64_t i = 0; i < width; ++i) {
      double value = (in.x[row * width + i] - mean) / std::sqrt(square + kEps);
      if (in.weight.size()) value = value * in.weight[i] + in.bias[i];
      if (in.shift.size() && span_of(row) >= 0) {
        const int64_t at = span_of(row) * width + i;
        value = value * (1.0 + in.scale[at]) + in.shift[at];
      }
      y[row * width + i] = value;
    }
  }
  return y;
}

void check(int64_t width, bool modulated, bool affine) {
  const auto run = [&](Dtype dtype, int threads) {
    Inputs in(dtype, width, modulated, affine);
    const auto parameter = [](const Array& like) { return Array(Dtype::kFloat32, like.size()); };
    Arrays out = {Array(dtype, kRows * width),   Array(dtype, kRows * width),  parameter(in.shift),
                  parameter(in.scale),           parameter(in.weight),         parameter(in.bias),
                  Array(Dtype::kFloat32, kRows), Array(Dtype::kFloat32, kRows)};
    ModulatedLayerNormParams p{};
    p.x = in.x.data(), p.shift = in.shift.floats(), p.scale = in.scale.floats(), p.spans = kSpans.data();
    p.weight = in.weight.floats(), p.bias = in.bias.floats();
    p.rows = kRows, p.width = width, p.num_spans = 3, p.eps = kEps, p.dtype = dtype, p.threads = threads;
    p.y = out[0].data(), p.dy = in.dy.data(), p.dx = out[1].data(), p.dshift = out[2].floats();
    p.dscale = out[3].floats(), p.dweight = out[4].floats(), p.dbias = out[5].floats();
    p.mean = out[6].floats(), p.rstd = out[7].floats();
    modulated_layer_norm_forward(p);
    modulated_layer_norm_backward(p);
    return out;
  };
  everywhere(run, [&](Dtype dtype) { return Truth{forward(Inputs(dtype, width, modulated, affine), width)}; });
}

}  // namespace

int main() {
  constexpr int64_t kThreaded = 259;
  static_assert(kRows * kThreaded > kAloneRowValues);
  constexpr int64_t kPutTogether = 6577;  // wide enough that several threads put the sums of five chunks together
  static_assert(5 * kPutTogether > kAloneRowValues);
  for (int64_t width : {int64_t{2}, int64_t{17}, int64_t{96}, kThreaded}) {
    check(width, true, false);
    check(width, false, true);
    check(width, true, true);
  }
  check(kPutTogether, true, true);
  return finish("modulated_layer_norm");
}
