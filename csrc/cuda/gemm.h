// gemm.h - Y[m, n] = activation(X[m, k] @ W[n, k]^T + bias) on a GPU, for few rows of X (gemm_few_rows.cuh), and for
// any number on Hopper (gemm_many_rows.cuh: w8a16, and w4a16 with bf16).
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/dtype.h"

namespace lepton::cuda {

constexpr int kMostFewRows = 16;   // rows of X, for gemm_few_rows.cuh
constexpr int kGroupOutputs = 64;  // n is padded to a multiple of it in GemmArgs::groups: the most outputs of a warp

// All pointers are device memory. The rows of X and W start at multiples of 16 bytes and are of such a length.
struct GemmArgs {
  const void* x;           // [m, k]: int8 (q - 128 of quantize_rows) where row_scale is given, else `dtype`
  int64_t x_stride;        // elements between rows of X
  const uint8_t* weight;   // int8: i8 [n, k]; int4: u8 [n, k / 2], value + 8, k = 2i in byte i's low nibble
  const float* scale;      // f32 [n]: int8
  const uint32_t* groups;  // [k / 128, n / 16, 8, 2], n padded to a multiple of 64, outputs o and o + 8 of sixteen next
                           // to each other: int4; the scale's bf16 in the upper half, the zero point in the lowest byte
  const float* row_scale;  // f32 [m], or null: w8a8
  const int32_t* row_zero;    // i32 [m], zero - 128: w8a8
  const int32_t* column_sum;  // i32 [n], sums of W's rows: w8a8
  const float* bias;          // f32 [n], or null
  void* y;                    // `dtype` [m, n], contiguous
  int m, n, k;
  Dtype dtype;
  Activation activation;
};

cudaError_t gemm_int8(const GemmArgs& args, cudaStream_t stream);  // w8a8 with row_scale, else w8a16
cudaError_t gemm_int4(const GemmArgs& args, cudaStream_t stream);  // w4a16

}  // namespace lepton::cuda
