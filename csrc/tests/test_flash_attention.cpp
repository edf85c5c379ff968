#include "uvg/flash_attention.h"

#include "tests/kernel_test.h"

using namespace uvg;
using namespace uvg::test;

namespace {

// Two samples of two runs each and one without keys; some query rows are of no sample.
struct Shape {
  int64_t heads, width, rows_q, rows_k;
  std::vector<int32_t> queries, keys;
  bool far = false;  // scores of query 5 ask for a reference of their own
};

std::vector<double> forward(const Shape& s, const RowLists& queries, const RowLists& keys, const Array& q,
                            const Array& k, const Array& v, double scale) {
  std::vector<double> out(s.rows_q * s.heads * s.width, 0.0);
  const auto at = [&](int64_t row, int64_t head, int64_t i) { return (row * s.heads + head) * s.width + i; };
  for (int64_t b = 0; b < queries.samples(); ++b) {
    for (int64_t head = 0; head < s.heads; ++head) {
      for (int64_t i = 0; i < queries.size(b); ++i) {
        const int64_t row = queries.rows(b)[i];
        std::vector<double> p(keys.size(b));
        double sum = 0;
        for (int64_t j = 0; j < keys.size(b); ++j) {
          double score = 0;
          for (int64_t c = 0; c < s.width; ++c) {
            score += static_cast<double>(q[at(row, head, c)]) * k[at(keys.rows(b)[j], head, c)];
          }
          sum += p[j] = std::exp(scale * score);
        }
        for (int64_t j = 0; j < keys.size(b); ++j) {
          for (int64_t c = 0; c < s.width; ++c) {
            out[at(row, head, c)] += p[j] / sum * v[at(keys.rows(b)[j], head, c)];
          }
        }
      }
    }
  }
  return out;
}

void check(const Shape& s) {
  const auto samples = static_cast<int64_t>(s.queries.size() / 4);
  const RowLists queries(s.queries.data(), samples, 2, s.rows_q), keys(s.keys.data(), samples, 2, s.rows_k);
  const int64_t size_q = s.rows_q * s.heads * s.width, size_k = s.rows_k * s.heads * s.width;
  const float scale = 2.0f / std::sqrt(static_cast<float>(s.width));
  const auto inputs = [&](Dtype dtype) {
    Arrays in = {Array::random(dtype, size_q, 1), Array::random(dtype, size_k, 2), Array::random(dtype, size_k, 3),
                 Array::random(dtype, size_q, 4)};
    for (int64_t i = 0; s.far && i < size_q; ++i) in[0].set(i, in[0][i] * (i / (s.heads * s.width) == 5 ? 64 : 1));
    return in;
  };
  const auto run = [&](Dtype dtype, int threads) {
    Arrays in = inputs(dtype);
    Arrays out = {Array(dtype, size_q), Array(dtype, size_q), Array(dtype, size_k), Array(dtype, size_k)};
    Array lse(Dtype::kFloat32, s.heads * s.rows_q);
    FlashAttentionParams p{};
    p.q = in[0].data(), p.k = in[1].data(), p.v = in[2].data(), p.dout = in[3].data();
    p.queries = &queries, p.keys = &keys, p.rows_q = s.rows_q, p.rows_k = s.rows_k;
    p.heads = s.heads, p.width = s.width, p.scale = scale, p.dtype = dtype, p.threads = threads;
    p.out = out[0].data(), p.lse = lse.floats();
    p.dq = out[1].data(), p.dk = out[2].data(), p.dv = out[3].data();
    flash_attention_forward(p);
    flash_attention_backward(p);
    return out;
  };
  everywhere(run, [&](Dtype dtype) {
    const Arrays in = inputs(dtype);
    return Truth{forward(s, queries, keys, in[0], in[1], in[2], scale)};
  });
}

}  // namespace

int main() {
  const std::vector<int32_t> self = {0, 70, 200, 9, 71, 129, 209, 1};  // row 70 is of no sample
  check({2, 32, 210, 210, self, self});
  check({1, 7, 210, 210, self, self});
  check({1, 128, 210, 210, self, self});
  check({3, 20, 40, 5, {0, 20, 0, 0, 20, 20, 0, 0}, {0, 5, 0, 0, 0, 5, 0, 0}});     // both look at the same keys
  check({1, 64, 3, 700, {0, 2, 0, 0, 2, 1, 0, 0}, {0, 650, 690, 10, 0, 0, 0, 0}});  // the second has no key
  check({1, 40, 210, 210, self, self, true});
  for (int32_t n : {16, 17, 33, 49, 92}) check({1, 24, n, n, {0, n, 0, 0}, {0, n, 0, 0}});  // parts of a panel
  check({1, 24, 600, 500, {0, 600, 0, 0}, {0, 500, 0, 0}});  // a head that all threads share in its backward
  check({5, 24, 300, 300, {0, 200, 0, 0, 200, 100, 0, 0}, {0, 200, 0, 0, 200, 100, 0, 0}});  // whole ones, then that
  return finish("flash_attention");
}
