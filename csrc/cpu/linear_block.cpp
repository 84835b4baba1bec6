// linear_block.cpp - rows are cut into blocks that pass through all layers on one thread; where the weights are too
// large to be read again for every block, or the rows too few for all threads, the layers follow each other instead.
#include "cpu/linear_block.h"

#include <algorithm>

#include "cpu/add_norm.h"
#include "cpu/cache.h"
#include "cpu/gemm_plan.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace lepton {
namespace {

// The weights of all layers are read again for every block of rows: at most this many second-level caches full.
constexpr int64_t kWeightCaches = 2;
// Activations of a block take at most half a second-level cache.
constexpr int kCacheShare = 2;

GemmArgs layer_args(const LinearBlockArgs& args, int layer, const void* x, int m, float* h) {
  const LinearLayer& it = args.layers[layer];
  const bool first = layer == 0;
  return {x,
          first ? args.dtype : Dtype::f32,
          first ? args.x_stride : it.weight.k,
          m,
          it.weight,
          it.bias,
          it.activation,
          h,
          Dtype::f32,
          it.quantize_activations,
          args.threads};
}

void finish_rows(const LinearBlockArgs& args, Isa isa, float* h, int row0, int rows) {
  const int n = args.layers[args.layer_count - 1].weight.n;
  const int64_t bytes = dtype_bytes(args.dtype);
  const char* residual = static_cast<const char*>(args.residual);
  select_add_norm(isa)({h, rows, n, residual ? residual + row0 * args.residual_stride * bytes : nullptr,
                        args.residual_stride, args.norm_weight, args.norm_bias, args.norm_eps,
                        static_cast<char*>(args.y) + row0 * int64_t(n) * bytes, args.dtype});
}

// f32 values of a row between the layers, all at once.
int64_t row_floats(const LinearBlockArgs& args) {
  int64_t floats = 0;
  for (int i = 0; i < args.layer_count; ++i) floats += args.layers[i].weight.n;
  return floats;
}

void one_block(const LinearBlockArgs& args, Isa isa, int row0, int rows) {
  thread_local Scratch memory, prepared;
  float* h = memory.floats(rows * row_floats(args));
  const void* x = static_cast<const char*>(args.x) + row0 * args.x_stride * dtype_bytes(args.dtype);
  for (int i = 0; i < args.layer_count; ++i) {
    const GemmArgs layer = layer_args(args, i, x, rows, h);
    const Activations plan = plan_activations(layer, args.m, isa, prepared);
    prepare_rows(plan, isa, 0, rows);
    multiply_tile(plan, layer, isa, 0, rows, 0, layer.weight.panels());
    x = h;
    h += int64_t(rows) * layer.weight.n;
  }
  finish_rows(args, isa, h - int64_t(rows) * args.layers[args.layer_count - 1].weight.n, row0, rows);
}

void layer_by_layer(const LinearBlockArgs& args, Isa isa) {
  thread_local Scratch memory;
  float* h = memory.floats(args.m * row_floats(args));
  const void* x = args.x;
  for (int i = 0; i < args.layer_count; ++i) {
    const GemmArgs layer = layer_args(args, i, x, args.m, h);
    gemm(layer);
    x = h;
    h += int64_t(args.m) * layer.weight.n;
  }
  const int n = args.layers[args.layer_count - 1].weight.n;
  h -= int64_t(args.m) * n;
  const int parts = std::min(args.m, args.threads), rows_each = divide_up(args.m, parts);
  parallel_for(divide_up(args.m, rows_each), parts, [&](int i) {
    const int row0 = i * rows_each;
    finish_rows(args, isa, h + int64_t(row0) * n, row0, std::min(rows_each, args.m - row0));
  });
  memory.trim();
}

}  // namespace

void linear_block(const LinearBlockArgs& args) {
  const Isa isa = isa_in_use();
  if (args.m == 0) return;
  advise_huge_pages(args.y, int64_t(args.m) * args.layers[args.layer_count - 1].weight.n * dtype_bytes(args.dtype));
  int64_t weight_bytes = 0;
  for (int i = 0; i < args.layer_count; ++i) {
    const PackedWeight& weight = args.layers[i].weight;
    weight_bytes += weight.panels() * weight.panel_bytes();
  }
  if (weight_bytes > kWeightCaches * l2_bytes() || args.m < kTileRows * args.threads) return layer_by_layer(args, isa);
  // Twice the floats: what is quantized of them takes up to half as much, and so do x and y.
  const int64_t row_bytes = 2 * row_floats(args) * int64_t(sizeof(float));
  const int64_t fit =
      std::max<int64_t>(l2_bytes() / kCacheShare / row_bytes / (2 * kTileRows) * (2 * kTileRows), kTileRows);
  const int blocks = round_up(int((args.m + fit - 1) / fit), args.threads);
  const int rows_each = divide_up(args.m, blocks);
  const int rows = round_up(rows_each, rows_each > kTileRows ? 2 * kTileRows : kTileRows);
  parallel_for(divide_up(args.m, rows), args.threads, [&](int i) {
    const int row0 = i * rows;
    one_block(args, isa, row0, std::min(rows, args.m - row0));
  });
}

}  // namespace lepton
