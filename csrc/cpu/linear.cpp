#include "uvg/linear.h"

#include "cpu/gemm.h"

namespace uvg {
namespace UVG_ISA {
namespace {

using Params = LinearParams;

template <typename F>
void forward(const Params& p) {
  using T = typename F::Value;
  gemm<F>({static_cast<const T*>(p.x), p.packed, static_cast<const T*>(p.bias), p.rows, p.depth, p.width, p.x_row,
           p.out_row, p.gelu, static_cast<T*>(p.out), static_cast<T*>(p.pre)},
          p.threads);
}

// Whether a weight of one product is packed panel by panel, each for all rows, so that it is not written to memory.
template <typename F>
bool packs_panels(int64_t rows) {
  return std::is_same_v<F, Singles<float>> && kTileVecs == 1 && rows <= kRowBlock;
}

template <typename F>
struct PanelRoom {
  GemmRoom<F> gemm;
  uint32_t *panel, *rows;

  PanelRoom(Scratch& scratch, const Product<F>& p, const Tasks& tasks)
      : gemm(scratch, p, tasks),
        panel(scratch.words(weight_words<F>(kPanel, p.depth))),
        rows(scratch.words(kLanes * row_words<F>(p.depth))) {}
};

template <typename F>
void forward_by_panels(const Params& p) {
  using T = typename F::Value;
  const Product<F> all{static_cast<const T*>(p.x),
                       nullptr,
                       static_cast<const T*>(p.bias),
                       p.rows,
                       p.depth,
                       kPanel,
                       p.x_row,
                       p.out_row,
                       p.gelu,
                       static_cast<T*>(p.out),
                       static_cast<T*>(p.pre)};
  const Tasks tasks(p.rows, kPanel, 1, kStaged<F>);
  const int64_t panels = round_up(p.width, kPanel) / kPanel;
  const Rows<T> weight{static_cast<const T*>(p.weight), p.depth, nullptr, p.width};
  Scratch scratch;
  const int threads = threads_for_products(p.threads, p.rows * p.depth * p.width);
  const PerThread<PanelRoom<F>> rooms(scratch, threads, all, tasks);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t panel = 0; panel < panels; ++panel) {
    const PanelRoom<F>& room = rooms.own();
    const int64_t first = panel * kPanel, left = p.width - first;
    Product<F> one = all;
    one.packed = room.panel, one.width = left < kPanel ? left : kPanel, one.out += first;
    if (one.bias != nullptr) one.bias += first;
    if (one.pre != nullptr) one.pre += first;
    pack_transposed<F>(weight.from(first, one.width), p.depth, room.panel, room.rows);
    for (int64_t task = 0; task < tasks.size(); ++task) gemm_task<F>(one, tasks, task, room.gemm);
  }
}

template <typename F>
void pack(const Params& p) {
  pack_weight<F>(static_cast<const typename F::Value*>(p.weight), p.width, p.depth, p.pack_into,
                 threads_for_rows(p.threads, p.width, p.depth));
}

constexpr int64_t kAtOnce = 4096;  // values; untuned

template <typename T>
void slopes(const GeluBackwardParams& p) {
  const T *dy = static_cast<const T*>(p.dy), *pre = static_cast<const T*>(p.pre);
  const int64_t parts = (p.size + kAtOnce - 1) / kAtOnce;
#pragma omp parallel for num_threads(threads_for_rows(p.threads, parts, kAtOnce)) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * kAtOnce, left = p.size - first;
    columns(left < kAtOnce ? left : kAtOnce, [&](int64_t i, int64_t n) {
      const Vec slope = GeluAndSlope(load(pre + first + i, n)).slope;
      store(static_cast<T*>(p.dz) + first + i, load(dy + first + i, n) * slope, n);
    });
  }
}

}  // namespace

void linear_words(const Params& p) {
  with_format(p.dtype, [&](auto format) { *p.words = weight_words<decltype(format)>(p.width, p.depth); });
}

void linear_pack(const Params& p) {
  with_format(p.dtype, [&](auto format) { pack<decltype(format)>(p); });
}

void linear_packs_panels(const Params& p) {
  with_format(p.dtype, [&](auto format) { *p.words = packs_panels<decltype(format)>(p.rows); });
}

void linear_forward(const Params& p) {
  if (p.packed == nullptr && p.weight != nullptr) return forward_by_panels<Singles<float>>(p);
  with_format(p.dtype, [&](auto format) { forward<decltype(format)>(p); });
}

void gelu_backward(const GeluBackwardParams& p) {
  with_type(p.dtype, [&](auto type) { slopes<decltype(type)>(p); });
}

}  // namespace UVG_ISA
}  // namespace uvg
