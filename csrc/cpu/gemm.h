// gemm.h - Y = activation(X @ dequant(W)^T + bias) on the CPU, for 8-bit and grouped 4-bit weights; activations
// quantized on the fly (w8a8, w4a8) or left in float (w8a16, w4a16).
#pragma once

#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/dtype.h"
#include "cpu/packed_weight.h"

namespace lepton {

struct GemmArgs {
  const void* x;  // [m, k], rows x_stride elements apart
  Dtype dtype;    // of x
  int64_t x_stride;
  int m;
  PackedWeight weight;  // n, k
  const float* bias;    // [n] or null
  Activation activation;
  void* y;  // [m, n], rows contiguous
  Dtype y_dtype;
  bool quantize_activations;
  int threads;
};

void gemm(const GemmArgs& args);

// The tiled layout from the saved one (docs/formats.md). `packed` has room for PackedLayout's bytes.
void pack_int8(const int8_t* weight, const float* scale, int n, int k, uint8_t* packed);
// The same in blocks: how many steps hold a weight other than 0, and those packed.
int64_t count_steps(const int8_t* weight, int n, int k, int step_quads);
void pack_int8_blocks(const int8_t* weight, const float* scale, int n, int k, int64_t steps, int step_quads,
                      uint8_t* packed);
// weight: uint8 rows of row_bytes, a multiple of 4, two k a byte, low nibble first, value + 8. scale: f32 [n, groups].
// zero: int8 [n, groups] in -8..7, or null for 0.
void pack_int4(const uint8_t* weight, int64_t row_bytes, const float* scale, const int8_t* zero, int n, int k,
               int group, uint8_t* packed);

}  // namespace lepton
