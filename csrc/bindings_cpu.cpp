// uvg_engine._cpu: what the CPU core offers to Python. Pointers, sizes and plain values; no torch.
#include "bindings_cpu.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "common/content_mark.h"
#include "common/cpu_features.h"
#include "common/pack_values.h"
#include "common/philox.h"
#include "uvg/flash_attention.h"
#include "uvg/gated_residual.h"
#include "uvg/gated_residual_norm.h"
#include "uvg/linear.h"
#include "uvg/linear_cross_entropy.h"
#include "uvg/linear_sample.h"
#include "uvg/modulated_layer_norm.h"
#include "uvg/moe_mlp.h"
#include "uvg/qk_norm_rope.h"

namespace py = pybind11;

namespace {

std::array<uint32_t, 4> philox4x32(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const uvg::PhiloxWords w =
      uvg::philox4x32({counter[0], counter[1], counter[2], counter[3]}, uvg::PhiloxKey{key[0], key[1]});
  return {w.w0, w.w1, w.w2, w.w3};
}

std::vector<std::string> isa_names(const std::vector<uvg::Isa>& isas) {
  std::vector<std::string> out;
  for (uvg::Isa isa : isas) out.emplace_back(uvg::isa_name(isa));
  return out;
}

py::dict cpu_features() {
  py::dict flags;
  for (const auto& [name, present] : uvg::cpu_flags()) flags[name] = present;
  py::dict out;
  out["isa"] = uvg::isa_name(uvg::isa_in_use());
  out["supported"] = isa_names(uvg::supported_isas());
  out["flags"] = flags;
  return out;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_FULL_VER);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict out;
  out["version"] = UVG_VERSION;
  out["compiler"] = compiler();
  out["isa"] = isa_names(uvg::compiled_isas());
#if defined(_OPENMP)
  out["openmp"] = true;
#else
  out["openmp"] = false;
#endif
  return out;
}

void layer_norm(bool backward, Address x, Address shift, Address scale, Address spans, Address weight, Address bias,
                int64_t rows, int64_t width, int64_t num_spans, float eps, int dtype, int threads, Address mean,
                Address rstd, Address y, Address dy, Address dx, Address dshift, Address dscale, Address dweight,
                Address dbias) {
  uvg::ModulatedLayerNormParams p{};
  p.x = at<void>(x);
  p.shift = at<float>(shift), p.scale = at<float>(scale), p.spans = at<int32_t>(spans);
  p.weight = at<float>(weight), p.bias = at<float>(bias);
  p.rows = rows, p.width = width, p.num_spans = num_spans;
  p.eps = eps, p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.mean = at<float>(mean), p.rstd = at<float>(rstd);
  p.y = at<void>(y), p.dy = at<void>(dy), p.dx = at<void>(dx);
  p.dshift = at<float>(dshift), p.dscale = at<float>(dscale);
  p.dweight = at<float>(dweight), p.dbias = at<float>(dbias);
  run(backward ? uvg::modulated_layer_norm_backward : uvg::modulated_layer_norm_forward, p);
}

void residual(bool backward, Address h, Address y, Address gate, Address spans, int64_t rows, int64_t width,
              int64_t num_spans, int dtype_h, int dtype_y, int threads, Address out, Address dout, Address dy,
              Address dgate) {
  uvg::GatedResidualParams p{};
  p.h = at<void>(h), p.y = at<void>(y), p.gate = at<float>(gate), p.spans = at<int32_t>(spans);
  p.rows = rows, p.width = width, p.num_spans = num_spans;
  p.dtype_h = static_cast<uvg::Dtype>(dtype_h), p.dtype_y = static_cast<uvg::Dtype>(dtype_y), p.threads = threads;
  p.out = at<void>(out), p.dout = at<void>(dout), p.dy = at<void>(dy), p.dgate = at<float>(dgate);
  run(backward ? uvg::gated_residual_backward : uvg::gated_residual_forward, p);
}

