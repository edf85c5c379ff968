// What moe_dispatch and moe_combine share: slots (the choices of the rows, in order) and their places among the grouped
// rows.
//
// One launch an op and direction. Nothing orders the blocks of a launch, so each of them works out the places of its
// own slots from the whole table of slots. That is 4 bytes a slot and block out of the L2 cache: at most 256 blocks,
// each with neighbouring rows, keep it at a quarter of the bytes of the rows (K = 2, 1,536 wide, bf16), for any number
// of rows.
#pragma once

#include "cuda/rows.h"

namespace uvg::cuda {

constexpr int kSlotWarps = 16, kSlotThreads = kSlotWarps * gpu::kWarp, kSlotBlocks = 256;  // untuned
constexpr int kTableStep = 4;  // entries of the table that a thread has on their way; untuned

// The rows of a block.
struct BlockRows {
  int64_t first, last;

  UVG_DEVICE BlockRows(int64_t rows, int64_t of_block)
      : first(gpu::block_x() * of_block), last(gpu::min(rows, first + of_block)) {}
};

// body(index, value) for all of table[count], the block's threads together; beyond it index is not below count. Whole
// warps are at the same index / 32.
template <typename F>
UVG_DEVICE void each_of_table(const int32_t* table, int64_t count, F body) {
  for (int64_t first = threadIdx.x; first - threadIdx.x < count; first += kTableStep * kSlotThreads) {
    int32_t values[kTableStep] = {};
#pragma unroll
    for (int i = 0; i < kTableStep; ++i) {
      const int64_t index = first + i * kSlotThreads;
      if (index < count) values[i] = gpu::load_global(table + index);
    }
#pragma unroll
    for (int i = 0; i < kTableStep; ++i) body(first + i * kSlotThreads, values[i]);
  }
}

// places[order[r]] = r, for the slots of the block's rows.
template <typename Params>
UVG_DEVICE void find_places(const Params& p, const BlockRows& rows) {
  const int64_t count = p.rows * p.top_k, first = rows.first * p.top_k, last = rows.last * p.top_k;
  each_of_table(p.order, count, [&](int64_t r, int32_t slot) {
    if (r < count && slot >= first && slot < last) gpu::store_global(p.places + slot, static_cast<int32_t>(r));
  });
  gpu::block_barrier();
}

// Runs kernel(params, rows of a block), one block also where there is no row.
template <typename Params>
void launch_slots(void (*kernel)(Params, int64_t), size_t shared_bytes, gpu::Stream stream, const Params& p) {
  const int64_t even = gpu::ceil_div(p.rows, kSlotBlocks), of_block = even < kSlotWarps ? kSlotWarps : even;
  const int64_t blocks = p.rows == 0 ? 1 : gpu::ceil_div(p.rows, of_block);
  gpu::launch(kernel, {blocks}, kSlotThreads, shared_bytes, stream, p, of_block);
}

// body(Tag<T>{}, std::integral_constant<int, kVector>{}) with 16-byte accesses where rows and addresses allow them.
template <typename Params, typename F>
void with_vectors(const Params& p, std::initializer_list<const void*> pointers, F body) {
  with_dtype(p.dtype, [&](auto tag) {
    constexpr int kVector = 16 / sizeof(typename decltype(tag)::Type);
    if (p.width % kVector == 0 && aligned(pointers)) {
      body(tag, std::integral_constant<int, kVector>{});
    } else {
      body(tag, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace uvg::cuda
