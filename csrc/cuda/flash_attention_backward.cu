// The backward of flash_attention in three kernels, each with its sums in a fixed order: delta, then dq by tiles of
// queries, then dk and dv by tiles of key rows of the buffer, because samples may share keys.
#include "cuda/attention_tiles.h"
#include "uvg/flash_attention.h"

namespace uvg::cuda {
namespace {

using Params = FlashAttentionCudaParams;
constexpr int kStages = 2, kKeys = 32, kQueries = 32;  // of a tile in flight; untuned

// delta[head, row] = sum over the head of dout * out. One warp a row and head.
template <typename T>
__global__ void __launch_bounds__(kAttentionThreads) delta_kernel(Params p) {
  const int64_t row = gpu::block_x() * kAttentionWarps + gpu::warp_in_block(), head = gpu::block_y();
  if (row >= p.rows_q) return;
  const int64_t first = (row * p.heads + head) * p.width;
  float sum = 0.0f;
  for (int64_t c = gpu::lane() * 8; c < p.width; c += gpu::kWarp * 8) {
    using Chunk = gpu::Pack<T, 8>;
    const Chunk out = gpu::load_global(reinterpret_cast<const Chunk*>(static_cast<const T*>(p.out) + first + c));
    const Chunk dout = gpu::load_global(reinterpret_cast<const Chunk*>(static_cast<const T*>(p.dout) + first + c));
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += gpu::to_float(out.at[i]) * gpu::to_float(dout.at[i]);
  }
  sum = gpu::warp_sum(sum);
  if (gpu::lane() == 0) gpu::store_global(p.delta + head * p.rows_q + row, sum);
}

template <typename T, int kHead>
__global__ void __launch_bounds__(kAttentionThreads, 2) dq_kernel(Params p) {
  const QueryTile tile(p.q_spans, p.samples, p.spans_q, gpu::block_x());
  if (tile.sample < 0) return;
  const SampleRows queries{p.q_spans + tile.sample * p.spans_q * 2, p.spans_q};
  const SampleRows keys{p.k_spans + tile.sample * p.spans_k * 2, p.spans_k};
  const int64_t num_keys = keys.size(), head = gpu::block_y(), stride = p.heads * p.width, offset = head * p.width;
  const int num_tiles = static_cast<int>((num_keys + kKeys - 1) / kKeys);
  if (num_tiles == 0) return;

  T* shared = gpu::shared_memory<T>();
  const Tile<T, kHead> q{shared}, dout{shared + kTile * kHead};
  const auto part = [&](int t, int which) {
    return Tile<T, kHead>{shared + (2 * kTile + (t % kStages * 2 + which) * kKeys) * kHead};
  };
  const auto copy_keys = [&](int t) {
    const auto row = [&](int r) { return keys.row(int64_t{t} * kKeys + r); };
    copy_tile<kKeys>(part(t, 0), static_cast<const T*>(p.k) + offset, stride, p.width, row);
    copy_tile<kKeys>(part(t, 1), static_cast<const T*>(p.v) + offset, stride, p.width, row);
    gpu::async_commit();
  };
  const auto query_row = [&](int r) { return queries.row(tile.first + r); };
  copy_tile<kTile>(q, static_cast<const T*>(p.q) + offset, stride, p.width, query_row);
  copy_tile<kTile>(dout, static_cast<const T*>(p.dout) + offset, stride, p.width, query_row);
  copy_keys(0);

  const int lane = gpu::lane(), own = gpu::warp_in_block() * 16;
  const float scale = p.scale * kLog2e;
  int64_t row[2];
  float lse[2], delta[2], acc[kHead / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    row[half] = query_row(own + lane / 4 + 8 * half);
    lse[half] = row[half] < 0 ? kInfinity : gpu::load_global(p.lse + head * p.rows_q + row[half]) * kLog2e;
    delta[half] = row[half] < 0 ? 0.0f : gpu::load_global(p.delta + head * p.rows_q + row[half]);
  }
  for (int t = 0; t < num_tiles; ++t) {
    if (t + 1 < num_tiles) {
      copy_keys(t + 1);
      gpu::async_wait<1>();
    } else {
      gpu::async_wait<0>();
    }
    gpu::block_barrier();
    float s[kKeys / 8][4], dp[kKeys / 8][4];
    scores<kKeys>(s, q, own, part(t, 0));
    scores<kKeys>(dp, dout, own, part(t, 1));
    const int64_t left = num_keys - int64_t{t} * kKeys;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool there = 8 * n + lane % 4 * 2 + i % 2 < left;
        const float weight = there ? gpu::exp2(s[n][i] * scale - lse[i / 2]) : 0.0f;
        s[n][i] = weight * (dp[n][i] - delta[i / 2]);
      }
    }
    accumulate<kKeys>(acc, s, part(t, 0));
    gpu::block_barrier();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    store_row<T, kHead>(static_cast<T*>(p.dq) + offset, row[half], stride, p.width, acc, half, p.scale);
  }
}

