// Logits of a vocabulary head in register tiles, for kernels that never keep them: logits = x weight^T + bias. A panel
// is kPanel columns of the logits, so as many rows of the weight.
#pragma once

#include "common/row_lists.h"
#include "common/threads.h"
#include "cpu/per_thread.h"
#include "cpu/tile.h"

namespace uvg {
namespace UVG_ISA {

constexpr float kNever = -__builtin_inff();

template <typename F>
struct Head {
  using T = typename F::Value;
  const T *x, *weight, *bias;
  int64_t rows, width, vocab;

  double multiplications() const {
    return static_cast<double>(rows) * static_cast<double>(vocab) * static_cast<double>(width);
  }
  int64_t words() const { return row_words<F>(width); }  // of a packed row
  int64_t padded_rows() const { return round_up(rows, kTileRows); }

  // Rows `first`.. of x as a left operand: whole tiles, zeros past the last row.
  void pack_x(int64_t first, int64_t count, uint32_t* out) const {
    const int64_t left = rows - first;
    pack_rows<F>({x + first * width, width, nullptr, left < count ? left : count}, width, round_up(count, kTileRows),
                 out);
  }
};

// One panel and its bias; columns past the vocabulary have bias -inf.
template <typename F>
struct HeadPanel {
  uint32_t *weight, *work;
  float* bias;

  HeadPanel(Scratch& scratch, const Head<F>& head)
      : weight(scratch.words(kPanel * head.words())),
        work(scratch.words(kLanes * head.words())),
        bias(scratch.floats(kPanel)) {}

  void fill(const Head<F>& head, int64_t first) const {
    const int64_t left = head.vocab - first, count = left < kPanel ? left : kPanel;
    pack_transposed<F>({head.weight + first * head.width, head.width, nullptr, count}, head.width, weight, work);
    for (int64_t i = 0; i < kPanel; i += kLanes)
      store(bias + i, i < count ? load(head.bias + first + i, count - i, kNever) : splat(kNever));
  }
};

// A tile of logits; body(row, logits of the row) in registers.
template <typename F, typename Body>
UVG_INLINE void logits_of(const uint32_t* x, const Head<F>& head, const HeadPanel<F>& panel, Body&& body) {
  alignas(64) float products[kTileRows * kPanel];
  multiply_into<F, kTileRows, kTileVecs>(products, kPanel, x, head.words(), 1, panel.weight, kPanel,
                                         depth_of<F>(head.width), true);
  Vec logits[kTileRows][kTileVecs];
#pragma GCC unroll 6
  for (int64_t r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileVecs; ++j)
      logits[r][j] = load(products + r * kPanel + j * kLanes) + load(panel.bias + j * kLanes);
    body(r, logits[r]);
  }
}

// Of some columns of a row: the largest logit and the sum of e^((logit - largest) * scale). The sum is NaN where
// a logit is NaN or +inf, and 0 where none is above -inf.
struct Mass {
  float top, sum;
};

UVG_INLINE Mass mass_of(const Vec (&logits)[kTileVecs], float scale) {
  Vec top = logits[0];
#pragma GCC unroll 4
  for (int j = 1; j < kTileVecs; ++j) top = select(logits[j] > top, logits[j], top);
  const float most = largest(top);
  const Vec reference = splat(most == kNever ? 0.0f : most);
  Vec total = {};
#pragma GCC unroll 4
  for (int j = 0; j < kTileVecs; ++j) total += exp((logits[j] - reference) * scale);
  return {most, most == kNever ? 0.0f * sum(total) : sum(total)};  // 0 leaves NaN, and nothing of exp(-inf)
}

constexpr int64_t kVocabTile = 1024;  // columns of a tile of the vocabulary; part of what linear_sample draws
constexpr int64_t kPanels = kVocabTile / kPanel;

// Masses of the panels of a row of a tile, and of the tile; what a panel has of it is in shares.
struct PanelMasses {
  float tops[kPanels], sums[kPanels];

  Mass total(float scale, float (&shares)[kPanels]) const {
    float top = tops[0];
    for (int64_t c = 1; c < kPanels; ++c) top = tops[c] > top ? tops[c] : top;
    const Vec reference = splat(top == kNever ? 0.0f : top);
    Vec all = {};
    for (int64_t c = 0; c < kPanels; c += kLanes) {
      const Vec share = load(sums + c) * exp((load(tops + c) - reference) * scale);
      store(shares + c, share);
      all += share;
    }
    return {top, sum(all)};
  }
};

// Masses of a tile for `count` packed rows of x; masses has room for whole register tiles. seen(row, column, logits) is
// told all logits of the row, a panel at a time, from that column of the vocabulary on.
template <typename F, typename Seen>
void weigh(const Head<F>& head, const HeadPanel<F>& panel, const uint32_t* x, int64_t count, int64_t tile, float scale,
           PanelMasses* masses, Seen&& seen) {
  const int64_t padded = round_up(count, kTileRows);
  for (int64_t c = 0; c < kPanels; ++c) {
    const int64_t column = tile * kVocabTile + c * kPanel;
    if (column >= head.vocab) {
      for (int64_t r = 0; r < padded; ++r) masses[r].tops[c] = kNever, masses[r].sums[c] = 0.0f;
      continue;
    }
    panel.fill(head, column);
    for (int64_t r = 0; r < padded; r += kTileRows)
      logits_of(x + r * head.words(), head, panel, [&](int64_t i, const Vec(&logits)[kTileVecs]) {
        const Mass mass = mass_of(logits, scale);
        masses[r + i].tops[c] = mass.top;
        masses[r + i].sums[c] = mass.sum;
        seen(r + i, column, logits);
      });
  }
}

// What a thread weighs tiles in, `rows` of x at the most.
template <typename F>
struct HeadRoom {
  HeadPanel<F> panel;
  PanelMasses* masses;

  HeadRoom(Scratch& scratch, const Head<F>& head, int64_t rows)
      : panel(scratch, head), masses(reinterpret_cast<PanelMasses*>(scratch.floats(rows * 2 * kPanels))) {}
};

// Tiles of the vocabulary times parts of the rows: enough tasks for the threads where there are few tiles.
struct TileTasks {
  int64_t tiles, rows, part, parts;

  TileTasks(int64_t num_rows, int64_t vocab, int threads)
      : tiles((vocab + kVocabTile - 1) / kVocabTile), rows(num_rows) {
    constexpr int64_t kMost = 384;  // rows of a part, so that their masses stay in the cache; untuned
    const int64_t wanted = threads == 1 ? 1 : (2 * threads + tiles - 1) / tiles;  // each packs its tile's weight anew
    const int64_t even = round_up((rows + wanted - 1) / wanted, kTileRows);
    part = even < kMost ? even : kMost;
    parts = (rows + part - 1) / part;
  }

  int64_t count() const { return tiles * parts; }
  int64_t tile(int64_t task) const { return task / parts; }
  int64_t first_row(int64_t task) const { return task % parts * part; }
  int64_t num_rows(int64_t task) const {
    const int64_t left = rows - first_row(task);
    return left < part ? left : part;
  }
};

// Threads worth starting for so many multiplications.
inline int threads_for(double multiplications, int threads) {
  return multiplications <= kAloneHeadProducts ? 1 : threads;
}

}  // namespace UVG_ISA
}  // namespace uvg
