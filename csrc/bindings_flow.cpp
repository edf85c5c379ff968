// flow_step and flow_noise of uvg_engine._cpu. Fields as in csrc/include/uvg/<op>.h.
#include <pybind11/stl.h>

#include <array>

#include "bindings_cpu.h"
#include "uvg/flow_noise.h"
#include "uvg/flow_step.h"

namespace {

using Out = std::array<Address, 3>;  // one latent each

void flow_step(Address x, Address v_cond, Address v_uncond, Address guidance, Address coefs, Address last, Address m1,
               Address m2, Address latent_spans, Address tokens, Address drawn, Address jump_prob, Address seeds,
               Address steps, Address token_spans, int64_t num_latents, int64_t num_tokens, int64_t samples, int dtype,
               int threads, Out out, Address tokens_next) {
  uvg::FlowStepParams p{};
  p.x = at<void>(x), p.v_cond = at<void>(v_cond), p.v_uncond = at<void>(v_uncond);
  p.guidance = at<float>(guidance), p.coefs = at<float>(coefs);
  p.last = at<void>(last), p.m1 = at<void>(m1), p.m2 = at<void>(m2);
  p.latent_spans = at<int32_t>(latent_spans), p.tokens = at<int64_t>(tokens), p.drawn = at<int64_t>(drawn);
  p.jump_prob = at<float>(jump_prob), p.seeds = at<int64_t>(seeds), p.steps = at<int64_t>(steps);
  p.token_spans = at<int32_t>(token_spans);
  p.num_latents = num_latents, p.num_tokens = num_tokens, p.samples = samples;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.x_next = at<void>(out[0]), p.corrected = at<void>(out[1]), p.estimate = at<void>(out[2]);
  p.tokens_next = at<int64_t>(tokens_next);
  run(uvg::flow_step_forward, p);
}

void flow_noise(Address data, Address tokens, Address sigma, Address kappa, Address seeds, int64_t step,
                Address latent_spans, Address token_spans, int64_t vocab, int64_t mask_id, int64_t num_latents,
                int64_t num_tokens, int64_t samples, int dtype, int threads, Address x, Address velocity,
                Address noisy) {
  uvg::FlowNoiseParams p{};
  p.data = at<void>(data), p.tokens = at<int64_t>(tokens);
  p.sigma = at<float>(sigma), p.kappa = at<float>(kappa), p.seeds = at<int64_t>(seeds);
  p.latent_spans = at<int32_t>(latent_spans), p.token_spans = at<int32_t>(token_spans);
  p.num_latents = num_latents, p.num_tokens = num_tokens, p.samples = samples, p.step = step;
  p.vocab = vocab, p.mask_id = mask_id;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.x = at<void>(x), p.velocity = at<void>(velocity), p.noisy = at<int64_t>(noisy);
  run(uvg::flow_noise_forward, p);
}

// A bit for each column of fp32 [rows, columns] that is not all zero; NaN is not.
int64_t asks_columns(Address table, int64_t rows, int64_t columns) {
  int64_t used = 0;
  for (int64_t i = 0; i < rows * columns; ++i)
    used |= static_cast<int64_t>(at<const float>(table)[i] != 0) << i % columns;
  return used;
}

}  // namespace

void bind_flow(pybind11::module_& m) {
  def_kernel(m, "flow_step", &flow_step);
  def_kernel(m, "flow_noise", &flow_noise);
  def_kernel(m, "asks_columns", &asks_columns);
}
