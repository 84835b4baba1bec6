// linear_block.h - one or two linear layers and what follows them in a transformer block, a few rows at a time, so that
// what lies between stays in the second-level cache:
//
//   H = activation(X W1^T + b1) [, H = H W2^T + b2];   Y = layer_norm(H + residual)
#pragma once

#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/dtype.h"
#include "cpu/packed_weight.h"

namespace lepton {

struct LinearLayer {
  PackedWeight weight;
  const float* bias;  // [n] or null
  Activation activation;
  bool quantize_activations;
};

struct LinearBlockArgs {
  const void* x;  // [m, k of the first layer], rows x_stride elements apart
  Dtype dtype;    // of x, residual and y; between the layers it is f32
  int64_t x_stride;
  int m;
  LinearLayer layers[2];
  int layer_count;
  const void* residual;  // [m, n of the last layer], rows residual_stride elements apart, or null
  int64_t residual_stride;
  const float* norm_weight;  // [n], or null for no normalization
  const float* norm_bias;    // [n]
  float norm_eps;
  void* y;  // [m, n], rows contiguous
  int threads;
};

void linear_block(const LinearBlockArgs& args);

}  // namespace lepton
