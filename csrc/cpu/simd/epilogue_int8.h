// epilogue_int8.h - what the kernels of 8-bit weights share: a step of k, and y from its exact int32 sums.
#pragma once

#include "cpu/simd/epilogue.h"

namespace lepton::LEPTON_ISA {
namespace {

// What dot_s8 takes at a time: quads, and bytes of a panel.
constexpr int kStepQuads = kTogether, kStepBytes = kStepQuads * kPanel * kQuad;

// Y[row .. row + rows, 16 columns] from the exact sums: rows row_step apart, planes plane_step.
template <int planes>
LEPTON_INLINE void write_output(const GemmTile& tile, int row, int rows, int panel, const int32_t* sums, int row_step,
                                int plane_step) {
  const I32x16 column_sum = load_i32(tile.weight.sum_i32(panel));
  const F32x16 scale = load_f32<Dtype::f32>(tile.weight.scale(panel)), bias = load_bias(tile, panel);
  for (int r = row; r < row + rows; ++r, sums += row_step) {
    I32x16 exact[planes];
    unroll<planes>([&]<int plane>() LEPTON_LAMBDA_INLINE {
      const I32x16 zero = broadcast_i32(tile.q.zero[r * planes + plane]);
      exact[plane] = sub(load_i32(sums + plane * plane_step), mul(zero, column_sum));
    });
    const F32x16 sum = join_planes<planes>(exact[0], exact[planes - 1]);
    store_output(tile, r, panel, add(mul(sum, mul(broadcast_f32(tile.q.scale[r]), scale)), bias));
  }
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
