// What a kernel's accesses cost the memory system, counted per line of source.
//
// The n-th execution of one line by the lanes of a warp, between two points where the warp meets, is one request, as on
// the device. Global memory: 32-byte sectors. Shared memory: wavefronts over 32 banks of 4 bytes; a request of 8 (16)
// bytes a lane is served in 2 (4) phases of neighbouring lanes.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "sim/where.h"

namespace sim {

enum class Space : uint8_t { kGlobal, kShared };
enum class Kind : uint8_t { kLoad, kStore, kAtomic };

// One line's traffic with accesses of one width.
struct LineTraffic {
  int64_t bytes = 0, requests = 0;
  int64_t transactions = 0;  // sectors or wavefronts
  int64_t ideal = 0;         // the fewest that could carry the same bytes
};

using LineKey = std::tuple<Space, Kind, int, const char*, int>;  // bytes of one access; file and line

struct Launch {
  int64_t grid_x, grid_y, grid_z, threads, shared_bytes;
};

struct Counters {
  std::map<LineKey, LineTraffic> lines;
  std::vector<Launch> launches;  // in order
  int64_t blocks = 0, barriers = 0, shuffles = 0, matrix_flops = 0;

  // Sums by name: "<space>_<kind>_bytes_<width>", "<space>_requests", "global_sectors", "global_sectors_ideal",
  // "shared_wavefronts", "shared_wavefronts_ideal", "launches", "blocks", "barriers", "shuffles", "matrix_flops".
  std::map<std::string, int64_t> totals() const;

  // "<file:line> <space> <kind> <width>" to {bytes, requests, transactions, ideal}.
  std::map<std::string, std::array<int64_t, 4>> by_line() const;
};

Counters& counters();

// The open requests of one warp.
class WarpTraffic {
 public:
  void add(Space space, Kind kind, int lane, const void* address, int bytes, Where where);
  void flush();  // the warp has met: what is open is complete

 private:
  struct Request {
    uint32_t lanes = 0;
    uintptr_t address[32];
  };
  struct Site {
    Where where;
    Space space;
    Kind kind;
    int bytes;
    LineTraffic* line;
    uint32_t seen[32] = {};
    std::vector<Request> requests;
  };
  static void count(const Site& site, const Request& request);

  std::vector<Site> sites_;
};

}  // namespace sim
