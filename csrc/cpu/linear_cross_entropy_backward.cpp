#include "cpu/head.h"
#include "uvg/linear_cross_entropy.h"

// The vocabulary is walked in steps of a few groups of columns. Of a step the gradient of the logits is computed, panel
// by panel, and stored twice as it is read: by rows for dx, by columns for dweight. Every sum runs in the order of the
// groups and rows, so that neither threads nor the groups of a step change a bit.
namespace uvg {
namespace UVG_ISA {
namespace {

using Params = LinearCrossEntropyParams;

constexpr int64_t kGroup = 192;          // columns; a multiple of kTileRows and of kPanel
constexpr int64_t kMostGroups = 8;       // of a step, where they are enough for the threads; untuned
constexpr int64_t kStepBytes = 8 << 20;  // of a step's gradients at most, where two groups are not more
constexpr int64_t kOwnBytes = 2 << 20;   // of them for each thread, where that is more; untuned
constexpr int64_t kFewestRows = 48;      // of a part of dx: each part packs the weight anew; untuned
constexpr int64_t kDepth = 256;          // dwords along the rows that dweight sums at once; untuned

template <typename F>
struct Backward {
  using T = typename F::Value;
  const Params& p;
  const Head<F> head;
  const int64_t padded, depth;            // rows; dwords along them
  const int64_t groups, row, by_row;      // of a step; dwords from row to row of scores and by_columns
  uint32_t *x, *x_columns;                // packed by rows and by columns
  uint32_t *scores, *by_columns;          // gradient of a step's logits: [padded, row], [depth, by_row]
  float* dx;                              // panels of columns, [padded][columns] each
  float *lse, *total, *target, *current;  // [padded], the last three: factors of p, 1_target and 1_current

  Backward(Scratch& scratch, const Params& params)
      : p(params),
        head{static_cast<const T*>(p.x),
             static_cast<const T*>(p.weight),
             static_cast<const T*>(p.bias),
             p.rows,
             p.width,
             p.vocab},
        padded(head.padded_rows()),
        depth(padded / F::kPer),
        groups(groups_of_a_step()),
        row(groups * kGroup / F::kPer + kLanes),  // rows off one another's sets
        by_row(F::kPer == 1 ? row : groups * kGroup + kLanes),
        x(scratch.words(padded * head.words())),
        x_columns(scratch.words(depth * round_up(p.width, kLanes))),
        scores(scratch.words(padded * row)),
        by_columns(F::kPer == 1 ? scores : scratch.words(depth * by_row)),
        dx(scratch.floats(padded * round_up(p.width, kLanes))),
        lse(scratch.floats(padded)),
        total(scratch.floats(padded)),
        target(scratch.floats(padded)),
        current(scratch.floats(padded)) {
    pack_columns<F>({head.x, p.width, nullptr, p.rows}, p.width, padded, x_columns);
    for (int64_t i = 0; i < padded; ++i) factors(i);
  }

  int64_t groups_of_a_step() const {
    const int64_t all = (p.vocab + kGroup - 1) / kGroup, busy = (2 * p.threads * kPanel + kGroup - 1) / kGroup;
    const int64_t most = busy < kMostGroups ? kMostGroups : busy, own = p.threads * kOwnBytes;
    const int64_t fit = (own < kStepBytes ? kStepBytes : own) / (padded * kGroup * 4), least = fit < 2 ? 2 : fit;
    return least < most ? (least < all ? least : all) : (most < all ? most : all);
  }

  // With a = target, b = current: dlogits = (a + b) * p - a * 1_target - b * 1_current.
  void factors(int64_t i) const {
    lse[i] = -kNever, total[i] = target[i] = current[i] = 0.0f;
    if (i >= p.rows) return;
    lse[i] = p.lse[i], target[i] = p.dloss[i];
    if (p.current != nullptr) {
      const float scaled = p.dloss[i] * p.rate[i];
      target[i] = p.current[i] == p.target[i] ? 0.0f : scaled;
      current[i] = scaled * p.p_current[i];
    }
    total[i] = target[i] + current[i];
  }

  // The panel of the step's columns from `at` on, all rows; and its part of dbias.
  void gradients(int64_t begin, int64_t at, const HeadPanel<F>& panel) const {
    const int64_t column = begin + at, left = p.vocab - column;
    panel.fill(head, column);
    float sums[kPanel] = {};
    for (int64_t r = 0; r < padded; r += kTileRows) tile(r, column, at, panel, sums);
    for (int64_t i = 0; i < kPanel && i < left; i += kLanes)
      store(static_cast<T*>(p.dbias) + column + i, load(sums + i), left - i < kLanes ? left - i : kLanes);
  }

  UVG_NOINLINE void tile(int64_t first, int64_t column, int64_t at, const HeadPanel<F>& panel, float* sums) const {
    logits_of(x + first * head.words(), head, panel, [&](int64_t r, const Vec(&logits)[kTileVecs]) {
      const int64_t i = first + r;
      Vec d[kTileVecs];
#pragma GCC unroll 4
      for (int j = 0; j < kTileVecs; ++j) d[j] = total[i] * exp(logits[j] - lse[i]);
      if (i < p.rows) {
        take_off(d, p.target[i] - column, target[i]);
        if (p.current != nullptr) take_off(d, p.current[i] - column, current[i]);
      }
      for (int j = 0; j < kTileVecs; ++j) store(sums + j * kLanes, load(sums + j * kLanes) + d[j]);
      F::put(scores + i * row, at, d);
      if (F::kPer == 2 && r % 2 == 1) pair_rows(scores + (i - 1) * row, row, at, by_columns + i / 2 * by_row + at);
    });
  }

