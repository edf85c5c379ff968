// Planted bugs, one for each detector: the message must name the fault, the line, the block and the thread. And right
// kernels, whose results and counts are known.
#include <cstdio>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "common/gpu_launch.h"
#include "common/gpu_math.h"
#include "common/gpu_memory.h"
#include "common/gpu_warp.h"
#include "tests/check.h"

namespace gpu = uvg::gpu;

namespace {

const char* const kOrders[] = {"forward", "reverse", "7", "8", "9"};
int planted_line = 0;

// Notes the line of the bug.
#define PLANTED(...)         \
  do {                       \
    planted_line = __LINE__; \
    __VA_ARGS__;             \
  } while (0)

int x() { return static_cast<int>(threadIdx.x); }

// Gives every byte of the block's 1024 a value, so that a fault is not that there is none.
void write_all() {
  gpu::store_shared(gpu::shared_memory<gpu::Pack<float, 4>>() + x(), gpu::Pack<float, 4>{});
  gpu::block_barrier();
}

void run(const std::function<void()>& kernel, int threads = 64, int64_t blocks = 1, size_t shared = 1024) {
  sim::machine().run({static_cast<unsigned>(blocks)}, {static_cast<unsigned>(threads)}, shared, kernel);
}

// The message of the error that the kernel must end in, in every order of threads.
void expect(const char* name, const std::string& message, const std::function<void()>& kernel, int threads = 64,
            int64_t blocks = 1) {
  for (const char* order : kOrders) {
    sim::machine().set_order(order);
    std::string said = "no error";
    try {
      run(kernel, threads, blocks);
    } catch (const sim::Error& error) {
      said = error.what();
    }
    const std::string start = "csrc/sim/tests/test_sim.cpp:" + std::to_string(planted_line) + ": block (";
    const bool right = said.rfind(start, 0) == 0 && said.find(" thread (") != std::string::npos &&
                       said.find(message) != std::string::npos;
    CHECK(right);
    if (!right) std::fprintf(stderr, "%s, order %s: %s\n", name, order, said.c_str());
  }
  sim::machine().set_order("forward");
  sim::forget_buffers();
}

void out_of_bounds_and_misaligned() {
  std::vector<float> in(64), out(64);
  const auto buffers = [&] {
    sim::register_buffer(in.data(), in.size() * 4, false);
    sim::register_buffer(out.data(), out.size() * 4, true);
  };
  buffers();
  expect("load beyond", "out of bounds: reads 4 bytes at offset 256 of a global buffer of 256 bytes",
         [&] { PLANTED(gpu::load_global(in.data() + 1 + x())); });
  buffers();
  expect("store beyond", "out of bounds: writes 4 bytes at offset 256 of a global buffer of 256 bytes",
         [&] { PLANTED(gpu::store_global(out.data() + 1 + x(), 0.0f)); });
  buffers();
  expect("null", "out of bounds: reads at an address in no buffer",
         [&] { PLANTED(gpu::load_global(static_cast<float*>(nullptr))); });
  buffers();
  expect("store to an input", "writes 4 bytes at offset 0 of a global buffer, which is an input",
         [&] { PLANTED(gpu::store_global(in.data(), 0.0f)); });
  buffers();
  expect("misaligned global", "reads 16 bytes at offset 4 of a global buffer, which is not aligned to 16",
         [&] { PLANTED(gpu::load_global(reinterpret_cast<gpu::Pack<float, 4>*>(in.data() + 1))); });
  expect("shared beyond", "out of bounds: writes 4 bytes at offset 1024 of shared memory of 1024 bytes",
         [] { PLANTED(gpu::store_shared(gpu::shared_memory<float>() + 256, 0.0f)); });
  expect("shared before", "out of bounds: writes 4 bytes at offset -4 of shared memory",
         [] { PLANTED(gpu::store_shared(gpu::shared_memory<float>() - 1, 0.0f)); });
  expect("misaligned shared", "writes 4 bytes at offset 2 of shared memory, which is not aligned to 4",
         [] { PLANTED(gpu::store_shared(reinterpret_cast<float*>(gpu::shared_memory<char>() + 2), 0.0f)); });
}

void uninitialised_and_in_flight() {
  expect("uninitialised", "reads 4 bytes at offset 128 of shared memory, which nothing has written", [] {
    if (x() == 0) gpu::store_shared(gpu::shared_memory<float>(), 1.0f);
    gpu::block_barrier();
    PLANTED(gpu::load_shared(gpu::shared_memory<float>() + (x() == 3 ? 32 : 0)));
  });
  std::vector<float> in(256);
  const auto copy = [&](bool lax) {
    gpu::async_copy_16(gpu::shared_memory<float>() + 4 * x(), in.data() + 4 * x(), true);
    gpu::async_commit();
    lax ? gpu::async_wait<1>() : gpu::async_wait<0>();
  };
  const auto buffer = [&] { sim::register_buffer(in.data(), in.size() * 4, false); };
  buffer();
  expect("not waited for", "has not been waited for", [&] {
    copy(true);
    gpu::block_barrier();
    PLANTED(gpu::load_shared(gpu::shared_memory<float>() + x()));
  });
  buffer();
  expect("no barrier after the wait", "with no barrier between", [&] {
    write_all();
    float* to = gpu::shared_memory<float>();
    PLANTED(gpu::async_copy_16(to + 4 * x(), in.data(), true); gpu::async_commit(); gpu::async_wait<0>();
            gpu::load_shared(to + 4 * (x() ^ 1)));
  });
  buffer();
  expect("written while it comes", "writes 4 bytes at offset 0 of shared memory, where a cp.async of thread (", [&] {
    copy(true);
    gpu::block_barrier();
    PLANTED(gpu::store_shared(gpu::shared_memory<float>(), 1.0f));
  });
  buffer();
  expect("copied from beyond", "out of bounds: reads 16 bytes at offset 1024 of a global buffer of 1024 bytes", [&] {
    PLANTED(gpu::async_copy_16(gpu::shared_memory<float>() + 4 * x(), in.data() + 4 * (x() + 1), true));
    gpu::async_commit();
    gpu::async_wait<0>();
  });
  buffer();
  expect("copied to an odd place", "writes 16 bytes at offset 4 of shared memory, which is not aligned to 16",
         [&] { PLANTED(gpu::async_copy_16(gpu::shared_memory<float>() + 1, in.data(), true)); });
  buffer();
  expect("never waited for", "leaves the kernel without waiting for this cp.async",
         [&] { PLANTED(gpu::async_copy_16(gpu::shared_memory<float>() + 4 * x(), in.data(), true)); });
}

void collectives_and_barriers() {
  expect("a lane is missing", "waits for ever for shuffle_xor", [] {
    if (x() != 5) PLANTED(gpu::shuffle_xor(x(), 1));
    if (x() == 5) gpu::named_barrier_wait(1, 64);
  });
  expect("a lane has left", "shuffle_xor", [] {
    if (x() == 5) return;
    PLANTED(gpu::shuffle_xor(x(), 1));
  });
  expect("two places", "warp diverged: this lane is at ", [] {
    uint32_t v = 0;
    PLANTED(if (x() % 2 == 0) v = gpu::shuffle_xor(1u, 1); else v = gpu::ballot(true));
    static_cast<void>(v);
  });
  expect("a thread skips the barrier", "divergent barrier", [] {
    if (x() != 40) PLANTED(gpu::block_barrier());
  });
  expect("counts differ", "named barrier 2 expects",
         [] { PLANTED(gpu::named_barrier_wait(2, x() < 32 ? 64 : 32 + 64)); });
  expect("a barrier that there is not", "named barrier must be 1 to 15, got 16",
         [] { PLANTED(gpu::named_barrier_wait(16, 64)); });
  expect("half a warp", "a named barrier's count must be whole warps, got 48",
         [] { PLANTED(gpu::named_barrier_wait(1, 48)); });
  expect("nobody arrives", "waits for ever for a named barrier", [] {
    if (x() < 32) PLANTED(gpu::named_barrier_wait(3, 64));
  });
}

void races() {
  const auto shared = [](int i) { return gpu::shared_memory<float>() + i; };
  expect("no barrier", "data race: ", [&] {
    write_all();
    PLANTED(gpu::store_shared(shared(x()), 1.0f); gpu::load_shared(shared(x() ^ 32)));
  });
  expect("read before write", "data race: ", [&] {
    write_all();
    PLANTED(gpu::load_shared(shared(x() ^ 32)); gpu::store_shared(shared(x()), 2.0f));
  });
  expect("a shuffle orders no memory", "data race: ", [&] {
    write_all();
    PLANTED(gpu::store_shared(shared(x()), 1.0f); gpu::shuffle_xor(x(), 1); gpu::load_shared(shared(x() ^ 1)));
  });
  expect("a warp's barrier orders no other warp", "data race: ", [&] {
    write_all();
    PLANTED(gpu::store_shared(shared(x()), 1.0f); gpu::warp_barrier(); gpu::load_shared(shared(x() ^ 32)));
  });
  std::vector<int> out(64);
  const auto buffer = [&] { sim::register_buffer(out.data(), out.size() * 4, true); };
  buffer();
  expect("threads", "data race: writes 4 bytes at offset 0 of a global buffer, written by thread (",
         [&] { PLANTED(gpu::store_global(out.data() + x() / 64, 1)); });
  buffer();
  expect("blocks", "written by block number", [&] { PLANTED(gpu::store_global(out.data() + x(), 1)); }, 32, 2);
  buffer();
  expect(
      "an atomic and a store", "data race: ",
      [&] {
        int* to = out.data() + x();
        PLANTED(if (blockIdx.x == 0) gpu::atomic_add_global(to, 1); else gpu::store_global(to, 1));
      },
      32, 2);
}

// ---- what is right stays quiet ----

void right_kernels() {
  std::vector<int> in(128), out(128), count(1);
  std::iota(in.begin(), in.end(), 0);
  for (const char* order : kOrders) {
    sim::machine().set_order(order);
    sim::register_buffer(in.data(), in.size() * 4, false);
    sim::register_buffer(out.data(), out.size() * 4, true);
    sim::register_buffer(count.data(), 4, true);
    run(
        [&] {  // through shared memory and back, twice over the same bytes
          int* s = gpu::shared_memory<int>();
          int value = gpu::load_global(in.data() + 64 * blockIdx.x + x());
          for (int turn = 0; turn < 2; ++turn) {
            gpu::store_shared(s + x(), value);
            gpu::block_barrier();
            value = gpu::load_shared(s + 63 - x());
            gpu::block_barrier();
          }
          gpu::store_shared(s + x(), value);
          gpu::warp_barrier();
          value = gpu::load_shared(s + (x() ^ 1)) + gpu::warp_sum(1);
          gpu::atomic_add_global(count.data(), 1);
          gpu::store_global(out.data() + 64 * blockIdx.x + x(), value);
        },
        64, 2);
    bool right = true;
    for (int i = 0; i < 128; ++i) right &= out[i] == (i ^ 1) + 32;
    CHECK(right);
    CHECK(count[0] == 128);
    count[0] = 0;
    run([&] {  // a producer warp hands over to a consumer warp by named barriers
      int* s = gpu::shared_memory<int>();
      for (int turn = 0; turn < 3; ++turn) {
        if (x() < 32) {
          if (turn > 0) gpu::named_barrier_wait(2, 64);
          gpu::store_shared(s + x(), turn + x());
          gpu::named_barrier_arrive(1, 64);
        } else {
          gpu::named_barrier_wait(1, 64);
          if (gpu::load_shared(s + x() - 32) != turn + x() - 32) out[0] = -1;
          if (turn < 2) gpu::named_barrier_arrive(2, 64);
        }
      }
    });
    CHECK(out[0] != -1);
    run([&] {  // lanes of a third of the warp find each other, and a vote finds them
      const int third = gpu::lane() % 3;
      if (gpu::lanes_with(third - 1) != 0x49249249u << third) out[0] = -1;
      if (gpu::ballot(third == 1) != 0x92492492u) out[0] = -1;
    });
    CHECK(out[0] != -1);
    sim::forget_buffers();
  }
  sim::machine().set_order("forward");
}

// A 16x16 by 16x8 product through cp.async, ldmatrix and mma, every element checked.
template <typename T>
void matrix_product() {
  std::vector<T> a(256), b(128);
  for (int i = 0; i < 256; ++i) a[i] = gpu::from_float<T>(static_cast<float>(i % 7 - 3));
  for (int i = 0; i < 128; ++i) b[i] = gpu::from_float<T>(static_cast<float>(i % 5 - 2));
  std::vector<float> c(128);
  sim::register_buffer(a.data(), 512, false);
  sim::register_buffer(b.data(), 256, false);
  sim::register_buffer(c.data(), 512, true);
  run(
      [&] {
        T* s = gpu::shared_memory<T>();
        const int lane = gpu::lane();
        gpu::async_copy_16(s + lane * 8, a.data() + lane * 8, true);
        gpu::async_copy_16(s + 256 + lane * 8, b.data() + lane % 16 * 8, lane < 16);  // 16 rows of 8, then zeros
        gpu::async_commit();
        gpu::async_wait<0>();
        gpu::warp_barrier();
        uint32_t fa[4], fb[4];
        gpu::load_matrices(fa, s + lane % 16 * 16 + lane / 16 * 8);
        gpu::load_matrices_transposed(fb, s + 256 + lane * 8);
        float d[4] = {};
        gpu::multiply<T>(d, fa, fb[0], fb[1]);
        for (int i = 0; i < 4; ++i) {
          gpu::store_global(c.data() + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, d[i]);
        }
      },
      32);
  bool right = true;
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      float want = 0.0f;
      for (int k = 0; k < 16; ++k) want += gpu::to_float(a[m * 16 + k]) * gpu::to_float(b[k * 8 + n]);
      right &= c[m * 8 + n] == want;
    }
  }
  CHECK(right);
  sim::forget_buffers();
}

