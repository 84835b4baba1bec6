// gemm_tile.h - what the GEMM kernels are handed: a range of panels times a range of rows, and where Y goes.
#pragma once

#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/dtype.h"
#include "cpu/kernel_table.h"
#include "cpu/packed_weight.h"
#include "cpu/quantize_rows.h"

namespace lepton {

// Bytes ahead of the reads of weights: few rows use each weight once, at the speed of memory.
constexpr int kPrefetchBytes = 4096;

// Y[rows, columns of the panels] = activation(X @ dequant(W)^T + bias) for panels [panel_begin, panel_end).
struct GemmTile {
  PackedWeight weight;
  int panel_begin, panel_end;
  int rows;

  QuantizedRows q;

  void* scratch;  // 64-byte aligned, for the kernel: scratch_bytes(tile)

  const float* bias;  // [n] or null
  Activation activation;
  void* y;  // [rows, n], rows y_stride elements apart
  Dtype y_dtype;
  int64_t y_stride;
  // Tile registers, sums over all of k: all panels pass by with one part of k after the other.
  int k_parts;
  // Tile registers: rows of Y are written from end to end, all panels for one pair of row tiles after the other.
  bool write_rows;
  // Tile registers: Y, which is made of whole cache lines of f32, is written past the caches.
  bool stream;

  // write_rows and 4 bit: a panel's steps of k, all of which are unpacked in scratch. 0: block after block.
  int unpacked_steps() const {
    if (!write_rows || weight.bits == 8) return 0;
    return q.layout == RowLayout::bf16_tiles ? divide_up(weight.k, q.step_k()) : weight.group_steps();
  }
};

// Steps of k, of two panels, whose int8 weights stay in the first-level cache (32 KiB) while sums need not come and go.
constexpr int kWholeSteps = 16;
// Steps of k, of two panels of 4-bit weights, that are unpacked at a time: 16 KiB, which stay in the first-level cache.
constexpr int kUnpackedSteps = 8;

// Bytes of sums that the kernels keep between blocks of k. Tile registers: of two panels, for each pair of tiles twice
// and once more; between parts of k of all panels, for each pair of tiles.
inline int64_t sum_bytes(const GemmTile& tile) {
  if (!tile.q.in_tiles()) return 0;
  const int64_t pairs = divide_up(tile.q.tiles_of(tile.rows), 2);
  const int64_t kept = tile.k_parts > 1 ? divide_up(tile.panel_end - tile.panel_begin, 2) : 2;
  return (pairs * kept + 1) * (2 * kTileRows * 2 * kPanel * 4);
}

// The sums, and behind them unpacked_steps of all panels.
inline int64_t scratch_bytes(const GemmTile& tile) {
  return sum_bytes(tile) + int64_t(tile.panel_end - tile.panel_begin) * tile.unpacked_steps() * kPanel * kTileStep;
}

using GemmTileFn = void(const GemmTile&);
LEPTON_KERNEL(gemm_int8_tile, GemmTileFn)
LEPTON_KERNEL(gemm_int8_blocks_tile, GemmTileFn)
LEPTON_KERNEL(gemm_int4_tile, GemmTileFn)
LEPTON_KERNEL_TO_AVX2(gemm_int16_tile, GemmTileFn)

// k of a piece of int16 activations: int32 sums are exact, as 32767 * 128 * 512 < 2^31, and a piece lies in one group.
inline int int16_piece(const PackedWeight& weight) {
  constexpr int kMost = 512;
  if (weight.groups() == 1) return kMost;
  int parts = divide_up(weight.group, kMost);
  while (weight.group % (parts * kNibbleBlock) != 0) ++parts;
  return weight.group / parts;
}

}  // namespace lepton
