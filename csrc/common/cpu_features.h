// Which instruction set the CPU kernels use: what this CPU has, what this build holds, what the user asks for.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace uvg {

// Weakest first within a family. Kernels are compiled once per set and chosen at load.
enum class Isa { kGeneric, kNeon, kNeonBf16, kAvx2, kAvx512, kAvx512Bf16 };

const char* isa_name(Isa isa);

// Sets that this CPU and its operating system run, weakest first; always begins with kGeneric.
std::vector<Isa> supported_isas();

// Sets that this build holds kernels for, weakest first; always begins with kGeneric.
std::vector<Isa> compiled_isas();

// The strongest of `usable` for an empty wish, else the wish. Throws std::invalid_argument on a name that is
// unknown or not in `usable`.
Isa choose_isa(const std::string& wish, const std::vector<Isa>& usable);

// What runs here: supported and compiled, lowered by UVG_CPU_ISA if that is set. Throws as choose_isa does.
Isa active_isa();

// active_isa() of the first call, or what use_isa() set since: what the kernels run in.
Isa isa_in_use();

// Run the kernels in another set from now on, by its name. Throws as choose_isa does. For tests and benches.
void use_isa(const std::string& name);

// Single features and whether the CPU has them, for reports.
std::vector<std::pair<const char*, bool>> cpu_flags();

}  // namespace uvg
