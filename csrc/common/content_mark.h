// A number that tells whether memory was rewritten.
#pragma once

#include <cstdint>
#include <cstring>

namespace uvg {

// From 64 places spread over `bytes` of memory, the first and the last among them: a change of all values is seen, one
// of a few need not be.
inline uint64_t content_mark(const void* memory, int64_t bytes) {
  constexpr int64_t kPlaces = 64;
  uint64_t mark = 0xCBF29CE484222325u + static_cast<uint64_t>(bytes);
  const auto* from = static_cast<const char*>(memory);
  if (bytes == 0) return mark;
  const int64_t word = bytes < 8 ? bytes : 8;
  for (int64_t i = 0; i < kPlaces; ++i) {
    uint64_t value = 0;
    std::memcpy(&value, from + (bytes - word) * i / (kPlaces - 1), static_cast<size_t>(word));
    mark = (mark ^ value) * 0x100000001B3u;
    mark ^= mark >> 29;
  }
  return mark;
}

}  // namespace uvg
