#include "uvg/linear_sample.h"

#include "cuda/attention_tiles.h"
#include "cuda/random.h"
#include "cuda/rows.h"

// No logit is stored. The first kernel multiplies on tensor cores and keeps of every panel of 64 words its largest
// logit and its mass. The second draws a tile of 1024 words from these, then a panel of it, and computes that panel's
// logits once more for the pick.
namespace uvg::cuda {
namespace {

using Params = LinearSampleParams;

constexpr int kDepth = 64, kStages = 2;  // columns of x in a tile of shared memory; such tiles in flight
constexpr int kPanel = 64, kPanels = 2;  // words of a panel, panels of a block; untuned
constexpr int kWords = 1024, kOfWords = kWords / kPanel;  // words of a tile of the draw, panels of it

// e^(difference / temperature); nothing of -inf, NaN of NaN and of what has no finite peak.
struct Heat {
  float temperature;

  UVG_HOST_DEVICE explicit Heat(double given)
      : temperature(given == 0.0      ? 1.0f
                    : given < 1.2e-38 ? 1.2e-38f
                                      : static_cast<float>(given)) {}

  UVG_DEVICE float share(float logit, float peak) const {
    return logit == -kInfinity ? 0.0f : gpu::exp2((logit - peak) / temperature * kLog2e);
  }
};

// Peak and mass of the panels from `kPart` on, of the rows that this lane has part of. logits: as `multiply` leaves
// them.
template <int kPart>
UVG_DEVICE void weigh_panels(const Params& p, const Heat& heat, const float (&logits)[kPanel * kPanels / 8][4],
                             int64_t first_row, int64_t first_word) {
  constexpr int kBegin = kPart * kPanel / 8;
  const int64_t panels = (p.vocab + kPanel - 1) / kPanel, panel = first_word / kPanel + kPart;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float peak = -kInfinity, mass = 0.0f;
#pragma unroll
    for (int n = 0; n < kPanel / 8; ++n)  // a NaN is not larger
      peak = gpu::max(logits[kBegin + n][2 * half + 1], gpu::max(logits[kBegin + n][2 * half], peak));
    peak = gpu::max(gpu::shuffle_xor(peak, 1), peak);
    peak = gpu::max(gpu::shuffle_xor(peak, 2), peak);
#pragma unroll
    for (int n = 0; n < kPanel / 8; ++n)
      mass += heat.share(logits[kBegin + n][2 * half], peak) + heat.share(logits[kBegin + n][2 * half + 1], peak);
    mass += gpu::shuffle_xor(mass, 1);
    mass += gpu::shuffle_xor(mass, 2);
    const int64_t row = first_row + gpu::lane() / 4 + 8 * half;
    if (gpu::lane() % 4 == 0 && row < p.rows && panel < panels)
      gpu::store_global(reinterpret_cast<gpu::Pack<float, 2>*>(p.weighed) + row * panels + panel, {{peak, mass}});
  }
  if constexpr (kPart + 1 < kPanels) weigh_panels<kPart + 1>(p, heat, logits, first_row, first_word);
}

template <typename T>
__global__ void __launch_bounds__(kAttentionThreads) weigh_kernel(Params p, Heat heat) {
  constexpr int kColumns = kPanel * kPanels;
  const int64_t first_row = gpu::block_y() * kTile, first_word = gpu::block_x() * kColumns;
  T* shared = gpu::shared_memory<T>();
  const auto x_tile = [&](int d) { return Tile<T, kDepth>{shared + d % kStages * (kTile + kColumns) * kDepth}; };
  const auto w_tile = [&](int d) { return Tile<T, kDepth>{x_tile(d).at + kTile * kDepth}; };
  const auto copy = [&](int d) {
    const int64_t skip = int64_t{d} * kDepth;
    copy_tile<kTile>(x_tile(d), static_cast<const T*>(p.x) + skip, p.width, p.width - skip,
                     [&](int r) { return first_row + r < p.rows ? first_row + r : int64_t{-1}; });
    copy_tile<kColumns>(w_tile(d), static_cast<const T*>(p.weight) + skip, p.width, p.width - skip,
                        [&](int r) { return first_word + r < p.vocab ? first_word + r : int64_t{-1}; });
    gpu::async_commit();
  };
  const int depths = static_cast<int>((p.width + kDepth - 1) / kDepth), own = gpu::warp_in_block() * 16;
  float logits[kColumns / 8][4] = {};
  if (depths > 0) copy(0);
  for (int d = 0; d < depths; ++d) {
    if (d + 1 < depths) {
      copy(d + 1);
      gpu::async_wait<1>();
    } else {
      gpu::async_wait<0>();
    }
    gpu::block_barrier();
    add_scores<kColumns>(logits, x_tile(d), own, w_tile(d));
    gpu::block_barrier();  // the stage is free for the tile after the next
  }
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t word = first_word + 8 * n + gpu::lane() % 4 * 2 + i;
      const bool there = word < p.vocab;
      const float bias = there ? gpu::to_float(gpu::load_global(static_cast<const T*>(p.bias) + word)) : 0.0f;
      logits[n][i] = there ? logits[n][i] + bias : -kInfinity;
      logits[n][2 + i] = there ? logits[n][2 + i] + bias : -kInfinity;
    }
  }
  weigh_panels<0>(p, heat, logits, first_row + own, first_word);
}

