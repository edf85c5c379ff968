// Places in kernel source, and the error that names one.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

namespace sim {

struct Where {
  const char* file;
  int line;

  // As a default argument: the line that calls the function which has it.
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

inline bool operator==(Where a, Where b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }
inline bool operator!=(Where a, Where b) { return !(a == b); }

inline std::string text(Where where) { return std::string(where.file) + ":" + std::to_string(where.line); }

// What a kernel did wrong: "file:line: block (x,y,z) thread (x,y,z): ...".
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace sim
