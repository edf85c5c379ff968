// linear_int8, moe_mlp_int8 and flash_attention_int8 of uvg_engine._cpu. Fields as in csrc/include/uvg/<op>.h.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings_cpu.h"
#include "uvg/flash_attention_int8.h"
#include "uvg/linear_int8.h"
#include "uvg/moe_mlp_int8.h"

namespace {

std::array<int64_t, 2> words(int64_t width, int64_t depth) {
  std::array<int64_t, 2> words{};
  uvg::LinearInt8Params p{};
  p.width = width, p.depth = depth, p.words = words.data();
  uvg::linear_int8_words(p);
  return words;
}

// Dwords of a packed weight, whatever its dtype, and of a quantised row.
int64_t weight_words(int64_t width, int64_t depth, int) { return words(width, depth)[0]; }
int64_t row_words(int64_t depth) { return words(0, depth)[1]; }

void pack(Address weight, int64_t width, int64_t depth, int dtype, int threads, Address packed) {
  uvg::LinearInt8Params p{};
  p.weight = at<void>(weight), p.depth = depth, p.width = width;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads, p.pack_into = at<uint32_t>(packed);
  run(uvg::linear_int8_pack, p);
}

void linear(Address x, Address packed, Address bias, int64_t rows, int64_t depth, int64_t width, int64_t x_row,
            bool gelu, int dtype, int threads, Address room, Address out) {
  uvg::LinearInt8Params p{};
  p.x = at<void>(x), p.packed = at<uint32_t>(packed), p.bias = at<void>(bias);
  p.rows = rows, p.depth = depth, p.width = width, p.x_row = x_row, p.gelu = gelu;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads, p.room = at<uint32_t>(room), p.out = at<void>(out);
  run(uvg::linear_int8_forward, p);
}

void moe_mlp(Address x, Address w1, Address b1, Address w2, Address b2, const std::vector<int64_t>& offsets,
             int64_t width, int64_t hidden, int64_t x_row, int dtype, int threads, Address room, int64_t room_rows,
             Address bytes, Address y) {
  uvg::MoeMlpInt8Params p{};
  p.x = at<void>(x), p.w1 = at<uint32_t>(w1), p.w2 = at<uint32_t>(w2), p.b1 = at<void>(b1), p.b2 = at<void>(b2);
  p.offsets = offsets.data(), p.experts = static_cast<int64_t>(offsets.size()) - 1;
  p.width = width, p.hidden = hidden, p.x_row = x_row;
  p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.room = at<void>(room), p.room_rows = room_rows, p.bytes = at<uint32_t>(bytes), p.y = at<void>(y);
  run(uvg::moe_mlp_int8_forward, p);
}

void attention(std::array<Address, 3> x, Spans q_spans, Spans k_spans, int64_t heads, int64_t width, float scale,
               int dtype, int threads, Address out) {
  const uvg::RowLists queries = row_lists(q_spans), keys = row_lists(k_spans);
  uvg::FlashAttentionParams p{};
  p.q = at<void>(x[0]), p.k = at<void>(x[1]), p.v = at<void>(x[2]);
  p.queries = &queries, p.keys = &keys, p.rows_q = std::get<3>(q_spans), p.rows_k = std::get<3>(k_spans);
  p.heads = heads, p.width = width, p.scale = scale, p.dtype = static_cast<uvg::Dtype>(dtype), p.threads = threads;
  p.out = at<void>(out);
  run(uvg::flash_attention_int8_forward, p);
}

}  // namespace

void bind_int8(pybind11::module_& m) {
  def_kernel(m, "linear_int8_words", &weight_words);
  def_kernel(m, "linear_int8_row_words", &row_words);
  def_kernel(m, "linear_int8_pack", &pack);
  def_kernel(m, "linear_int8", &linear);
  def_kernel(m, "moe_mlp_int8", &moe_mlp);
  def_kernel(m, "flash_attention_int8", &attention);
}
