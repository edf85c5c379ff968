#include "sim/memory.h"

#include <algorithm>
#include <cstring>

#include "sim/machine.h"

namespace sim {
namespace {

constexpr uintptr_t kLine = 16;          // bytes that share one entry of the shadow
constexpr size_t kPageLines = 256;       // lines that come into being together
constexpr size_t kAlignment = 1024;      // of shared memory
constexpr unsigned char kPoison = 0xFF;  // NaN in every float format

// Who touched which bytes of a line, since the last barrier of the whole block.
struct Record {
  uint32_t thread, clock;
  uint16_t mask;
  Kind kind;
  Where where;
};

// The same across blocks, which nothing orders within a launch.
struct BlockRecord {
  uint32_t block;
  uint16_t mask;
  Kind kind;
  Where where;
};

struct Line {
  uint64_t generation = 0;
  uint64_t launch = 0;
  uint16_t written = 0;             // shared: holds a value
  std::vector<Record> in_flight;    // shared: targets of copies not waited for
  std::vector<Record> records;      // of this block
  std::vector<BlockRecord> blocks;  // global
};

struct Region {
  uintptr_t begin = 0;
  size_t bytes = 0;
  bool writable = true;
  std::vector<std::unique_ptr<Line[]>> pages;  // of lines, where one was touched: buffers may be larger than memory

  bool holds(uintptr_t address, size_t size) const {
    return address >= begin && address - begin <= bytes && size <= bytes - (address - begin);
  }
  void has_lines() {
    pages.clear();
    pages.resize(bytes / kLine / kPageLines + 2);
  }
  Line& line(uintptr_t address) {
    const uintptr_t number = address / kLine - begin / kLine;
    auto& page = pages[number / kPageLines];
    if (page == nullptr) page = std::make_unique<Line[]>(kPageLines);
    return page[number % kPageLines];
  }
};

uint64_t launch_number = 0;
std::vector<Region> buffers;
Region shared;
std::unique_ptr<std::byte[]> shared_storage;

bool conflict(Kind a, Kind b) { return !(a == Kind::kLoad && b == Kind::kLoad) && !(a == b && a == Kind::kAtomic); }

const char* verb(Kind kind) {
  return kind == Kind::kLoad ? "reads" : kind == Kind::kStore ? "writes" : "changes by an atomic";
}

const char* participle(Kind kind) {
  return kind == Kind::kLoad ? "read" : kind == Kind::kStore ? "written" : "changed by an atomic";
}

// One access, told in words where something is wrong with it.
struct Access {
  Space space;
  Kind kind;
  uintptr_t offset;  // from the region's begin
  int bytes;
  Where where;

  std::string text() const {
    return std::string(verb(kind)) + " " + std::to_string(bytes) + " bytes at offset " +
           std::to_string(static_cast<int64_t>(offset)) + " of ";
  }

