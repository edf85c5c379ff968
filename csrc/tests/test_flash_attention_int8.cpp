#include "uvg/flash_attention_int8.h"

#include "tests/kernel_test.h"

using namespace uvg;
using namespace uvg::test;

// Values are the Python tests'; here all instruction sets must agree with the generic one.
namespace {

// Two samples of two runs each; some query rows are of no sample, row 5 is `far` times as large.
void check(int64_t heads, int64_t width, float far) {
  const std::vector<int32_t> q_spans = {0, 30, 70, 200, 30, 40, 270, 5}, k_spans = {0, 90, 90, 7, 97, 3, 100, 30};
  const int64_t rows_q = 280, rows_k = 130;
  const RowLists queries(q_spans.data(), 2, 2, rows_q), keys(k_spans.data(), 2, 2, rows_k);
  const auto run = [&](Dtype dtype, int threads) {
    Array q = Array::random(dtype, rows_q * heads * width, 1), k = Array::random(dtype, rows_k * heads * width, 2);
    Array v = Array::random(dtype, rows_k * heads * width, 3);
    for (int64_t i = 0; i < q.size(); ++i) q.set(i, q[i] * (i / (heads * width) == 5 ? far : 1.0f));
    Arrays out = {Array(dtype, rows_q * heads * width)};
    FlashAttentionParams p{};
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.queries = &queries, p.keys = &keys;
    p.rows_q = rows_q, p.rows_k = rows_k, p.heads = heads, p.width = width;
    p.scale = 2.0f / std::sqrt(static_cast<float>(width)), p.dtype = dtype, p.threads = threads;
    p.out = out[0].data();
    flash_attention_int8_forward(p);
    return out;
  };
  everywhere(run, [](Dtype) { return Truth{}; });
}

}  // namespace

int main() {
  check(1, 1, 1.0f);
  check(2, 33, 1.0f);
  check(3, 64, 1.0f);
  check(1, 33, 64.0f);  // asks for a reference beside rows that need none; no scale of a power of two
  return finish("flash_attention_int8");
}
