// The measure by which kernel_test.h judges: what a kernel never wrote is NaN, and no later value hides it.
#include "tests/kernel_test.h"

using namespace uvg::test;

int main() {
  const std::vector<double> want = {1, -2, 4};
  Array got(uvg::Dtype::kFloat32, 3);
  CHECK(std::isnan(worst(got, want)));
  for (int64_t missing = 0; missing < 3; ++missing) {
    got = Array(uvg::Dtype::kFloat32, 3);
    for (int64_t i = 0; i < 3; ++i) {
      if (i != missing) got.set(i, static_cast<float>(want[i]));
    }
    CHECK(std::isnan(worst(got, want)));
  }
  for (int64_t i = 0; i < 3; ++i) got.set(i, static_cast<float>(want[i]));
  CHECK(worst(got, want) == 0);
  got.set(1, -1.0f);
  CHECK(worst(got, want) == 0.25);
  CHECK(worst(Array(), {}) == 0);
  return finish("worst");
}
