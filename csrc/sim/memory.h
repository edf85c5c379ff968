// Shared and global memory as the simulator sees it: bounds, alignment, initialisation, copies in flight, races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "sim/traffic.h"
#include "sim/where.h"

namespace sim {

// A range of global memory that the next launches may touch. One that kernels only read needs no race tracking.
void register_buffer(const void* begin, size_t bytes, bool writable);
void forget_buffers();

// One access of the current thread. Throws Error on a fault; counts it. The caller then moves the bytes.
void access(Space space, Kind kind, const void* address, int bytes, Where where);

// cp.async: bytes arrive in shared memory only when the thread waits for their group.
void async_copy(void* to, const void* from, int bytes, int source_bytes, Where where);
void async_commit();
void async_wait(int groups_in_flight);

// Shared memory of the running block.
std::byte* shared_memory();
void new_shared_memory(size_t bytes);
void new_launch();

}  // namespace sim
