#include "uvg/linear.h"

#include "tests/kernel_test.h"
#include "uvg/moe_mlp.h"

using namespace uvg;
using namespace uvg::test;

namespace {

double gelu(double x) { return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }

// [rows, width] = act(x w^T + b) in double; x: [rows, depth].
std::vector<double> product(const std::vector<double>& x, const Array& w, const Array& b, int64_t first, int64_t depth,
                            int64_t width, bool act) {
  const auto rows = static_cast<int64_t>(x.size()) / depth;
  std::vector<double> out(rows * width);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < width; ++n) {
      double sum = b[first * width + n];
      for (int64_t i = 0; i < depth; ++i) sum += x[r * depth + i] * w[(first * width + n) * depth + i];
      out[r * width + n] = act ? gelu(sum) : sum;
    }
  }
  return out;
}

// `count` weights [width, depth], one after the other, as the kernels of the instruction set in use read them.
std::vector<uint32_t> packed(Array& weight, int64_t count, int64_t depth, int64_t width, Dtype dtype, int threads) {
  int64_t words = 0;
  LinearParams p{};
  p.depth = depth, p.width = width, p.dtype = dtype, p.threads = threads, p.words = &words;
  linear_words(p);
  std::vector<uint32_t> out(count * words);
  const int64_t bytes = depth * width * (dtype == Dtype::kFloat32 ? 4 : 2);
  for (int64_t i = 0; i < count; ++i) {
    p.weight = static_cast<const uint8_t*>(weight.data()) + i * bytes, p.pack_into = out.data() + i * words;
    linear_pack(p);
  }
  return out;
}

void check_linear(int64_t rows, int64_t depth, int64_t width, bool act) {
  const auto inputs = [&](Dtype dtype) {
    return Arrays{Array::random(dtype, rows * depth, 1), Array::random(dtype, width * depth, 2, 0.3f),
                  Array::random(dtype, width, 3)};
  };
  const auto run = [&](Dtype dtype, int threads) {
    Arrays in = inputs(dtype);
    Arrays out = {Array(dtype, rows * width), Array(dtype, rows * width)};
    const std::vector<uint32_t> weight = packed(in[1], 1, depth, width, dtype, threads);
    LinearParams p{};
    p.x = in[0].data(), p.bias = in[2].data(), p.packed = weight.data();
    p.rows = rows, p.depth = depth, p.width = width, p.x_row = depth, p.out_row = width;
    p.gelu = act, p.dtype = dtype, p.threads = threads, p.out = out[0].data(), p.pre = out[1].data();
    linear_forward(p);
    int64_t by_panels = 0;
    p.words = &by_panels;
    linear_packs_panels(p);
    if (by_panels != 0) {  // the same bits
      Arrays again = {Array(dtype, rows * width), Array(dtype, rows * width)};
      p.packed = nullptr, p.weight = in[1].data(), p.out = again[0].data(), p.pre = again[1].data();
      linear_forward(p);
      for (size_t i = 0; i < out.size(); ++i) CHECK(again[i].same_bits(out[i]));
    }
    return out;
  };
  everywhere(run, [&](Dtype dtype) {
    const Arrays in = inputs(dtype);
    return Truth{product(values(in[0]), in[1], in[2], 0, depth, width, act),
                 product(values(in[0]), in[1], in[2], 0, depth, width, false)};
  });
}

double gelu_slope(double x) { return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5; }

void check_slopes(int64_t size) {
  const auto inputs = [&](Dtype dtype) {
    return Arrays{Array::random(dtype, size, 1), Array::random(dtype, size, 2, 6.0f)};
  };
  const auto run = [&](Dtype dtype, int threads) {
    Arrays in = inputs(dtype);
    Arrays out = {Array(dtype, size)};
    gelu_backward({in[0].data(), in[1].data(), size, dtype, threads, out[0].data()});
    return out;
  };
  everywhere(run, [&](Dtype dtype) {
    const Arrays in = inputs(dtype);
    Truth truth = {std::vector<double>(size)};
    for (int64_t i = 0; i < size; ++i) truth[0][i] = in[0][i] * gelu_slope(in[1][i]);
    return truth;
  });
}