  // "reads 4 bytes at offset 8 of shared memory" and what is wrong with that.
  [[noreturn]] void fail(const std::string& fault, const char* kind_of_fault = "") const {
    const char* memory = space == Space::kShared ? "shared memory" : "a global buffer";
    machine().fail(where, kind_of_fault + text() + memory + fault);
  }
};

// Calls body(line, mask) for each line that [address, address + bytes) touches.
template <typename F>
void each_line(Region* region, uintptr_t address, int bytes, F body) {
  const uintptr_t end = address + static_cast<uintptr_t>(bytes);
  while (address < end) {
    const uintptr_t stop = std::min(end, (address / kLine + 1) * kLine);
    const auto mask = static_cast<uint16_t>(((1u << (stop - address)) - 1) << (address % kLine));
    body(region->line(address), mask);
    address = stop;
  }
}

template <typename R>
void overwrite(std::vector<R>* records, uint16_t mask) {
  for (R& r : *records) r.mask = static_cast<uint16_t>(r.mask & ~mask);
  records->erase(std::remove_if(records->begin(), records->end(), [](const R& r) { return r.mask == 0; }),
                 records->end());
}

// Records from before a barrier of the whole block, or of another block, say nothing more.
void forget_what_is_ordered(Line* line) {
  if (line->generation == machine().generation()) return;
  line->records.clear();
  line->generation = machine().generation();
}

void check_threads(Line* line, uint16_t mask, const Access& a) {
  const Machine& m = machine();
  const uint32_t me = machine().thread().number;
  forget_what_is_ordered(line);
  for (const Record& r : line->records) {
    if ((r.mask & mask) == 0 || r.thread == me || !conflict(a.kind, r.kind) || m.ordered(r.thread, r.clock)) continue;
    a.fail(std::string(", ") + participle(r.kind) + " by " + m.thread_name(r.thread) + " at " + text(r.where) +
               " with no barrier between",
           "data race: ");
  }
}

void note_thread(Line* line, uint16_t mask, Kind kind, Where where) {
  const Thread& me = machine().thread();
  if (kind == Kind::kStore) overwrite(&line->records, mask);
  for (Record& r : line->records) {
    if (r.thread == me.number && r.kind == kind && (r.mask == mask || r.clock == me.clock)) {
      r.mask |= mask, r.clock = me.clock, r.where = where;
      return;
    }
  }
  line->records.push_back({me.number, me.clock, mask, kind, where});
}

void check_blocks(Line* line, uint16_t mask, const Access& a) {
  const uint32_t block = machine().block_number();
  if (line->launch != launch_number) {
    line->blocks.clear();
    line->launch = launch_number;
  }
  uint16_t loaded_by_two = 0, loaded = 0;
  for (BlockRecord& r : line->blocks) {
    if (r.kind == Kind::kLoad) loaded_by_two |= loaded & r.mask, loaded |= r.mask;
    if (r.block == block || (r.mask & mask) == 0 || !conflict(a.kind, r.kind)) continue;
    a.fail(std::string(", ") + participle(r.kind) + " by block number " + std::to_string(r.block) + " at " +
               text(r.where) + "; nothing orders blocks",
           "data race: ");
  }
  if (a.kind == Kind::kLoad && (mask & ~loaded_by_two) == 0) return;  // a third reader tells nothing new
  for (BlockRecord& r : line->blocks) {
    if (r.block == block && r.kind == a.kind) {
      r.mask |= mask;
      return;
    }
  }
  line->blocks.push_back({block, mask, a.kind, a.where});
}

void check_alignment(const Access& a, uintptr_t address) {
  if (address % static_cast<uintptr_t>(a.bytes) != 0) a.fail(", which is not aligned to " + std::to_string(a.bytes));
}

void check_settled(const Line& line, uint16_t mask, const Access& a) {
  for (const Record& r : line.in_flight) {
    if ((r.mask & mask) == 0) continue;
    a.fail(", where a cp.async of " + machine().thread_name(r.thread) + " at " + text(r.where) +
           " has not been waited for");
  }
}

Access shared_access(Kind kind, uintptr_t address, int bytes, Where where) {
  const Access a{Space::kShared, kind, address - shared.begin, bytes, where};
  if (!shared.holds(address, static_cast<size_t>(bytes))) {
    a.fail(" of " + std::to_string(shared.bytes) + " bytes", "out of bounds: ");
  }
  check_alignment(a, address);
  return a;
}

Region& global_region(Kind kind, uintptr_t address, int bytes, Where where) {
  const Region* before = nullptr;
  for (Region& r : buffers) {
    if (r.holds(address, static_cast<size_t>(bytes))) return r;
    if (r.begin <= address && (before == nullptr || r.begin > before->begin)) before = &r;
  }
  if (before == nullptr || address == 0) {
    machine().fail(where, std::string("out of bounds: ") + verb(kind) + " at an address in no buffer");
  }
  Access{Space::kGlobal, kind, address - before->begin, bytes, where}.fail(
      " of " + std::to_string(before->bytes) + " bytes", "out of bounds: ");
}

}  // namespace

void register_buffer(const void* begin, size_t bytes, bool writable) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  for (Region& r : buffers) {
    if (r.begin == address && r.bytes == bytes && (r.writable || !writable)) return;
  }
  buffers.push_back({address, bytes, writable, {}});
  if (writable) buffers.back().has_lines();
}

