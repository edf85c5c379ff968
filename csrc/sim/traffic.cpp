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

// Distinct values of `all`, which is sorted on the way.
int64_t distinct(std::vector<uintptr_t>* all) {
  std::sort(all->begin(), all->end());
  return std::unique(all->begin(), all->end()) - all->begin();
}

void count_global(const std::vector<uintptr_t>& addresses, int bytes, LineTraffic* line) {
  std::vector<uintptr_t> sectors, starts = addresses;
  for (uintptr_t a : addresses) {
    for (uintptr_t s = a / kSector; s <= (a + bytes - 1) / kSector; ++s) sectors.push_back(s);
  }
  line->transactions += distinct(&sectors);
  line->ideal += (distinct(&starts) * bytes + kSector - 1) / kSector;
}

void count_shared_phase(const std::vector<uintptr_t>& addresses, int bytes, LineTraffic* line) {
  if (addresses.empty()) return;
  std::vector<uintptr_t> words;
  for (uintptr_t a : addresses) {
    for (uintptr_t w = a / kWord; w <= (a + bytes - 1) / kWord; ++w) words.push_back(w);
  }
  const int64_t total = distinct(&words);
  int64_t used[kBanks] = {}, most = 0;
  for (int64_t i = 0; i < total; ++i) most = std::max(most, ++used[words[static_cast<size_t>(i)] % kBanks]);
  line->transactions += most;
  line->ideal += 1;
}

}  // namespace

Counters& counters() {
  static Counters all;
  return all;
}

std::map<std::string, int64_t> Counters::totals() const {
  std::map<std::string, int64_t> out = {{"launches", launches}, {"blocks", blocks},      {"barriers", barriers},
                                        {"shuffles", shuffles}, {"global_requests", 0},  {"shared_requests", 0},
                                        {"global_sectors", 0},  {"shared_wavefronts", 0}};
  out["matrix_flops"] = matrix_flops, out["global_sectors_ideal"] = 0, out["shared_wavefronts_ideal"] = 0;
  for (const auto& [key, line] : lines) {
    const auto& [space, kind, width, place] = key;
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
    const auto& [space, kind, width, place] = key;
    out[place + " " + name(space) + " " + name(kind) + " " + std::to_string(width)] = {line.bytes, line.requests,
                                                                                       line.transactions, line.ideal};
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
    sites_.push_back({where, space, kind, bytes, {}, {}});
    site = std::prev(sites_.end());
  }
  const uint32_t turn = site->seen[lane]++;
  if (site->requests.size() <= turn) site->requests.resize(turn + 1);
  Request& request = site->requests[turn];
  request.lanes |= 1u << lane;
  request.address[lane] = reinterpret_cast<uintptr_t>(address);
}

void WarpTraffic::count(const Site& site, const Request& request, LineTraffic* line) {
  std::vector<uintptr_t> addresses;
  const int phase = site.space == Space::kGlobal ? 32 : site.bytes <= 4 ? 32 : 128 / site.bytes;
  for (int first = 0; first < 32; first += phase) {
    addresses.clear();
    for (int lane = first; lane < first + phase; ++lane) {
      if (request.lanes >> lane & 1) addresses.push_back(request.address[lane]);
    }
    line->bytes += static_cast<int64_t>(addresses.size()) * site.bytes;
    site.space == Space::kGlobal ? count_global(addresses, site.bytes, line)
                                 : count_shared_phase(addresses, site.bytes, line);
  }
  line->requests += 1;
}

void WarpTraffic::flush() {
  for (Site& site : sites_) {
    if (site.requests.empty()) continue;
    LineTraffic& line = counters().lines[{site.space, site.kind, site.bytes, text(site.where)}];
    for (const Request& request : site.requests) count(site, request, &line);
    site.requests.clear();
    std::fill(std::begin(site.seen), std::end(site.seen), 0);
  }
}

}  // namespace sim
