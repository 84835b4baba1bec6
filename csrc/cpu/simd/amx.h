// amx.h - tile registers: up to 16 rows of 64 bytes, sums of 16 x 16 products. Tiles 0 to 3 are for sums, 4 and 5 for
// activations, 6 and 7 for weights.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/simd/avx512vnni.h"

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kTileBytes = kPanel * kTileStep;  // of a panel's weights
constexpr int kTileLines = kTileBytes / 64;

constexpr int kTilePanels = 2;                              // panels of a 2 x 2 block of sums
constexpr int kTileSums = kTileRows * kPanel;               // i32 of one tile of sums
constexpr int kTilePairSums = 2 * kTilePanels * kTileSums;  // of a 2 x 2 block

// Tile registers for the length of a scope. Released at its end, so that a switch of threads need not save them.
struct TileScope {
  // For products with row_tiles tiles of tile_rows rows each.
  LEPTON_INLINE TileScope(int tile_rows, int row_tiles) {
    const int rows_of[2] = {tile_rows, row_tiles > 1 ? tile_rows : 1};  // 1: not multiplied, but stored
    alignas(64) uint8_t config[64] = {1};  // palette 1; from 16 on the bytes of a row, from 48 on the rows
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = kTileStep;
      const bool sums = tile < 2 * kTilePanels, activations = tile == 4 || tile == 5;
      config[48 + tile] = uint8_t(sums ? rows_of[tile / kTilePanels] : activations ? rows_of[tile - 4] : kPanel);
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
LEPTON_INLINE void tile_load(const void* p) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(int64_t(kTileStep)), "i"(tile) : "memory");
}
// The same, for what should not push other lines out of the first-level cache.
template <int tile>
LEPTON_INLINE void tile_load_once(const void* p) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(int64_t(kTileStep)), "i"(tile) : "memory");
}
template <int tile>
LEPTON_INLINE void tile_store(void* p) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t(kTileStep)), "i"(tile) : "memory");
}
enum class TileDot { u8, s8, bf16 };  // the activations

// sum[16][16] i32 += a s8 or u8 [16][64] . w s8 [16][16][4], or f32 += a bf16 [16][32] . w bf16 [16][16][2]
template <TileDot dot, int sum, int a, int w>
LEPTON_INLINE void tile_dot() {
  if constexpr (dot == TileDot::s8)
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(w));
  else if constexpr (dot == TileDot::u8)
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(w));
  else
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(w));
}

// Calls body.operator()<row_tile, panel, sum>() for a block of sums, `sum` the tile register.
template <int row_tiles, int panels, typename Body>
LEPTON_INLINE void for_sum_tiles(const Body& body) {
  unroll<row_tiles * panels>([&]<int i>() LEPTON_LAMBDA_INLINE {
    constexpr int row_tile = i % row_tiles, panel = i / row_tiles;
    body.template operator()<row_tile, panel, row_tile * kTilePanels + panel>();
  });
}

// Weights that a product will want next, fetched to the second-level cache a few lines a step.
struct TilePrefetch {
  const uint8_t* next;  // the first panel's
  int64_t panel_bytes;
  int lines;  // of each panel, each step
};

// Gives a tile of sums to a product: out with those of the product before, in with what this one starts from.
template <int tile>
LEPTON_INLINE void tile_exchange(int32_t* finished, const int32_t* before) {
  if (finished != nullptr) tile_store<tile>(finished);
  if (before != nullptr)
    tile_load<tile>(before);
  else
    tile_zero<tile>();
}

// Stores sums [row_tiles][panels][16][16].
template <int row_tiles, int panels>
LEPTON_INLINE void tile_store_sums(int32_t* sums) {
  for_sum_tiles<row_tiles, panels>([&]<int row_tile, int panel, int sum>() LEPTON_LAMBDA_INLINE {
    tile_store<sum>(sums + (row_tile * panels + panel) * kTileSums);
  });
}

// Tiles [2][panels] of sums = before + A @ W over `steps` steps of k; before: such sums, or null for zeros. A:
// row_tiles tiles of q, from a on. W: s8 [k / 4][16][4], panels w_stride bytes apart. With row_tiles == 1 only the
// first half of the sums is used.
//
// The sums stay in the tiles. A store must wait for its tile's products, and would hold up the next product's: so that
// one stores them, tile by tile in its first step, to `finished` (null: they are not needed).
template <TileDot kind, int row_tiles, int panels>
LEPTON_INLINE void tile_multiply(const uint8_t* a, const QuantizedRows& q, const uint8_t* w, int64_t w_stride,
                                 int steps, const int32_t* before, int32_t* finished, TilePrefetch prefetch) {
  const int64_t a_stride = q.tile_stride();
  const int a_step = q.step_bytes();
  const auto dot = [&]<int row_tile, int panel>(bool first) LEPTON_LAMBDA_INLINE {
    constexpr int sum = row_tile * kTilePanels + panel, place = (row_tile * panels + panel) * kTileSums;
    if (first) tile_exchange<sum>(finished ? finished + place : nullptr, before ? before + place : nullptr);
    if constexpr (row_tile < row_tiles) tile_dot<kind, sum, 4 + row_tile, 6 + panel>();
  };
  const auto step = [&](bool first) LEPTON_LAMBDA_INLINE {
    tile_load_once<4>(a);
    tile_load<6>(w);
    if constexpr (row_tiles == 2) tile_load_once<5>(a + a_stride);
    if constexpr (panels == 2) tile_load<7>(w + w_stride);
    dot.template operator()<0, 0>(first);
    dot.template operator()<1, 0>(first);
    for (int line = 0; line < prefetch.lines; ++line, prefetch.next += 64) {
      _mm_prefetch(prefetch.next, _MM_HINT_T1);
      if constexpr (panels == 2) _mm_prefetch(prefetch.next + prefetch.panel_bytes, _MM_HINT_T1);
    }
    if constexpr (panels == 2) {
      dot.template operator()<0, 1>(first);
      dot.template operator()<1, 1>(first);
    }
    a += a_step;
    w += kTileBytes;
  };
  step(true);
  for (int i = 1; i < steps; ++i) step(false);
}

// Calls body(row, rows, panel, place) for the rows, a tile's, and the panels whose sums make outputs of a pair of row
// tiles: two of one plane, or both planes of one. The first plane's sums are at `place`.
template <int planes, int panels, typename Body>
LEPTON_INLINE void for_tiles_of_pair(const GemmTile& tile, int pair, const Body& body) {
  const int tile_rows = tile.q.tile_rows;
  for (int row_tile = 0; row_tile < 2; row_tile += planes) {
    const int row = (2 * pair + row_tile) / planes * tile_rows, left = tile.rows - row;
    for (int panel = 0; panel < panels && left > 0; ++panel)
      body(row, left < tile_rows ? left : tile_rows, panel, (row_tile * panels + panel) * kTileSums);
  }
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