// The words that a row has seen so far: a choice among them, their largest logit, and their mass at that.
struct Seen {
  int64_t choice = -1;
  float peak = -kInfinity, mass = 0.0f;

  // Words with a peak and a mass of their own join; `replaces` says whether the choice falls on them, given their share
  // and the mass of all.
  template <typename F>
  UVG_DEVICE void join(const Heat& heat, int64_t number, float other_peak, float other_mass, F replaces) {
    if (other_mass == 0.0f) return;
    const float top = gpu::max(peak, other_peak), share = other_mass * heat.share(other_peak, top);
    mass = (mass == 0.0f ? 0.0f : mass * heat.share(peak, top)) + share;
    peak = top;
    if (replaces(share, mass)) choice = number;
  }
};

// The row's panels, as the first kernel weighed them.
struct Panels {
  const gpu::Pack<float, 2>* at;
  int64_t count;

  UVG_DEVICE float peak(int64_t i) const { return gpu::load_global(at + i).at[0]; }
  UVG_DEVICE float mass(int64_t i) const { return gpu::load_global(at + i).at[1]; }
};

// The panel with the largest logit, ties to the lowest, and the sum of all masses, which is NaN where there is no
// distribution; the whole warp calls it.
struct Largest {
  int64_t panel = -1;
  float mass = 0.0f;

  UVG_DEVICE explicit Largest(const Panels& panels) {
    float peak = -kInfinity;
    for (int64_t i = gpu::lane(); i < panels.count; i += gpu::kWarp) {
      mass += panels.mass(i);
      if (panels.peak(i) > peak) peak = panels.peak(i), panel = i;
    }
    mass = gpu::warp_sum(mass);
    const float top = gpu::warp_max(peak);
    const int64_t none = panels.count;
    panel = -gpu::warp_max(peak == top && panel >= 0 ? -panel : -none);
    if (panel == none) panel = -1;
  }
};

// Logit of one word, by one lane.
template <typename T>
UVG_DEVICE float dot(const Params& p, int64_t row, int64_t word) {
  float total = gpu::to_float(gpu::load_global(static_cast<const T*>(p.bias) + word));
  for (int64_t c = 0; c < p.width; c += 8) {
    float a[8], b[8];
    load_vector(a, static_cast<const T*>(p.x) + row * p.width + c);
    load_vector(b, static_cast<const T*>(p.weight) + word * p.width + c);
#pragma unroll
    for (int i = 0; i < 8; ++i) total += a[i] * b[i];
  }
  return total;
}

