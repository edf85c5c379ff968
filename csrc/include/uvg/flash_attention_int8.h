// flash_attention with the products of queries and keys in bytes. Fields as there; lse, dout, dq, dk and dv are null.
#pragma once

#include "uvg/flash_attention.h"

namespace uvg {

UVG_KERNEL(flash_attention_int8_forward, FlashAttentionParams)

}  // namespace uvg
