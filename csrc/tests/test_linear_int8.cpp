#include "uvg/linear_int8.h"

#include "tests/kernel_test.h"
#include "uvg/moe_mlp_int8.h"

using namespace uvg;
using namespace uvg::test;

// Values are the Python tests'; here all instruction sets must agree with the generic one, whose sums are plain loops.
namespace {

std::vector<int64_t> words_of(int64_t depth, int64_t width) {
  std::vector<int64_t> words(2);
  LinearInt8Params p{};
  p.depth = depth, p.width = width, p.words = words.data();
  linear_int8_words(p);
  return words;
}

std::vector<uint32_t> packed(Array& weight, int64_t count, int64_t depth, int64_t width, Dtype dtype, int threads) {
  const int64_t words = words_of(depth, width)[0];
  std::vector<uint32_t> out(count * words);
  for (int64_t i = 0; i < count; ++i) {
    LinearInt8Params p{};
    p.depth = depth, p.width = width, p.dtype = dtype, p.threads = threads;
    p.weight = static_cast<const uint8_t*>(weight.data()) + i * depth * width * (dtype == Dtype::kFloat32 ? 4 : 2);
    p.pack_into = out.data() + i * words;
    linear_int8_pack(p);
  }
  return out;
}

void check_linear(int64_t rows, int64_t depth, int64_t width, bool act) {
  const auto run = [&](Dtype dtype, int threads) {
    Array x = Array::random(dtype, rows * depth, 1), weight = Array::random(dtype, width * depth, 2, 0.3f);
    Array bias = Array::random(dtype, width, 3);
    Arrays out = {Array(dtype, rows * width)};
    const std::vector<uint32_t> words = packed(weight, 1, depth, width, dtype, threads);
    std::vector<uint32_t> room(rows * words_of(depth, width)[1], ~0u);
    LinearInt8Params p{};
    p.x = x.data(), p.bias = bias.data(), p.packed = words.data();
    p.rows = rows, p.depth = depth, p.width = width, p.x_row = depth, p.gelu = act;
    p.dtype = dtype, p.threads = threads, p.room = room.data(), p.out = out[0].data();
    linear_int8_forward(p);
    return out;
  };
  everywhere(run, [](Dtype) { return Truth{}; });
}

// Three experts, the second without rows; room for fewer rows than the largest has.
void check_experts(int64_t width, int64_t hidden) {
  const std::vector<int64_t> offsets = {0, 37, 37, 60};
  const int64_t rows = 60, room_rows = 20;
  const auto run = [&](Dtype dtype, int threads) {
    Array x = Array::random(dtype, rows * width, 1), room(dtype, room_rows * hidden);
    Array w1 = Array::random(dtype, 3 * hidden * width, 2, 0.3f), b1 = Array::random(dtype, 3 * hidden, 3);
    Array w2 = Array::random(dtype, 3 * width * hidden, 4, 0.3f), b2 = Array::random(dtype, 3 * width, 5);
    Arrays out = {Array(dtype, rows * width)};
    const std::vector<uint32_t> words1 = packed(w1, 3, width, hidden, dtype, threads);
    const std::vector<uint32_t> words2 = packed(w2, 3, hidden, width, dtype, threads);
    std::vector<uint32_t> bytes(room_rows * words_of(std::max(width, hidden), 0)[1], ~0u);
    MoeMlpInt8Params p{};
    p.x = x.data(), p.w1 = words1.data(), p.w2 = words2.data(), p.b1 = b1.data(), p.b2 = b2.data();
    p.offsets = offsets.data(), p.experts = 3, p.width = width, p.hidden = hidden, p.x_row = width;
    p.dtype = dtype, p.threads = threads, p.room = room.data(), p.room_rows = room_rows;
    p.bytes = bytes.data(), p.y = out[0].data();
    moe_mlp_int8_forward(p);
    return out;
  };
  everywhere(run, [](Dtype) { return Truth{}; });
}

}  // namespace

int main() {
  check_linear(1, 1, 1, false);
  check_linear(7, 33, 65, true);
  check_linear(130, 64, 17, false);
  check_linear(45, 3100, 200, true);
  check_experts(17, 40);
  check_experts(64, 96);
  return finish("linear_int8");
}
