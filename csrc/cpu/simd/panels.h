// panels.h - how the integer kernels walk over a tile's panels and rows: sums of some panels and rows in registers at a
// time, or of 32 rows and two panels in tile registers.
//
// A Kernel has
//   kRows, kPanels                                    whose sums fit the registers
//   multiply<planes, rows, panels>(tile, row, panel)  Y of `rows` (of all planes) x `panels`
//   multiply_tiles<planes, panels>(tile, begin, end)  Y of all rows x panels [begin, end), `panels` of them at a time
//   in
//                                                     tile registers
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/simd/epilogue.h"
#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

// Panels side by side for one row: enough sums in flight, at most four streams of weights.
template <int planes>
constexpr int kVectorPanels = kDirectSums / planes < 4 ? kDirectSums / planes : 4;

template <typename Kernel, int planes, int kRows, int panels>
LEPTON_INLINE int multiply_panels(const GemmTile& tile, int panel) {
  for (; panel + panels <= tile.panel_end; panel += panels)
    for_row_blocks<kRows, planes>(tile.rows * planes, [&]<int rows>(int row) {
      Kernel::template multiply<planes, rows, panels>(tile, row, panel);
    });
  return panel;
}

template <typename Kernel, int planes>
void multiply_vectors(const GemmTile& tile) {
  int panel = tile.panel_begin;
  if (tile.rows == 1) {
    panel = multiply_panels<Kernel, planes, planes, kVectorPanels<planes>>(tile, panel);
    multiply_panels<Kernel, planes, planes, 1>(tile, panel);
    return;
  }
  panel = multiply_panels<Kernel, planes, Kernel::kRows, Kernel::kPanels>(tile, panel);
  if constexpr (Kernel::kPanels > 1) multiply_panels<Kernel, planes, Kernel::kRows, 1>(tile, panel);
}

#if defined(LEPTON_ISA_AMX)
template <typename Kernel, int planes>
void multiply_tiles(const GemmTile& tile) {
  const TileScope registers(tile.q.tile_rows, tile.q.tiles_of(tile.rows));
  const int rest = (tile.panel_end - tile.panel_begin) % kTilePanels, end = tile.panel_end - rest;
  if (tile.panel_begin < end) Kernel::template multiply_tiles<planes, kTilePanels>(tile, tile.panel_begin, end);
  if (rest > 0) Kernel::template multiply_tiles<planes, 1>(tile, end, tile.panel_end);
  if (tile.stream) _mm_sfence();  // before other threads hear that Y is there
}
#endif

template <typename Kernel>
LEPTON_INLINE void multiply_tile(const GemmTile& tile) {
#if defined(LEPTON_ISA_AMX)
  if (tile.q.layout == RowLayout::tiles)
    return tile.q.planes == 1 ? multiply_tiles<Kernel, 1>(tile) : multiply_tiles<Kernel, 2>(tile);
#endif
  if (tile.q.planes == 1) return multiply_vectors<Kernel, 1>(tile);
  if constexpr (splits_activations(Isa::LEPTON_ISA)) multiply_vectors<Kernel, 2>(tile);
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