void forget_buffers() { buffers.clear(); }

void new_launch() { ++launch_number; }

void new_shared_memory(size_t bytes) {
  shared_storage = std::make_unique<std::byte[]>(bytes + kAlignment);
  auto begin = reinterpret_cast<uintptr_t>(shared_storage.get());
  begin = (begin + kAlignment - 1) / kAlignment * kAlignment;
  std::memset(reinterpret_cast<void*>(begin), kPoison, bytes);
  shared.begin = begin, shared.bytes = bytes;
  shared.has_lines();
}

std::byte* shared_memory() { return reinterpret_cast<std::byte*>(shared.begin); }

void access(Space space, Kind kind, const void* pointer, int bytes, Where where) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  Thread& me = machine().thread();
  if (space == Space::kShared) {
    const Access a = shared_access(kind, address, bytes, where);
    each_line(&shared, address, bytes, [&](Line& line, uint16_t mask) {
      check_settled(line, mask, a);
      if (kind != Kind::kStore && (mask & ~line.written) != 0) a.fail(", which nothing has written");
      check_threads(&line, mask, a);
      note_thread(&line, mask, kind, where);
      line.written |= mask;
    });
  } else {
    Region& region = global_region(kind, address, bytes, where);
    const Access a{space, kind, address - region.begin, bytes, where};
    check_alignment(a, address);
    if (kind != Kind::kLoad && !region.writable) a.fail(", which is an input");
    if (region.writable) {
      each_line(&region, address, bytes, [&](Line& line, uint16_t mask) {
        check_threads(&line, mask, a);
        note_thread(&line, mask, kind, where);
        check_blocks(&line, mask, a);
      });
    }
  }
  me.warp->traffic.add(space, kind, me.lane, pointer, bytes, where);
}

void async_copy(void* to, const void* from, int bytes, int source_bytes, Where where) {
  if (source_bytes > 0) access(Space::kGlobal, Kind::kLoad, from, source_bytes, where);
  const auto address = reinterpret_cast<uintptr_t>(to);
  const Access a = shared_access(Kind::kStore, address, bytes, where);
  Thread& me = machine().thread();
  each_line(&shared, address, bytes, [&](Line& line, uint16_t mask) {
    check_settled(line, mask, a);
    check_threads(&line, mask, a);
    line.in_flight.push_back({me.number, me.clock, mask, Kind::kStore, where});
  });
  me.copies.back().push_back({to, from, bytes, source_bytes, where});
  me.warp->traffic.add(Space::kShared, Kind::kStore, me.lane, to, bytes, where);
}

void async_commit() { machine().thread().copies.emplace_back(); }

void async_wait(int groups_in_flight) {
  Thread& me = machine().thread();
  while (static_cast<int>(me.copies.size()) - 1 > groups_in_flight) {
    for (const AsyncCopy& c : me.copies.front()) {
      std::memcpy(c.to, c.from, static_cast<size_t>(c.source_bytes));
      std::memset(static_cast<char*>(c.to) + c.source_bytes, 0, static_cast<size_t>(c.bytes - c.source_bytes));
      each_line(&shared, reinterpret_cast<uintptr_t>(c.to), c.bytes, [&](Line& line, uint16_t mask) {
        overwrite(&line.in_flight, mask);
        forget_what_is_ordered(&line);
        note_thread(&line, mask, Kind::kStore, c.where);
        line.written |= mask;
      });
    }
    me.copies.erase(me.copies.begin());
  }
}

}  // namespace sim
