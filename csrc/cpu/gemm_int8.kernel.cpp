// gemm_int8.kernel.cpp - Y = (Xq @ Wq^T) with uint8 activations, int8 weights and exact int32 sums, scaled at the end.
//
//   y[r, c] = float(sum_k q[r, k] w[c, k] - zero[r] * column_sum[c]) * (row_scale[r] * scale[c]) + bias[c]
//
// Sums stay in registers over the whole of k, so Y is written once and nothing else is.
#include "cpu/simd/epilogue.h"

namespace lepton::LEPTON_ISA {
namespace {

// Bytes ahead of a single row's reads: one row uses each weight once, at the speed of memory.
constexpr int kPrefetchBytes = 4096;
constexpr int kVectorPanels = 4;  // panels side by side for one row: enough sums in flight, four streams of weights

// Y[row .. row + rows, 16 columns] from the exact sums, whose rows are sums_stride apart.
LEPTON_INLINE void write_output(const GemmTile& tile, int row, int rows, int panel, const int32_t* sums,
                                int sums_stride) {
  const Int8Meta& meta = static_cast<const Int8Meta*>(tile.weight.meta)[panel];
  const I32x16 column_sum = load_i32(meta.column_sum);
  const F32x16 scale = load_f32<Dtype::f32>(meta.scale), bias = load_bias(tile, panel);
  for (int r = 0; r < rows; ++r) {
    const I32x16 exact = load_i32(sums + int64_t(r) * sums_stride);
    const I32x16 sum = sub(exact, mul(broadcast_i32(tile.row_zero[row + r]), column_sum));
    const F32x16 y_scale = mul(broadcast_f32(tile.row_scale[row + r]), scale);
    store_output(tile, row + r, panel, add(mul(to_f32(sum), y_scale), bias));
  }
}

template <int rows, int panels>
LEPTON_INLINE void multiply(const GemmTile& tile, int row, int panel0) {
  const int64_t panel_bytes = tile.weight.panel_bytes();
  const int8_t* w = reinterpret_cast<const int8_t*>(tile.weight.data) + panel0 * panel_bytes;
  const uint8_t* a = tile.q + row * tile.q_stride;
  const int quads = divide_up(tile.weight.k, kQuad);

  I32x16 acc[panels][rows];
  unroll<panels * rows>([&]<int i>() LEPTON_LAMBDA_INLINE { acc[i / rows][i % rows] = broadcast_i32(0); });
  for (int q = 0; q < quads; ++q, a += kQuadBytes, w += kPanel * kQuad) {
    unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
      if constexpr (rows == 1) __builtin_prefetch(w + p * panel_bytes + kPrefetchBytes);
      dot_s8<rows>(acc[p], a, tile.q_stride, w + p * panel_bytes);
    });
  }
  alignas(64) int32_t sums[panels * rows][kPanel];
  unroll<panels * rows>([&]<int i>() LEPTON_LAMBDA_INLINE { store_i32(sums[i], acc[i / rows][i % rows]); });
  for (int p = 0; p < panels; ++p) write_output(tile, row, rows, panel0 + p, sums[p * rows], kPanel);
}

template <int kRows, int panels>
LEPTON_INLINE int multiply_panels(const GemmTile& tile, int panel) {
  for (; panel + panels <= tile.panel_end; panel += panels)
    for_row_blocks<kRows>(tile.rows, [&]<int rows>(int row) { multiply<rows, panels>(tile, row, panel); });
  return panel;
}

#if defined(LEPTON_ISA_AMX)
// Steps of k whose weights, of two panels, stay in the first-level cache while all rows of the tile pass by.
constexpr int kStepBlock = 8;

template <int panels>
LEPTON_INLINE void multiply_tiles(const GemmTile& tile, int panel) {
  const int64_t panel_bytes = tile.weight.panel_bytes();
  const uint8_t* w = tile.weight.data + panel * panel_bytes;
  const int steps = divide_up(tile.weight.k, kTileStep);
  int32_t* const sums = static_cast<int32_t*>(tile.sums);
  for (int step = 0; step < steps; step += kStepBlock) {
    const int count = steps - step < kStepBlock ? steps - step : kStepBlock;
    for (int row = 0; row < tile.rows; row += kTileRowBlock) {
      const int rows = tile.rows - row < kTileRowBlock ? tile.rows - row : kTileRowBlock;
      const uint8_t* a = tile.q + row * tile.q_stride + step * kTileStep;
      const uint8_t* block = w + int64_t(step) * kTileStep * kPanel;
      int32_t* out = sums + row * kTileSumsRow;
      if (rows > kTileRows)
        tile_multiply<2, panels>(a, tile.q_stride, block, panel_bytes, count, step == 0, out);
      else
        tile_multiply<1, panels>(a, tile.q_stride, block, panel_bytes, count, step == 0, out);
      if (step + count == steps)
        for (int p = 0; p < panels; ++p) write_output(tile, row, rows, panel + p, out + p * kPanel, kTileSumsRow);
    }
  }
}
#endif

}  // namespace

void gemm_int8_tile(const GemmTile& tile) {
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
  panel = multiply_panels<kInt8Rows, kInt8Panels>(tile, panel);
  if constexpr (kInt8Panels > 1) multiply_panels<kInt8Rows, 1>(tile, panel);
}

}  // namespace lepton::LEPTON_ISA
