// tile_blocks.h - products in tile registers whose sums run over all of k: one block of k after the other, whose
// weights stay in the first-level cache while all rows of the tile pass by.
//
// A Weights has
//   kDot, kLines                  what a tile of them multiplies; cache lines of a panel's step where they are stored
//   steps()                       of k, of 64 bytes of activations
//   block_steps(once)             steps in a block; once: there is one pair of row tiles, so that all are used once
//   stored(panel, step)           where they are stored, panels stored_stride() bytes apart
//   block<panels>(panel, step, count)   ready to multiply, s8 [count][16][16][4] or bf16 [count][16][16][2], panels
//                                       panel_stride() bytes apart
//   whole(panel)                  the same for all of k (GemmTile::write_rows)
//   write<planes>(tile, row, rows, panel, sums, plane_step)   Y[row .. row + rows, 16 columns] from sums [rows][16]
#pragma once

#include "cpu/simd/amx.h"
#include "cpu/simd/epilogue.h"

namespace lepton::LEPTON_ISA {
namespace {

// Blocks of at most this many steps, all of one size, hold that many.
constexpr int even_block(int steps, int most) { return divide_up(steps, divide_up(steps, most)); }

template <int planes, int panels, typename Weights>
LEPTON_INLINE void multiply_blocks(const GemmTile& tile, const Weights& weights, int panel_begin, int panel_end) {
  const int64_t tile_stride = tile.q.tile_stride();
  const int row_tiles = tile.q.tiles_of(tile.rows), pairs = divide_up(row_tiles, 2);
  const bool once = pairs == 1;
  const int steps = weights.steps(), block_steps = weights.block_steps(once);
  int32_t* const last_sums = static_cast<int32_t*>(tile.scratch);
  int32_t* const kept_sums = last_sums + kTilePairSums;
  struct {
    int32_t* sums;
    int panel, pair;
    bool last;
  } previous{};  // the product whose sums are still in the tiles
  const auto write_previous = [&] {
    if (!previous.last) return;
    for_tiles_of_pair<planes, panels>(
        tile, previous.pair, [&](int row, int rows, int p, int place) LEPTON_LAMBDA_INLINE {
          weights.template write<planes>(tile, row, rows, previous.panel + p, last_sums + place, panels * kTileSums);
        });
  };
  const auto multiply_pair = [&](int panel, int pair, int step, int count, const uint8_t* w,
                                 const TilePrefetch& prefetch) {
    const bool last = step + count == steps;
    const uint8_t* a = tile.q.q + 2 * pair * tile_stride + int64_t(step) * tile.q.step_bytes();
    const int panel_pair = tile.k_parts > 1 ? (panel - panel_begin) / panels : 0;
    int32_t* const kept = kept_sums + (int64_t(panel_pair) * pairs + pair) * kTilePairSums;
    const int32_t* const before = step == 0 ? nullptr : kept;
    const int64_t w_stride = weights.panel_stride();
    if (2 * pair + 1 < row_tiles)
      tile_multiply<Weights::kDot, 2, panels>(a, tile.q, w, w_stride, count, before, previous.sums, prefetch);
    else
      tile_multiply<Weights::kDot, 1, panels>(a, tile.q, w, w_stride, count, before, previous.sums, prefetch);
    write_previous();
    previous = {last ? last_sums : kept, panel, pair, last};
  };
  // All rows with steps [begin, end) of two panels.
  const auto multiply_part = [&](int panel, int begin, int end) {
    for (int step = begin; step < end; step += block_steps) {
      const int count = end - step < block_steps ? end - step : block_steps, next = step + count;
      // Of these panels the next block, or the first one of those that come after them. Weights that are used once are
      // a stream, which the hardware fetches ahead best when left alone.
      const uint8_t* const wanted = next < end ? weights.stored(panel, next) : weights.stored(panel + panels, begin);
      TilePrefetch prefetch{wanted, weights.stored_stride(), once ? 0 : divide_up(Weights::kLines, pairs)};
      const uint8_t* const w = weights.template block<panels>(panel, step, count);
      for (int pair = 0; pair < pairs; ++pair, prefetch.next += int64_t(count) * prefetch.lines * 64)
        multiply_pair(panel, pair, step, count, w, prefetch);
    }
  };
  if (tile.write_rows) {
    for (int pair = 0; pair < pairs; ++pair)
      for (int panel = panel_begin; panel < panel_end; panel += panels)
        multiply_pair(panel, pair, 0, steps, weights.whole(panel), {});
  } else {
    const int part_steps = round_up(divide_up(steps, tile.k_parts), block_steps);
    for (int begin = 0; begin < steps; begin += part_steps)
      for (int panel = panel_begin; panel < panel_end; panel += panels)
        multiply_part(panel, begin, steps - begin < part_steps ? steps : begin + part_steps);
  }
  tile_store_sums<2, panels>(previous.sums);
  write_previous();
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
