// Values that lie apart, as packed ones: all steps, all dtypes, rounding to nearest with ties to even. And fp16 as the
// kernels of every instruction set load and store it.
#include "common/pack_values.h"

#include <cmath>
#include <limits>
#include <vector>

#include "tests/kernel_test.h"
#include "uvg/linear.h"

namespace {

uint16_t rounded(float value) {
  uvg::BFloat16 to{};
  uvg::convert(value, to);
  return to.bits;
}

// fp16 as its definition has it.
double value_of(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return (bits >> 15 != 0) ? -size : size;
}

float to_float(uint16_t bits) {
  float value = 0;
  uvg::convert(uvg::Float16{bits}, value);
  return value;
}

uint16_t to_half(float value) {
  uvg::Float16 half{};
  uvg::convert(value, half);
  return half.bits;
}

// Every fp16 number, and for each the fp32 numbers where the rounding to it begins and ends: half way to the next one,
// which an even number takes, and one beyond. What they have to be is in the second.
struct Rounding {
  std::vector<float> from;
  std::vector<uint16_t> to;

  Rounding() {
    for (uint16_t bits = 0; bits < 0x7C00; ++bits) {
      const double next = bits == 0x7BFF ? 65536.0 : value_of(static_cast<uint16_t>(bits + 1));
      const auto middle = static_cast<float>((value_of(bits) + next) / 2);
      add(static_cast<float>(value_of(bits)), bits);
      add(std::nextafter(middle, 0.0F), bits);
      add(middle, static_cast<uint16_t>(bits + bits % 2));
      add(std::nextafter(middle, 1e30F), static_cast<uint16_t>(bits + 1));
    }
    add(std::numeric_limits<float>::denorm_min(), 0);
    add(std::numeric_limits<float>::max(), 0x7C00);
    add(std::numeric_limits<float>::infinity(), 0x7C00);
  }

  void add(float value, uint16_t bits) {
    from.push_back(value), to.push_back(bits);
    from.push_back(-value), to.push_back(static_cast<uint16_t>(bits | 0x8000));
  }
};

bool is_nan(uint16_t bits) { return (bits & 0x7C00) == 0x7C00 && (bits & 0x3FF) != 0; }

void fp16_one_by_one(const Rounding& rounding) {
  for (int32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = to_float(half);
    if ((bits & 0x7FFF) < 0x7C00) CHECK(value == value_of(half) && std::signbit(value) == (bits >> 15 != 0));
    if ((bits & 0x7FFF) == 0x7C00) CHECK(std::isinf(value) && std::signbit(value) == (bits >> 15 != 0));
    if (is_nan(half)) CHECK(std::isnan(value));
  }
  for (size_t i = 0; i < rounding.from.size(); ++i) CHECK(to_half(rounding.from[i]) == rounding.to[i]);
  CHECK(is_nan(to_half(std::numeric_limits<float>::quiet_NaN())) && is_nan(to_half(to_float(0xFC01))));
}

// A kernel that loads, multiplies by one and stores: the slope of GELU is one at 30, where no bit of it is left out.
std::vector<uint16_t> through_a_kernel(std::vector<uint16_t> dy, int64_t size) {
  std::vector<uint16_t> pre(dy.size(), to_half(30.0F)), dz(dy.size());
  uvg::GeluBackwardParams p{};
  p.dy = dy.data(), p.pre = pre.data(), p.size = size, p.dtype = uvg::Dtype::kFloat16, p.threads = 1;
  p.dz = dz.data();
  uvg::gelu_backward(p);
  return dz;
}

// Results with more bits than fp16 has, below its normal numbers too, must be rounded as above: x * weight + bias,
// exact in fp32 or rounded there once.
void fp16_in_kernels() {
  std::vector<uint16_t> all(0x10000);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  constexpr int64_t kWidth = 33;  // two vectors and a part of one
  for (const std::string& isa : uvg::test::usable_isas()) {
    uvg::use_isa(isa);
    for (int64_t size : {int64_t{0x10000}, int64_t{0x10000 - 5}}) {
      const std::vector<uint16_t> got = through_a_kernel(all, size);
      for (int64_t i = 0; i < size; ++i) CHECK(got[i] == all[i] || (is_nan(got[i]) && is_nan(all[i])));
    }
    const std::pair<uint16_t, uint16_t> factors[] = {{0x3C00, 0x0001}, {0x3C00, 0x03FF}, {0x3C00, 0x3555},
                                                     {0x3C00, 0x7BFF}, {0x3800, 0x0000}, {0x2B55, 0x0000}};
    for (const auto& [factor, bias] : factors) {
      std::vector<uint16_t> weight(kWidth, factor), biases(kWidth, bias), out(all.size() * kWidth);
      int64_t words = 0;
      uvg::LinearParams p{};
      p.depth = 1, p.width = kWidth, p.dtype = uvg::Dtype::kFloat16, p.threads = 1, p.words = &words;
      uvg::linear_words(p);
      std::vector<uint32_t> packed(static_cast<size_t>(words));
      p.weight = weight.data(), p.pack_into = packed.data();
      uvg::linear_pack(p);
      p.x = all.data(), p.packed = packed.data(), p.bias = biases.data(), p.rows = 0x10000, p.x_row = 1;
      p.out_row = kWidth, p.out = out.data();
      uvg::linear_forward(p);
      for (size_t i = 0; i < out.size(); ++i) {
        const uint16_t want = to_half(to_float(all[i / kWidth]) * to_float(factor) + to_float(bias));
        CHECK(out[i] == want || (is_nan(out[i]) && is_nan(want)));
      }
    }
  }
}

}  // namespace

