// int4_tiles.h - 4-bit weights in tile registers: they are unpacked to int8, and sums of whole groups leave the tiles
// to be scaled and added as floats.
#pragma once

#include "cpu/simd/amx.h"
#include "cpu/simd/epilogue.h"

namespace lepton::LEPTON_ISA {
namespace {

// What a panel's zero points differ from 8, byte by byte; not used where the weight is symmetric.
LEPTON_INLINE __m512i zeros_less_eight(const PackedWeight& weight, int panel, int group) {
  const __m512i zero = _mm512_mullo_epi32(load_zeros(weight, panel, group).v, _mm512_set1_epi32(0x01010101));
  return _mm512_sub_epi8(zero, _mm512_set1_epi8(8));
}

// 64 bytes of nibbles to s8, nibble - zero: the low ones, then the high ones.
template <bool symmetric>
LEPTON_INLINE void unpack(const uint8_t* w, __m512i less_eight, uint8_t* out) {
  // Affine over bits (GFNI), byte 7 - i of the matrix for bit i: bits 0 to 2 of the nibble as they are, its bit 3 five
  // times, all of those inverted. That is the nibble less 8.
  constexpr uint64_t kLowNibble = 0x0102040808080808, kHighNibble = 0x1020408080808080;
  const __m512i pair = _mm512_loadu_si512(w);
  __m512i low = _mm512_gf2p8affine_epi64_epi8(pair, _mm512_set1_epi64(kLowNibble), 0xf8);
  __m512i high = _mm512_gf2p8affine_epi64_epi8(pair, _mm512_set1_epi64(kHighNibble), 0xf8);
  if constexpr (!symmetric) {
    low = _mm512_sub_epi8(low, less_eight);
    high = _mm512_sub_epi8(high, less_eight);
  }
  _mm512_store_si512(out, low);
  _mm512_store_si512(out + 64, high);
}

// Adds `groups` groups from `group` on to the float sums y[rows][16] of a panel, or, with the last group, writes Y.
// sums: the groups' exact ones [rows][16], kTilePairSums apart, the second plane's plane_step behind the first's.
template <int planes, int groups>
void add_groups(const GemmTile& tile, int row, int rows, int panel, int group, const int32_t* sums, int plane_step,
                float* y) {
  const bool first = group == 0, last = group + groups == tile.weight.groups();
  F32x16 scale[groups];
  unroll<groups>([&]<int g>()
                     LEPTON_LAMBDA_INLINE { scale[g] = load_f32<Dtype::f32>(tile.weight.scale(panel, group + g)); });
  const auto added = [&](int r) LEPTON_LAMBDA_INLINE {
    F32x16 sum = first ? broadcast_f32(0) : load_f32<Dtype::f32>(y + r * kPanel);
    unroll<groups>([&]<int g>() LEPTON_LAMBDA_INLINE {
      const int32_t* const high = sums + g * kTilePairSums + r * kPanel;
      const F32x16 part = join_planes<planes>(load_i32(high), load_i32(high + (planes - 1) * plane_step));
      sum = add(sum, mul(part, scale[g]));
    });
    return sum;
  };
  if (last) {
    const F32x16 bias = load_bias(tile, panel), column_sum = load_f32<Dtype::f32>(tile.weight.sum_f32(panel));
    for (int r = 0; r < rows; ++r) store_dequantized<planes>(tile, row + r, panel, added(r), column_sum, bias);
  } else {
#pragma GCC unroll 4  // a few percent with 16 rows
    for (int r = 0; r < rows; ++r) store_f32<Dtype::f32>(y + r * kPanel, added(r));
  }
}

// Panels and steps in the order in which multiply_one_pair uses them, unpacked some steps before.
template <int panels, int kSteps>
struct Unpacker {
  const PackedWeight& weight;
  const int steps, group_steps, panel_end;
  const int64_t panel_bytes;
  int panel, group = 0, left = steps, left_of_group = 0;
  const uint8_t* next = weight.panel(panel);
  __m512i zeros[panels] = {};

