// gemm_tile.h - what the GEMM kernels are handed: a range of panels times a range of rows, and where Y goes.
#pragma once

#include <stdint.h>

#include "cpu/dtype.h"
#include "cpu/kernel_table.h"
#include "cpu/packed_weight.h"

namespace lepton {

constexpr int kDirectRows = 4;  // gemm_dequant uses weights from registers for so few rows, without a buffer

// Y[rows, columns of the panels] = X @ dequant(W)^T + bias for panels [panel_begin, panel_end).
struct GemmTile {
  PackedWeight weight;
  int panel_begin, panel_end;
  int rows;

  // Quantized activations (gemm_int8, gemm_int4): see quantize_rows.h.
  const uint8_t* q;
  int64_t q_stride;
  const float* row_scale;
  const int32_t* row_zero;
  const int32_t* row_group_sum;  // [rows, groups], 4 bit only

  // Float activations (gemm_dequant): f32 rows.
  const float* x;
  int64_t x_stride;

  void* sums;  // 64-byte aligned, for the kernel: sums_bytes()

  const float* bias;  // [n] or null
  void* y;            // [rows, n], rows y_stride elements apart
  Dtype y_dtype;
  int64_t y_stride;
};

// Bytes that a kernel may want for `rows` rows between blocks of k: two 32-bit values for each column of two panels,
// and rows up to the next block of tile registers.
constexpr int64_t sums_bytes(int rows) { return int64_t(round_up(rows, 32)) * 2 * kPanel * 2 * 4; }

// Rows from which tile registers are faster than vectors.
constexpr int kTileLeastRows = 8;

using GemmTileFn = void(const GemmTile&);
LEPTON_KERNEL(gemm_int8_tile, GemmTileFn)
LEPTON_KERNEL(gemm_int4_tile, GemmTileFn)
LEPTON_KERNEL(gemm_dequant_tile, GemmTileFn)

// f32 [rows, k] from another type, or copied: the activations of gemm_dequant_tile.
struct ToF32Args {
  const void* x;
  Dtype dtype;
  int64_t x_stride;
  int rows, k;
  float* out;
  int64_t out_stride;
};
using ToF32Fn = void(const ToF32Args&);
LEPTON_KERNEL(to_f32_rows, ToF32Fn)

}  // namespace lepton
