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

#if defined(LEPTON_ISA_AMX)
// Steps of k that are unpacked at a time: weights of two panels that stay in the first-level cache.
constexpr int kStepBlock = 8;

// s8 [steps * 16][16][4]: nibble - zero for k from `k0` on, and zeros from `end` on, up to whole steps.
LEPTON_INLINE void unpack(const PackedWeight& weight, int panel, int group, int k0, int end, uint8_t* out) {
  const Int4Meta& meta = static_cast<const Int4Meta*>(weight.meta)[int64_t(panel) * weight.groups() + group];
  const __m512i zero = _mm512_mullo_epi32(load_i32(meta.zero).v, _mm512_set1_epi32(0x01010101));
  const __m512i low = _mm512_set1_epi8(0xf);
  const uint8_t* w = weight.data + panel * weight.panel_bytes() + int64_t(k0) * kPanel / 2;
  const int pairs = round_up(end - k0, kNibbleBlock) / (2 * kQuad);
  for (int i = 0; i < pairs; ++i, w += 64, out += 128) {
    const __m512i pair = _mm512_loadu_si512(w);
    _mm512_store_si512(out, _mm512_sub_epi8(_mm512_and_si512(pair, low), zero));
    _mm512_store_si512(out + 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(pair, 4), low), zero));
  }
  const int padding = round_up(end - k0, kTileStep) - round_up(end - k0, kNibbleBlock);
  __builtin_memset(out, 0, size_t(padding) * kPanel);
}

// y[rows][kTileSumsRow] += one group's exact sums, scaled; the last group's result goes to Y.
LEPTON_INLINE void add_group(const GemmTile& tile, int row, int rows, int panel, int group, const int32_t* sums,
                             float* y) {
  const int groups = tile.weight.groups();
  const Int4Meta& meta = static_cast<const Int4Meta*>(tile.weight.meta)[int64_t(panel) * groups + group];
  const I32x16 column_sum = load_i32(meta.column_sum);
  const F32x16 scale = load_f32<Dtype::f32>(meta.scale), bias = load_bias(tile, panel);
  for (int r = 0; r < rows; ++r, sums += kTileSumsRow, y += kTileSumsRow) {
    const I32x16 sum = sub(load_i32(sums), mul(column_sum, broadcast_i32(tile.row_zero[row + r])));
    const F32x16 before = group == 0 ? broadcast_f32(0) : load_f32<Dtype::f32>(y);
    const F32x16 after = add(before, mul(to_f32(sum), scale));
    if (group + 1 < groups)
      store_f32<Dtype::f32>(y, after);
    else
      store_output(tile, row + r, panel, add(mul(after, broadcast_f32(tile.row_scale[row + r])), bias));
  }
}

template <int panels>
LEPTON_INLINE void multiply_tiles(const GemmTile& tile, int panel) {
  alignas(64) uint8_t block[panels][kStepBlock * kTileStep * kPanel];
  const PackedWeight& weight = tile.weight;
  int32_t* const sums = static_cast<int32_t*>(tile.sums);
  float* const y = reinterpret_cast<float*>(sums + round_up(tile.rows, kTileRowBlock) * kTileSumsRow);
  for (int group = 0, k0 = 0; k0 < weight.k; ++group, k0 += weight.group) {
    const int group_end = k0 + weight.group < weight.k ? k0 + weight.group : weight.k;
    for (int begin = k0; begin < group_end; begin += kStepBlock * kTileStep) {
      const int end = begin + kStepBlock * kTileStep < group_end ? begin + kStepBlock * kTileStep : group_end;
      const int steps = divide_up(end - begin, kTileStep);
      for (int p = 0; p < panels; ++p) unpack(weight, panel + p, group, begin, end, block[p]);
      for (int row = 0; row < tile.rows; row += kTileRowBlock) {
        const int rows = tile.rows - row < kTileRowBlock ? tile.rows - row : kTileRowBlock;
        const uint8_t* a = tile.q + row * tile.q_stride + begin;
        int32_t* out = sums + row * kTileSumsRow;
        if (rows > kTileRows)
          tile_multiply<2, panels>(a, tile.q_stride, block[0], sizeof(block[0]), steps, begin == k0, out);
        else
          tile_multiply<1, panels>(a, tile.q_stride, block[0], sizeof(block[0]), steps, begin == k0, out);
        if (end < group_end) continue;
        for (int p = 0; p < panels; ++p)
          add_group(tile, row, rows, panel + p, group, out + p * kPanel, y + row * kTileSumsRow + p * kPanel);
      }
    }
  }
}
#endif

}  // namespace

void gemm_int4_tile(const GemmTile& tile) {
#if defined(LEPTON_ISA_AMX)
  if (tile.rows >= kTileLeastRows) {
    const TileScope registers;
    int panel = tile.panel_begin;
    for (; panel + kTilePanels <= tile.panel_end; panel += kTilePanels) multiply_tiles<kTilePanels>(tile, panel);
    if (panel < tile.panel_end) multiply_tiles<1>(tile, panel);
    return;
  }
#endif
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
