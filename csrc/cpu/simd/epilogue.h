// epilogue.h - the end of every GEMM kernel: y = activation(sums * scale + bias) in the output's type, at full and
// partial panels.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/simd/activate.h"
#include "cpu/simd/partial.h"
#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

// Plain C++ takes long to compile, and to run beside a call.
#if defined(LEPTON_ISA_GENERIC) || defined(LEPTON_ISA_SSSE3)
#define LEPTON_EPILOGUE __attribute__((noinline))
#else
#define LEPTON_EPILOGUE LEPTON_INLINE
#endif

// The bias of one panel; zeros past n or without a bias.
LEPTON_INLINE F32x16 load_bias(const GemmTile& tile, int panel) {
  if (tile.bias == nullptr) return broadcast_f32(0);
  const int n0 = panel * kPanel;
  return load_partial<Dtype::f32>(tile.bias + n0, tile.weight.n - n0);
}

// The exact sums of both planes, or of the one there is, as a float.
template <int planes>
LEPTON_INLINE F32x16 join_planes(I32x16 high, I32x16 low) {
  if constexpr (planes == 1) return to_f32(high);
  return add(mul(to_f32(high), broadcast_f32(256)), to_f32(low));
}

// The float sum of a group of 4-bit weights, from each plane's sum of activations times nibbles. q_sum: the sum of the
// activations, the planes' plane_step apart.
template <int planes>
LEPTON_INLINE F32x16 scaled_group(const PackedWeight& weight, const I32x16 (&products)[planes], I32x16 zero,
                                  const int32_t* q_sum, int plane_step, F32x16 scale) {
  I32x16 sums[planes];
  unroll<planes>([&]<int plane>() LEPTON_LAMBDA_INLINE {
    const int32_t sum = q_sum[plane * plane_step];
    sums[plane] = sub(products[plane], weight.symmetric ? broadcast_i32(8 * sum) : mul(zero, broadcast_i32(sum)));
  });
  return mul(join_planes<planes>(sums[0], sums[planes - 1]), scale);
}

// The zero points of a panel's group; not used where the weight is symmetric.
LEPTON_INLINE I32x16 load_zeros(const PackedWeight& weight, int panel, int group) {
  return weight.symmetric ? broadcast_i32(8) : load_u8(weight.zero(panel, group));
}

LEPTON_EPILOGUE void store_output(const GemmTile& tile, int row, int panel, F32x16 v) {
  v = activate(v, tile.activation);
  const int n0 = panel * kPanel, count = tile.weight.n - n0;
  char* y = static_cast<char*>(tile.y) + (row * tile.y_stride + n0) * dtype_bytes(tile.y_dtype);
  switch (tile.y_dtype) {
    case Dtype::f32:
#if defined(LEPTON_ISA_AMX)
      if (tile.stream) return _mm512_stream_ps(reinterpret_cast<float*>(y), v.v);
#endif
      return store_partial<Dtype::f32>(y, count, v);
    case Dtype::bf16:
      return store_partial<Dtype::bf16>(y, count, v);
    case Dtype::f16:
      return store_partial<Dtype::f16>(y, count, v);
  }
}

// Y[row, 16 columns] of 4-bit weights, from the scaled sum over all groups and that of the dequantized weights.
template <int planes>
LEPTON_INLINE void store_dequantized(const GemmTile& tile, int row, int panel, F32x16 sum, F32x16 column_sum,
                                     F32x16 bias) {
  const int32_t* zero = tile.q.zero + row * planes;
  const float row_zero = float(planes == 1 ? zero[0] : zero[0] * 256 + zero[1]);
  const F32x16 shifted = sub(sum, mul(broadcast_f32(row_zero), column_sum));
  store_output(tile, row, panel, add(mul(shifted, broadcast_f32(tile.q.scale[row])), bias));
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
