// The choice of an instruction set: strongest by default, the wish if it can be had, else a clear error.
#include "common/cpu_features.h"

#include <stdexcept>
#include <string>

#include "tests/check.h"

namespace {

std::string refusal(const std::string& wish, const std::vector<uvg::Isa>& usable) {
  try {
    uvg::choose_isa(wish, usable);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

}  // namespace

int main() {
  using uvg::Isa;
  const std::vector<Isa> usable = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512};

  CHECK(uvg::choose_isa("", usable) == Isa::kAvx512);
  CHECK(uvg::choose_isa("avx2", usable) == Isa::kAvx2);
  CHECK(uvg::choose_isa("generic", {Isa::kGeneric}) == Isa::kGeneric);
  CHECK(refusal("avx512_bf16", usable).find("(generic, avx2, avx512), got 'avx512_bf16'") != std::string::npos);
  CHECK(refusal("AVX2", usable).find("must be one of generic, neon, neon_bf16, avx2") != std::string::npos);

  CHECK(uvg::supported_isas().front() == Isa::kGeneric);
  CHECK(uvg::compiled_isas().front() == Isa::kGeneric);
  return uvg::test::finish("cpu_features");
}
