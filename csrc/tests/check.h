// The whole test framework: CHECK counts, `finish` prints and gives the exit code.
#pragma once

#include <cstdio>

namespace uvg::test {

inline int passed = 0;
inline int failed = 0;

inline int finish(const char* name) {
  std::printf("%s: %d passed, %d failed\n", name, passed, failed);
  return failed || !passed ? 1 : 0;
}

}  // namespace uvg::test

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (condition) {                                                               \
      ++uvg::test::passed;                                                         \
    } else {                                                                       \
      ++uvg::test::failed;                                                         \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                              \
  } while (0)
