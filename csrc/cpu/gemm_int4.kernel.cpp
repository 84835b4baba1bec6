// gemm_int4.kernel.cpp - Y = Xq @ dequant(W4)^T with signed activations (q - 128), 4-bit weights in groups along k, and
// int32 sums exact within a group; groups are added in float, in order.
//
//   s_g    = sum over the group of q[r, k] (nibble[c, k] - zero[c, g]), in each plane
//   y[r,c] = row_scale[r] * ((s_0 scale[c, 0] + s_1 scale[c, 1] + ...) - row_zero[r] * sum[c]) + bias[c]
//
// with sum[c] = scale[c, 0] * (sum of group 0's weights) + ...; of two planes s_g = float(high) * 256 + float(low).
#include "cpu/simd/panels.h"
#if defined(LEPTON_ISA_AMX)
#include "cpu/simd/bf16_tiles.h"
#include "cpu/simd/int4_tiles.h"
#elif defined(__AVX512VNNI__) || defined(LEPTON_ISA_AVX2)
#include "cpu/simd/int4_unpacked.h"
#endif

namespace lepton::LEPTON_ISA {
namespace {

struct GemmInt4 {
  static constexpr int kRows = kInt4Rows, kPanels = kInt4Panels;
  template <int planes, int rows, int panels>
  static void multiply(const GemmTile& tile, int row, int panel0);
  template <int planes, int panels>
  static void multiply_tiles(const GemmTile& tile, int panel_begin, int panel_end);
};

template <int planes, int rows, int panels>
LEPTON_INLINE void GemmInt4::multiply(const GemmTile& tile, int row, int panel0) {
  const PackedWeight& weight = tile.weight;
  const int64_t panel_bytes = weight.panel_bytes(), stride = tile.q.stride;
  const int groups = weight.groups();
  const uint8_t* w = weight.panel(panel0);
  const uint8_t* a = tile.q.q + row * stride;
  constexpr int kRows = rows / planes;
  constexpr bool split = panels * rows <= kSplitSums;

  F32x16 y[panels][kRows];
  unroll<panels * kRows>([&]<int i>() LEPTON_LAMBDA_INLINE { y[i / kRows][i % kRows] = broadcast_f32(0); });
  for (int g = 0; g < groups; ++g) {
    const int left = weight.k - g * weight.group;
    const int blocks = divide_up(left < weight.group ? left : weight.group, kNibbleBlock);
    // Past the end of a panel: of the panels that come next.
    const int64_t place = int64_t(g) * weight.group * kPanel / 2 + kPrefetchBytes;
    const int64_t ahead = kPrefetchBytes + (place < panel_bytes ? 0 : (panels - 1) * panel_bytes);
    I32x16 acc[panels][rows], high[panels][rows];
    unroll<panels * rows>(
        [&]<int i>() LEPTON_LAMBDA_INLINE { acc[i / rows][i % rows] = high[i / rows][i % rows] = broadcast_i32(0); });
    for (int b = 0; b < blocks; ++b, a += kTogether * kNibbleBlock, w += kPanel * kNibbleBlock / 2) {
      unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
        __builtin_prefetch(w + p * panel_bytes + ahead);
        __builtin_prefetch(w + p * panel_bytes + ahead + 64);
        if constexpr (split)
          dot_u4<rows>(acc[p], high[p], a, stride, w + p * panel_bytes);
        else
          dot_u4<rows>(acc[p], a, stride, w + p * panel_bytes);
      });
    }
    unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE { sums_to_rows<rows>(acc[p]); });
    if constexpr (split) {
      unroll<panels * rows>([&]<int i>() LEPTON_LAMBDA_INLINE {
        I32x16& sum = acc[i / rows][i % rows];
        sum = add(sum, shift_right_signed<4>(high[i / rows][i % rows]));
      });
    }
    const int32_t* q_sum = tile.q.group_sum + int64_t(row) * groups + g;
    unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
      __builtin_prefetch(weight.scale(panel0 + panels + p, g));
      const F32x16 scale = load_f32<Dtype::f32>(weight.scale(panel0 + p, g));
      const I32x16 zero = load_zeros(weight, panel0 + p, g);
      unroll<kRows>([&]<int r>() LEPTON_LAMBDA_INLINE {
        I32x16 products[planes];
        unroll<planes>([&]<int plane>() LEPTON_LAMBDA_INLINE { products[plane] = acc[p][r * planes + plane]; });
        y[p][r] =
            add(y[p][r], scaled_group<planes>(weight, products, zero, q_sum + r * planes * groups, groups, scale));
      });
    });
  }
  unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
    const F32x16 bias = load_bias(tile, panel0 + p), column_sum = load_f32<Dtype::f32>(weight.sum_f32(panel0 + p));
    unroll<kRows>([&]<int r>() LEPTON_LAMBDA_INLINE {
      store_dequantized<planes>(tile, row / planes + r, panel0 + p, y[p][r], column_sum, bias);
    });
  });
}

#if defined(LEPTON_ISA_AMX)
template <int planes, int panels>
LEPTON_INLINE void GemmInt4::multiply_tiles(const GemmTile& tile, int panel_begin, int panel_end) {
  multiply_int4_tiles<planes, panels>(tile, panel_begin, panel_end);
}
#endif

}  // namespace

void gemm_int4_tile(const GemmTile& tile) {
#if defined(LEPTON_ISA_AVX2) || (defined(__AVX512VNNI__) && !defined(LEPTON_ISA_AMX))
  if (multiply_many_rows(tile)) return;
#endif
#if defined(LEPTON_ISA_AMX)
  if (tile.q.layout == RowLayout::bf16_tiles) return multiply_tiles<GemmBf16, 1>(tile);
#endif
  multiply_tile<GemmInt4>(tile);
}

}  // namespace lepton::LEPTON_ISA
