// gemm.cpp - the driver of every quantized GEMM: prepares the activations once, cuts Y into tiles, deals them to
// threads.
#include "cpu/gemm.h"

#include <algorithm>
#include <memory>

#include "cpu/gemm_tile.h"
#include "cpu/parallel.h"
#include "cpu/quantize_rows.h"

namespace lepton {
namespace {

// Rows of prepared activations that a tile works on: they are read again for every panel, so they should stay in a
// second-level cache, of which half a megabyte is what small cores have.
constexpr int64_t kActivationBytes = 256 * 1024;
// Tile registers use weights so fast that reading them from memory is what costs; processors that have them have 2 MiB.
constexpr int64_t kTileActivationBytes = 1024 * 1024;
// Floats are read once for every block of widened weights, so that many rows share the widening.
constexpr int64_t kFloatActivationBytes = 2 * 1024 * 1024;
// Below this many multiplications a second thread costs more than it saves (a fork and join take a few microseconds).
constexpr int64_t kParallelWork = 400 * 1000;
// Tiles per thread: enough that a late thread costs little, few enough that dealing them out costs nothing.
constexpr int kTilesPerThread = 4;
// A tile's rows are a multiple of what a kernel takes at a time: 6 or 12 with vectors, 32 with tile registers.
constexpr int kRowMultiple = 12, kTileRowMultiple = 32;
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
  QuantizeRowsArgs quantized{};
  ToF32Args floats{};
};

// Row strides that are an odd number of cache lines: with a power of two all rows of a tile would share one set of the
// first-level cache, which has 8 to 12 places.
int64_t odd_lines(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

// Lays the prepared activations of all rows out in one scratch buffer.
Activations plan_activations(const GemmArgs& args, Isa isa, Scratch& scratch) {
  const int m = args.m, k = args.weight.k, groups = args.weight.groups();
  Activations plan;
  if (!args.quantize_activations) {
    const int64_t stride = odd_lines(int64_t(k) * 4) / 4;
    plan.floats = {args.x, args.dtype, args.x_stride, m, k, nullptr, stride};
    if (args.dtype == Dtype::f32 && m <= kDirectRows) return plan;  // read where it is
    plan.floats.out = static_cast<float*>(scratch.get(size_t(m) * size_t(stride) * sizeof(float)));
    return plan;
  }
  const bool bytes = args.weight.bits == 4;
  const int64_t stride = odd_lines(int64_t(round_up(k, 16)) / kQuad * (bytes ? kQuad : quad_bytes(isa)));
  // Tile registers read whole blocks of rows; what they make of the rows past m is not used.
  const size_t q_bytes = size_t(round_up(m, 16)) * size_t(stride), row_bytes = size_t(round_up(m, 16)) * 4;
  char* memory = static_cast<char*>(scratch.get(q_bytes + row_bytes * (2 + (bytes ? size_t(groups) : 0))));
  plan.quantized = {args.x,
                    args.dtype,
                    args.x_stride,
                    m,
                    k,
                    bytes ? QuantizedLayout::bytes : QuantizedLayout::quads,
                    reinterpret_cast<uint8_t*>(memory),
                    stride,
                    reinterpret_cast<float*>(memory + q_bytes),
                    reinterpret_cast<int32_t*>(memory + q_bytes + row_bytes),
                    bytes ? reinterpret_cast<int32_t*>(memory + q_bytes + 2 * row_bytes) : nullptr,
                    args.weight.group};
  return plan;
}

void prepare_rows(const Activations& plan, const GemmArgs& args, Isa isa, int row0, int rows) {
  const int64_t offset = row0 * args.x_stride * dtype_bytes(args.dtype);
  if (args.quantize_activations) {
    QuantizeRowsArgs part = plan.quantized;
    part.x = static_cast<const char*>(part.x) + offset;
    part.rows = rows;
    part.q += row0 * part.q_stride;
    part.scale += row0;
    part.zero += row0;
    if (part.group_sum) part.group_sum += int64_t(row0) * args.weight.groups();
    select_quantize_rows(isa)(part);
  } else if (plan.floats.out) {
    ToF32Args part = plan.floats;
    part.x = static_cast<const char*>(part.x) + offset;
    part.rows = rows;
    part.out += row0 * part.out_stride;
    select_to_f32_rows(isa)(part);
  }
}

GemmTile tile_of(const Activations& plan, const GemmArgs& args, int row0, int rows, int panel_begin, int panel_end) {
  GemmTile tile{};
  tile.weight = args.weight;
  tile.panel_begin = panel_begin;
  tile.panel_end = panel_end;
  tile.rows = rows;
  if (args.quantize_activations) {
    const QuantizeRowsArgs& q = plan.quantized;
    tile.q = q.q + row0 * q.q_stride;
    tile.q_stride = q.q_stride;
    tile.row_scale = q.scale + row0;
    tile.row_zero = q.zero + row0;
    if (q.group_sum) tile.row_group_sum = q.group_sum + int64_t(row0) * args.weight.groups();
  } else if (plan.floats.out) {
    tile.x = plan.floats.out + row0 * plan.floats.out_stride;
    tile.x_stride = plan.floats.out_stride;
  } else {
    tile.x = static_cast<const float*>(args.x) + row0 * args.x_stride;
    tile.x_stride = args.x_stride;
  }
  tile.bias = args.bias;
  tile.y = static_cast<char*>(args.y) + int64_t(row0) * args.weight.n * dtype_bytes(args.dtype);
  tile.y_dtype = args.dtype;
  tile.y_stride = args.weight.n;
  return tile;
}

GemmTileFn* tile_kernel(const GemmArgs& args, Isa isa) {
  if (!args.quantize_activations) return select_gemm_dequant_tile(isa);
  return args.weight.bits == 8 ? select_gemm_int8_tile(isa) : select_gemm_int4_tile(isa);
}

}  // namespace

void gemm(const GemmArgs& args) {
  const Isa isa = isa_in_use();
  const int m = args.m, k = args.weight.k, panels = args.weight.panels();
  if (m == 0 || panels == 0) return;
  const int threads = int64_t(m) * args.weight.n * k < kParallelWork ? 1 : std::max(1, args.threads);

  thread_local Scratch scratch;
  const Activations plan = plan_activations(args, isa, scratch);
  const int64_t row_bytes = args.quantize_activations ? plan.quantized.q_stride : int64_t(k) * 4;
  const bool tiles = args.quantize_activations && isa == Isa::amx;
  const int64_t tile_bytes = tiles                       ? kTileActivationBytes
                             : args.quantize_activations ? kActivationBytes
                                                         : kFloatActivationBytes;
  const int multiple = tiles ? kTileRowMultiple : kRowMultiple;
  const int64_t rows_that_fit = tile_bytes / std::max<int64_t>(row_bytes, 1) / multiple * multiple;
  const int row_block = int(std::min<int64_t>(std::max<int64_t>(rows_that_fit, multiple), m));
  const int row_tiles = divide_up(m, row_block);

  const int prepare_threads = int64_t(m) * k < kParallelWork / 4 ? 1 : threads;
  const int prepare_rows_each = divide_up(m, std::min(m, prepare_threads * kTilesPerThread));
  parallel_for(divide_up(m, prepare_rows_each), prepare_threads, [&](int i) {
    const int row0 = i * prepare_rows_each;
    prepare_rows(plan, args, isa, row0, std::min(prepare_rows_each, m - row0));
  });

  const int wanted = threads == 1 ? 1 : divide_up(threads * kTilesPerThread, row_tiles);
  const int tile_panels = std::min(panels, round_up(divide_up(panels, wanted), kPanelMultiple));
  const int panel_tiles = divide_up(panels, tile_panels);
  GemmTileFn* kernel = tile_kernel(args, isa);
  parallel_for(row_tiles * panel_tiles, threads, [&](int i) {
    const int row0 = i / panel_tiles * row_block, panel0 = i % panel_tiles * tile_panels;
    const int rows = std::min(row_block, m - row0);
    GemmTile tile = tile_of(plan, args, row0, rows, panel0, std::min(panels, panel0 + tile_panels));
    thread_local Scratch sums;
    if (rows > 1) tile.sums = sums.get(size_t(sums_bytes(rows)));
    kernel(tile);
  });
  scratch.trim();
}

}  // namespace lepton
