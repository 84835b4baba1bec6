// gemm_int8_blocks.kernel.cpp - gemm_int8 with weights of which only some steps of k are stored, each panel's own
// (packed_weight.h): the same products and the same exact sums, at the places that the index names.
#include "cpu/simd/epilogue_int8.h"
#include "cpu/simd/panels.h"

namespace lepton::LEPTON_ISA {
namespace {

struct GemmInt8Blocks {
  // Panels have no k in common, so each is a tile of its own: of as many rows as have room.
  static constexpr int kRows = kInt8Rows * kInt8Panels, kPanels = 1;
  template <int planes, int rows, int panels>
  static void multiply(const GemmTile& tile, int row, int panel0) {
    for (int p = 0; p < panels; ++p) multiply_panel<planes, rows>(tile, row, panel0 + p);
  }
  template <int planes, int rows>
  static void multiply_panel(const GemmTile& tile, int row, int panel);
};

template <int planes, int rows>
LEPTON_INLINE void GemmInt8Blocks::multiply_panel(const GemmTile& tile, int row, int panel) {
  // Sums of one row alone would wait for each other.
  constexpr int kChains = rows <= 2 ? kDirectSums / rows : 1;
  constexpr int kStepActivations = kTogether * kStepQuads * kQuadBytes;
  const PackedWeight& weight = tile.weight;
  const int64_t begin = weight.step_begin[panel], stride = tile.q.stride;
  const int count = int(weight.step_begin[panel + 1] - begin);
  const int8_t* w = reinterpret_cast<const int8_t*>(weight.data) + begin * kStepBytes;
  const uint16_t* place = weight.step_place + begin;
  const uint8_t* const a = tile.q.q + row * stride;

  I32x16 acc[kChains][rows];
  unroll<kChains * rows>([&]<int i>() LEPTON_LAMBDA_INLINE { acc[i / rows][i % rows] = broadcast_i32(0); });
  int s = 0;
  for (; s + kChains <= count; s += kChains, w += kChains * kStepBytes) {
    unroll<kChains>([&]<int c>() LEPTON_LAMBDA_INLINE {
      __builtin_prefetch(w + c * kStepBytes + kPrefetchBytes);
      dot_s8<rows>(acc[c], a + place[s + c] * kStepActivations, stride, w + c * kStepBytes);
    });
  }
  for (; s < count; ++s, w += kStepBytes) dot_s8<rows>(acc[0], a + place[s] * kStepActivations, stride, w);
  unroll<(kChains - 1) * rows>(
      [&]<int i>() LEPTON_LAMBDA_INLINE { acc[0][i % rows] = add(acc[0][i % rows], acc[1 + i / rows][i % rows]); });
  sums_to_rows<rows>(acc[0]);
  alignas(64) int32_t sums[rows][kPanel];
  unroll<rows>([&]<int i>() LEPTON_LAMBDA_INLINE { store_i32(sums[i], acc[0][i]); });
  write_output<planes>(tile, row / planes, rows / planes, panel, sums[0], planes * kPanel, kPanel);
}

}  // namespace

void gemm_int8_blocks_tile(const GemmTile& tile) {
  if (tile.q.planes == 1) return multiply_vectors<GemmInt8Blocks, 1>(tile);
  if constexpr (splits_activations(Isa::LEPTON_ISA)) multiply_vectors<GemmInt8Blocks, 2>(tile);
}

}  // namespace lepton::LEPTON_ISA
