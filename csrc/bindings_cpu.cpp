// uvg_engine._cpu: what the CPU core offers to Python. Pointers, sizes and plain values; no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/philox.h"

namespace py = pybind11;

namespace {

std::array<uint32_t, 4> philox4x32(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const uvg::PhiloxWords w =
      uvg::philox4x32({counter[0], counter[1], counter[2], counter[3]}, uvg::PhiloxKey{key[0], key[1]});
  return {w.w0, w.w1, w.w2, w.w3};
}

std::vector<std::string> isa_names(const std::vector<uvg::Isa>& isas) {
  std::vector<std::string> out;
  for (uvg::Isa isa : isas) out.emplace_back(uvg::isa_name(isa));
  return out;
}

py::dict cpu_features() {
  py::dict flags;
  for (const auto& [name, present] : uvg::cpu_flags()) flags[name] = present;
  py::dict out;
  out["isa"] = uvg::isa_name(uvg::active_isa());
  out["supported"] = isa_names(uvg::supported_isas());
  out["flags"] = flags;
  return out;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_FULL_VER);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict out;
  out["version"] = UVG_VERSION;
  out["compiler"] = compiler();
  out["isa"] = isa_names(uvg::compiled_isas());
#if defined(_OPENMP)
  out["openmp"] = true;
#else
  out["openmp"] = false;
#endif
  return out;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU core of uvg_engine.";
  m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"),
        "Four uint32 words of Philox4x32-10 for a counter of 4 and a key of 2 uint32 words.");
  m.def("cpu_features", &cpu_features,
        "Instruction set in use (UVG_CPU_ISA lowers it; ValueError on one this CPU or build lacks), those that the "
        "CPU supports, and single feature flags.");
  m.def("build_info", &build_info, "Version, compiler, instruction sets compiled in, OpenMP or not.");
}
