#include "uvg/linear_cross_entropy.h"

#include "cpu/head.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = LinearCrossEntropyParams;

// One row: log of its sum of e^logit as peak + log(mass), and the losses, from the tiles' masses in their order.
void finish(const Params& p, int64_t row, const Mass* masses, int64_t tiles, float at_target, float at_current) {
  double mass = 0.0;  // of the tiles so far, times e^peak
  float peak = kNever;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const Mass& m = masses[tile * p.rows + row];
    if (m.sum == 0.0f) continue;
    const float higher = m.top > peak ? m.top : peak;
    const auto weight = [&](float top) { return __builtin_exp(static_cast<double>(top) - higher); };
    mass = mass * weight(peak) + m.sum * weight(m.top);
    peak = higher;
  }
  const double log_mass = peak == -kNever ? 0.0 : __builtin_log(mass);  // of +inf, the peak says it all
  const double log_p = static_cast<double>(at_target) - peak - log_mass;
  p.lse[row] = static_cast<float>(peak + log_mass);
  double loss = -log_p;
  if (p.current != nullptr) {
    const double p_current = __builtin_exp(static_cast<double>(at_current) - peak - log_mass);
    p.p_current[row] = static_cast<float>(p_current);
    loss = -p.rate[row] * (p_current + (p.current[row] == p.target[row] ? -1.0 : log_p));
  }
  p.loss[row] = static_cast<float>(loss);
}

template <typename F>
void forward(const Params& p) {
  if (p.rows == 0) return;
  using T = typename F::Value;
  const Head<F> head{static_cast<const T*>(p.x),
                     static_cast<const T*>(p.weight),
                     static_cast<const T*>(p.bias),
                     p.rows,
                     p.width,
                     p.vocab};
  const int threads = threads_for(head.multiplications(), p.threads);
  const TileTasks tasks(p.rows, p.vocab, threads);
  Scratch scratch;
  uint32_t* x = scratch.words(head.padded_rows() * head.words());
  auto* masses = reinterpret_cast<Mass*>(scratch.floats(tasks.tiles * p.rows * 2));  // [tiles, rows]
  float *at_target = scratch.floats(p.rows), *at_current = scratch.floats(p.rows);   // logits
  const PerThread<HeadRoom<F>> rooms(scratch, threads, head, tasks.part);
#pragma omp parallel num_threads(threads)
  {
    const auto& [panel, panels] = rooms.own();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < head.padded_rows(); r += kTileRows) head.pack_x(r, kTileRows, x + r * head.words());
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks.count(); ++task) {
      const int64_t tile = tasks.tile(task), begin = tasks.first_row(task), count = tasks.num_rows(task);
      const auto look = [&](const int64_t* wanted, int64_t row, int64_t column, const auto& logits, float* out) {
        const int64_t offset = wanted[row] - column;
        if (offset < 0 || offset >= kPanel) return;
        float lanes[kPanel];
        for (int j = 0; j < kTileVecs; ++j) store(lanes + j * kLanes, logits[j]);
        out[row] = lanes[offset];
      };
      weigh(head, panel, x + begin * head.words(), count, tile, 1.0f, panels,
            [&](int64_t r, int64_t column, const auto& logits) {
              if (r >= count) return;
              look(p.target, begin + r, column, logits, at_target);
              if (p.current != nullptr) look(p.current, begin + r, column, logits, at_current);
            });
      float shares[kPanels];
      for (int64_t r = 0; r < count; ++r) masses[tile * p.rows + begin + r] = panels[r].total(1.0f, shares);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row)
      finish(p, row, masses, tasks.tiles, at_target[row], p.current == nullptr ? 0.0f : at_current[row]);
  }
}

}  // namespace

void linear_cross_entropy_forward(const Params& p) {
  with_format(p.dtype, [&](auto format) { forward<decltype(format)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
