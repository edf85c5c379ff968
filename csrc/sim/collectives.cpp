#include "sim/collectives.h"

namespace sim {
namespace {

constexpr uint32_t kAll = 0xFFFFFFFFu;

struct Shuffled {
  uint64_t value;
  int source;
  Where where;
};

struct Rows {
  uint16_t at[8];
};

struct Matrices {
  uint32_t at[4];
};

struct Fragments {
  uint32_t a[4], b[2];
  float c[4];
};

struct Result {
  float d[4];
};

// Fragment layouts of m16n8k16: lane = 4 * group + t holds, of A, rows group and group + 8, of B, column group.
template <float Convert(uint16_t)>
struct Multiply {
  void operator()(uint32_t, const Fragments* const* in, Result* const* out) const {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int group = lane / 4, t = lane % 4 * 2;
      for (int r = 0; r < 4; ++r) {
        float* to = &a[group + (r & 1) * 8][t + (r >> 1) * 8];
        to[0] = Convert(static_cast<uint16_t>(in[lane]->a[r]));
        to[1] = Convert(static_cast<uint16_t>(in[lane]->a[r] >> 16));
      }
      for (int r = 0; r < 2; ++r) {
        b[t + r * 8][group] = Convert(static_cast<uint16_t>(in[lane]->b[r]));
        b[t + r * 8 + 1][group] = Convert(static_cast<uint16_t>(in[lane]->b[r] >> 16));
      }
      for (int r = 0; r < 4; ++r) c[group + (r >> 1) * 8][t + (r & 1)] = in[lane]->c[r];
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
      }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int group = lane / 4, t = lane % 4 * 2;
      for (int r = 0; r < 4; ++r) out[lane]->d[r] = c[group + (r >> 1) * 8][t + (r & 1)];
    }
    counters().matrix_flops += 2 * 16 * 8 * 16;
  }
};

}  // namespace

uint64_t shuffle(uint32_t mask, const char* name, uint64_t value, int source_lane, Where where) {
  const Shuffled in{value, source_lane, where};
  return together<uint64_t>(mask, name, where, in, [](uint32_t met, const Shuffled* const* ins, uint64_t* const* outs) {
    ++counters().shuffles;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(met >> lane & 1)) continue;
      const int source = ins[lane]->source;
      if (!(met >> source & 1)) {
        machine().fail(ins[lane]->where, "lane " + std::to_string(lane) + " shuffles from lane " +
                                             std::to_string(source) + ", which is not in the mask");
      }
      *outs[lane] = ins[source]->value;
    }
  });
}

uint32_t ballot(uint32_t mask, bool vote, Where where) {
  return together<uint32_t>(mask, "a vote", where, vote,
                            [](uint32_t met, const bool* const* ins, uint32_t* const* outs) {
                              uint32_t votes = 0;
                              for (int lane = 0; lane < kWarpSize; ++lane) {
                                if ((met >> lane & 1) && *ins[lane]) votes |= 1u << lane;
                              }
                              for (int lane = 0; lane < kWarpSize; ++lane) {
                                if (met >> lane & 1) *outs[lane] = votes;
                              }
                            });
}

uint32_t match_any(uint32_t mask, int32_t value, Where where) {
  return together<uint32_t>(mask, "match_any", where, value,
                            [](uint32_t met, const int32_t* const* ins, uint32_t* const* outs) {
                              for (int lane = 0; lane < kWarpSize; ++lane) {
                                if (!(met >> lane & 1)) continue;
                                *outs[lane] = 0;
                                for (int other = 0; other < kWarpSize; ++other) {
                                  if ((met >> other & 1) && *ins[other] == *ins[lane]) *outs[lane] |= 1u << other;
                                }
                              }
                            });
}

void load_matrices(int count, bool transpose, const void* row, uint32_t* out, Where where) {
  Rows in{};
  if (machine().thread().lane < 8 * count) {
    access(Space::kShared, Kind::kLoad, row, 16, where);
    std::memcpy(&in, row, 16);
  }
  // Lane 4 * r + c gets elements 2c and 2c + 1 of row r, or with .trans of column r.
  const auto straight = [](uint32_t, const Rows* const* ins, Matrices* const* outs) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const Rows& source = *ins[m * 8 + lane / 4];
        outs[lane]->at[m] = source.at[lane % 4 * 2] | uint32_t{source.at[lane % 4 * 2 + 1]} << 16;
      }
    }
  };
  const auto transposed = [](uint32_t, const Rows* const* ins, Matrices* const* outs) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int m = 0; m < 4; ++m) {
        const int first = m * 8 + lane % 4 * 2, column = lane / 4;
        outs[lane]->at[m] = ins[first]->at[column] | uint32_t{ins[first + 1]->at[column]} << 16;
      }
    }
  };
  const Matrices got = transpose ? together<Matrices>(kAll, "ldmatrix.trans", where, in, transposed)
                                 : together<Matrices>(kAll, "ldmatrix", where, in, straight);
  for (int m = 0; m < count; ++m) out[m] = got.at[m];
}

void multiply(bool is_bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  Fragments in;
  std::memcpy(in.a, a, sizeof(a)), std::memcpy(in.b, b, sizeof(b)), std::memcpy(in.c, d, sizeof(d));
  const Result got = is_bf16 ? together<Result>(kAll, "mma.bf16", where, in, Multiply<from_bf16>{})
                             : together<Result>(kAll, "mma.fp16", where, in, Multiply<from_fp16>{});
  std::memcpy(d, got.d, sizeof(d));
}

float from_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

#if defined(__aarch64__)
using Half = __fp16;  // g++ has _Float16 there from 13 on
#else
using Half = _Float16;
#endif

float from_fp16(uint16_t bits) {
  Half half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

uint16_t to_fp16(float value) {
  const auto half = static_cast<Half>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

}  // namespace sim
