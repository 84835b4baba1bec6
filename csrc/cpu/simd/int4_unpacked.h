// int4_unpacked.h - 4-bit weights for many rows on AVX2 (w4a8) and on AVX-512 without tile registers: some groups of
// one panel or four are unpacked to bytes, which stay in the first-level cache while rows pass by.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/simd/epilogue.h"

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kUnpackedK = 256;    // k that are unpacked at a time: of four panels 16 KiB
constexpr int kUnpackedRows = 48;  // of all planes, that pass by before the next k: 12 KiB of sums

constexpr int kUnpackedLeastRows = 12;  // of all planes, that pay for unpacking

// u8 [k / 4][16][4] from k / 16 blocks of nibbles.
LEPTON_INLINE void unpack_nibbles(const uint8_t* w, int k, uint8_t* out) {
  const I32x16 low = broadcast_i32(0x0f0f0f0f);
  for (int i = 0; i < k; i += 2 * kQuad, w += 64, out += 128) {
    const I32x16 pair = load_i32(w);
    store_i32(out, bit_and(pair, low));
    store_i32(out + 64, bit_and(shift_right<4>(pair), low));
  }
}

// Adds group g, unpacked at w (panels panel_stride bytes apart), to the sums y[row][panels][16], or, if it is the last,
// writes Y.
template <int planes, int rows, int panels>
LEPTON_INLINE void multiply_group(const GemmTile& tile, int row, int panel0, int g, int steps, const uint8_t* w,
                                  int64_t panel_stride, float* y) {
  const PackedWeight& weight = tile.weight;
  const int groups = weight.groups();
  const uint8_t* a = tile.q.q + row * tile.q.stride + int64_t(g) * weight.group;
  I32x16 acc[panels][rows];
  unroll<panels * rows>([&]<int i>() LEPTON_LAMBDA_INLINE { acc[i / rows][i % rows] = broadcast_i32(0); });
  for (int s = 0; s < steps; ++s, a += kUnpackedStep, w += kPanel * kUnpackedStep)
    unroll<panels>([&]<int p>()
                       LEPTON_LAMBDA_INLINE { dot_unpacked<rows>(acc[p], a, tile.q.stride, w + p * panel_stride); });
  // Through memory: gcc keeps the sums of the loop above in registers only if nothing else is done with them.
  alignas(64) int32_t sums[panels][rows][kPanel];
  unroll<panels * rows>([&]<int i>()
                            LEPTON_LAMBDA_INLINE { store_i32(sums[i / rows][i % rows], acc[i / rows][i % rows]); });
  const int32_t* q_sum = tile.q.group_sum + int64_t(row) * groups + g;
  const bool first = g == 0, last = g + 1 == groups;
  F32x16 scale[panels];
  I32x16 zero[panels];
  unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
    scale[p] = load_f32<Dtype::f32>(weight.scale(panel0 + p, g));
    zero[p] = load_zeros(weight, panel0 + p, g);
  });
  for (int r = 0; r < rows; r += planes, q_sum += planes * groups, y += panels * kPanel) {
    unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
      I32x16 products[planes];
      unroll<planes>([&]<int plane>() LEPTON_LAMBDA_INLINE { products[plane] = load_i32(sums[p][r + plane]); });
      const F32x16 before = first ? broadcast_f32(0) : load_f32<Dtype::f32>(y + p * kPanel);
      store_f32<Dtype::f32>(y + p * kPanel,
                            add(before, scaled_group<planes>(weight, products, zero[p], q_sum, groups, scale[p])));
    });
    if (!last) continue;
    for (int p = 0; p < panels; ++p)
      store_dequantized<planes>(tile, (row + r) / planes, panel0 + p, load_f32<Dtype::f32>(y + p * kPanel),
                                load_f32<Dtype::f32>(weight.sum_f32(panel0 + p)), load_bias(tile, panel0 + p));
  }
}

// Y of all rows x `panels` panels.
template <int planes, int kRows, int panels>
LEPTON_INLINE void multiply_unpacked(const GemmTile& tile, int panel0) {
  constexpr int kPanelStride = kUnpackedK * kPanel;
  alignas(64) uint8_t unpacked[panels * kPanelStride];
  alignas(64) float y[kUnpackedRows / planes * panels * kPanel];
  const PackedWeight& weight = tile.weight;
  const int groups = weight.groups(), together = kUnpackedK / weight.group, all_rows = tile.rows * planes;
  for (int row0 = 0; row0 < all_rows; row0 += kUnpackedRows) {
    const int rows_here = all_rows - row0 < kUnpackedRows ? all_rows - row0 : kUnpackedRows;
    for (int g0 = 0; g0 < groups; g0 += together) {
      const int g_end = g0 + together < groups ? g0 + together : groups;
      const int k0 = g0 * weight.group, left = weight.k - k0;
      const int k = round_up(left < together * weight.group ? left : together * weight.group, kNibbleBlock);
      for (int p = 0; p < panels; ++p)
        unpack_nibbles(weight.panel(panel0 + p) + int64_t(k0) * kPanel / 2, k, unpacked + p * kPanelStride);
      for_row_blocks<kRows, planes>(rows_here, [&]<int rows>(int row) LEPTON_LAMBDA_INLINE {
        for (int g = g0; g < g_end; ++g) {
          const int from = (g - g0) * weight.group, count = k - from < weight.group ? k - from : weight.group;
          multiply_group<planes, rows, panels>(tile, row0 + row, panel0, g, divide_up(count, kUnpackedStep),
                                               unpacked + from * kPanel, kPanelStride,
                                               y + row / planes * panels * kPanel);
        }
      });
    }
  }
}

template <int planes>
void multiply_all_unpacked(const GemmTile& tile) {
  int panel = tile.panel_begin;
  for (; panel + kInt8Panels <= tile.panel_end; panel += kInt8Panels)
    multiply_unpacked<planes, kInt8Rows, kInt8Panels>(tile, panel);
  if constexpr (kInt8Panels > 1)
    for (; panel < tile.panel_end; ++panel) multiply_unpacked<planes, kInt8Rows, 1>(tile, panel);
}

// Whether it did.
LEPTON_INLINE bool multiply_many_rows(const GemmTile& tile) {
  if (tile.rows * tile.q.planes < kUnpackedLeastRows || tile.weight.group > kUnpackedK) return false;
  if (tile.q.planes == 1) {
    multiply_all_unpacked<1>(tile);
  } else {
    if constexpr (splits_activations(Isa::LEPTON_ISA)) multiply_all_unpacked<2>(tile);
  }
  return true;
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