  static UVG_INLINE void take_off(Vec (&d)[kTileVecs], int64_t offset, float value) {
    if (offset < 0 || offset >= kPanel) return;
    float lanes[kPanel] = {};
    lanes[offset] = value;
    for (int j = 0; j < kTileVecs; ++j) d[j] -= load(lanes + j * kLanes);
  }

  // Rows of dweight: one group, columns `c`.. of the width. out: [kGroup, kPanel].
  void weight_gradient(int64_t begin, int64_t group, int64_t c, float* out) const {
    const int64_t at = group * kGroup, left = p.vocab - begin - at, count = left < kGroup ? left : kGroup;
    const int64_t here = p.width - c < kPanel ? p.width - c : kPanel;
    for (int64_t k = 0; k < depth; k += kDepth)
      multiply_all<F>(out, round_up(count, kTileRows), here, by_columns + k * by_row + at, 1, by_row,
                      x_columns + c * depth, depth, k, depth - k < kDepth ? depth - k : kDepth, k == 0);
    for (int64_t r = 0; r < count; ++r)
      write(out + r * round_up(here, kLanes), here, static_cast<T*>(p.dweight) + (begin + at + r) * p.width + c);
  }

  // A step's part of dx: columns `c`.. of the width, `count` rows from `first` on. packed: room for a panel of a
  // group's rows of the weight.
  void x_gradient(int64_t begin, int64_t c, int64_t first, int64_t count, uint32_t* packed) const {
    const int64_t here = p.width - c < kPanel ? p.width - c : kPanel, end = begin + groups * kGroup;
    float* out = dx + c * padded + first * round_up(here, kLanes);
    for (int64_t v = begin; v < end && v < p.vocab; v += kGroup) {
      const int64_t left = p.vocab - v, words = left < kGroup ? left : kGroup, depth = round_up(words, kPanel);
      pack_columns<F>({head.weight + v * p.width + c, p.width, nullptr, words}, here, depth, packed);
      multiply_all<F>(out, count, here, scores + first * row + (v - begin) / F::kPer, row, 1, packed, depth / F::kPer,
                      0, depth / F::kPer, v == 0);
    }
  }

  static void write(const float* from, int64_t width, T* to) {
    columns(width, [&](int64_t i, int64_t n) { store(to + i, load(from + i), n); });
  }

  struct Room {
    HeadPanel<F> panel;
    float* out;
    uint32_t* packed;

    Room(Scratch& scratch, const Head<F>& head)
        : panel(scratch, head),
          out(scratch.floats(kGroup * kPanel)),
          packed(scratch.words(kGroup / F::kPer * kPanel)) {}
  };

  void run() const {
    const int64_t step = groups * kGroup, panels = (p.width + kPanel - 1) / kPanel;
    const int threads = threads_for(3 * head.multiplications(), p.threads);
    Scratch scratch;
    const PerThread<Room> rooms(scratch, threads, head);
    const int64_t wanted = panels > 0 ? (2 * threads + panels - 1) / panels : 1,
                  even = round_up((padded + wanted - 1) / wanted, kTileRows);
    const int64_t part = even < kFewestRows ? kFewestRows : even, parts = (padded + part - 1) / part;
#pragma omp parallel num_threads(threads)
    {
      const auto& [panel, out, packed] = rooms.own();
#pragma omp for schedule(static)
      for (int64_t r = 0; r < padded; r += kTileRows) head.pack_x(r, kTileRows, x + r * head.words());
      for (int64_t begin = 0; begin < p.vocab; begin += step) {
        const int64_t left = p.vocab - begin, count = left < step ? left : step;
        const int64_t here = (count + kGroup - 1) / kGroup;
#pragma omp for schedule(dynamic, 1)
        for (int64_t at = 0; at < count; at += kPanel) gradients(begin, at, panel);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < (parts + here) * panels; ++task) {
          const int64_t c = task % panels * kPanel, at = task / panels, first = at * part;
          at < parts ? x_gradient(begin, c, first, padded - first < part ? padded - first : part, packed)
                     : weight_gradient(begin, at - parts, c, out);
        }
      }
#pragma omp for schedule(static)
      for (int64_t r = 0; r < p.rows; ++r)
        for (int64_t c = 0; c < p.width; c += kPanel) {
          const int64_t rest = p.width - c < kPanel ? p.width - c : kPanel;
          write(dx + c * padded + r * round_up(rest, kLanes), rest, static_cast<T*>(p.dx) + r * p.width + c);
        }
    }
  }
};

template <typename F>
void backward(const Params& p) {
  if (p.rows == 0) {
    std::memset(p.dweight, 0, static_cast<size_t>(p.vocab * p.width) * sizeof(typename F::Value));
    std::memset(p.dbias, 0, static_cast<size_t>(p.vocab) * sizeof(typename F::Value));
    return;
  }
  Scratch scratch;
  Backward<F>(scratch, p).run();
}

}  // namespace

void linear_cross_entropy_backward(const Params& p) {
  with_format(p.dtype, [&](auto format) { backward<decltype(format)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
