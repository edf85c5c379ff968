#include "uvg/linear_sample.h"

#include "common/philox.h"
#include "cpu/head.h"

// Three steps, each in parallel: what every tile of the vocabulary says of every row (its mass, and in which panel its
// own pick lies); per row, tile after tile, which tile wins; and the winner's pick, for which that panel alone is
// computed once more. So no logit is stored, and neither threads nor other rows change a bit of a row's result.
namespace uvg {
namespace UVG_ISA {
namespace {

using Params = LinearSampleParams;

// What a tile says of a row.
struct TileDraw {
  Mass mass;
  float between;  // uniform by which the tile replaces the choice so far
  float rest;     // of the panel's mass, what lies before the pick
  int32_t panel;  // of the tile, in which the pick lies
};

// A share of the largest one below which nothing is drawn: far under the resolution of the uniforms, and above what
// exp leaves of minus infinity.
constexpr float kNothing = 1e-30f;

// Logits times this are exponents of e. Finite and not zero: no difference of logits, 0 or -inf, gives NaN.
float exponent_scale(double temperature) {
  const double scale = temperature == 0.0 ? 1.0 : 1.0 / temperature;
  return static_cast<float>(scale > 1e38 ? 1e38 : (scale < 1e-37 ? 1e-37 : scale));
}

template <typename F>
struct Sampler {
  using T = typename F::Value;
  const Params& p;
  const Head<F> head;
  const int64_t tiles;
  const float scale;
  uint32_t* const x;      // packed
  TileDraw* const draws;  // [tiles, rows]
  int32_t* const first;   // [tiles * kPanels], the first row whose pick lies in this panel, -1 for none
  int32_t* const next;    // [rows], the next row of the same panel, -1 for none
  float* const rest;      // [rows], of the panel's mass, what lies before the pick

  Sampler(Scratch& scratch, const Params& params)
      : p(params),
        head{static_cast<const T*>(p.x),
             static_cast<const T*>(p.weight),
             static_cast<const T*>(p.bias),
             p.rows,
             p.width,
             p.vocab},
        tiles((p.vocab + kVocabTile - 1) / kVocabTile),
        scale(exponent_scale(p.temperature)),
        x(scratch.words(head.padded_rows() * head.words())),
        draws(reinterpret_cast<TileDraw*>(scratch.words(tiles * p.rows * int64_t{sizeof(TileDraw) / 4}))),
        first(reinterpret_cast<int32_t*>(scratch.words(tiles * kPanels))),
        next(reinterpret_cast<int32_t*>(scratch.words(p.rows))),
        rest(scratch.floats(p.rows)) {}

  // Step 1.
  TileDraw draw(int64_t tile, int64_t row, const PanelMasses& masses) const {
    TileDraw d{};
    float shares[kPanels];
    d.mass = masses.total(scale, shares);
    while (d.panel < kPanels - 1 && masses.tops[d.panel] != d.mass.top) ++d.panel;
    if (p.temperature == 0.0 || !(d.mass.sum > 0.0f)) return d;
    const PhiloxWords words = philox4x32(
        {static_cast<uint32_t>(p.steps[row]), kDraw, static_cast<uint32_t>(p.tokens[row]), static_cast<uint32_t>(tile)},
        philox_key(p.seeds[row]));
    d.between = philox_uniform(words.w1);
    double target = static_cast<double>(philox_uniform(words.w0)) * d.mass.sum;
    for (int64_t c = 0; c < kPanels; ++c) {
      if (shares[c] < kNothing) continue;
      d.panel = static_cast<int32_t>(c);  // where rounding leaves the target past the end: the last that has any
      d.rest = static_cast<float>(target / shares[c] * masses.sums[c]);
      if (target < shares[c]) break;
      target -= shares[c];
    }
    return d;
  }

  // Step 2: the panel of the vocabulary in which the row's pick lies, or -1.
  int64_t decide(int64_t row) const {
    const auto weight = [&](float top, float peak) {
      return top == peak ? 1.0 : __builtin_exp((static_cast<double>(top) - peak) / p.temperature);
    };
    double mass = 0.0;  // of the tiles so far, times e^(peak / temperature)
    float peak = kNever;
    int64_t chosen = -1;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const TileDraw& d = draws[tile * p.rows + row];
      if (d.mass.sum != d.mass.sum) return -1;
      if (d.mass.sum == 0.0f) continue;
      bool replace = d.mass.top > peak;
      const float higher = replace ? d.mass.top : peak;
      if (p.temperature != 0.0) {
        const double share = d.mass.sum * weight(d.mass.top, higher);
        mass = mass * weight(peak, higher) + share;
        replace = d.between * mass < share;
      }
      peak = higher;
      if (replace) chosen = tile * kPanels + d.panel, rest[row] = d.rest;
    }
    return chosen;
  }