void residual_norm(bool backward, std::array<Address, 8> in, int64_t rows, int64_t width, int64_t num_spans, float eps,
                   std::array<int, 3> dtypes, int threads, std::array<Address, 4> out, std::array<Address, 2> douts,
                   std::array<Address, 7> dins) {
  uvg::GatedResidualNormParams p{};
  p.h = at<void>(in[0]), p.y = at<void>(in[1]), p.gate = at<float>(in[2]);
  p.shift = at<float>(in[3]), p.scale = at<float>(in[4]), p.spans = at<int32_t>(in[5]);
  p.weight = at<float>(in[6]), p.bias = at<float>(in[7]);
  p.rows = rows, p.width = width, p.num_spans = num_spans, p.eps = eps, p.threads = threads;
  p.dtype_h = static_cast<uvg::Dtype>(dtypes[0]), p.dtype_y = static_cast<uvg::Dtype>(dtypes[1]);
  p.dtype_normed = static_cast<uvg::Dtype>(dtypes[2]);
  p.out = at<void>(out[0]), p.normed = at<void>(out[1]), p.mean = at<float>(out[2]), p.rstd = at<float>(out[3]);
  p.dout = at<void>(douts[0]), p.dnormed = at<void>(douts[1]);
  p.dh = at<void>(dins[0]), p.dy = at<void>(dins[1]), p.dgate = at<float>(dins[2]);
  p.dshift = at<float>(dins[3]), p.dscale = at<float>(dins[4]);
  p.dweight = at<float>(dins[5]), p.dbias = at<float>(dins[6]);
  run(backward ? uvg::gated_residual_norm_backward : uvg::gated_residual_norm_forward, p);
}

void moe_mlp(Address x, Address w1, Address b1, Address w2, Address b2, const std::vector<int64_t>& offsets,
             int64_t width, int64_t hidden, int64_t x_row, int dtype, int threads, Address room, int64_t room_rows,
             Address y, Address pre) {
  uvg::MoeMlpParams p{};
  p.x = at<void>(x), p.w1 = at<uint32_t>(w1), p.w2 = at<uint32_t>(w2), p.b1 = at<void>(b1), p.b2 = at<void>(b2);
  p.offsets = offsets.data(), p.experts = static_cast<int64_t>(offsets.size()) - 1;
  p.width = width, p.hidden = hidden, p.x_row = x_row;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.room = at<void>(room), p.room_rows = room_rows, p.y = at<void>(y), p.pre = at<void>(pre);
  run(uvg::moe_mlp_forward, p);
}

int64_t weight_words(int64_t width, int64_t depth, int dtype) {
  int64_t words = 0;
  uvg::LinearParams p{};
  p.depth = depth, p.width = width, p.dtype = static_cast<uvg::Dtype>(dtype), p.words = &words;
  uvg::linear_words(p);
  return words;
}

// Tells whether a packed weight still is one: changes with what the weight holds and with the instruction set.
uint64_t weight_mark(Address weight, int64_t bytes) {
  return uvg::content_mark(at<void>(weight), bytes) + static_cast<uint64_t>(uvg::isa_in_use());
}

void pack_values(Address from, int64_t rows, int64_t width, int64_t row_step, int64_t step, int dtype_from,
                 int dtype_to, Address to) {
  uvg::PackValuesParams p{};
  p.from = at<void>(from), p.rows = rows, p.width = width, p.row_step = row_step, p.step = step;
  p.dtype_from = static_cast<uvg::Dtype>(dtype_from), p.dtype_to = static_cast<uvg::Dtype>(dtype_to);
  p.to = at<void>(to);
  run(uvg::pack_values, p);
}

void pack_weight(Address weight, int64_t width, int64_t depth, int dtype, int threads, Address packed) {
  uvg::LinearParams p{};
  p.weight = at<void>(weight), p.depth = depth, p.width = width;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads, p.pack_into = at<uint32_t>(packed);
  run(uvg::linear_pack, p);
}

