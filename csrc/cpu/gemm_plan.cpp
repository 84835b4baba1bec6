// gemm_plan.cpp - how activations are laid out for a level, and which kernel takes a tile of them.
#include "cpu/gemm_plan.h"

#include "cpu/cache.h"

namespace lepton {
namespace {

// Rows, of all planes, from which tile registers are faster than vectors.
constexpr int kTileLeastRows = 5;
// Second-level caches that Y must fill to be streamed past them: what reads a smaller one next finds enough of it
// there.
constexpr int64_t kStreamCaches = 2;

// Row strides that are an odd number of cache lines: with a power of two all rows of a tile would share one set of the
// first-level cache, which has 8 to 12 places.
int64_t odd_lines(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

// How tile registers write a Y that overflows the second-level cache. Rows from end to end are the fastest, but all of
// the weights pass by for every pair of row tiles: as bytes they must fit that cache, and their k be one block.
void write_large_output(const GemmArgs& args, GemmTile& tile) {
  const PackedWeight& weight = args.weight;
  const int64_t y_bytes = int64_t(args.m) * weight.n * dtype_bytes(args.y_dtype);
  if (y_bytes <= l2_bytes()) return;
  const bool grouped = weight.bits == 4 && tile.q.layout == RowLayout::tiles;
  const int steps = grouped ? weight.group_steps() : divide_up(weight.k, tile.q.step_k());
  const int64_t bytes = int64_t(weight.panels()) * steps * kPanel * kTileStep;
  tile.write_rows = steps <= (grouped ? kUnpackedSteps : kWholeSteps) && bytes <= l2_bytes() / 2;
  const uintptr_t line_offset = (reinterpret_cast<uintptr_t>(args.y) | uintptr_t(weight.n) * sizeof(float)) % 64;
  tile.stream =
      !tile.write_rows && y_bytes >= kStreamCaches * l2_bytes() && args.y_dtype == Dtype::f32 && line_offset == 0;
}

// Whether a level without fast products of bytes has them for these weights.
bool multiplies_bytes(const PackedWeight& weight, Isa isa) { return multiplies_narrow(isa) && weight.narrow(); }

GemmTile tile_of(const Activations& plan, const GemmArgs& args, int row0, int rows, int panel_begin, int panel_end) {
  GemmTile tile{};
  tile.weight = args.weight;
  tile.panel_begin = panel_begin;
  tile.panel_end = panel_end;
  tile.rows = rows;
  tile.q = plan.integers.out.from(row0, divide_up(plan.integers.k, plan.integers.group));
  tile.bias = args.bias;
  tile.activation = args.activation;
  tile.y = static_cast<char*>(args.y) + int64_t(row0) * args.weight.n * dtype_bytes(args.y_dtype);
  tile.y_dtype = args.y_dtype;
  tile.y_stride = args.weight.n;
  tile.k_parts = plan.k_parts;
  if (plan.in_tiles()) write_large_output(args, tile);
  return tile;
}

GemmTileFn* tile_kernel(const Activations& plan, const PackedWeight& weight, Isa isa) {
  if (plan.integers.out.layout == RowLayout::int16) return select_gemm_int16_tile(isa);
  if (weight.step_begin != nullptr) return select_gemm_int8_blocks_tile(isa);
  return weight.bits == 8 ? select_gemm_int8_tile(isa) : select_gemm_int4_tile(isa);
}

}  // namespace

Activations plan_activations(const GemmArgs& args, int product_rows, Isa isa, Scratch& scratch) {
  const int m = args.m, k = args.weight.k;
  Activations plan{};
  QuantizedRows rows{};
  const bool int16 = !args.quantize_activations && !splits_activations(isa);
  rows.planes = args.quantize_activations || int16 ? 1 : 2;
  rows.biased = args.weight.bits == 4 || signed_quads(isa);
  if (int16) {
    rows.layout = RowLayout::int16;
  } else if (!args.quantize_activations && multiplies_bf16(isa, args.weight.bits, product_rows)) {
    rows.layout = RowLayout::bf16_tiles;
    rows.planes = 1;
    rows.tile_rows = even_tile_rows(m);
  } else if (isa == Isa::amx && m * rows.planes >= kTileLeastRows && args.weight.step_begin == nullptr) {
    rows.layout = RowLayout::tiles;
    rows.tile_rows = even_tile_rows(m);
  } else if (rows_together(isa) == 2) {
    rows.layout = RowLayout::pairs;
  } else {
    rows.layout = args.weight.bits == 4 || multiplies_bytes(args.weight, isa) ? RowLayout::bytes : RowLayout::quads;
  }
  const int quad = int16 || rows.layout == RowLayout::quads ? quad_bytes(isa) : kQuad;
  const int group = int16 && args.weight.bits == 4 ? int16_piece(args.weight) : args.weight.group;
  rows.stride =
      rows.in_tiles() ? divide_up(k, rows.step_k()) * kTileStep : odd_lines(int64_t(round_up(k, 16)) / kQuad * quad);
  const bool sums = args.weight.bits == 4 && !rows.in_tiles();
  // The last tile is loaded whole; what is computed of its rows past m is not used.
  const int padded = rows.in_tiles() ? round_up(m, rows.tile_rows) : m;
  const size_t plane_rows = size_t(round_up(padded * rows.planes, 16));  // 16: what lies behind it stays aligned
  const size_t q_bytes = plane_rows * size_t(rows.stride), i32_bytes = plane_rows * 4;
  char* memory = static_cast<char*>(scratch.get(q_bytes + i32_bytes * (2 + (sums ? size_t(divide_up(k, group)) : 0))));
  rows.q = reinterpret_cast<uint8_t*>(memory);
  rows.scale = reinterpret_cast<float*>(memory + q_bytes);
  rows.zero = reinterpret_cast<int32_t*>(memory + q_bytes + i32_bytes);
  if (sums) rows.group_sum = reinterpret_cast<int32_t*>(memory + q_bytes + 2 * i32_bytes);
  plan.integers = {args.x, args.dtype, args.x_stride, 0, 0, k, group, rows};
  return plan;
}

void prepare_rows(const Activations& plan, Isa isa, int row_begin, int row_end) {
  QuantizeRowsArgs part = plan.integers;
  part.row_begin = row_begin;
  part.row_end = row_end;
  select_quantize_rows(isa)(part);
}

void multiply_tile(const Activations& plan, const GemmArgs& args, Isa isa, int row0, int rows, int panel_begin,
                   int panel_end) {
  GemmTile tile = tile_of(plan, args, row0, rows, panel_begin, panel_end);
  thread_local Scratch scratch;
  tile.scratch = scratch.get(size_t(scratch_bytes(tile)));
  tile_kernel(plan, args.weight, isa)(tile);
  scratch.trim();
}

}  // namespace lepton
