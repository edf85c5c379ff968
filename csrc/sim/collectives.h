// What a warp does together, with the semantics of PTX: shuffles, votes, matches, ldmatrix, mma.
#pragma once

#include <cstdint>
#include <cstring>

#include "sim/machine.h"

namespace sim {

// What every lane of `mask` gets from one function of all lanes' values: f(mask, in[32], out[32]), run once.
template <typename Out, typename In, typename F>
Out together(uint32_t mask, const char* name, Where where, const In& in, F) {
  Out out{};
  machine().meet(mask, name, where, &in, &out, [](uint32_t met, const void* const* ins, void* const* outs) {
    F{}(met, reinterpret_cast<const In* const*>(ins), reinterpret_cast<Out* const*>(outs));
  });
  return out;
}

uint64_t shuffle(uint32_t mask, const char* name, uint64_t value, int source_lane, Where where);
uint32_t ballot(uint32_t mask, bool vote, Where where);
uint32_t match_any(uint32_t mask, int32_t value, Where where);  // lanes of the mask with the same value

// count 8x8 matrices of 16-bit elements; lane 8m+r gives the address of row r of matrix m.
void load_matrices(int count, bool transpose, const void* row, uint32_t* out, Where where);

// d += a b for m16n8k16; a, b as pairs of bf16 or fp16, accumulated in fp32.
void multiply(bool is_bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where);

float from_bf16(uint16_t bits);
uint16_t to_bf16(float value);  // to nearest, ties to even
float from_fp16(uint16_t bits);
uint16_t to_fp16(float value);

}  // namespace sim
