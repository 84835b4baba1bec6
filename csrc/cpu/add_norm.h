// add_norm.h - Y = layer_norm(H + residual) over rows, the end of a transformer block's halves.
//
//   y = (v - mean v) / sqrt(mean (v - mean v)^2 + eps) * weight + bias,   v = h + residual
//
// Sums run over sixteen lanes, then over the lanes in order: the same bits on every level.
#pragma once

#include <stdint.h>

#include "cpu/dtype.h"
#include "cpu/kernel_table.h"

namespace lepton {

struct AddNormArgs {
  float* h;  // [rows, n] contiguous; overwritten
  int rows, n;
  const void* residual;  // [rows, n], rows residual_stride elements apart, or null
  int64_t residual_stride;
  const float* weight;  // [n], or null: y = v
  const float* bias;    // [n]
  float eps;
  void* y;      // [rows, n] contiguous
  Dtype dtype;  // of residual and y
};

using AddNormFn = void(const AddNormArgs&);
LEPTON_KERNEL(add_norm, AddNormFn)

}  // namespace lepton