bool packs_panels(int64_t rows, int dtype) {
  int64_t answer = 0;
  uvg::LinearParams p{};
  p.rows = rows, p.dtype = static_cast<uvg::Dtype>(dtype), p.words = &answer;
  uvg::linear_packs_panels(p);
  return answer != 0;
}

// packed: or the weight as it is, where packs_panels.
void linear(Address x, Address packed, Address weight, Address bias, int64_t rows, int64_t depth, int64_t width,
            int64_t x_row, int64_t out_row, bool gelu, int dtype, int threads, Address out, Address pre) {
  uvg::LinearParams p{};
  p.x = at<void>(x), p.packed = at<uint32_t>(packed), p.weight = at<void>(weight), p.bias = at<void>(bias);
  p.rows = rows, p.depth = depth, p.width = width, p.x_row = x_row, p.out_row = out_row;
  p.gelu = gelu, p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.out = at<void>(out), p.pre = at<void>(pre);
  run(uvg::linear_forward, p);
}

void linear_backward(Address dz, Address x, Address weight, int64_t rows, int64_t depth, int64_t width, int64_t x_row,
                     int64_t weight_row, bool gelu, int dtype, int threads, Address dx, Address dweight, Address dbias,
                     Address dx_before, Address dx_so_far) {
  uvg::LinearBackwardParams p{};
  p.dz = at<void>(dz), p.x = at<void>(x), p.weight = at<void>(weight);
  p.rows = rows, p.depth = depth, p.width = width, p.x_row = x_row, p.weight_row = weight_row;
  p.gelu = gelu, p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.dx = at<void>(dx), p.dweight = at<void>(dweight), p.dbias = at<void>(dbias);
  p.dx_before = at<float>(dx_before), p.dx_so_far = at<float>(dx_so_far);
  run(uvg::linear_backward, p);
}

void gelu_backward(Address dy, Address pre, int64_t size, int dtype, int threads, Address dz) {
  uvg::GeluBackwardParams p{};
  p.dy = at<void>(dy), p.pre = at<void>(pre), p.size = size;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads, p.dz = at<void>(dz);
  run(uvg::gelu_backward, p);
}

void attention(bool backward, std::array<Address, 3> x, Spans q_spans, Spans k_spans, int64_t heads, int64_t width,
               float scale, int dtype, int threads, Address out, Address lse, Address dout, std::array<Address, 3> dx) {
  const uvg::RowLists queries = row_lists(q_spans), keys = row_lists(k_spans);
  uvg::FlashAttentionParams p{};
  p.q = at<void>(x[0]), p.k = at<void>(x[1]), p.v = at<void>(x[2]);
  p.queries = &queries, p.keys = &keys, p.rows_q = std::get<3>(q_spans), p.rows_k = std::get<3>(k_spans);
  p.heads = heads, p.width = width, p.scale = scale, p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.out = at<void>(out), p.lse = at<float>(lse), p.dout = at<void>(dout);
  p.dq = at<void>(dx[0]), p.dk = at<void>(dx[1]), p.dv = at<void>(dx[2]);
  run(backward ? uvg::flash_attention_backward : uvg::flash_attention_forward, p);
}

using Pair = std::array<Address, 2>;

void norm_rope(bool backward, Pair x, Pair weight, Address spans, Address table, int64_t rows, int64_t width,
               int64_t heads, int64_t num_spans, int64_t positions, float eps, int dtype, int threads, Pair rstd,
               Pair y, Pair dy, Pair dx, Pair dweight) {
  uvg::QkNormRopeParams p{};
  p.spans = at<int32_t>(spans), p.table = at<float>(table);
  p.rows = rows, p.width = width, p.heads = heads, p.num_spans = num_spans, p.positions = positions;
  p.eps = eps, p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  for (int i = 0; i < 2; ++i) {
    p.x[i] = at<void>(x[i]), p.weight[i] = at<float>(weight[i]), p.rstd[i] = at<float>(rstd[i]);
    p.y[i] = at<void>(y[i]), p.dy[i] = at<void>(dy[i]), p.dx[i] = at<void>(dx[i]);
    p.dweight[i] = at<float>(dweight[i]);
  }
  run(backward ? uvg::qk_norm_rope_backward : uvg::qk_norm_rope_forward, p);
}

