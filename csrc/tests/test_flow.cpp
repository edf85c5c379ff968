// flow_noise and flow_step: both streams in one call.
#include "tests/kernel_test.h"
#include "uvg/flow_noise.h"
#include "uvg/flow_step.h"

using namespace uvg;
using namespace uvg::test;

namespace {

constexpr int64_t kSamples = 3;

struct Spans {
  std::vector<int32_t> latents, tokens;
  int64_t num_latents, num_tokens;
};

const Spans kSmall = {{0, 5, 5, 0, 6, 30}, {1, 3, 4, 0, 4, 9}, 37, 14};
const Spans kLarge = {{0, 70001, 70001, 3, 70004, 9}, {0, 9033, 9033, 8040, 17073, 1}, 70013, 17074};

// Integers as floats, so that they are compared like the rest; they are small enough.
Array floats(const std::vector<int64_t>& from) {
  Array out(Dtype::kFloat32, static_cast<int64_t>(from.size()));
  for (int64_t i = 0; i < out.size(); ++i) out.set(i, static_cast<float>(from[i]));
  return out;
}

std::vector<int64_t> counted(int64_t size, int64_t modulus) {
  std::vector<int64_t> out(size);
  for (int64_t i = 0; i < size; ++i) out[i] = i % modulus;
  return out;
}

const std::vector<int64_t> kSeeds = {1, -5 * (int64_t{1} << 40), 77};

// At sigma 0 the latent stays; at sigma 1 it is the noise, and the velocity tells the same noise.
void check_noise(const Spans& spans, int64_t mask_id) {
  const std::vector<float> sigma = {0.0f, 1.0f, 0.3f}, kappa = {0.2f, 1.0f, 0.7f};
  const std::vector<int64_t> tokens = counted(spans.num_tokens, 50);
  const auto run = [&](Dtype dtype, int threads) {
    Array data = Array::random(dtype, spans.num_latents, 1);
    Arrays out = {Array(dtype, spans.num_latents), Array(dtype, spans.num_latents)};
    std::vector<int64_t> noisy(spans.num_tokens, -9);
    FlowNoiseParams p{};
    p.data = data.data(), p.tokens = tokens.data(), p.sigma = sigma.data(), p.kappa = kappa.data();
    p.seeds = kSeeds.data(), p.latent_spans = spans.latents.data(), p.token_spans = spans.tokens.data();
    p.num_latents = spans.num_latents, p.num_tokens = spans.num_tokens, p.samples = kSamples, p.step = 6;
    p.vocab = 50, p.mask_id = mask_id, p.dtype = dtype, p.threads = threads;
    p.x = out[0].data(), p.velocity = out[1].data(), p.noisy = noisy.data();
    flow_noise_forward(p);
    for (int64_t i = 0; i < spans.latents[1]; ++i) CHECK(out[0][i] == data[i]);  // sigma 0
    for (int64_t id : noisy) CHECK(0 <= id && id < 50);
    out.push_back(floats(noisy));
    return out;
  };
  everywhere(run, [](Dtype) { return Truth{}; });
}

// Euler with guidance 1, and no jump for the first sample, always one for the second.
void check_step(const Spans& spans) {
  const std::vector<float> guidance = {1.0f, 1.0f, 1.0f}, jump = {0.0f, 1.0f, 0.5f};
  std::vector<float> coefs(kSamples * 10, 0.0f);
  for (int64_t b = 0; b < kSamples; ++b) coefs[10 * b + 1] = coefs[10 * b + 6] = 1.0f, coefs[10 * b + 9] = -0.1f;
  const std::vector<int64_t> tokens = counted(spans.num_tokens, 50), drawn(spans.num_tokens, 99), steps = {3, 4, 5};
  const auto inputs = [&](Dtype dtype) {
    return Arrays{Array::random(dtype, spans.num_latents, 1), Array::random(dtype, spans.num_latents, 2)};
  };
  const auto run = [&](Dtype dtype, int threads) {
    Arrays in = inputs(dtype), out;
    for (int i = 0; i < 3; ++i) out.emplace_back(dtype, spans.num_latents);
    std::vector<int64_t> next(spans.num_tokens, -9);
    FlowStepParams p{};
    p.x = in[0].data(), p.v_cond = in[1].data(), p.guidance = guidance.data(), p.coefs = coefs.data();
    p.latent_spans = spans.latents.data(), p.tokens = tokens.data(), p.drawn = drawn.data();
    p.jump_prob = jump.data(), p.seeds = kSeeds.data(), p.steps = steps.data(), p.token_spans = spans.tokens.data();
    p.num_latents = spans.num_latents, p.num_tokens = spans.num_tokens, p.samples = kSamples;
    p.dtype = dtype, p.threads = threads;
    p.x_next = out[0].data(), p.corrected = out[1].data(), p.estimate = out[2].data(), p.tokens_next = next.data();
    flow_step_forward(p);
    for (int b : {0, 1}) {
      for (int32_t i = spans.tokens[2 * b]; i < spans.tokens[2 * b] + spans.tokens[2 * b + 1]; ++i) {
        CHECK(next[i] == (b ? drawn[i] : tokens[i]));
      }
    }
    out.push_back(floats(next));
    return out;
  };
  everywhere(run, [&](Dtype dtype) {
    const Arrays in = inputs(dtype);
    std::vector<double> x = values(in[0]);
    for (int64_t b = 0; b < kSamples; ++b) {
      const int32_t first = spans.latents[2 * b], last = first + spans.latents[2 * b + 1];
      for (int32_t i = first; i < last; ++i) x[i] -= 0.1f * in[1][i];
    }
    return Truth{x, values(in[0]), values(in[0])};
  });
}

}  // namespace

int main() {
  for (int64_t size : {kLarge.num_latents, kLarge.num_tokens}) {
    CHECK(size > kAloneStepValues && size > kAloneNoiseValues);
  }
  for (const Spans& spans : {kSmall, kLarge}) {
    check_noise(spans, -1);
    check_noise(spans, 3);
    check_step(spans);
  }
  return finish("flow");
}
