// Values that lie apart, as packed ones: all steps, both dtypes, rounding to nearest with ties to even.
#include "common/pack_values.h"

#include <limits>
#include <vector>

#include "tests/check.h"

namespace {

uint16_t rounded(float value) {
  uvg::BFloat16 to{};
  uvg::convert(value, to);
  return to.bits;
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
  return uvg::test::finish("pack_values");
}
