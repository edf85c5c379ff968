#include "uvg/gated_residual_norm.h"

#include "cpu/gate.h"
#include "cpu/norm_row.h"
#include "cpu/partial_sums.h"
#include "cpu/per_thread.h"
#include "cpu/stream.h"

// A row of the residual stream stays in the cache from its update to its norm: memory sees it once.
namespace uvg {
namespace UVG_ISA {
namespace {

using Params = GatedResidualNormParams;
constexpr int64_t kGatePart = kNormParts, kParts = kNormParts + 1;

// kept: room for the rows where they go past the cache; they are normed from there.
template <int64_t kRows, typename H, typename Y, typename N>
UVG_NOINLINE void forward_rows(const Params& p, int64_t r, const Gate& gate, const NormFactors& factors, H* kept,
                               const Target<H> out, const Target<N> normed) {
  const int64_t width = p.width;
  const H* h = static_cast<const H*>(p.h) + r * width;
  const Y* y = static_cast<const Y*>(p.y) + r * width;
  H* const rows = out.past() ? kept : out.row(r);
  norm_rows<kRows>(
      rows, width, p.eps, factors, p.mean + r, p.rstd + r,
      [&](int64_t i, int64_t n, Vec(&values)[kRows]) UVG_INLINED {
        const Vec weight = gate.at(i, n);
        each<kRows>([&](auto k) UVG_INLINED {
          const Vec sum = load(h + k * width + i, n) + weight * load(y + k * width + i, n);
          store(rows + k * width + i, sum, n);
          if (out.past()) out.put(r + k, i, sum, n);
          values[k] = load(rows + k * width + i, n);  // as it was rounded
        });
      },
      [&](int64_t i, int64_t n, const Vec(&values)[kRows]) UVG_INLINED {
        ask_ahead<kRows>(h, width, i), ask_ahead<kRows>(y, width, i);
        normed.put_rows(r, i, values, n);
      });
}

template <typename H, typename Y, typename N>
struct Forward {
  struct Room {
    H* rows;
    Room(Scratch& scratch, int64_t width) : rows(reinterpret_cast<H*>(scratch.words(kGroup * width))) {}
  };

  void operator()(const Params& p) const {
    const RowChunks chunks(p.spans, p.num_spans, 2, p.rows, rows_at_once(p));
    const Target<H> out(p.out, p.rows, p.width);
    const Target<N> normed(p.normed, p.rows, p.width);
    const int threads = threads_for_rows(p.threads, p.rows, p.width);
    Scratch scratch;
    const PerThread<Room> rooms(scratch, threads, out.past() ? p.width : 0);
#pragma omp parallel num_threads(threads)
    {
      H* const kept = rooms.own().rows;
#pragma omp for schedule(static)
      for (int64_t c = 0; c < chunks.size(); ++c) {
        const Gate gate(p.gate, chunks[c].span, p.width);
        const NormFactors factors = NormFactors::of(p, chunks[c].span);
        by_groups(chunks[c], [&](int64_t r, auto rows) {
          forward_rows<rows.value, H, Y, N>(p, r, gate, factors, kept, out, normed);
        });
        out.finish(), normed.finish();
      }
    }
  }
};

// sums: of the chunk, by part; that of the gate is null without one.
template <int64_t kRows, typename H, typename Y, typename N>
UVG_NOINLINE void backward_rows(const Params& p, int64_t r, const Gate& gate, const NormFactors& factors,
                                float* const (&sums)[kParts], const Target<H> dh, const Target<Y> dy) {
  const int64_t width = p.width, at = r * width;
  const H *out = static_cast<const H*>(p.out) + at, *dout = static_cast<const H*>(p.dout) + at;
  const Y* y = static_cast<const Y*>(p.y) + at;
  const N* dnormed = static_cast<const N*>(p.dnormed) + at;
  norm_rows_backward<kRows>(out, dnormed, width, p.mean + r, p.rstd + r, factors, sums[kPlain], sums[kProjected],
                            [&](int64_t i, int64_t n, const Vec(&values)[kRows]) UVG_INLINED {
                              ask_ahead<kRows>(out, width, i), ask_ahead<kRows>(dout, width, i);
                              ask_ahead<kRows>(y, width, i), ask_ahead<kRows>(dnormed, width, i);
                              const Vec weight = gate.at(i, n);
                              Vec column = {}, g[kRows], gated[kRows];
                              each<kRows>([&](auto k) UVG_INLINED {
                                g[k] = load(dout + k * width + i, n) + values[k];
                                gated[k] = weight * g[k];
                                if (sums[kGatePart] != nullptr) column += g[k] * load(y + k * width + i, n);
                              });
                              dh.put_rows(r, i, g, n), dy.put_rows(r, i, gated, n);
                              if (sums[kGatePart] != nullptr) add_to(sums[kGatePart] + i, column, n);
                            });
}

template <typename H, typename Y, typename N>
struct Backward {
  void operator()(const Params& p) const {
    const RowChunks chunks(p.spans, p.num_spans, 2, p.rows);
    PartialSums sums(chunks, kParts, p.width, p.threads);
    const Target<H> dh(p.dh, p.rows, p.width);
    const Target<Y> dy(p.dy, p.rows, p.width);
#pragma omp parallel for num_threads(threads_for_rows(p.threads, p.rows, p.width)) schedule(static)
    for (int64_t c = 0; c < chunks.size(); ++c) {
      const Gate gate(p.gate, chunks[c].span, p.width);
      const NormFactors factors = NormFactors::of(p, chunks[c].span);
      float* const own[kParts] = {sums.start(c, kPlain), sums.start(c, kProjected),
                                  p.gate == nullptr ? nullptr : sums.start(c, kGatePart)};
      by_groups(chunks[c],
                [&](int64_t r, auto rows) { backward_rows<rows.value, H, Y, N>(p, r, gate, factors, own, dh, dy); });
      dh.finish(), dy.finish();
    }
    finish_norm(p, chunks, sums);
    if (p.gate != nullptr) sums.per_span(kGatePart, p.dgate, p.num_spans);
  }
};

template <template <typename, typename, typename> class Run, typename Half>
void choose(const Params& p) {
  with_float_or<Half>(p.dtype_h, [&](auto h) {
    with_float_or<Half>(p.dtype_y, [&](auto y) {
      with_float_or<Half>(p.dtype_normed, [&](auto normed) { Run<decltype(h), decltype(y), decltype(normed)>{}(p); });
    });
  });
}

// bf16 and fp16 do not meet in a call.
template <template <typename, typename, typename> class Run>
void choose(const Params& p) {
  const Dtype fp16 = Dtype::kFloat16;
  const bool any = p.dtype_h == fp16 || p.dtype_y == fp16 || p.dtype_normed == fp16;
  any ? choose<Run, Float16>(p) : choose<Run, BFloat16>(p);
}

}  // namespace

void gated_residual_norm_forward(const Params& p) { choose<Forward>(p); }

void gated_residual_norm_backward(const Params& p) { choose<Backward>(p); }

}  // namespace UVG_ISA
}  // namespace uvg