// One block: 64 neighbouring key rows of the buffer, 16 a warp, against the queries of every sample that names one of
// them. Scores are transposed: a row is a key, a column a query.
//
// NaN in a sample's queries comes into all 16 rows of a warp, zero weights or not. So a row begins with its first
// sample, and is stored after each of its own: what others do to it before and after is not seen.
template <typename T, int kHead>
__global__ void __launch_bounds__(kAttentionThreads, 2) dkv_kernel(Params p) {
  const int64_t first = gpu::block_x() * kTile, head = gpu::block_y(), stride = p.heads * p.width;
  const int64_t offset = head * p.width;
  T* shared = gpu::shared_memory<T>();
  const Tile<T, kHead> k{shared}, v{shared + kTile * kHead};
  const auto part = [&](int t, int which) {
    return Tile<T, kHead>{shared + (2 * kTile + (t % kStages * 2 + which) * kQueries) * kHead};
  };
  float* columns = reinterpret_cast<float*>(shared + (2 * kTile + kStages * 2 * kQueries) * kHead);
  const auto lse_of = [&](int t) { return columns + t % kStages * 2 * kQueries; };
  const auto delta_of = [&](int t) { return columns + (t % kStages * 2 + 1) * kQueries; };
  const auto key_row = [&](int r) { return first + r < p.rows_k ? first + r : -1; };
  copy_tile<kTile>(k, static_cast<const T*>(p.k) + offset, stride, p.width, key_row);
  copy_tile<kTile>(v, static_cast<const T*>(p.v) + offset, stride, p.width, key_row);
  gpu::async_commit();

  const int lane = gpu::lane(), own = gpu::warp_in_block() * 16;
  const float scale = p.scale * kLog2e;
  float dk[kHead / 8][4] = {}, dv[kHead / 8][4] = {};
  bool begun[2] = {false, false};
  const auto clear = [&](int half) {
#pragma unroll
    for (int n = 0; n < kHead / 8; ++n)
      dk[n][2 * half] = dk[n][2 * half + 1] = dv[n][2 * half] = dv[n][2 * half + 1] = 0.0f;
  };
  const auto store = [&](int half) {
    const int64_t row = key_row(own + lane / 4 + 8 * half);
    store_row<T, kHead>(static_cast<T*>(p.dk) + offset, row, stride, p.width, dk, half, p.scale);
    store_row<T, kHead>(static_cast<T*>(p.dv) + offset, row, stride, p.width, dv, half, 1.0f);
  };
  for (int64_t sample = 0; sample < p.samples; ++sample) {
    const SampleRows keys{p.k_spans + sample * p.spans_k * 2, p.spans_k};
    const SampleRows queries{p.q_spans + sample * p.spans_q * 2, p.spans_q};
    if (!keys.meet(first, first + kTile)) continue;
    const int64_t num_queries = queries.size();
    const int num_tiles = static_cast<int>((num_queries + kQueries - 1) / kQueries);
    float times[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      times[half] = static_cast<float>(keys.times(first + own + lane / 4 + 8 * half));
      if (begun[half] || times[half] == 0.0f) continue;
      begun[half] = true;
      clear(half);
    }
    const auto copy_queries = [&](int t) {
      const auto row = [&](int r) { return queries.row(int64_t{t} * kQueries + r); };
      copy_tile<kQueries>(part(t, 0), static_cast<const T*>(p.q) + offset, stride, p.width, row);
      copy_tile<kQueries>(part(t, 1), static_cast<const T*>(p.dout) + offset, stride, p.width, row);
      gpu::async_commit();
      if (gpu::warp_in_block() != 0) return;
      const int64_t mine = row(lane);
      const int64_t place = head * p.rows_q + mine;
      gpu::store_shared(lse_of(t) + lane, mine < 0 ? kInfinity : gpu::load_global(p.lse + place) * kLog2e);
      gpu::store_shared(delta_of(t) + lane, mine < 0 ? 0.0f : gpu::load_global(p.delta + place));
    };
    if (num_tiles > 0) copy_queries(0);
    for (int t = 0; t < num_tiles; ++t) {
      if (t + 1 < num_tiles) {
        copy_queries(t + 1);
        gpu::async_wait<1>();
      } else {
        gpu::async_wait<0>();
      }
      gpu::block_barrier();
      float s[kQueries / 8][4], dp[kQueries / 8][4];
      scores<kQueries>(s, k, own, part(t, 0));
      scores<kQueries>(dp, v, own, part(t, 1));
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n) {
        const int column = 8 * n + lane % 4 * 2;
        const auto lse = gpu::load_shared(reinterpret_cast<const gpu::Pack<float, 2>*>(lse_of(t) + column));
        const auto delta = gpu::load_shared(reinterpret_cast<const gpu::Pack<float, 2>*>(delta_of(t) + column));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float weight = gpu::exp2(s[n][i] * scale - lse.at[i % 2]);
          const bool mine = times[i / 2] > 0.0f;  // a key of others may score far above lse, or be NaN
          s[n][i] = mine ? times[i / 2] * weight : 0.0f;
          dp[n][i] = mine ? s[n][i] * (dp[n][i] - delta.at[i % 2]) : 0.0f;
        }
      }
      accumulate<kQueries>(dv, s, part(t, 1));
      accumulate<kQueries>(dk, dp, part(t, 0));
      gpu::block_barrier();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (times[half] > 0.0f) store(half);
    }
  }
  gpu::async_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (begun[half]) continue;
    clear(half);
    store(half);
  }
}

template <typename T, int kHead>
struct Backward {
  void operator()(const Params& p, gpu::Stream stream) const {
    gpu::launch(delta_kernel<T>, {gpu::ceil_div(p.rows_q, kAttentionWarps), p.heads}, kAttentionThreads, 0, stream, p);
    constexpr size_t kShared = sizeof(T) * kHead * (2 * kTile + kStages * 2 * kKeys);
    gpu::launch(dq_kernel<T, kHead>, {p.rows_q / kTile + p.samples, p.heads}, kAttentionThreads, kShared, stream, p);
    constexpr size_t kColumns = sizeof(float) * kStages * 2 * kQueries;
    constexpr size_t kSharedKv = sizeof(T) * kHead * (2 * kTile + kStages * 2 * kQueries) + kColumns;
    gpu::launch(dkv_kernel<T, kHead>, {gpu::ceil_div(p.rows_k, kTile), p.heads}, kAttentionThreads, kSharedKv, stream,
                p);
  }
};

}  // namespace

void flash_attention_backward(const FlashAttentionCudaParams& p, gpu::Stream stream) {
  run_attention<Backward>(p, stream);
}

}  // namespace uvg::cuda
