// Philox4x32-10 against Random123's published vectors, and the two maps at their ends.
#include "common/philox.h"

#include "tests/check.h"

namespace {

bool equal(uvg::PhiloxWords got, uvg::PhiloxWords want) {
  return got.w0 == want.w0 && got.w1 == want.w1 && got.w2 == want.w2 && got.w3 == want.w3;
}

}  // namespace

int main() {
  using uvg::philox4x32;
  constexpr uint32_t kOnes = 0xFFFFFFFFu;

  CHECK(equal(philox4x32({0, 0, 0, 0}, {0, 0}), {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  CHECK(equal(philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
              {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK(equal(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
              {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));

  const uvg::PhiloxKey key = uvg::philox_key(-2);
  CHECK(key.lo == 0xFFFFFFFEu && key.hi == kOnes);
  CHECK(uvg::philox_key(int64_t{5} << 32).hi == 5 && uvg::philox_key(int64_t{5} << 32).lo == 0);

  CHECK(uvg::philox_uniform(0) == 0x1p-24f);
  CHECK(uvg::philox_uniform(kOnes) == 1.0f - 0x1p-24f);
  CHECK(uvg::philox_uniform(1u << 31) == 0.5f + 0x1p-24f);

  CHECK(uvg::philox_integer(kOnes, 7) == 6);
  CHECK(uvg::philox_integer(0, 7) == 0);
  CHECK(uvg::philox_integer(kOnes, 1) == 0);
  return uvg::test::finish("philox");
}
