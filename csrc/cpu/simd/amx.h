// amx.h - tile registers: 16 rows of 64 bytes, sums of 16 x 16 products. Tiles 0 to 3 are for sums, 4 and 5 for
// activations, 6 and 7 for weights; all have the full shape, and callers pad with zeros.
#pragma once

#include "cpu/simd/avx512vnni.h"

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // a row of a tile: 16 quads of bytes, or 16 pairs of bf16

// Tile registers for the length of a scope. Released at its end, so that a switch of threads need not save them.
struct TileScope {
  LEPTON_INLINE TileScope() {
    alignas(64) uint8_t config[64] = {1};  // palette 1; from 16 on the bytes of a row, from 48 on the rows
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = kTileBytes;
      config[48 + tile] = kTileRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  LEPTON_INLINE ~TileScope() { asm volatile("tilerelease"); }
};

template <int tile>
LEPTON_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
LEPTON_INLINE void tile_load(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile>
LEPTON_INLINE void tile_store(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(tile) : "memory");
}
// sum[16][16] i32 += a u8 [16][64] . w s8 [16][16][4]
template <int sum, int a, int w>
LEPTON_INLINE void tile_dot_u8s8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(w));
}

constexpr int kTileStep = 64;                       // k of one product
constexpr int kTileRowBlock = 2 * kTileRows;        // rows of a 2 x 2 block of sums
constexpr int kTilePanels = 2;                      // panels of it
constexpr int kTileSumsRow = kTilePanels * kPanel;  // i32 in a row of its sums

// sums[row_tiles * 16][kTileSumsRow], its first panels * 16 columns, (+)= A @ W over `steps` steps of k. A: u8, rows
// a_stride bytes apart. W: s8 [k / 4][16][4], panels w_stride bytes apart.
template <int row_tiles, int panels>
LEPTON_INLINE void tile_multiply(const uint8_t* a, int64_t a_stride, const uint8_t* w, int64_t w_stride, int steps,
                                 bool first, int32_t* sums) {
  constexpr int64_t row_bytes = kTileSumsRow * 4;
  int32_t* const below = sums + kTileRows * kTileSumsRow;
  if (first) {
    tile_zero<0>();
    if constexpr (panels == 2) tile_zero<1>();
    if constexpr (row_tiles == 2) tile_zero<2>();
    if constexpr (row_tiles == 2 && panels == 2) tile_zero<3>();
  } else {
    tile_load<0>(sums, row_bytes);
    if constexpr (panels == 2) tile_load<1>(sums + kPanel, row_bytes);
    if constexpr (row_tiles == 2) tile_load<2>(below, row_bytes);
    if constexpr (row_tiles == 2 && panels == 2) tile_load<3>(below + kPanel, row_bytes);
  }
  for (int step = 0; step < steps; ++step, a += kTileStep, w += kTileStep * kPanel) {
    tile_load<6>(w, kTileBytes);
    tile_load<4>(a, a_stride);
    tile_dot_u8s8<0, 4, 6>();
    if constexpr (row_tiles == 2) {
      tile_load<5>(a + kTileRows * a_stride, a_stride);
      tile_dot_u8s8<2, 5, 6>();
    }
    if constexpr (panels == 2) {
      tile_load<7>(w + w_stride, kTileBytes);
      tile_dot_u8s8<1, 4, 7>();
      if constexpr (row_tiles == 2) tile_dot_u8s8<3, 5, 7>();
    }
  }
  tile_store<0>(sums, row_bytes);
  if constexpr (panels == 2) tile_store<1>(sums + kPanel, row_bytes);
  if constexpr (row_tiles == 2) tile_store<2>(below, row_bytes);
  if constexpr (row_tiles == 2 && panels == 2) tile_store<3>(below + kPanel, row_bytes);
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
