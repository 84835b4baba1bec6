// gemm.cpp - the driver of every quantized GEMM: prepares the activations once, cuts Y into tiles, deals them to
// threads.
#include "cpu/gemm.h"

#include <algorithm>

#include "cpu/cache.h"
#include "cpu/gemm_plan.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace lepton {
namespace {

// Prepared activations that a tile works on are read again for every panel, so they take at most this share of the
// second-level cache: a quarter where vectors multiply, half with tile registers, which use weights so fast that
// reading those again for another tile of rows is what costs.
constexpr int kVectorCacheShare = 4, kTileCacheShare = 2;
// Below this many multiplications a second thread costs more than it saves: ten microseconds of one row's work, and a
// fork and join take five.
constexpr int64_t kParallelWork = 1000 * 1000;
// Tiles per thread: enough that a late thread costs little, few enough that dealing them out costs nothing.
constexpr int kTilesPerThread = 4;
// At least so many at levels that multiply int16 pairs: the rows that fit the share (12 with k = 4096) would read large
// weights from the last-level cache too often. Not with weights in blocks, of which there are few, and whose places
// make jumps through rows that have to be near.
constexpr int kPairRows = 96;
// A tile's rows are a multiple of what a kernel takes at a time: 6 or 12 with vectors, two tiles with tile registers.
constexpr int kRowMultiple = 12;
// A panel group of a tile holds a multiple of this many panels, the most that a kernel takes side by side.
constexpr int kPanelMultiple = 4;

// What a sum that leaves and comes back between parts of k costs, in bytes of weights read: it is 4 bytes each way, and
// nothing fetches it ahead.
constexpr int kSumCost = 16;
constexpr int kMostParts = 16;

// With weights that stay in the second-level cache threads share out rows, so that each writes rows of Y from end to
// end: from so many rows a tile on, below that panels.
constexpr int kLeastRowsShared = 256;

// Whether the weights leave half of the second-level cache to all else.
bool fits_second_level(const PackedWeight& weight) { return weight.panels() * weight.panel_bytes() <= l2_bytes() / 2; }

// How a product is cut along m, and k within a tile.
struct RowTiles {
  int rows;     // of a tile
  int k_parts;  // all panels pass by with one part of k after the other; sums wait in memory between them
};

// Rows of a tile: those whose part of k fits the share of the cache, dealt evenly.
RowTiles row_tiles_of(const Activations& plan, const PackedWeight& weight, int m, int threads) {
  const int multiple = plan.in_tiles() ? 2 * plan.integers.out.tile_rows : kRowMultiple;
  const int64_t bytes = l2_bytes() / (plan.in_tiles() ? kTileCacheShare : kVectorCacheShare);
  const int least = !plan.has_pairs() ? multiple : weight.step_begin == nullptr ? kPairRows : 2 * multiple;
  const int share = divide_up(m, threads * kTilesPerThread);
  const auto rows_with = [&](int k_parts) {
    int64_t fit = std::max<int64_t>(bytes * k_parts / plan.row_bytes() / multiple * multiple, least);
    if (threads > 1 && share >= kLeastRowsShared && fits_second_level(weight)) fit = std::min<int64_t>(fit, share);
    const int tiles = int((m + fit - 1) / fit);
    return std::min(m, round_up(divide_up(m, tiles), multiple));
  };
  // Of a column, in bytes from beyond the second-level cache: its weights once for every tile of rows (a byte each,
  // read or unpacked), and its sums between parts.
  const auto cost = [&](int k_parts) {
    return int64_t(divide_up(m, rows_with(k_parts))) * weight.k + int64_t(k_parts - 1) * m * kSumCost;
  };
  int best = 1;
  if (plan.in_tiles() && (weight.bits == 8 || plan.integers.out.layout == RowLayout::bf16_tiles))
    for (int k_parts = 2; k_parts <= kMostParts; ++k_parts)
      if (cost(k_parts) < cost(best)) best = k_parts;
  return {rows_with(best), best};
}

}  // namespace

void gemm(const GemmArgs& args) {
  const Isa isa = isa_in_use();
  const int m = args.m, k = args.weight.k, panels = args.weight.panels();
  if (m == 0 || panels == 0) return;
  const int threads = int64_t(m) * args.weight.n * k < kParallelWork ? 1 : std::max(1, args.threads);

  advise_huge_pages(args.y, int64_t(m) * args.weight.n * dtype_bytes(args.y_dtype));
  thread_local Scratch scratch;
  Activations plan = plan_activations(args, m, isa, scratch);
  const auto [row_block, k_parts] = row_tiles_of(plan, args.weight, m, threads);
  plan.k_parts = k_parts;
  const int row_tiles = divide_up(m, row_block);

  const int prepare_threads = int64_t(m) * k < kParallelWork / 4 ? 1 : threads;
  const int prepare_rows_each = divide_up(m, std::min(m, prepare_threads * kTilesPerThread));
  parallel_for(divide_up(m, prepare_rows_each), prepare_threads, [&](int i) {
    const int row0 = i * prepare_rows_each;
    prepare_rows(plan, isa, row0, std::min(row0 + prepare_rows_each, m));
  });

  const int wanted = threads == 1 ? 1 : divide_up(threads * kTilesPerThread, row_tiles);
  const int tile_panels = std::min(panels, round_up(divide_up(panels, wanted), kPanelMultiple));
  const int panel_tiles = divide_up(panels, tile_panels);
  parallel_for(row_tiles * panel_tiles, threads, [&](int i) {
    const int row0 = i / panel_tiles * row_block, panel0 = i % panel_tiles * tile_panels;
    multiply_tile(plan, args, isa, row0, std::min(row_block, m - row0), panel0, std::min(panels, panel0 + tile_panels));
  });
  scratch.trim();
}

}  // namespace lepton
