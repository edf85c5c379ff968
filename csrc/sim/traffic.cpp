#include "sim/traffic.h"

#include <algorithm>
#include <iterator>

namespace sim {
namespace {

constexpr int kSector = 32, kBanks = 32, kWord = 4;

const char* name(Space space) { return space == Space::kGlobal ? "global" : "shared"; }

const char* name(Kind kind) {
  switch (kind) {
    case Kind::kLoad:
      return "load";
    case Kind::kStore:
      return "store";
    default:
      return "atomic";
  }
}

// Values of one request: of 32 lanes at most, 16 bytes each.
template <int kMost>
struct Values {
  uintptr_t at[kMost];
  int count = 0;

  void add(uintptr_t value) { at[count++] = value; }

  // Leaves the distinct ones, sorted; how many.
  int64_t distinct() {
    std::sort(at, at + count);
    count = static_cast<int>(std::unique(at, at + count) - at);
    return count;
  }
};

using Addresses = Values<32>;

void count_global(Addresses* addresses, int bytes, LineTraffic* line) {
  Values<64> sectors;  // an access is aligned, but a caller may count others
  for (int i = 0; i < addresses->count; ++i) {
    const uintptr_t a = addresses->at[i];
    for (uintptr_t s = a / kSector; s <= (a + bytes - 1) / kSector; ++s) sectors.add(s);
  }
  line->transactions += sectors.distinct();
  line->ideal += (addresses->distinct() * bytes + kSector - 1) / kSector;
}

void count_shared_phase(const Addresses& addresses, int bytes, LineTraffic* line) {
  if (addresses.count == 0) return;
  Values<64> words;
  for (int i = 0; i < addresses.count; ++i) {
    const uintptr_t a = addresses.at[i];
    for (uintptr_t w = a / kWord; w <= (a + bytes - 1) / kWord; ++w) words.add(w);
  }
  const int64_t total = words.distinct();
  int64_t used[kBanks] = {}, most = 0;
  for (int64_t i = 0; i < total; ++i) most = std::max(most, ++used[words.at[i] % kBanks]);
  line->transactions += most;
  line->ideal += 1;
}

}  // namespace

Counters& counters() {
  static Counters all;
  return all;
}

std::map<std::string, int64_t> Counters::totals() const {
  std::map<std::string, int64_t> out = {{"launches", static_cast<int64_t>(launches.size())},
                                        {"blocks", blocks},
                                        {"barriers", barriers},
                                        {"shuffles", shuffles},
                                        {"global_requests", 0},
                                        {"shared_requests", 0},
                                        {"global_sectors", 0},
                                        {"shared_wavefronts", 0}};
  out["matrix_flops"] = matrix_flops, out["global_sectors_ideal"] = 0, out["shared_wavefronts_ideal"] = 0;
  for (const auto& [key, line] : lines) {
    const auto& [space, kind, width, file, number] = key;
    const std::string prefix = name(space), unit = space == Space::kGlobal ? "_sectors" : "_wavefronts";
    out[prefix + "_" + name(kind) + "_bytes_" + std::to_string(width)] += line.bytes;
    out[prefix + "_requests"] += line.requests;
    out[prefix + unit] += line.transactions;
    out[prefix + unit + "_ideal"] += line.ideal;
  }
  return out;
}

std::map<std::string, std::array<int64_t, 4>> Counters::by_line() const {
  std::map<std::string, std::array<int64_t, 4>> out;
  for (const auto& [key, line] : lines) {
    const auto& [space, kind, width, file, number] = key;
    auto& sum = out[text({file, number}) + " " + name(space) + " " + name(kind) + " " + std::to_string(width)];
    sum[0] += line.bytes, sum[1] += line.requests, sum[2] += line.transactions, sum[3] += line.ideal;
  }
  return out;
}

void WarpTraffic::add(Space space, Kind kind, int lane, const void* address, int bytes, Where where) {
  auto same = [&](const Site& s) {
    return s.where.line == where.line && s.where.file == where.file && s.space == space && s.kind == kind &&
           s.bytes == bytes;
  };
  auto site = std::find_if(sites_.begin(), sites_.end(), same);
  if (site == sites_.end()) {
    LineTraffic* line = &counters().lines[{space, kind, bytes, where.file, where.line}];
    sites_.push_back({where, space, kind, bytes, line, {}, {}});
    site = std::prev(sites_.end());
  }
  const uint32_t turn = site->seen[lane]++;
  if (site->requests.size() <= turn) site->requests.resize(turn + 1);
  Request& request = site->requests[turn];
  request.lanes |= 1u << lane;
  request.address[lane] = reinterpret_cast<uintptr_t>(address);
}

void WarpTraffic::count(const Site& site, const Request& request) {
  LineTraffic* line = site.line;
  const int phase = site.space == Space::kGlobal ? 32 : site.bytes <= 4 ? 32 : 128 / site.bytes;
  for (int first = 0; first < 32; first += phase) {
    Addresses addresses;
    for (int lane = first; lane < first + phase; ++lane) {
      if (request.lanes >> lane & 1) addresses.add(request.address[lane]);
    }
    line->bytes += int64_t{addresses.count} * site.bytes;
    site.space == Space::kGlobal ? count_global(&addresses, site.bytes, line)
                                 : count_shared_phase(addresses, site.bytes, line);
  }
  line->requests += 1;
}

void WarpTraffic::flush() {
  for (Site& site : sites_) {
    if (site.requests.empty()) continue;
    for (const Request& request : site.requests) count(site, request);
    site.requests.clear();
    std::fill(std::begin(site.seen), std::end(site.seen), 0);
  }
}

}  // namespace sim
