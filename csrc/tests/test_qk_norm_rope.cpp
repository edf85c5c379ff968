#include "uvg/qk_norm_rope.h"

#include "tests/kernel_test.h"

using namespace uvg;
using namespace uvg::test;

namespace {

const std::vector<int32_t> kSpans = {0,  24, 0, 2, 3, 4,
                                     24, 9,  1, 0, 0, 0};  // video, text; the last two rows of no span
constexpr int64_t kRows = 35, kHeads = 3, kPositions = 10;
constexpr float kEps = 1e-6f;

// Position of a row on the axis of a pair, as docs/design.md has it.
int64_t position(int64_t row, int64_t pair, int64_t head) {
  if (row >= 24) return row - 24;
  const int64_t side = head / 6, axis = pair < head / 2 - 2 * side ? 0 : pair < head / 2 - side ? 1 : 2;
  return axis == 0 ? row / 12 : axis == 1 ? row / 4 % 3 : row % 4;
}

std::vector<double> forward(const Array& x, const Array& weight, const Array& table, int64_t head, bool rotated) {
  const int64_t width = kHeads * head, pairs = head / 2;
  std::vector<double> y(kRows * width);
  for (int64_t row = 0; row < kRows; ++row) {
    double square = 0;
    for (int64_t i = 0; i < width; ++i) square += std::pow(x[row * width + i], 2) / static_cast<double>(width);
    const auto normed = [&](int64_t i) { return x[row * width + i] / std::sqrt(square + kEps) * weight[i]; };
    for (int64_t n = 0; n < kHeads; ++n) {
      for (int64_t j = 0; j < pairs; ++j) {
        const bool text = row >= 24 && row < 33, bare = row >= 33 || !rotated;
        const int64_t a = n * head + (text ? j : 2 * j), b = n * head + (text ? j + pairs : 2 * j + 1);
        const int64_t at = bare ? 0 : (((text ? 1 : 0) * kPositions + position(row, j, head)) * pairs + j) * 2;
        const double cos = bare ? 1.0 : table[at], sin = bare ? 0.0 : table[at + 1];
        y[row * width + a] = normed(a) * cos - normed(b) * sin;
        y[row * width + b] = normed(a) * sin + normed(b) * cos;
      }
    }
  }
  return y;
}

// rotated: with spans and a table. tensors: 1 is q alone.
void check(int64_t head, bool rotated, int tensors) {
  const int64_t width = kHeads * head;
  Array table = Array::random(Dtype::kFloat32, 2 * kPositions * head, 7);
  Arrays weight = {Array::random(Dtype::kFloat32, width, 5), Array::random(Dtype::kFloat32, width, 6)};
  const auto x = [&](Dtype dtype, int i) { return Array::random(dtype, kRows * width, 1 + i); };
  const auto run = [&](Dtype dtype, int threads) {
    QkNormRopeParams p{};
    p.rows = kRows, p.width = width, p.heads = kHeads, p.eps = kEps, p.dtype = dtype, p.threads = threads;
    if (rotated) p.spans = kSpans.data(), p.table = table.floats(), p.num_spans = 2, p.positions = kPositions;
    Arrays in, y, out;
    for (int i = 0; i < 4; ++i) in.push_back(x(dtype, i));
    y.reserve(2), out.reserve(6);
    const auto made = [](Arrays& into, Dtype of, int64_t size) { return into.emplace_back(of, size).data(); };
    for (int i = 0; i < tensors; ++i) {
      p.x[i] = in[i].data(), p.dy[i] = in[2 + i].data(), p.weight[i] = weight[i].floats();
      p.y[i] = made(y, dtype, kRows * width), p.dx[i] = made(out, dtype, kRows * width);
      p.dweight[i] = static_cast<float*>(made(out, Dtype::kFloat32, width));
      p.rstd[i] = static_cast<float*>(made(out, Dtype::kFloat32, kRows));
    }
    qk_norm_rope_forward(p);
    qk_norm_rope_backward(p);
    y.insert(y.end(), out.begin(), out.end());
    return y;
  };
  everywhere(run, [&](Dtype dtype) {
    Truth truth;
    for (int i = 0; i < tensors; ++i) truth.push_back(forward(x(dtype, i), weight[i], table, head, rotated));
    return truth;
  });
}

}  // namespace

int main() {
  constexpr int64_t kThreaded = 314;
  static_assert(kRows * kHeads * kThreaded > kAloneRowValues);
  constexpr int64_t kPutTogether = 3650;  // wide enough that several threads put the sums of three chunks together
  static_assert(3 * kHeads * kPutTogether > kAloneRowValues);
  for (int64_t head : {int64_t{2}, int64_t{6}, int64_t{16}, int64_t{32}, int64_t{44}, kThreaded}) check(head, true, 2);
  for (int64_t head : {6, 44}) check(head, true, 1), check(head, false, 1);
  check(kPutTogether, true, 2);
  return finish("qk_norm_rope");
}