// gap: values between rows of x. act: the product was with GELU of x.
void check_backward(int64_t rows, int64_t depth, int64_t width, int64_t gap, bool act) {
  const int64_t x_row = depth + gap;
  const auto inputs = [&](Dtype dtype) {
    return Arrays{Array::random(dtype, rows * width, 1), Array::random(dtype, rows * x_row, 2, 2.0f),
                  Array::random(dtype, width * depth, 3, 0.3f)};
  };
  const auto run = [&](Dtype dtype, int threads) {
    Arrays in = inputs(dtype);
    Arrays out = {Array(dtype, rows * depth), Array(dtype, width * depth), Array(dtype, width)};
    LinearBackwardParams p{};
    p.dz = in[0].data(), p.x = in[1].data(), p.weight = in[2].data();
    p.rows = rows, p.depth = depth, p.width = width, p.x_row = x_row, p.weight_row = depth;
    p.gelu = act, p.dtype = dtype, p.threads = threads;
    p.dx = out[0].data(), p.dweight = out[1].data(), p.dbias = out[2].data();
    linear_backward(p);
    return out;
  };
  everywhere(run, [&](Dtype dtype) {
    const Arrays in = inputs(dtype);
    Truth truth = {std::vector<double>(rows * depth), std::vector<double>(width * depth), std::vector<double>(width)};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < width; ++n) {
        const double dz = in[0][r * width + n];
        truth[2][n] += dz;
        for (int64_t i = 0; i < depth; ++i) {
          const double x = in[1][r * x_row + i];
          truth[0][r * depth + i] += dz * in[2][n * depth + i] * (act ? gelu_slope(x) : 1);
          truth[1][n * depth + i] += dz * (act ? gelu(x) : x);
        }
      }
    }
    return truth;
  });
}

// Gradients from two parts of dz's columns, dx summed up over both; rows of the weight lie apart.
void check_parts(int64_t rows, int64_t depth, int64_t width, int64_t size) {
  const int64_t weight_row = depth + 3;
  const auto inputs = [&](Dtype dtype) {
    return Arrays{Array::random(dtype, rows * width, 1), Array::random(dtype, rows * depth, 2),
                  Array::random(dtype, width * weight_row, 3, 0.3f)};
  };
  const auto run = [&](Dtype dtype, int threads) {
    Arrays in = inputs(dtype);
    Arrays out = {Array(dtype, rows * depth), Array(dtype, width * depth), Array(dtype, width)};
    Array sums(Dtype::kFloat32, rows * depth), dweight(dtype, width * weight_row);
    const auto at = [&](Array& array, int64_t i) {
      return static_cast<uint8_t*>(array.data()) + i * (dtype == Dtype::kFloat32 ? 4 : 2);
    };
    for (int64_t first = 0; first < width; first += size) {
      const int64_t part = width - first < size ? width - first : size;
      Array dz(dtype, rows * part);
      for (int64_t r = 0; r < rows; ++r) dz.copy(r * part, in[0], r * width + first, part, 1.0f);
      LinearBackwardParams p{};
      p.dz = dz.data(), p.x = in[1].data(), p.weight = at(in[2], first * weight_row);
      p.rows = rows, p.depth = depth, p.width = part, p.x_row = depth, p.weight_row = weight_row;
      p.dtype = dtype, p.threads = threads;
      p.dx = out[0].data(), p.dweight = at(dweight, first * weight_row), p.dbias = at(out[2], first);
      if (first + part < width) p.dx_so_far = sums.floats();
      if (first != 0) p.dx_before = sums.floats();
      linear_backward(p);
    }
    for (int64_t n = 0; n < width; ++n) {
      out[1].copy(n * depth, dweight, n * weight_row, depth, 1.0f);
      CHECK(std::isnan(dweight[n * weight_row + depth]));
    }
    return out;
  };
  everywhere(run, [&](Dtype dtype) {
    const Arrays in = inputs(dtype);
    Truth truth = {std::vector<double>(rows * depth), std::vector<double>(width * depth), std::vector<double>(width)};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < width; ++n) {
        const double dz = in[0][r * width + n];
        truth[2][n] += dz;
        for (int64_t i = 0; i < depth; ++i) {
          truth[0][r * depth + i] += dz * in[2][n * weight_row + i];
          truth[1][n * depth + i] += dz * in[1][r * depth + i];
        }
      }
    }
    return truth;
  });
}

