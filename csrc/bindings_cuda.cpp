// uvg_engine._cuda: the launchers of csrc/cuda for Python. Compiled with UVG_SIMULATE it is _cuda_sim, which runs them
// on the CPU. Every op is called as <op>_forward(stream, **fields), <op>_backward(stream, **fields) with the fields of
// its params struct by name; uvg_engine/backends/cuda checks and calls. No torch, no CUDA header.
#include "common/fields.h"
#include "common/gpu_driver.h"
#include "uvg/flash_attention.h"
#include "uvg/flow_noise.h"
#include "uvg/flow_step.h"
#include "uvg/gated_residual.h"
#include "uvg/gated_residual_norm.h"
#include "uvg/linear_sample.h"
#include "uvg/modulated_layer_norm.h"
#include "uvg/moe_combine.h"
#include "uvg/moe_dispatch.h"
#include "uvg/moe_route.h"
#include "uvg/qk_norm_rope.h"

#if UVG_SIMULATE
#include "sim/machine.h"
#endif

#define UVG_FIELD(name) (#name, p.name)

namespace py = pybind11;

namespace uvg {
namespace {

void read(Fields& f, FlashAttentionCudaParams& p) {
  f UVG_FIELD(q) UVG_FIELD(k) UVG_FIELD(v) UVG_FIELD(q_spans) UVG_FIELD(k_spans);
  f UVG_FIELD(samples) UVG_FIELD(spans_q) UVG_FIELD(spans_k) UVG_FIELD(rows_q) UVG_FIELD(rows_k);
  f UVG_FIELD(heads) UVG_FIELD(width) UVG_FIELD(scale) UVG_FIELD(dtype);
  f UVG_FIELD(out) UVG_FIELD(lse) UVG_FIELD(dout) UVG_FIELD(delta) UVG_FIELD(dq) UVG_FIELD(dk) UVG_FIELD(dv);
}

void read(Fields& f, FlowNoiseParams& p) {
  f UVG_FIELD(data) UVG_FIELD(tokens) UVG_FIELD(sigma) UVG_FIELD(kappa) UVG_FIELD(seeds);
  f UVG_FIELD(latent_spans) UVG_FIELD(token_spans) UVG_FIELD(num_latents) UVG_FIELD(num_tokens) UVG_FIELD(samples);
  f UVG_FIELD(step) UVG_FIELD(vocab) UVG_FIELD(mask_id) UVG_FIELD(dtype);
  f UVG_FIELD(x) UVG_FIELD(velocity) UVG_FIELD(noisy);
}

void read(Fields& f, FlowStepParams& p) {
  f UVG_FIELD(x) UVG_FIELD(v_cond) UVG_FIELD(v_uncond) UVG_FIELD(last) UVG_FIELD(m1) UVG_FIELD(m2);
  f UVG_FIELD(guidance) UVG_FIELD(coefs) UVG_FIELD(latent_spans) UVG_FIELD(tokens) UVG_FIELD(drawn);
  f UVG_FIELD(jump_prob) UVG_FIELD(seeds) UVG_FIELD(steps) UVG_FIELD(token_spans);
  f UVG_FIELD(num_latents) UVG_FIELD(num_tokens) UVG_FIELD(samples) UVG_FIELD(dtype);
  f UVG_FIELD(x_next) UVG_FIELD(corrected) UVG_FIELD(estimate) UVG_FIELD(tokens_next);
}

void read(Fields& f, GatedResidualParams& p) {
  f UVG_FIELD(h) UVG_FIELD(y) UVG_FIELD(gate) UVG_FIELD(spans);
  f UVG_FIELD(rows) UVG_FIELD(width) UVG_FIELD(num_spans) UVG_FIELD(dtype_h) UVG_FIELD(dtype_y);
  f UVG_FIELD(out) UVG_FIELD(dout) UVG_FIELD(dy) UVG_FIELD(dgate) UVG_FIELD(partial);
}

void read(Fields& f, GatedResidualNormParams& p) {
  f UVG_FIELD(h) UVG_FIELD(y) UVG_FIELD(gate) UVG_FIELD(shift) UVG_FIELD(scale) UVG_FIELD(spans);
  f UVG_FIELD(weight) UVG_FIELD(bias) UVG_FIELD(rows) UVG_FIELD(width) UVG_FIELD(num_spans) UVG_FIELD(eps);
  f UVG_FIELD(dtype_h) UVG_FIELD(dtype_y) UVG_FIELD(dtype_normed);
  f UVG_FIELD(out) UVG_FIELD(normed) UVG_FIELD(mean) UVG_FIELD(rstd) UVG_FIELD(dout) UVG_FIELD(dnormed);
  f UVG_FIELD(dh) UVG_FIELD(dy) UVG_FIELD(dgate) UVG_FIELD(dshift) UVG_FIELD(dscale) UVG_FIELD(dweight);
  f UVG_FIELD(dbias) UVG_FIELD(row_means) UVG_FIELD(partial);
}

void read(Fields& f, LinearSampleParams& p) {
  f UVG_FIELD(x) UVG_FIELD(weight) UVG_FIELD(bias) UVG_FIELD(seeds) UVG_FIELD(steps) UVG_FIELD(tokens);
  f UVG_FIELD(rows) UVG_FIELD(width) UVG_FIELD(vocab) UVG_FIELD(temperature) UVG_FIELD(dtype);
  f UVG_FIELD(ids) UVG_FIELD(weighed);
}

void read(Fields& f, ModulatedLayerNormParams& p) {
  f UVG_FIELD(x) UVG_FIELD(shift) UVG_FIELD(scale) UVG_FIELD(spans) UVG_FIELD(weight) UVG_FIELD(bias);
  f UVG_FIELD(rows) UVG_FIELD(width) UVG_FIELD(num_spans) UVG_FIELD(eps) UVG_FIELD(dtype);
  f UVG_FIELD(mean) UVG_FIELD(rstd) UVG_FIELD(y) UVG_FIELD(dy) UVG_FIELD(dx);
  f UVG_FIELD(dshift) UVG_FIELD(dscale) UVG_FIELD(dweight) UVG_FIELD(dbias) UVG_FIELD(partial);
}

void read(Fields& f, MoeCombineParams& p) {
  f UVG_FIELD(grouped) UVG_FIELD(order) UVG_FIELD(weights) UVG_FIELD(rows) UVG_FIELD(width) UVG_FIELD(top_k);
  f UVG_FIELD(dtype) UVG_FIELD(places) UVG_FIELD(out) UVG_FIELD(dout) UVG_FIELD(dgrouped) UVG_FIELD(dweights);
}

void read(Fields& f, MoeDispatchParams& p) {
  f UVG_FIELD(x) UVG_FIELD(chosen) UVG_FIELD(rows) UVG_FIELD(width) UVG_FIELD(experts) UVG_FIELD(top_k);
  f UVG_FIELD(dtype) UVG_FIELD(grouped) UVG_FIELD(offsets) UVG_FIELD(order) UVG_FIELD(places);
  f UVG_FIELD(dgrouped) UVG_FIELD(dx);
}

void read(Fields& f, MoeRouteParams& p) {
  f UVG_FIELD(logits) UVG_FIELD(rows) UVG_FIELD(experts) UVG_FIELD(top_k) UVG_FIELD(dtype);
  f UVG_FIELD(weights) UVG_FIELD(chosen) UVG_FIELD(dweights) UVG_FIELD(dlogits);
}

void read(Fields& f, QkNormRopeParams& p) {
  f UVG_FIELD(x) UVG_FIELD(weight) UVG_FIELD(spans) UVG_FIELD(table);
  f UVG_FIELD(rows) UVG_FIELD(width) UVG_FIELD(heads) UVG_FIELD(num_spans) UVG_FIELD(positions);
  f UVG_FIELD(eps) UVG_FIELD(dtype) UVG_FIELD(rstd);
  f UVG_FIELD(y) UVG_FIELD(dy) UVG_FIELD(dx) UVG_FIELD(dweight) UVG_FIELD(partial);
}

// Buffers of the simulator live as long as the call.
struct Buffers {
#if UVG_SIMULATE
  ~Buffers() { sim::forget_buffers(); }
#endif
};

template <typename Params>
void define(py::module_& m, const char* name, void (*launcher)(const Params&, void*)) {
  m.def(name, [launcher](uintptr_t stream, const py::kwargs& given) {
    [[maybe_unused]] const Buffers buffers;
    Params p{};
    Fields fields(given);
    read(fields, p);
    fields.done();
    const py::gil_scoped_release release;
    launcher(p, reinterpret_cast<void*>(stream));  // NOLINT
  });
}

void define_kernels(py::module_& m) {
  define(m, "flash_attention_forward", &cuda::flash_attention_forward);
  define(m, "flash_attention_backward", &cuda::flash_attention_backward);
  define(m, "flow_noise_forward", &cuda::flow_noise_forward);
  define(m, "flow_step_forward", &cuda::flow_step_forward);
  define(m, "gated_residual_forward", &cuda::gated_residual_forward);
  define(m, "gated_residual_backward", &cuda::gated_residual_backward);
  define(m, "gated_residual_norm_forward", &cuda::gated_residual_norm_forward);
  define(m, "gated_residual_norm_backward", &cuda::gated_residual_norm_backward);
  define(m, "linear_sample_forward", &cuda::linear_sample_forward);
  define(m, "modulated_layer_norm_forward", &cuda::modulated_layer_norm_forward);
  define(m, "modulated_layer_norm_backward", &cuda::modulated_layer_norm_backward);
  define(m, "moe_combine_forward", &cuda::moe_combine_forward);
  define(m, "moe_combine_backward", &cuda::moe_combine_backward);
  define(m, "moe_dispatch_forward", &cuda::moe_dispatch_forward);
  define(m, "moe_dispatch_backward", &cuda::moe_dispatch_backward);
  define(m, "moe_route_forward", &cuda::moe_route_forward);
  define(m, "moe_route_backward", &cuda::moe_route_backward);
  define(m, "qk_norm_rope_forward", &cuda::qk_norm_rope_forward);
  define(m, "qk_norm_rope_backward", &cuda::qk_norm_rope_backward);
}

}  // namespace
}  // namespace uvg

