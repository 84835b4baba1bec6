// epilogue.cuh - the end of every product: y = activation(sum * scale + bias) in the output's type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/gemm.h"

namespace lepton::cuda {

__device__ inline float activate(float y, Activation activation) {
  switch (activation) {
    case Activation::none:
      return y;
    case Activation::relu:
      return y < 0 ? 0.f : y;
    case Activation::silu:
      return y / (1 + expf(-y));
    case Activation::gelu:
      return 0.5f * y * (1 + erff(0.7071067811865476f * y));
    case Activation::gelu_tanh:
      return y / (1 + expf(-1.5957691216057308f * (y + 0.044715f * y * y * y)));
  }
  return y;
}

// Y[row, output] of a finished sum; every float step rounds by itself, as in reference.py.
__device__ inline void finish(const GemmArgs& args, int row, int output, float y) {
  if (args.bias) y = __fadd_rn(y, args.bias[output]);
  y = activate(y, args.activation);
  const int64_t at = int64_t(row) * args.n + output;
  switch (args.dtype) {
    case Dtype::f32:
      static_cast<float*>(args.y)[at] = y;
      break;
    case Dtype::bf16:
      static_cast<__nv_bfloat16*>(args.y)[at] = __float2bfloat16_rn(y);
      break;
    case Dtype::f16:
      static_cast<__half*>(args.y)[at] = __float2half_rn(y);
      break;
  }
}

__device__ inline float scaled(const GemmArgs& args, int row, int output, int sum) {
  const int exact = sum - args.row_zero[row] * args.column_sum[output];
  return __fmul_rn(float(exact), __fmul_rn(args.row_scale[row], args.scale[output]));
}

__device__ inline float scaled(const GemmArgs& args, int, int output, float sum) {
  return args.scale ? sum * args.scale[output] : sum;
}

}  // namespace lepton::cuda