int64_t counted(const char* name) { return sim::counters().totals()[name]; }

void counts() {
  alignas(32) static float in[32 * 32];
  sim::register_buffer(in, sizeof(in), false);
  sim::counters() = {};
  run([&] { gpu::load_global(in + x()); }, 32);
  CHECK(counted("global_sectors") == 4 && counted("global_sectors_ideal") == 4 && counted("global_requests") == 1);
  CHECK(counted("global_load_bytes_4") == 128 && counted("launches") == 1 && counted("blocks") == 1);
  sim::counters() = {};
  run([&] { gpu::load_global(in + 32 * x()); }, 32);  // a column: a sector for each lane
  CHECK(counted("global_sectors") == 32 && counted("global_sectors_ideal") == 4);
  sim::counters() = {};
  run([&] { gpu::store_shared(gpu::shared_memory<float>() + 32 * x(), 0.0f); }, 32, 1, 4096);  // all in bank 0
  CHECK(counted("shared_wavefronts") == 32 && counted("shared_wavefronts_ideal") == 1);
  sim::counters() = {};
  run(
      [&] {
        for (int i = 0; i < 3; ++i) {
          gpu::store_shared(gpu::shared_memory<gpu::Pack<float, 4>>() + x(), gpu::Pack<float, 4>{});
        }
        gpu::block_barrier();
      },
      32);
  CHECK(counted("shared_wavefronts") == 12 && counted("shared_wavefronts_ideal") == 12 && counted("barriers") == 1);
  CHECK(counted("shared_requests") == 3 && counted("shared_store_bytes_16") == 3 * 512);
  sim::counters() = {};
  matrix_product<uvg::BFloat16>();
  CHECK(counted("matrix_flops") == 4096);
  sim::forget_buffers();
}

}  // namespace

int main() {
  out_of_bounds_and_misaligned();
  uninitialised_and_in_flight();
  collectives_and_barriers();
  races();
  right_kernels();
  matrix_product<uvg::BFloat16>();
  matrix_product<uvg::Float16>();
  counts();
  return uvg::test::finish("test_sim");
}
