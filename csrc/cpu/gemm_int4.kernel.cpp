// gemm_int4.kernel.cpp - Y = Xq @ dequant(W4)^T with uint8 activations, 4-bit weights in groups along k, and int32 sums
// exact within a group; groups are added in float, in order.
//
//   s_g    = sum over the group of q[r, k] nibble[c, k] - zero[c] * (sum of q) - row_zero[r] * column_sum[c]
//   y[r,c] = row_scale[r] * (s_0 scale[c, 0] + s_1 scale[c, 1] + ...) + bias[c]
#include "cpu/simd/epilogue.h"

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kPrefetchBytes = 4096;  // as in gemm_int8.kernel.cpp

template <int rows, int panels>
LEPTON_INLINE void multiply(const GemmTile& tile, int row, int panel0) {
  const PackedWeight& weight = tile.weight;
  const int64_t panel_bytes = weight.panel_bytes();
  const int groups = weight.groups();
  const uint8_t* w = weight.data + panel0 * panel_bytes;
  const uint8_t* a = tile.q + row * tile.q_stride;

  F32x16 y[panels][rows];
  for (int p = 0; p < panels; ++p)
    for (int r = 0; r < rows; ++r) y[p][r] = broadcast_f32(0);
  for (int g = 0; g < groups; ++g) {
    const int left = weight.k - g * weight.group;
    const int blocks = divide_up(left < weight.group ? left : weight.group, kNibbleBlock);
    I32x16 acc[panels][rows];
    unroll<panels * rows>([&]<int i>() LEPTON_LAMBDA_INLINE { acc[i / rows][i % rows] = broadcast_i32(0); });
    for (int b = 0; b < blocks; ++b, a += kNibbleBlock, w += kPanel * kNibbleBlock / 2) {
      unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
        if constexpr (rows == 1) {
          __builtin_prefetch(w + p * panel_bytes + kPrefetchBytes);
          __builtin_prefetch(w + p * panel_bytes + kPrefetchBytes + 64);
        }
        dot_u4<rows>(acc[p], a, tile.q_stride, w + p * panel_bytes);
      });
    }
    I32x16 sums[panels][rows];  // in memory, for a loop
    unroll<panels * rows>([&]<int i>() LEPTON_LAMBDA_INLINE { sums[i / rows][i % rows] = acc[i / rows][i % rows]; });
    for (int p = 0; p < panels; ++p) {
      const Int4Meta& meta = static_cast<const Int4Meta*>(weight.meta)[int64_t(panel0 + p) * groups + g];
      const I32x16 zero = load_i32(meta.zero), column_sum = load_i32(meta.column_sum);
      const F32x16 scale = load_f32<Dtype::f32>(meta.scale);
      for (int r = 0; r < rows; ++r) {
        const int32_t q_sum = tile.row_group_sum[int64_t(row + r) * groups + g];
        I32x16 sum = sub(sums[p][r], mul(zero, broadcast_i32(q_sum)));
        sum = sub(sum, mul(column_sum, broadcast_i32(tile.row_zero[row + r])));
        y[p][r] = add(y[p][r], mul(to_f32(sum), scale));
      }
    }
  }

  for (int p = 0; p < panels; ++p) {
    const F32x16 bias = load_bias(tile, panel0 + p);
    for (int r = 0; r < rows; ++r)
      store_output(tile, row + r, panel0 + p, add(mul(y[p][r], broadcast_f32(tile.row_scale[row + r])), bias));
  }
}

template <int kRows, int panels>
LEPTON_INLINE int multiply_panels(const GemmTile& tile, int panel) {
  for (; panel + panels <= tile.panel_end; panel += panels)
    for_row_blocks<kRows>(tile.rows, [&]<int rows>(int row) { multiply<rows, panels>(tile, row, panel); });
  return panel;
}

constexpr int kVectorPanels = 2;  // panels side by side for one row

}  // namespace

void gemm_int4_tile(const GemmTile& tile) {
  int panel = tile.panel_begin;
  if (tile.rows == 1) {
    for (; panel + kVectorPanels <= tile.panel_end; panel += kVectorPanels) multiply<1, kVectorPanels>(tile, 0, panel);
    for (; panel < tile.panel_end; ++panel) multiply<1, 1>(tile, 0, panel);
    return;
  }
  panel = multiply_panels<kInt4Rows, kInt4Panels>(tile, panel);
  if constexpr (kInt4Panels > 1) multiply_panels<kInt4Rows, 1>(tile, panel);
}

}  // namespace lepton::LEPTON_ISA
