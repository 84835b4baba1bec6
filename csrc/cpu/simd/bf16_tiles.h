// bf16_tiles.h - w4a16 with many rows in tile registers: weights are unpacked to bf16 with their scales in them, so
// that sums run over all of k and no group is added by itself.
//
//   y[r,c] = sum_k bf16(x[r, k]) bf16((nibble[c, k] - zero[c, g]) scale[c, g]) + bias[c]
#pragma once

#include "cpu/simd/tile_blocks.h"

namespace lepton::LEPTON_ISA {
namespace {

// Of a float weight the upper half is kept, which alone would shrink it by 0.72 * 2^-8 on average (over magnitudes that
// are spread evenly by logarithm): this factor makes up for that. Weights that bf16 holds stay as they are, since less
// than a unit of their last place is added; others are off by 0.72 units at most. Rounding, at most 0.5, takes a third
// more instructions.
constexpr float kCutOff = 1 + 0.7213f / 256;

// What (nibble - zero) * scale is made of, 16 columns of a group.
struct GroupScale {
  F32x16 scale, offset;

  LEPTON_INLINE GroupScale(const PackedWeight& weight, int panel, int group) {
    scale = mul(load_f32<Dtype::f32>(weight.scale(panel, group)), broadcast_f32(kCutOff));
    offset = mul(to_f32(load_zeros(weight, panel, group)), sub(broadcast_f32(0), scale));
  }
};

// 64 bytes of nibbles, 8 k of 16 columns, to bf16 [4][16][2].
LEPTON_INLINE void unpack_bf16(const uint8_t* w, const GroupScale& group, uint8_t* out) {
  const I32x16 word = load_i32(w);
  const auto weight = [&]<int shift>() LEPTON_LAMBDA_INLINE {
    return as_i32(fmadd(nibble_f32<shift>(word), group.scale, group.offset)).v;
  };
  unroll<4>([&]<int pair>() LEPTON_LAMBDA_INLINE {
    constexpr int shift = 16 * (pair % 2) + 4 * (pair / 2);
    const __m512i first = weight.template operator()<shift>(), second = weight.template operator()<shift + 8>();
    // The lower halves from the upper ones of `first`.
    _mm512_store_si512(out + 64 * pair, _mm512_mask_alignr_epi8(second, 0x3333333333333333, first, first, 2));
  });
}

struct Bf16Weights {
  static constexpr TileDot kDot = TileDot::bf16;
  static constexpr int kStepK = kTileStep / 2, kLines = kTileLines / 4;
  const PackedWeight& weight;
  uint8_t* unpacked;  // a block, or where `whole` is used all of k from first_panel on
  int64_t stride;
  int first_panel;

  int steps() const { return divide_up(weight.k, kStepK); }
  int block_steps(bool) const { return even_block(steps(), kUnpackedSteps); }
  const uint8_t* stored(int panel, int step) const { return weight.panel(panel) + int64_t(step) * kLines * 64; }
  int64_t stored_stride() const { return weight.panel_bytes(); }
  template <int panels>
  LEPTON_INLINE const uint8_t* block(int panel, int step, int count) const {
    for (int p = 0; p < panels; ++p) unpack_panel(panel + p, step, count, unpacked + p * stride);
    return unpacked;
  }
  int64_t panel_stride() const { return stride; }
  uint8_t* whole(int panel) const { return unpacked + (panel - first_panel) * stride; }

  // bf16 [count][16][16][2]
  LEPTON_INLINE void unpack_panel(int panel, int step, int count, uint8_t* out) const {
    const int stored_k = round_up(weight.k, kNibbleBlock), wanted = (step + count) * kStepK;
    const int end = wanted < stored_k ? wanted : stored_k;
    const uint8_t* w = stored(panel, step);
    int k = step * kStepK;
    for (int group = k / weight.group; k < end; ++group) {
      const GroupScale scale(weight, panel, group);
      const int64_t next_group = int64_t(group + 1) * weight.group;
      const int group_end = next_group < end ? int(next_group) : end;
      for (; k < group_end; k += kNibbleVector, w += 64, out += 4 * 64) unpack_bf16(w, scale, out);
    }
    if (k < wanted) __builtin_memset(out, 0, size_t(wanted - k) * kPanel * 2);
  }
  template <int planes>
  LEPTON_INLINE void write(const GemmTile& tile, int row, int rows, int panel, const int32_t* sums, int) const {
    const F32x16 bias = load_bias(tile, panel);
    for (int r = 0; r < rows; ++r)
      store_output(tile, row + r, panel, add(load_f32<Dtype::f32>(sums + r * kPanel), bias));
  }
};

struct GemmBf16 {
  template <int planes, int panels>
  LEPTON_INLINE static void multiply_tiles(const GemmTile& tile, int panel_begin, int panel_end) {
    if (const int steps = tile.unpacked_steps(); steps > 0) {
      uint8_t* const unpacked = static_cast<uint8_t*>(tile.scratch) + sum_bytes(tile);
      const Bf16Weights weights{tile.weight, unpacked, int64_t(steps) * kTileBytes, panel_begin};
      for (int panel = panel_begin; panel < panel_end; ++panel)
        weights.unpack_panel(panel, 0, steps, weights.whole(panel));
      return multiply_blocks<planes, panels>(tile, weights, panel_begin, panel_end);
    }
    alignas(64) uint8_t block[panels * kUnpackedSteps * kTileBytes];
    const Bf16Weights weights{tile.weight, block, kUnpackedSteps * kTileBytes, panel_begin};
    multiply_blocks<planes, panels>(tile, weights, panel_begin, panel_end);
  }
};

}  // namespace
}  // namespace lepton::LEPTON_ISA
