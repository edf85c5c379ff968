#include "uvg/moe_mlp.h"

#include "tests/kernel_test.h"
#include "uvg/linear.h"

using namespace uvg;
using namespace uvg::test;

namespace {

double gelu(double x) { return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }

// A packed weight [experts, width, depth].
std::vector<uint32_t> pack(const Array& weight, Dtype dtype, int64_t experts, int64_t width, int64_t depth) {
  int64_t words = 0;
  LinearParams p{};
  p.depth = depth, p.width = width, p.dtype = dtype, p.threads = 1, p.words = &words;
  linear_words(p);
  std::vector<uint32_t> packed(experts * words);
  for (int64_t e = 0; e < experts; ++e) {
    Array own(dtype, width * depth);
    own.copy(0, weight, e * width * depth, width * depth, 1.0f);
    p.weight = own.data(), p.pack_into = packed.data() + e * words;
    linear_pack(p);
  }
  return packed;
}

// Experts of more rows than the room holds, one of none and one of a row: y, and what the backward reads.
void check_forward(int64_t width, int64_t hidden, int64_t room_rows) {
  const std::vector<int64_t> offsets = {0, 43, 43, 44, 61};
  const auto experts = static_cast<int64_t>(offsets.size()) - 1, rows = offsets.back();
  const auto inputs = [&](Dtype dtype) {
    return Arrays{Array::random(dtype, rows * width, 1), Array::random(dtype, experts * hidden * width, 2),
                  Array::random(dtype, experts * hidden, 3), Array::random(dtype, experts * width * hidden, 4),
                  Array::random(dtype, experts * width, 5)};
  };
  const auto run = [&](Dtype dtype, int threads) {
    Arrays in = inputs(dtype), out = {Array(dtype, rows * hidden), Array(dtype, rows * width)};
    const std::vector<uint32_t> w1 = pack(in[1], dtype, experts, hidden, width);
    const std::vector<uint32_t> w2 = pack(in[3], dtype, experts, width, hidden);
    Array room(dtype, room_rows * hidden);
    MoeMlpParams p{};
    p.x = in[0].data(), p.w1 = w1.data(), p.b1 = in[2].data(), p.w2 = w2.data(), p.b2 = in[4].data();
    p.offsets = offsets.data(), p.experts = experts, p.width = width, p.hidden = hidden, p.x_row = width;
    p.dtype = dtype, p.threads = threads, p.room = room.data(), p.room_rows = room_rows;
    p.pre = out[0].data(), p.y = out[1].data();
    moe_mlp_forward(p);
    return out;
  };
  everywhere(run, [&](Dtype dtype) {
    const Arrays in = inputs(dtype);
    std::vector<double> pre(rows * hidden), y(rows * width);
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
        for (int64_t h = 0; h < hidden; ++h) {
          double& value = pre[r * hidden + h] = in[2][e * hidden + h];
          for (int64_t i = 0; i < width; ++i) {
            value += static_cast<double>(in[0][r * width + i]) * in[1][(e * hidden + h) * width + i];
          }
        }
        for (int64_t i = 0; i < width; ++i) {
          double& value = y[r * width + i] = in[4][e * width + i];
          for (int64_t h = 0; h < hidden; ++h) {
            value += gelu(pre[r * hidden + h]) * in[3][(e * width + i) * hidden + h];
          }
        }
      }
    }
    return Truth{pre, y};
  });
}

}  // namespace

int main() {
  check_forward(13, 21, 20);
  check_forward(64, 130, 30);
  return finish("moe_mlp");
}
