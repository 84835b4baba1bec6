// gemm_int8.kernel.cpp - Y = (Xq @ Wq^T) with unsigned activations, int8 weights and exact int32 sums, scaled at the
// end.
//
//   s      = sum_k q[r, k] w[c, k] - zero[r] * sum_k w[c, k], in each plane
//   y[r,c] = float(s) * (row_scale[r] * scale[c]) + bias[c]; of two planes (float(high) * 256 + float(low)) * ...
//
// Vectors keep sums in registers over the whole of k, so Y is written once and nothing else is; tiles keep them in
// memory between blocks of k.
#include "cpu/simd/epilogue_int8.h"
#include "cpu/simd/panels.h"
#if defined(LEPTON_ISA_AMX)
#include "cpu/simd/tile_blocks.h"
#endif

namespace lepton::LEPTON_ISA {
namespace {

// Any int8 weights.
struct Int8Product {
  static constexpr int kRows = kInt8Rows, kQuads = kStepQuads, kActivations = kTogether * kStepQuads * kQuadBytes;
  template <int rows>
  LEPTON_INLINE static void add(I32x16 (&acc)[rows], const uint8_t* a, int64_t stride, const int8_t* w) {
    dot_s8<rows>(acc, a, stride, w);
  }
};

#if defined(LEPTON_ISA_AVX2)
// Narrow weights, two quads at a time; activations are bytes.
struct NarrowProduct {
  static constexpr int kRows = kNarrowRows, kQuads = 2, kActivations = kQuads * kQuad;
  template <int rows>
  LEPTON_INLINE static void add(I32x16 (&acc)[rows], const uint8_t* a, int64_t stride, const int8_t* w) {
    dot_narrow<rows>(acc, a, stride, w);
  }
};
#endif

template <typename Product>
struct GemmInt8 {
  static constexpr int kRows = Product::kRows, kPanels = kInt8Panels;
  template <int planes, int rows, int panels>
  static void multiply(const GemmTile& tile, int row, int panel0);
  template <int planes, int panels>
  static void multiply_tiles(const GemmTile& tile, int panel_begin, int panel_end);
};

template <typename Product>
template <int planes, int rows, int panels>
LEPTON_INLINE void GemmInt8<Product>::multiply(const GemmTile& tile, int row, int panel0) {
  const int64_t panel_bytes = tile.weight.panel_bytes(), stride = tile.q.stride;
  const int8_t* w = reinterpret_cast<const int8_t*>(tile.weight.panel(panel0));
  const uint8_t* a = tile.q.q + row * stride;
  constexpr int kStepBytes = Product::kQuads * kPanel * kQuad;
  const int steps = divide_up(tile.weight.k, Product::kQuads * kQuad);  // past the last quad activations are 0

  I32x16 acc[panels][rows];
  unroll<panels * rows>([&]<int i>() LEPTON_LAMBDA_INLINE { acc[i / rows][i % rows] = broadcast_i32(0); });
  const auto add_steps = [&](int count, int64_t ahead) LEPTON_LAMBDA_INLINE {
    for (int s = 0; s < count; ++s, a += Product::kActivations, w += kStepBytes) {
      unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
        __builtin_prefetch(w + p * panel_bytes + ahead);
        if constexpr (kStepBytes > 64) __builtin_prefetch(w + p * panel_bytes + ahead + 64);
        Product::template add<rows>(acc[p], a, stride, w + p * panel_bytes);
      });
    }
  };
  constexpr int kAheadSteps = kPrefetchBytes / kStepBytes;
  const int before_end = steps > kAheadSteps ? steps - kAheadSteps : 0;
  add_steps(before_end, kPrefetchBytes);
  add_steps(steps - before_end, kPrefetchBytes + (panels - 1) * panel_bytes);  // of the panels that come next
  unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE { sums_to_rows<rows>(acc[p]); });
  alignas(64) int32_t sums[panels * rows][kPanel];
  unroll<panels * rows>([&]<int i>() LEPTON_LAMBDA_INLINE { store_i32(sums[i], acc[i / rows][i % rows]); });
  for (int p = 0; p < panels; ++p)
    write_output<planes>(tile, row / planes, rows / planes, panel0 + p, sums[p * rows], planes * kPanel, kPanel);
}

#if defined(LEPTON_ISA_AMX)
// Steps of k whose weights, of two panels, stay in the first-level cache (26 KiB) while sums come and go.
constexpr int kStepBlock = 13;

// int8 panels are multiplied as they are stored.
struct Int8Weights {
  static constexpr TileDot kDot = TileDot::u8;
  static constexpr int kLines = kTileLines;
  const PackedWeight& weight;

  int steps() const { return divide_up(weight.k, kTileStep); }
  int block_steps(bool once) const {
    return once || steps() <= kWholeSteps ? steps() : even_block(steps(), kStepBlock);
  }
  const uint8_t* stored(int panel, int step) const { return weight.panel(panel) + int64_t(step) * kTileBytes; }
  int64_t stored_stride() const { return weight.panel_bytes(); }
  template <int panels>
  const uint8_t* block(int panel, int step, int) const {
    return stored(panel, step);
  }
  int64_t panel_stride() const { return stored_stride(); }
  const uint8_t* whole(int panel) const { return stored(panel, 0); }
  template <int planes>
  LEPTON_INLINE void write(const GemmTile& tile, int row, int rows, int panel, const int32_t* sums,
                           int plane_step) const {
    write_output<planes>(tile, row, rows, panel, sums, kPanel, plane_step);
  }
};

template <typename Product>
template <int planes, int panels>
LEPTON_INLINE void GemmInt8<Product>::multiply_tiles(const GemmTile& tile, int panel_begin, int panel_end) {
  multiply_blocks<planes, panels>(tile, Int8Weights{tile.weight}, panel_begin, panel_end);
}
#endif

}  // namespace

void gemm_int8_tile(const GemmTile& tile) {
#if defined(LEPTON_ISA_AVX2)
  if (tile.q.layout == RowLayout::bytes) return multiply_vectors<GemmInt8<NarrowProduct>, 1>(tile);
#endif
  multiply_tile<GemmInt8<Int8Product>>(tile);
}

}  // namespace lepton::LEPTON_ISA
