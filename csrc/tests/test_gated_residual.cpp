#include "uvg/gated_residual.h"

#include "tests/kernel_test.h"

using namespace uvg;
using namespace uvg::test;

namespace {

// Three spans out of order, one empty, rows of no span between them.
const std::vector<int32_t> kSpans = {75, 60, 0, 70, 140, 0};
constexpr int64_t kRows = 140;

int span_of(int64_t row) { return row < 70 ? 1 : row >= 75 && row < 135 ? 0 : -1; }

void check(int64_t width, bool gated) {
  const auto gate = Array::random(Dtype::kFloat32, gated ? 3 * width : 0, 3);
  const auto inputs = [&](Dtype dtype) {
    return Arrays{Array::random(dtype, kRows * width, 1), Array::random(dtype, kRows * width, 2), gate};
  };
  const auto run = [&](Dtype dtype, int threads) {
    Arrays in = inputs(dtype);
    Array dout = Array::random(dtype, kRows * width, 4);
    Arrays out = {Array(dtype, kRows * width), Array(dtype, kRows * width),
                  Array(Dtype::kFloat32, gated ? 3 * width : 0)};
    GatedResidualParams p{};
    p.h = in[0].data(), p.y = in[1].data(), p.gate = in[2].floats(), p.spans = kSpans.data();
    p.rows = kRows, p.width = width, p.num_spans = 3, p.dtype_h = p.dtype_y = dtype, p.threads = threads;
    p.out = out[0].data(), p.dout = dout.data(), p.dy = out[1].data(), p.dgate = out[2].floats();
    gated_residual_forward(p);
    gated_residual_backward(p);
    return out;
  };
  const auto truth = [&](Dtype dtype) {
    const Arrays in = inputs(dtype);
    const Array dout = Array::random(dtype, kRows * width, 4);
    std::vector<double> out(kRows * width), dy(kRows * width), dgate(gated ? 3 * width : 0);
    for (int64_t i = 0; i < kRows * width; ++i) {
      const int span = span_of(i / width);
      const int64_t at = span * width + i % width;
      const double g = !gated ? 1.0 : span < 0 ? 0.0 : gate[at];
      out[i] = in[0][i] + g * in[1][i];
      dy[i] = g * dout[i];
      if (gated && span >= 0) dgate[at] += static_cast<double>(dout[i]) * in[1][i];
    }
    return Truth{out, dy, dgate};
  };
  everywhere(run, truth);
}

}  // namespace

int main() {
  constexpr int64_t kThreaded = 259;
  static_assert(kRows * kThreaded > kAloneRowValues);
  constexpr int64_t kPutTogether = 6577;  // wide enough that several threads put the sums of five chunks together
  static_assert(5 * kPutTogether > kAloneRowValues);
  for (int64_t width : {int64_t{1}, int64_t{17}, int64_t{96}, kThreaded}) {
    check(width, true);
    check(width, false);
  }
  check(kPutTogether, true);
  return finish("gated_residual");
}