void cross_entropy(bool backward, Address x, Address weight, Address bias, Address target, Address current,
                   Address rate, int64_t rows, int64_t width, int64_t vocab, int dtype, int threads, Address loss,
                   Address lse, Address p_current, Address dloss, Address dx, Address dweight, Address dbias) {
  uvg::LinearCrossEntropyParams p{};
  p.x = at<void>(x), p.weight = at<void>(weight), p.bias = at<void>(bias);
  p.target = at<int64_t>(target), p.current = at<int64_t>(current), p.rate = at<float>(rate);
  p.rows = rows, p.width = width, p.vocab = vocab;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.loss = at<float>(loss), p.lse = at<float>(lse), p.p_current = at<float>(p_current), p.dloss = at<float>(dloss);
  p.dx = at<void>(dx), p.dweight = at<void>(dweight), p.dbias = at<void>(dbias);
  run(backward ? uvg::linear_cross_entropy_backward : uvg::linear_cross_entropy_forward, p);
}

void sample(Address x, Address weight, Address bias, std::array<Address, 3> names, int64_t rows, int64_t width,
            int64_t vocab, double temperature, int dtype, int threads, Address ids) {
  uvg::LinearSampleParams p{};
  p.x = at<void>(x), p.weight = at<void>(weight), p.bias = at<void>(bias);
  p.seeds = at<int64_t>(names[0]), p.steps = at<int64_t>(names[1]), p.tokens = at<int64_t>(names[2]);
  p.rows = rows, p.width = width, p.vocab = vocab, p.temperature = temperature;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads, p.ids = at<int64_t>(ids);
  run(uvg::linear_sample, p);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU core of uvg_engine.";
  m.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"),
        "Four uint32 words of Philox4x32-10 for a counter of 4 and a key of 2 uint32 words.");
  m.def("cpu_features", &cpu_features,
        "Instruction set in use (UVG_CPU_ISA lowers it; ValueError on one this CPU or build lacks), those that the "
        "CPU supports, and single feature flags.");
  m.def("use_isa", &uvg::use_isa, py::arg("name"), "Run the kernels in another instruction set from now on.");
  // Kernels: addresses of packed tensors, sizes, Dtype numbers (0 float32, 1 bfloat16); uvg_engine/backends/cpu/
  // checks and calls. Fields as in csrc/include/uvg/<op>.h.
  def_kernel(m, "pack_values", &pack_values);
  def_kernel(m, "modulated_layer_norm", &layer_norm);
  def_kernel(m, "gated_residual", &residual);
  def_kernel(m, "gated_residual_norm", &residual_norm);
  def_kernel(m, "qk_norm_rope", &norm_rope);
  def_kernel(m, "moe_mlp", &moe_mlp);
  def_kernel(m, "flash_attention", &attention);
  def_kernel(m, "linear", &linear);
  def_kernel(m, "linear_backward", &linear_backward);
  def_kernel(m, "gelu_backward", &gelu_backward);
  def_kernel(m, "linear_words", &weight_words);
  def_kernel(m, "weight_mark", &weight_mark);
  def_kernel(m, "linear_pack", &pack_weight);
  def_kernel(m, "linear_packs_panels", &packs_panels);
  def_kernel(m, "linear_cross_entropy", &cross_entropy);
  def_kernel(m, "linear_sample", &sample);
  bind_flow(m);
  bind_int8(m);
  bind_moe_routing(m);
  bind_plans(m);
  m.def("build_info", &build_info, "Version, compiler, instruction sets compiled in, OpenMP or not.");
}
