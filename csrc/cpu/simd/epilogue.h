// epilogue.h - the end of every GEMM kernel: y = activation(sums * scale + bias) in the output's type, at full and
// partial panels.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/simd/activate.h"
#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

// The bias of one panel; zeros past n or without a bias.
LEPTON_INLINE F32x16 load_bias(const GemmTile& tile, int panel) {
  float values[kPanel] = {};
  if (tile.bias == nullptr) return load_f32<Dtype::f32>(values);
  const int n0 = panel * kPanel, count = tile.weight.n - n0;
  if (count >= kPanel) return load_f32<Dtype::f32>(tile.bias + n0);
  for (int c = 0; c < count; ++c) values[c] = tile.bias[n0 + c];
  return load_f32<Dtype::f32>(values);
}

template <Dtype dtype>
LEPTON_INLINE void store_columns(char* y, int count, F32x16 v) {
  if (count >= kPanel) return store_f32<dtype>(y, v);
  alignas(64) char values[kPanel * dtype_bytes(dtype)];
  store_f32<dtype>(values, v);
  for (int b = 0; b < count * dtype_bytes(dtype); ++b) y[b] = values[b];
}

LEPTON_INLINE void store_output(const GemmTile& tile, int row, int panel, F32x16 v) {
  v = activate(v, tile.activation);
  const int n0 = panel * kPanel, count = tile.weight.n - n0;
  char* y = static_cast<char*>(tile.y) + (row * tile.y_stride + n0) * dtype_bytes(tile.y_dtype);
  switch (tile.y_dtype) {
    case Dtype::f32:
      return store_columns<Dtype::f32>(y, count, v);
    case Dtype::bf16:
      return store_columns<Dtype::bf16>(y, count, v);
    case Dtype::f16:
      return store_columns<Dtype::f16>(y, count, v);
  }
}

template <int rows, int multiple, typename Body>
LEPTON_INLINE void call_with_rows(int count, int row, const Body& body) {
  if constexpr (rows > 0) {
    if (count == rows)
      body.template operator()<rows>(row);
    else
      call_with_rows<rows - multiple, multiple>(count, row, body);
  }
}

// Calls body.operator()<rows>(row) over all rows, a multiple of `multiple`: kRows at a time, then what is left at once,
// so no row is padding.
template <int kRows, int multiple = 1, typename Body>
LEPTON_INLINE void for_row_blocks(int rows, const Body& body) {
  static_assert(kRows % multiple == 0);
  int row = 0;
  for (; row + kRows <= rows; row += kRows) body.template operator()<kRows>(row);
  call_with_rows<kRows - multiple, multiple>(rows - row, row, body);
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