  // Step 3: the picks in one panel. rows: room for a register tile of x.
  void pick(int64_t at, const HeadPanel<F>& panel, uint32_t* rows) const {
    panel.fill(head, at * kPanel);
    for (int64_t row = first[at]; row >= 0;) {
      int64_t own[kTileRows], count = 0;
      for (; row >= 0 && count < kTileRows; row = next[row]) {
        std::memcpy(rows + count * head.words(), x + row * head.words(), static_cast<size_t>(head.words()) * 4);
        own[count++] = row;
      }
      pick_rows(rows, own, count, at * kPanel, panel);
    }
  }

  UVG_NOINLINE void pick_rows(const uint32_t* rows, const int64_t* own, int64_t count, int64_t column,
                              const HeadPanel<F>& panel) const {
    logits_of(rows, head, panel, [&](int64_t r, const Vec(&logits)[kTileVecs]) {
      if (r < count) p.ids[own[r]] = column + place(logits, rest[own[r]]);
    });
  }

  int64_t place(const Vec (&logits)[kTileVecs], float target) const {
    float x[kPanel], top = kNever;
    int64_t best = 0;
    for (int j = 0; j < kTileVecs; ++j) store(x + j * kLanes, logits[j]);
    for (int64_t i = 0; i < kPanel; ++i)
      if (x[i] > top) top = x[i], best = i;
    if (p.temperature == 0.0) return best;
    double before = 0.0;
    for (int j = 0; j < kTileVecs; ++j) store(x + j * kLanes, exp((logits[j] - top) * scale));
    for (int64_t i = 0; i < kPanel; ++i) {
      if (x[i] < kNothing) continue;
      best = i;  // as above: the last that has any
      before += x[i];
      if (before > target) break;
    }
    return best;
  }

  struct Room {
    HeadRoom<F> head;
    uint32_t* rows;  // a register tile of x

    Room(Scratch& scratch, const Head<F>& of, int64_t part)
        : head(scratch, of, part), rows(scratch.words(kTileRows * of.words())) {}
  };

  void run(int threads) const {
    const TileTasks tasks(p.rows, p.vocab, threads);
    Scratch scratch;
    const PerThread<Room> rooms(scratch, threads, head, tasks.part);
#pragma omp parallel num_threads(threads)
    {
      const Room& room = rooms.own();
      const auto& [panel, masses] = room.head;
      std::memset(room.rows, 0, static_cast<size_t>(kTileRows * head.words()) * 4);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < head.padded_rows(); r += kTileRows) head.pack_x(r, kTileRows, x + r * head.words());
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks.count(); ++task) {
        const int64_t tile = tasks.tile(task), begin = tasks.first_row(task), count = tasks.num_rows(task);
        weigh(head, panel, x + begin * head.words(), count, tile, scale, masses, [](auto&&...) {});
        for (int64_t r = 0; r < count; ++r) draws[tile * p.rows + begin + r] = draw(tile, begin + r, masses[r]);
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < p.rows; ++row) p.ids[row] = decide(row);
#pragma omp single
      {
        for (int64_t at = 0; at < tiles * kPanels; ++at) first[at] = -1;
        for (int64_t row = p.rows - 1; row >= 0; --row) {
          const int64_t at = p.ids[row];
          if (at < 0) continue;
          next[row] = first[at];
          first[at] = static_cast<int32_t>(row);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t at = 0; at < tiles * kPanels; ++at)
        if (first[at] >= 0) pick(at, panel, room.rows);
    }
  }
};

template <typename F>
void sample(const Params& p) {
  if (p.rows == 0) return;
  Scratch scratch;
  const Sampler<F> sampler(scratch, p);
  sampler.run(threads_for(sampler.head.multiplications(), p.threads));
}

}  // namespace

void linear_sample(const Params& p) {
  with_format(p.dtype, [&](auto format) { sample<decltype(format)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