int main() {
  const std::vector<float> from = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  std::vector<float> to(6, -1);
  uvg::PackValuesParams p{from.data(), 2, 3, 6, 2, uvg::Dtype::kFloat32, uvg::Dtype::kFloat32, to.data()};
  uvg::pack_values(p);
  CHECK(to == std::vector<float>({0, 2, 4, 6, 8, 10}));
  p.row_step = 0, p.step = 1;  // a row that is repeated
  uvg::pack_values(p);
  CHECK(to == std::vector<float>({0, 1, 2, 0, 1, 2}));

  std::vector<uvg::BFloat16> half(6);
  p.row_step = 1, p.step = 4, p.dtype_to = uvg::Dtype::kBFloat16, p.to = half.data();
  uvg::pack_values(p);
  p = {half.data(), 3, 2, 1, 3, uvg::Dtype::kBFloat16, uvg::Dtype::kFloat32, to.data()};
  uvg::pack_values(p);
  CHECK(to == std::vector<float>({0, 1, 4, 5, 8, 9}));
  std::vector<uvg::BFloat16> again(6);
  p = {half.data(), 1, 6, 0, 1, uvg::Dtype::kBFloat16, uvg::Dtype::kBFloat16, again.data()};
  uvg::pack_values(p);
  for (int i = 0; i < 6; ++i) CHECK(again[i].bits == half[i].bits);

  CHECK(rounded(1.0F) == 0x3F80 && rounded(-2.0F) == 0xC000 && rounded(-0.0F) == 0x8000);
  CHECK(rounded(1.00390625F) == 0x3F80);  // half way to the next, which is odd
  CHECK(rounded(1.01171875F) == 0x3F82);  // half way between an odd one and the next
  CHECK(rounded(1.004F) == 0x3F81 && rounded(3.4e38F) == 0x7F80);
  CHECK(rounded(std::numeric_limits<float>::infinity()) == 0x7F80);
  const uint16_t nan = rounded(std::numeric_limits<float>::quiet_NaN());
  CHECK((nan & 0x7F80) == 0x7F80 && (nan & 0x7F) != 0);

  std::vector<uvg::Float16> fp16(6);
  p = {to.data(), 3, 2, 2, 1, uvg::Dtype::kFloat32, uvg::Dtype::kFloat16, fp16.data()};
  uvg::pack_values(p);
  p = {fp16.data(), 1, 6, 0, 1, uvg::Dtype::kFloat16, uvg::Dtype::kBFloat16, again.data()};
  uvg::pack_values(p);
  p = {again.data(), 1, 6, 0, 1, uvg::Dtype::kBFloat16, uvg::Dtype::kFloat16, fp16.data()};
  uvg::pack_values(p);
  p = {fp16.data(), 1, 6, 0, 1, uvg::Dtype::kFloat16, uvg::Dtype::kFloat32, to.data()};
  uvg::pack_values(p);
  CHECK(to == std::vector<float>({0, 1, 4, 5, 8, 9}));
  fp16_one_by_one(Rounding());
  fp16_in_kernels();
  return uvg::test::finish("pack_values");
}