// Three experts, the second without rows; room for fewer rows than the largest has.
void check_experts(int64_t width, int64_t hidden) {
  const std::vector<int64_t> offsets = {0, 37, 37, 60};
  const int64_t rows = 60, room_rows = 20;
  const auto inputs = [&](Dtype dtype) {
    return Arrays{Array::random(dtype, rows * width, 1), Array::random(dtype, 3 * hidden * width, 2, 0.3f),
                  Array::random(dtype, 3 * hidden, 3), Array::random(dtype, 3 * width * hidden, 4, 0.3f),
                  Array::random(dtype, 3 * width, 5)};
  };
  const auto run = [&](Dtype dtype, int threads) {
    Arrays in = inputs(dtype);
    Arrays out = {Array(dtype, rows * width), Array(dtype, rows * hidden)};
    Array room(dtype, room_rows * hidden);
    const std::vector<uint32_t> w1 = packed(in[1], 3, width, hidden, dtype, threads);
    const std::vector<uint32_t> w2 = packed(in[3], 3, hidden, width, dtype, threads);
    MoeMlpParams p{};
    p.x = in[0].data(), p.w1 = w1.data(), p.w2 = w2.data(), p.b1 = in[2].data(), p.b2 = in[4].data();
    p.offsets = offsets.data(), p.experts = 3, p.width = width, p.hidden = hidden, p.x_row = width;
    p.dtype = dtype, p.threads = threads, p.room = room.data(), p.room_rows = room_rows;
    p.y = out[0].data(), p.pre = out[1].data();
    moe_mlp_forward(p);
    return out;
  };
  everywhere(run, [&](Dtype dtype) {
    const Arrays in = inputs(dtype);
    const std::vector<double> x = values(in[0]);
    std::vector<double> y;
    for (int64_t e = 0; e < 3; ++e) {
      const std::vector<double> own(x.begin() + offsets[e] * width, x.begin() + offsets[e + 1] * width);
      const auto part =
          product(product(own, in[1], in[2], e, width, hidden, true), in[3], in[4], e, hidden, width, false);
      y.insert(y.end(), part.begin(), part.end());
    }
    return Truth{y};
  });
}

}  // namespace

int main() {
  check_linear(1, 1, 1, false);
  check_linear(7, 33, 65, true);
  check_linear(130, 64, 17, false);
  check_linear(45, 130, 200, true);
  check_linear(101, 700, 300, false);  // blocks of rows, of the depth and of panels, none of them whole
  check_backward(0, 5, 3, 0, false);
  check_backward(1, 1, 1, 0, true);
  check_backward(3, 0, 2, 0, false);
  check_backward(3, 2, 0, 0, false);
  check_backward(7, 33, 65, 4, false);
  check_backward(131, 65, 50, 0, true);
  check_backward(29, 70, 33, 5, true);
  check_backward(1, 300, 6700, 0, false);  // a weight of more than one group
  check_backward(1, 16, 5, 0, false);      // very few rows
  check_backward(4, 528, 70, 3, false);
  check_backward(3, 1040, 801, 0, false);
  check_backward(4, 64, 40, 0, true);
  check_backward(64, 200, 193, 1, false);
  static_assert(2 * 150 * 130 * 193 > 40 * kAloneProducts);
  check_backward(150, 130, 193, 0, false);
  check_backward(1601, 17, 7, 0, true);
  for (int64_t size : {0, 1, 15, 4095, 4097}) check_slopes(size);
  check_slopes(kAloneRowValues + 4096 + 17);
  check_parts(37, 70, 50, 17);
  check_parts(37, 70, 50, 13);
  check_parts(0, 5, 7, 4);
  check_parts(1, 130, 1540, 1536);
  check_experts(17, 40);
  check_experts(64, 96);
  return finish("linear");
}
