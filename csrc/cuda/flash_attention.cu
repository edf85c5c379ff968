#include "uvg/flash_attention.h"

#include "cuda/attention_tiles.h"

namespace uvg::cuda {
namespace {

using Params = FlashAttentionCudaParams;
constexpr int kStages = 2, kKeys = 64;  // key tiles in flight, keys of one; untuned

// One block: 64 queries of one head of one sample, 16 a warp; keys come in tiles, two in flight; online softmax.
template <typename T, int kHead>
__global__ void __launch_bounds__(kAttentionThreads, 2) forward_kernel(Params p) {
  const QueryTile tile(p.q_spans, p.samples, p.spans_q, gpu::block_x());
  if (tile.sample < 0) return;
  const SampleRows queries{p.q_spans + tile.sample * p.spans_q * 2, p.spans_q};
  const SampleRows keys{p.k_spans + tile.sample * p.spans_k * 2, p.spans_k};
  const int64_t num_keys = keys.size(), head = gpu::block_y(), stride = p.heads * p.width;
  const int num_tiles = static_cast<int>((num_keys + kKeys - 1) / kKeys);
  if (num_tiles == 0) return;

  T* shared = gpu::shared_memory<T>();
  const Tile<T, kHead> q{shared};
  const auto k_tile = [&](int t) { return Tile<T, kHead>{shared + (kTile + t % kStages * 2 * kKeys) * kHead}; };
  const auto v_tile = [&](int t) { return Tile<T, kHead>{shared + (kTile + (t % kStages * 2 + 1) * kKeys) * kHead}; };
  const int64_t offset = head * p.width;
  const auto copy_keys = [&](int t) {
    const auto row = [&](int r) { return keys.row(int64_t{t} * kKeys + r); };
    copy_tile<kKeys>(k_tile(t), static_cast<const T*>(p.k) + offset, stride, p.width, row);
    copy_tile<kKeys>(v_tile(t), static_cast<const T*>(p.v) + offset, stride, p.width, row);
    gpu::async_commit();
  };
  copy_tile<kTile>(q, static_cast<const T*>(p.q) + offset, stride, p.width,
                   [&](int r) { return queries.row(tile.first + r); });
  copy_keys(0);

  const int lane = gpu::lane(), own = gpu::warp_in_block() * 16;
  const float scale = p.scale * kLog2e;
  float acc[kHead / 8][4] = {}, largest[2] = {-kInfinity, -kInfinity}, sum[2] = {0.0f, 0.0f};
  for (int t = 0; t < num_tiles; ++t) {
    if (t + 1 < num_tiles) {
      copy_keys(t + 1);
      gpu::async_wait<1>();
    } else {
      gpu::async_wait<0>();
    }
    gpu::block_barrier();
    float s[kKeys / 8][4];
    scores<kKeys>(s, q, own, k_tile(t));
    const int64_t left = num_keys - int64_t{t} * kKeys;  // beyond it there is no key
    float before[2] = {largest[0], largest[1]}, peak[2];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = 8 * n + lane % 4 * 2 + i % 2 < left ? s[n][i] * scale : -kInfinity;
        largest[i / 2] = gpu::max(largest[i / 2], s[n][i]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = gpu::max(largest[half], gpu::shuffle_xor(largest[half], 1));
      largest[half] = gpu::max(largest[half], gpu::shuffle_xor(largest[half], 2));
      peak[half] = largest[half] == -kInfinity ? 0.0f : largest[half];  // so far nothing but -inf
      const float shrink = gpu::exp2(before[half] - peak[half]);
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < kHead / 8; ++n) acc[n][2 * half] *= shrink, acc[n][2 * half + 1] *= shrink;
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = gpu::exp2(s[n][i] - peak[i / 2]);
        sum[i / 2] += s[n][i];
      }
    }
    accumulate<kKeys>(acc, s, v_tile(t));
    gpu::block_barrier();  // the stage is free for the tile after the next
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += gpu::shuffle_xor(sum[half], 1);
    sum[half] += gpu::shuffle_xor(sum[half], 2);
    const int64_t row = queries.row(tile.first + own + lane / 4 + 8 * half);
    store_row<T, kHead>(static_cast<T*>(p.out) + offset, row, stride, p.width, acc, half, 1.0f / sum[half]);
    if (row >= 0 && lane % 4 == 0) {
      gpu::store_global(p.lse + head * p.rows_q + row, (largest[half] + gpu::log2(sum[half])) * kLn2);
    }
  }
}

template <typename T, int kHead>
struct Forward {
  void operator()(const Params& p, gpu::Stream stream) const {
    constexpr size_t kShared = sizeof(T) * kHead * (kTile + kStages * 2 * kKeys);
    gpu::launch(forward_kernel<T, kHead>, {p.rows_q / kTile + p.samples, p.heads}, kAttentionThreads, kShared, stream,
                p);
  }
};

}  // namespace

void flash_attention_forward(const FlashAttentionCudaParams& p, gpu::Stream stream) {
  run_attention<Forward>(p, stream);
}

}  // namespace uvg::cuda