  LEPTON_INLINE void unpack_step(uint8_t (&out)[kSteps][panels][kTileBytes], int place) {
    if (panel == panel_end) return;
    if (left_of_group == 0) {
      for (int p = 0; p < panels; ++p) zeros[p] = zeros_less_eight(weight, panel + p, group);
      left_of_group = group_steps;
      ++group;
    }
    const auto unpack_all = [&]<bool symmetric>() LEPTON_LAMBDA_INLINE {
      unroll<panels * kTileStep / kNibbleVector>([&]<int i>() LEPTON_LAMBDA_INLINE {
        constexpr int p = i / (kTileStep / kNibbleVector), vector = i % (kTileStep / kNibbleVector);
        unpack<symmetric>(next + p * panel_bytes + vector * 64, zeros[p], out[place][p] + vector * 128);
      });
    };
    if (weight.symmetric)
      unpack_all.template operator()<true>();
    else
      unpack_all.template operator()<false>();
    next += kTileBytes / 2;
    --left_of_group;
    if (--left > 0) return;
    panel += panels;
    next = weight.panel(panel);
    left = steps;
    group = left_of_group = 0;
  }
};

// All rows in one pair of row tiles, groups of whole steps. Weights are used once, unpacked a few steps before, while
// the tiles multiply. All that is kept between steps is small and stays in the first-level cache, though activations
// and nibbles stream through it: with twice as many unpacked steps, or sums, it takes half as long again.
template <int planes, int row_tiles, int panels>
void multiply_one_pair(const GemmTile& tile, int panel_begin, int panel_end) {
  constexpr int kSteps = 4, kAhead = kSteps - 1;
  alignas(64) uint8_t unpacked[kSteps][panels][kTileBytes];
  alignas(64) int32_t sums[row_tiles * panels * kTileSums];
  alignas(64) float y[row_tiles * panels * kTileSums];
  const PackedWeight weight = tile.weight;
  const int64_t tile_stride = tile.q.tile_stride();
  const int a_step = tile.q.step_bytes();
  const int steps = divide_up(weight.k, kTileStep), groups = weight.groups();
  const int group_steps = groups == 1 ? steps : weight.group / kTileStep;
  Unpacker<panels, kSteps> unpacker{weight, steps, group_steps, panel_end, weight.panel_bytes(), panel_begin};
  for (int place = 0; place < kAhead; ++place) unpacker.unpack_step(unpacked, place);
  int place = 0;
  for (int panel = panel_begin; panel < panel_end; panel += panels) {
    const uint8_t* a = tile.q.q;
    for (int group = 0; group < groups; ++group) {
      for_sum_tiles<row_tiles, panels>([&]<int, int, int sum>() LEPTON_LAMBDA_INLINE { tile_zero<sum>(); });
      const bool last = group + 1 == groups;
      const int count = last ? steps - group * group_steps : group_steps;
      for (int i = 0; i < count; ++i, a += a_step, place = (place + 1) % kSteps) {
        tile_load<4>(a);
        if constexpr (row_tiles == 2) tile_load<5>(a + tile_stride);
        unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE { tile_load<6 + p>(unpacked[place][p]); });
        for_sum_tiles<row_tiles, panels>([&]<int row_tile, int p, int sum>() LEPTON_LAMBDA_INLINE {
          tile_dot<TileDot::s8, sum, 4 + row_tile, 6 + p>();
        });
        unpacker.unpack_step(unpacked, (place + kAhead) % kSteps);
      }
      tile_store_sums<row_tiles, panels>(sums);
      for (int p = 0; p < panels; ++p) __builtin_prefetch(weight.scale(panel + panels + p, group));
      for_tiles_of_pair<planes, panels>(tile, 0, [&](int row, int rows, int p, int at) LEPTON_LAMBDA_INLINE {
        add_groups<planes, 1>(tile, row, rows, panel + p, group, sums + at, panels * kTileSums, y + at);
      });
    }
  }
}

// Steps of one group in a block of unpacked weights. Weights of other groups are 0 in it.
struct Piece {
  int group, step, steps;
  int place;         // in the block
  bool first, last;  // of the group's pieces
};

// s8 [piece.steps * 16][16][4]: nibble - zero for k of the group, elsewhere 0.
LEPTON_INLINE void unpack_piece(const PackedWeight& weight, int panel, const Piece& piece, uint8_t* out) {
  const int k0 = piece.group * weight.group, left = weight.k - k0;
  const int group_end = k0 + round_up(left < weight.group ? left : weight.group, kNibbleBlock);
  const int begin = piece.step * kTileStep, end = begin + piece.steps * kTileStep;
  const int from = k0 > begin ? k0 : begin, to = group_end < end ? group_end : end;
  const __m512i zeros = zeros_less_eight(weight, panel, piece.group);
  const uint8_t* w = weight.panel(panel) + int64_t(from) * kPanel / 2;
  if (from > begin) __builtin_memset(out, 0, size_t(from - begin) * kPanel);
  out += (from - begin) * kPanel;
  if (weight.symmetric)
    for (int k = from; k < to; k += kNibbleVector, w += 64, out += 128) unpack<true>(w, zeros, out);
  else
    for (int k = from; k < to; k += kNibbleVector, w += 64, out += 128) unpack<false>(w, zeros, out);
  if (to < end) __builtin_memset(out, 0, size_t(end - to) * kPanel);
}

struct Block {
  int first_group;
  int count = 0, steps = 0;  // of the pieces
  Piece pieces[kUnpackedSteps];
};

// The steps from (group, step) on that fit a block; moves group and step behind them.
LEPTON_INLINE Block next_block(const PackedWeight& weight, int& group, int& step) {
  Block block;
  block.first_group = group;
  while (block.steps < kUnpackedSteps && group < weight.groups()) {
    const int k0 = group * weight.group, left = weight.k - k0;
    const int end = divide_up(k0 + (left < weight.group ? left : weight.group), kTileStep);
    const int room = kUnpackedSteps - block.steps, steps = end - step < room ? end - step : room;
    Piece& piece = block.pieces[block.count++];
    piece = {group, step, steps, block.steps, step == k0 / kTileStep, step + steps == end};
    block.steps += steps;
    step = piece.last ? ++group * weight.group / kTileStep : step + steps;
  }
  return block;
}

// The weights of a block; panels panel_stride bytes apart.
template <int panels>
LEPTON_INLINE void unpack_block(const PackedWeight& weight, int panel, const Block& block, uint8_t* out,
                                int64_t panel_stride) {
  for (int i = 0; i < block.count; ++i)
    for (int p = 0; p < panels; ++p)
      unpack_piece(weight, panel + p, block.pieces[i], out + p * panel_stride + block.pieces[i].place * kTileBytes);
}

// The groups that a block of pieces ended, for a pair of row tiles: their exact sums on the way into Y.
struct EndedGroups {
  int panel, pair;
  int group, groups;  // groups from `group` on
};

// Adds ended groups to the pair's sums in y, and after the last group writes Y.
template <int planes, int panels>
LEPTON_INLINE void add_ended_groups(const GemmTile& tile, const EndedGroups& ended, const int32_t* group_sums,
                                    float* y) {
  constexpr int kPlaneStep = panels * kTileSums;
  if (ended.groups == 0) return;  // a block in the middle of a group
  for_tiles_of_pair<planes, panels>(tile, ended.pair, [&](int row, int rows, int p, int place) LEPTON_LAMBDA_INLINE {
    const auto add_from = [&]<int groups>(int from) LEPTON_LAMBDA_INLINE {
      add_groups<planes, groups>(tile, row, rows, ended.panel + p, ended.group + from,
                                 group_sums + from * kTilePairSums + place, kPlaneStep, y + place);
    };
    int from = 0;
    for (; ended.groups - from > 4; from += 4) add_from.template operator()<4>(from);
    switch (ended.groups - from) {
      case 4:
        return add_from.template operator()<4>(from);
      case 3:
        return add_from.template operator()<3>(from);
      case 2:
        return add_from.template operator()<2>(from);
      case 1:
        return add_from.template operator()<1>(from);
    }
  });
}

template <int planes, int panels>
LEPTON_INLINE void multiply_int4_tiles(const GemmTile& tile, int panel_begin, int panel_end) {
  alignas(64) int32_t group_sums[kUnpackedSteps][kTilePairSums];
  const PackedWeight& weight = tile.weight;
  const int64_t tile_stride = tile.q.tile_stride();
  const int row_tiles = tile.q.tiles_of(tile.rows), pairs = divide_up(row_tiles, 2);
  if (pairs == 1 && (weight.group % kTileStep == 0 || weight.groups() == 1)) {
    if (row_tiles == 2) return multiply_one_pair<planes, 2, panels>(tile, panel_begin, panel_end);
    if constexpr (planes == 1) return multiply_one_pair<planes, 1, panels>(tile, panel_begin, panel_end);
  }
  int32_t* const kept_sums = static_cast<int32_t*>(tile.scratch);
  float* const y_sums = reinterpret_cast<float*>(kept_sums + int64_t(pairs) * kTilePairSums);
  int32_t* finished = nullptr;  // where the sums go that are still in the tiles
  EndedGroups ended{};          // of the pair before
  const auto add_ended = [&] {
    add_ended_groups<planes, panels>(tile, ended, group_sums[0], y_sums + int64_t(ended.pair) * kTilePairSums);
  };
  const auto multiply_block = [&](int panel, int pair, const Block& block, const uint8_t* unpacked,
                                  int64_t panel_stride, TilePrefetch prefetch) {
    int32_t* const kept = kept_sums + int64_t(pair) * kTilePairSums;
    int ended_groups = 0;
    for (int i = 0; i < block.count; ++i) {
      const Piece& piece = block.pieces[i];
      const uint8_t* a = tile.q.q + 2 * pair * tile_stride + int64_t(piece.step) * tile.q.step_bytes();
      const uint8_t* w = unpacked + piece.place * kTileBytes;
      const int32_t* const before = piece.first ? nullptr : kept;
      if (2 * pair + 1 < row_tiles)
        tile_multiply<TileDot::s8, 2, panels>(a, tile.q, w, panel_stride, piece.steps, before, finished, prefetch);
      else
        tile_multiply<TileDot::s8, 1, panels>(a, tile.q, w, panel_stride, piece.steps, before, finished, prefetch);
      prefetch.next += int64_t(piece.steps) * prefetch.lines * 64;
      if (i == 0) add_ended();  // now that the first product has stored the last of its sums
      finished = piece.last ? group_sums[ended_groups++] : kept;
    }
    ended = {panel, pair, block.first_group, ended_groups};
  };
  if (const int unpacked_steps = tile.unpacked_steps(); unpacked_steps > 0) {
    uint8_t* const unpacked = static_cast<uint8_t*>(tile.scratch) + sum_bytes(tile);
    const int64_t panel_stride = int64_t(unpacked_steps) * kTileBytes;
    const auto of_panel = [&](int panel) { return unpacked + (panel - panel_begin) * panel_stride; };
    int group = 0, step = 0;
    const Block block = next_block(weight, group, step);
    for (int panel = panel_begin; panel < panel_end; panel += panels)
      unpack_block<panels>(weight, panel, block, of_panel(panel), panel_stride);
    for (int pair = 0; pair < pairs; ++pair)
      for (int panel = panel_begin; panel < panel_end; panel += panels)
        multiply_block(panel, pair, block, of_panel(panel), panel_stride, {});
  } else {
    constexpr int kPanelStride = kUnpackedSteps * kTileBytes;
    alignas(64) uint8_t unpacked[panels * kPanelStride];
    for (int panel = panel_begin; panel < panel_end; panel += panels) {
      for (int group = 0, step = 0; group < weight.groups();) {
        const Block block = next_block(weight, group, step);
        unpack_block<panels>(weight, panel, block, unpacked, kPanelStride);
        const uint8_t* const wanted = group == weight.groups() ? weight.panel(panel + panels)
                                                               : weight.panel(panel) + int64_t(step) * (kTileBytes / 2);
        TilePrefetch prefetch{wanted, weight.panel_bytes(), divide_up(kTileLines / 2, pairs)};
        for (int pair = 0; pair < pairs; ++pair, prefetch.next += int64_t(block.steps) * prefetch.lines * 64)
          multiply_block(panel, pair, block, unpacked, kPanelStride, prefetch);
      }
    }
  }
  tile_store_sums<2, panels>(finished);
  add_ended();
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