#if UVG_SIMULATE
PYBIND11_MODULE(_cuda_sim, m) {
  m.doc() = "The CUDA kernels of uvg_engine, run on the CPU thread by thread. See docs/simulator.md.";
  py::register_exception<sim::Error>(m, "SimulationError");
  m.def("set_order", [](const std::string& order) { sim::machine().set_order(order); });
  m.def("set_last_block_only", [](bool only) { sim::machine().set_last_block_only(only); });
  m.def("reset_counters", [] { sim::counters() = {}; });
  m.def("counters", [] { return sim::counters().totals(); });
  m.def("counters_by_line", [] { return sim::counters().by_line(); });
  m.def("launches", [] {
    py::list out;
    for (const sim::Launch& l : sim::counters().launches) {
      out.append(py::make_tuple(py::make_tuple(l.grid_x, l.grid_y, l.grid_z), l.threads, l.shared_bytes));
    }
    return out;
  });
  uvg::define_kernels(m);
}
#else
PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of uvg_engine.";
  m.def("versions", [] {
    const uvg::cuda::Versions found = uvg::cuda::versions();
    return py::make_tuple(found.driver, found.runtime);
  });
  m.def("build_info", [] {
    py::dict out;
    out["version"] = UVG_VERSION;
    out["compiler"] = UVG_NVCC;
    out["archs"] = UVG_ARCHS;
    return out;
  });
  uvg::define_kernels(m);
}
#endif
