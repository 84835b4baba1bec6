// gemm.cpp - the driver of every quantized GEMM: prepares the activations once, cuts Y into tiles, deals them to
// threads.
#include "cpu/gemm.h"

#include <algorithm>
#include <memory>

#include "cpu/cache.h"
#include "cpu/gemm_tile.h"
#include "cpu/parallel.h"
#include "cpu/quantize_rows.h"

namespace lepton {
namespace {

// Prepared activations that a tile works on are read again for every panel, so they take at most this share of the
// second-level cache: a quarter where vectors multiply, half with tile registers, which use weights so fast that reading
// those again for another tile of rows is what costs.
constexpr int kVectorCacheShare = 4, kTileCacheShare = 2;
// Floats are read once for every block of widened weights, so that many rows share the widening.
constexpr int64_t kFloatActivationBytes = 2 * 1024 * 1024;
// Below this many multiplications a second thread costs more than it saves: ten microseconds of one row's work, and a
// fork and join take five.
constexpr int64_t kParallelWork = 1000 * 1000;
// Tiles per thread: enough that a late thread costs little, few enough that dealing them out costs nothing.
constexpr int kTilesPerThread = 4;
// A tile's rows are a multiple of what a kernel takes at a time: 6 or 12 with vectors, 32 with tile registers.
constexpr int kRowMultiple = 12, kTileRowMultiple = 2 * kTileRows;
// Rows, of all planes, from which tile registers are faster than vectors.
constexpr int kTileLeastRows = 8;
// A panel group of a tile holds a multiple of this many panels, the most that a kernel takes side by side.
constexpr int kPanelMultiple = 4;

// A buffer that a thread keeps between calls, 64-byte aligned.
class Scratch {
 public:
  void* get(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = bytes;
      memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
    }
    return memory_.get();
  }
  void trim() {
    if (size_ > kKeepBytes) {
      memory_.reset();
      size_ = 0;
    }
  }

 private:
  static constexpr size_t kKeepBytes = 32u << 20;
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

struct Activations {
  bool quantized;
  QuantizeRowsArgs integers{};
  ToF32Args floats{};

