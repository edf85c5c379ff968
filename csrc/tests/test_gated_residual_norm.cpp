#include "tests/kernel_test.h"
#include "uvg/gated_residual_norm.h"

using namespace uvg;
using namespace uvg::test;

namespace {

const std::vector<int32_t> kSpans = {75, 60, 0, 70, 140, 0};  // out of order, one empty, rows of no span
constexpr int64_t kRows = 140;
constexpr float kEps = 1e-6f;

int span_of(int64_t row) { return row < 70 ? 1 : row >= 75 && row < 135 ? 0 : -1; }

// h and y, then gate, shift, scale, then dout and dnormed.
Arrays inputs(Dtype dtype, int64_t width) {
  Arrays out;
  for (uint32_t seed : {1, 2}) out.push_back(Array::random(dtype, kRows * width, seed));
  for (uint32_t seed : {3, 4, 5}) out.push_back(Array::random(Dtype::kFloat32, 3 * width, seed));
  for (uint32_t seed : {6, 7}) out.push_back(Array::random(dtype, kRows * width, seed));
  return out;
}

Truth forward(const Arrays& in, int64_t width) {
  std::vector<double> out(kRows * width), normed(kRows * width);
  for (int64_t row = 0; row < kRows; ++row) {
    const int span = span_of(row);
    double mean = 0, square = 0;
    for (int64_t i = 0; i < width; ++i) {
      const double gate = span < 0 ? 0.0 : in[2][span * width + i];
      out[row * width + i] = in[0][row * width + i] + gate * in[1][row * width + i];
      mean += out[row * width + i] / static_cast<double>(width);
    }
    for (int64_t i = 0; i < width; ++i) square += std::pow(out[row * width + i] - mean, 2) / static_cast<double>(width);
    for (int64_t i = 0; i < width; ++i) {
      const double value = (out[row * width + i] - mean) / std::sqrt(square + kEps);
      const int64_t at = span * width + i;
      normed[row * width + i] = span < 0 ? value : value * (1.0 + in[4][at]) + in[3][at];
    }
  }
  return {out, normed};
}

void check(int64_t width) {
  const auto run = [&](Dtype dtype, int threads) {
    Arrays in = inputs(dtype, width), out;
    for (int i = 0; i < 4; ++i) out.emplace_back(dtype, kRows * width);
    for (int i = 0; i < 3; ++i) out.emplace_back(Dtype::kFloat32, 3 * width);
    Array mean(Dtype::kFloat32, kRows), rstd(Dtype::kFloat32, kRows);
    GatedResidualNormParams p{};
    p.h = in[0].data(), p.y = in[1].data(), p.gate = in[2].floats(), p.shift = in[3].floats();
    p.scale = in[4].floats(), p.spans = kSpans.data(), p.rows = kRows, p.width = width, p.num_spans = 3;
    p.eps = kEps, p.dtype_h = p.dtype_y = p.dtype_normed = dtype, p.threads = threads;
    p.out = out[0].data(), p.normed = out[1].data(), p.mean = mean.floats(), p.rstd = rstd.floats();
    p.dout = in[5].data(), p.dnormed = in[6].data(), p.dh = out[2].data(), p.dy = out[3].data();
    p.dgate = out[4].floats(), p.dshift = out[5].floats(), p.dscale = out[6].floats();
    gated_residual_norm_forward(p);
    gated_residual_norm_backward(p);
    return out;
  };
  everywhere(run, [&](Dtype dtype) { return forward(inputs(dtype, width), width); });
}

}  // namespace

int main() {
  constexpr int64_t kThreaded = 259;
  static_assert(kRows * kThreaded > kAloneRowValues);
  constexpr int64_t kPutTogether = 6577;  // wide enough that several threads put the sums of five chunks together
  static_assert(5 * kPutTogether > kAloneRowValues);
  for (int64_t width : {int64_t{3}, int64_t{17}, int64_t{96}, kThreaded}) check(width);
  check(kPutTogether);
  return finish("gated_residual_norm");
}