// One warp a row.
template <typename T>
__global__ void __launch_bounds__(kRowWarps* gpu::kWarp) pick_kernel(Params p, Heat heat) {
  const int64_t row = row_of_warp();
  if (row >= p.rows) return;
  const int64_t count = (p.vocab + kPanel - 1) / kPanel;
  const Panels panels{reinterpret_cast<const gpu::Pack<float, 2>*>(p.weighed) + row * count, count};
  const Largest largest(panels);
  const auto* seed = p.seeds + row;
  int64_t panel = largest.mass == largest.mass ? largest.panel : -1;
  float target = 0.0f;  // of the panel's mass, where the pick falls
  if (p.temperature != 0.0 && panel >= 0) {
    const auto uniforms = [&](int64_t tile) {
      return draw(gpu::load_global(seed), gpu::load_global(p.steps + row), kDraw, gpu::load_global(p.tokens + row),
                  tile);
    };
    const auto tile_of = [&](int64_t tile) {
      Seen words;
      for (int64_t i = tile * kOfWords; i < gpu::min(count, (tile + 1) * kOfWords); ++i)
        words.join(heat, i, panels.peak(i), panels.mass(i), [](float, float) { return false; });
      return words;
    };
    Seen row_seen;
    for (int64_t first = 0; first * kOfWords < count; first += gpu::kWarp) {  // a tile a lane, then one by one
      const Seen own = tile_of(first + gpu::lane());
      const float own_u = own.mass == 0.0f ? 0.0f : philox_uniform(uniforms(first + gpu::lane()).w1);
      for (int i = 0; i < gpu::kWarp; ++i) {
        const float u = gpu::shuffle_from(own_u, i);
        row_seen.join(heat, first + i, gpu::shuffle_from(own.peak, i), gpu::shuffle_from(own.mass, i),
                      [&](float share, float all) { return u * all < share; });
      }
    }
    const int64_t first = row_seen.choice * kOfWords, end = gpu::min(count, first + kOfWords);
    const Seen words = tile_of(row_seen.choice);
    float left = philox_uniform(uniforms(row_seen.choice).w0) * words.mass;
    for (int64_t i = first; i < end; ++i) {  // rounding may leave a little: then the last panel that has a mass
      const float mass = panels.mass(i) == 0.0f ? 0.0f : panels.mass(i) * heat.share(panels.peak(i), words.peak);
      if (mass == 0.0f) continue;
      panel = i, target = left / mass;
      if (left < mass) break;
      left -= mass;
    }
  }
  if (panel < 0) {
    if (gpu::lane() == 0) gpu::store_global(p.ids + row, int64_t{-1});
    return;
  }
  // Two words a lane: number `lane` of either half of the panel.
  float logits[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t place = panel * kPanel + half * gpu::kWarp + gpu::lane();
    logits[half] = place < p.vocab ? dot<T>(p, row, place) : -kInfinity;
  }
  const float top = gpu::warp_max(gpu::max(logits[0], logits[1]));
  int64_t picked = -1;
  if (p.temperature == 0.0) {
    const int64_t lowest = logits[0] == top ? gpu::lane() : logits[1] == top ? gpu::kWarp + gpu::lane() : kPanel;
    picked = -gpu::warp_max(-lowest);
  } else {
    const float shares[2] = {heat.share(logits[0], top), heat.share(logits[1], top)};
    const float upto[2] = {gpu::warp_sum_upto(shares[0]), gpu::warp_sum_upto(shares[1])};
    const float half_mass = gpu::shuffle_from(upto[0], gpu::kWarp - 1);
    const float pick = target * (half_mass + gpu::shuffle_from(upto[1], gpu::kWarp - 1));
    if (shares[0] > 0.0f && upto[0] - shares[0] <= pick) picked = gpu::lane();
    if (shares[1] > 0.0f && half_mass + (upto[1] - shares[1]) <= pick) picked = gpu::kWarp + gpu::lane();
    picked = gpu::warp_max(picked);
  }
  if (gpu::lane() == 0) gpu::store_global(p.ids + row, panel * kPanel + picked);
}

template <typename T>
void run(const Params& p, gpu::Stream stream) {
  constexpr size_t kShared = sizeof(T) * kStages * (kTile + kPanel * kPanels) * kDepth;
  const Heat heat(p.temperature);
  gpu::launch(weigh_kernel<T>, {gpu::ceil_div(p.vocab, kPanel * kPanels), gpu::ceil_div(p.rows, kTile)},
              kAttentionThreads, kShared, stream, p, heat);
  const int warps = row_warps(0);
  gpu::launch(pick_kernel<T>, {gpu::ceil_div(p.rows, warps)}, warps * gpu::kWarp, 0, stream, p, heat);
}

}  // namespace

void linear_sample_forward(const Params& p, gpu::Stream stream) {
  p.dtype == Dtype::kBFloat16 ? run<BFloat16>(p, stream) : run<Float16>(p, stream);
}

}  // namespace uvg::cuda