  int64_t row_bytes() const {
    return quantized ? integers.out.planes * integers.out.stride : floats.out_stride * int64_t(sizeof(float));
  }
  bool in_tiles() const { return quantized && integers.out.layout == RowLayout::tiles; }
};

// Row strides that are an odd number of cache lines: with a power of two all rows of a tile would share one set of the
// first-level cache, which has 8 to 12 places.
int64_t odd_lines(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

// Lays the prepared activations of all rows out in one scratch buffer.
Activations plan_activations(const GemmArgs& args, Isa isa, Scratch& scratch) {
  const int m = args.m, k = args.weight.k;
  Activations plan{};
  plan.quantized = args.quantize_activations || splits_activations(isa);
  if (!plan.quantized) {
    const int64_t stride = odd_lines(int64_t(k) * 4) / 4;
    plan.floats = {args.x, args.dtype, args.x_stride, m, k, nullptr, stride};
    if (args.dtype == Dtype::f32 && m <= kDirectRows) return plan;  // read where it is
    plan.floats.out = static_cast<float*>(scratch.get(size_t(m) * size_t(stride) * sizeof(float)));
    return plan;
  }
  QuantizedRows rows{};
  rows.planes = args.quantize_activations ? 1 : 2;
  rows.biased = args.weight.bits == 4;
  if (isa == Isa::amx && m * rows.planes >= kTileLeastRows)
    rows.layout = RowLayout::tiles;
  else
    rows.layout = args.weight.bits == 8 ? RowLayout::quads : RowLayout::bytes;
  const int quad = rows.layout == RowLayout::quads ? quad_bytes(isa) : kQuad;
  rows.stride = rows.layout == RowLayout::tiles ? round_up(k, kTileStep) : odd_lines(int64_t(round_up(k, 16)) / kQuad * quad);
  const bool sums = args.weight.bits == 4 && rows.layout != RowLayout::tiles;
  // Tiles hold whole blocks of rows; what is computed of the rows past m is not used.
  const size_t plane_rows = size_t(round_up(m, kTileRows)) * size_t(rows.planes);
  const size_t q_bytes = plane_rows * size_t(rows.stride), i32_bytes = plane_rows * 4;
  char* memory = static_cast<char*>(scratch.get(q_bytes + i32_bytes * (2 + (sums ? size_t(args.weight.groups()) : 0))));
  rows.q = reinterpret_cast<uint8_t*>(memory);
  rows.scale = reinterpret_cast<float*>(memory + q_bytes);
  rows.zero = reinterpret_cast<int32_t*>(memory + q_bytes + i32_bytes);
  if (sums) rows.group_sum = reinterpret_cast<int32_t*>(memory + q_bytes + 2 * i32_bytes);
  plan.integers = {args.x, args.dtype, args.x_stride, 0, 0, k, args.weight.group, rows};
  return plan;
}

void prepare_rows(const Activations& plan, Isa isa, int row_begin, int row_end) {
  if (plan.quantized) {
    QuantizeRowsArgs part = plan.integers;
    part.row_begin = row_begin;
    part.row_end = row_end;
    select_quantize_rows(isa)(part);
  } else if (plan.floats.out) {
    ToF32Args part = plan.floats;
    part.x = static_cast<const char*>(part.x) + row_begin * part.x_stride * dtype_bytes(part.dtype);
    part.rows = row_end - row_begin;
    part.out += row_begin * part.out_stride;
    select_to_f32_rows(isa)(part);
  }
}

GemmTile tile_of(const Activations& plan, const GemmArgs& args, int row0, int rows, int panel_begin, int panel_end) {
  GemmTile tile{};
  tile.weight = args.weight;
  tile.panel_begin = panel_begin;
  tile.panel_end = panel_end;
  tile.rows = rows;
  if (plan.quantized) {
    tile.q = plan.integers.out.from(row0, args.weight.groups());
  } else if (plan.floats.out) {
    tile.x = plan.floats.out + row0 * plan.floats.out_stride;
    tile.x_stride = plan.floats.out_stride;
  } else {
    tile.x = static_cast<const float*>(args.x) + row0 * args.x_stride;
    tile.x_stride = args.x_stride;
  }
  tile.bias = args.bias;
  tile.activation = args.activation;
  tile.y = static_cast<char*>(args.y) + int64_t(row0) * args.weight.n * dtype_bytes(args.dtype);
  tile.y_dtype = args.dtype;
  tile.y_stride = args.weight.n;
  return tile;
}

// Rows of a tile: what fits the share of the cache, dealt evenly.
int rows_of_tile(const Activations& plan, int m) {
  const int multiple = plan.in_tiles() ? kTileRowMultiple : kRowMultiple;
  const int64_t bytes = plan.in_tiles()  ? l2_bytes() / kTileCacheShare
                        : plan.quantized ? l2_bytes() / kVectorCacheShare
                                         : kFloatActivationBytes;
  const int64_t fit = std::max<int64_t>(bytes / plan.row_bytes() / multiple * multiple, multiple);
  const int tiles = int((m + fit - 1) / fit);
  return std::min(m, round_up(divide_up(m, tiles), multiple));
}

GemmTileFn* tile_kernel(const Activations& plan, int bits, Isa isa) {
  if (!plan.quantized) return select_gemm_dequant_tile(isa);
  return bits == 8 ? select_gemm_int8_tile(isa) : select_gemm_int4_tile(isa);
}

}  // namespace

void gemm(const GemmArgs& args) {
  const Isa isa = isa_in_use();
  const int m = args.m, k = args.weight.k, panels = args.weight.panels();
  if (m == 0 || panels == 0) return;
  const int threads = int64_t(m) * args.weight.n * k < kParallelWork ? 1 : std::max(1, args.threads);

  thread_local Scratch scratch;
  const Activations plan = plan_activations(args, isa, scratch);
  const int row_block = rows_of_tile(plan, m), row_tiles = divide_up(m, row_block);

  const int prepare_threads = int64_t(m) * k < kParallelWork / 4 ? 1 : threads;
  const int prepare_rows_each = divide_up(m, std::min(m, prepare_threads * kTilesPerThread));
  parallel_for(divide_up(m, prepare_rows_each), prepare_threads, [&](int i) {
    const int row0 = i * prepare_rows_each;
    prepare_rows(plan, isa, row0, std::min(row0 + prepare_rows_each, m));
  });

  const int wanted = threads == 1 ? 1 : divide_up(threads * kTilesPerThread, row_tiles);
  const int tile_panels = std::min(panels, round_up(divide_up(panels, wanted), kPanelMultiple));
  const int panel_tiles = divide_up(panels, tile_panels);
  GemmTileFn* kernel = tile_kernel(plan, args.weight.bits, isa);
  const int planes = plan.quantized ? plan.integers.out.planes : 1;
  parallel_for(row_tiles * panel_tiles, threads, [&](int i) {
    const int row0 = i / panel_tiles * row_block, panel0 = i % panel_tiles * tile_panels;
    const int rows = std::min(row_block, m - row0);
    GemmTile tile = tile_of(plan, args, row0, rows, panel0, std::min(panels, panel0 + tile_panels));
    thread_local Scratch tile_scratch;
    if (plan.in_tiles() || !plan.quantized) tile.scratch = tile_scratch.get(size_t(scratch_bytes(rows * planes)));
    kernel(tile);
  });
  scratch.trim();
}

}  // namespace lepton
