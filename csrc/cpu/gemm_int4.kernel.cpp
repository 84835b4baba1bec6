// gemm_int4.kernel.cpp - Y = Xq @ dequant(W4)^T with signed activations (q - 128), 4-bit weights in groups along k, and
// int32 sums exact within a group; groups are added in float, in order.
//
//   s_g    = sum over the group of q[r, k] (nibble[c, k] - zero[c, g]), in each plane
//   y[r,c] = row_scale[r] * ((s_0 scale[c, 0] + s_1 scale[c, 1] + ...) - row_zero[r] * sum[c]) + bias[c]
//
// with sum[c] = scale[c, 0] * (sum of group 0's weights) + ...; of two planes s_g = float(high) * 256 + float(low).
#include "cpu/simd/epilogue.h"
#include "cpu/simd/panels.h"

namespace lepton::LEPTON_ISA {
namespace {

struct GemmInt4 {
  static constexpr int kRows = kInt4Rows, kPanels = kInt4Panels;
  template <int planes, int rows, int panels>
  static void multiply(const GemmTile& tile, int row, int panel0);
  template <int planes, int panels>
  static void multiply_tiles(const GemmTile& tile, int panel_begin, int panel_end);
};

// Y[row, 16 columns] from the sum over all groups.
template <int planes>
LEPTON_INLINE void write_output(const GemmTile& tile, int row, int panel, F32x16 sum, F32x16 column_sum, F32x16 bias) {
  const int32_t* zero = tile.q.zero + row * planes;
  const float row_zero = float(planes == 1 ? zero[0] : zero[0] * 256 + zero[1]);
  const F32x16 shifted = sub(sum, mul(broadcast_f32(row_zero), column_sum));
  store_output(tile, row, panel, add(mul(shifted, broadcast_f32(tile.q.scale[row])), bias));
}

template <int planes, int rows, int panels>
LEPTON_INLINE void GemmInt4::multiply(const GemmTile& tile, int row, int panel0) {
  const PackedWeight& weight = tile.weight;
  const int64_t panel_bytes = weight.panel_bytes(), stride = tile.q.stride;
  const int groups = weight.groups();
  const uint8_t* w = weight.panel(panel0);
  const uint8_t* a = tile.q.q + row * stride;
  constexpr int kRows = rows / planes;

  F32x16 y[panels][kRows];
  unroll<panels * kRows>([&]<int i>() LEPTON_LAMBDA_INLINE { y[i / kRows][i % kRows] = broadcast_f32(0); });
  for (int g = 0; g < groups; ++g) {
    const int left = weight.k - g * weight.group;
    const int blocks = divide_up(left < weight.group ? left : weight.group, kNibbleBlock);
    // Past the end of a panel: of the panels that come next.
    const int64_t place = int64_t(g) * weight.group * kPanel / 2 + kPrefetchBytes;
    [[maybe_unused]] const int64_t ahead = kPrefetchBytes + (place < panel_bytes ? 0 : (panels - 1) * panel_bytes);
    I32x16 acc[panels][rows];
    unroll<panels * rows>([&]<int i>() LEPTON_LAMBDA_INLINE { acc[i / rows][i % rows] = broadcast_i32(0); });
    for (int b = 0; b < blocks; ++b, a += kNibbleBlock, w += kPanel * kNibbleBlock / 2) {
      unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
        if constexpr (rows == planes) {
          __builtin_prefetch(w + p * panel_bytes + ahead);
          __builtin_prefetch(w + p * panel_bytes + ahead + 64);
        }
        dot_u4<rows>(acc[p], a, stride, w + p * panel_bytes);
      });
    }
    const int32_t* q_sum = tile.q.group_sum + int64_t(row) * groups + g;
    unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
      const F32x16 scale = load_f32<Dtype::f32>(weight.scale(panel0 + p, g));
      const I32x16 zero = weight.symmetric ? broadcast_i32(8) : load_u8(weight.zero(panel0 + p, g));
      unroll<kRows>([&]<int r>() LEPTON_LAMBDA_INLINE {
        I32x16 sums[planes];
        unroll<planes>([&]<int plane>() LEPTON_LAMBDA_INLINE {
          const I32x16 shift = mul(zero, broadcast_i32(q_sum[(r * planes + plane) * groups]));
          sums[plane] = sub(acc[p][r * planes + plane], shift);
        });
        y[p][r] = add(y[p][r], mul(join_planes<planes>(sums[0], sums[planes - 1]), scale));
      });
    });
  }
  unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
    const F32x16 bias = load_bias(tile, panel0 + p), column_sum = load_f32<Dtype::f32>(weight.sum_f32(panel0 + p));
    unroll<kRows>([&]<int r>() LEPTON_LAMBDA_INLINE {
      write_output<planes>(tile, row / planes + r, panel0 + p, y[p][r], column_sum, bias);
    });
  });
}

#if defined(LEPTON_ISA_AMX)
// Steps of k that are unpacked at a time: weights of two panels that stay in the first-level cache (16 KiB).
constexpr int kStepBlock = 8;

// Steps of one group in a block of unpacked weights. Weights of other groups are 0 in it.
struct Piece {
  int group, step, steps;
  int place;         // in the block
  bool first, last;  // of the group's pieces
};

// s8 [piece.steps * 16][16][4]: nibble - zero for k of the group, elsewhere 0.
LEPTON_INLINE void unpack(const PackedWeight& weight, int panel, const Piece& piece, uint8_t* out) {
  constexpr int kVector = 2 * kQuad;  // k in 64 bytes of nibbles
  const int k0 = piece.group * weight.group, left = weight.k - k0;
  const int group_end = k0 + round_up(left < weight.group ? left : weight.group, kNibbleBlock);
  const int begin = piece.step * kTileStep, end = begin + piece.steps * kTileStep;
  const int from = k0 > begin ? k0 : begin, to = group_end < end ? group_end : end;
  const I32x16 zeros = weight.symmetric ? broadcast_i32(8) : load_u8(weight.zero(panel, piece.group));
  const __m512i zero = _mm512_mullo_epi32(zeros.v, _mm512_set1_epi32(0x01010101)), low = _mm512_set1_epi8(0xf);
  const uint8_t* w = weight.panel(panel) + int64_t(from) * kPanel / 2;
  __builtin_memset(out, 0, size_t(from - begin) * kPanel);
  out += (from - begin) * kPanel;
  for (int k = from; k < to; k += kVector, w += 64, out += 128) {
    const __m512i pair = _mm512_loadu_si512(w);
    _mm512_store_si512(out, _mm512_sub_epi8(_mm512_and_si512(pair, low), zero));
    _mm512_store_si512(out + 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(pair, 4), low), zero));
  }
  __builtin_memset(out, 0, size_t(end - to) * kPanel);
}

// Fills a block with the steps from (group, step) on, which it moves. Returns the pieces.
template <int panels>
LEPTON_INLINE int unpack_block(const PackedWeight& weight, int panel, int& group, int& step,
                               uint8_t (&block)[panels][kStepBlock * kTileBytes], Piece (&pieces)[kStepBlock]) {
  int count = 0;
  for (int place = 0; place < kStepBlock && group < weight.groups();) {
    const int k0 = group * weight.group, left = weight.k - k0;
    const int end = divide_up(k0 + (left < weight.group ? left : weight.group), kTileStep);
    const int steps = end - step < kStepBlock - place ? end - step : kStepBlock - place;
    Piece& piece = pieces[count++];
    piece = {group, step, steps, place, step == k0 / kTileStep, step + steps == end};
    for (int p = 0; p < panels; ++p) unpack(weight, panel + p, piece, block[p] + place * kTileBytes);
    place += steps;
    step = piece.last ? ++group * weight.group / kTileStep : step + steps;
  }
  return count;
}

// The groups that a block of pieces ended, for a pair of row tiles: their exact sums on the way into Y.
struct EndedGroups {
  int panel, pair;
  int group, groups;  // groups from `group` on
};

// y[rows][16] = (y, or 0 at first) + the exact sums of `groups` groups, kTilePairSums apart, scaled.
template <int planes, int groups>
LEPTON_INLINE void add_rows(const int32_t* sums, int plane_step, const float* scales, int rows, bool first, float* y) {
  F32x16 scale[groups];
  unroll<groups>([&]<int g>() LEPTON_LAMBDA_INLINE { scale[g] = load_f32<Dtype::f32>(scales + g * kPanel); });
  for (int r = 0; r < rows; ++r, sums += kPanel, y += kPanel) {
    F32x16 sum = first ? broadcast_f32(0) : load_f32<Dtype::f32>(y);
    unroll<groups>([&]<int g>() LEPTON_LAMBDA_INLINE {
      const int32_t* const high = sums + g * kTilePairSums;
      const F32x16 part = join_planes<planes>(load_i32(high), load_i32(high + (planes - 1) * plane_step));
      sum = add(sum, mul(part, scale[g]));
    });
    store_f32<Dtype::f32>(y, sum);
  }
}

// Adds ended groups to the pair's sums in y, and after the last group writes Y.
template <int planes, int panels>
LEPTON_INLINE void add_groups(const GemmTile& tile, const EndedGroups& ended, const int32_t* group_sums, float* y) {
  constexpr int kPlaneStep = panels * kTileSums, kTogether = 4;
  if (ended.groups == 0) return;  // a block in the middle of a group
  const PackedWeight& weight = tile.weight;
  for_tiles_of_pair<planes, panels>(
      tile.rows, ended.pair, [&](int row, int rows, int p, int place) LEPTON_LAMBDA_INLINE {
        const int panel = ended.panel + p, end = ended.group + ended.groups;
        const int32_t* sums = group_sums + place;
        float* const sum = y + place;
        int g = ended.group;
        for (; g + kTogether <= end; g += kTogether, sums += kTogether * kTilePairSums)
          add_rows<planes, kTogether>(sums, kPlaneStep, weight.scale(panel, g), rows, g == 0, sum);
        for (; g < end; ++g, sums += kTilePairSums)
          add_rows<planes, 1>(sums, kPlaneStep, weight.scale(panel, g), rows, g == 0, sum);
        if (end < weight.groups()) return;
        const F32x16 bias = load_bias(tile, panel), column_sum = load_f32<Dtype::f32>(weight.sum_f32(panel));
        for (int r = 0; r < rows; ++r)
          write_output<planes>(tile, row + r, panel, load_f32<Dtype::f32>(sum + r * kPanel), column_sum, bias);
      });
}

template <int planes, int panels>
LEPTON_INLINE void GemmInt4::multiply_tiles(const GemmTile& tile, int panel_begin, int panel_end) {
  alignas(64) uint8_t block[panels][kStepBlock * kTileBytes];
  alignas(64) int32_t group_sums[kStepBlock][kTilePairSums];
  Piece pieces[kStepBlock];
  const PackedWeight& weight = tile.weight;
  const int64_t tile_stride = kTileRows * tile.q.stride;
  const int row_tiles = divide_up(tile.rows, kTileRows) * planes, pairs = divide_up(row_tiles, 2);
  int32_t* const kept_sums = static_cast<int32_t*>(tile.scratch);
  float* const y_sums = reinterpret_cast<float*>(kept_sums + int64_t(pairs) * kTilePairSums);
  int32_t* finished = nullptr;  // where the sums go that are still in the tiles
  EndedGroups ended{};          // of the pair before
  const auto add_ended = [&] {
    add_groups<planes, panels>(tile, ended, group_sums[0], y_sums + int64_t(ended.pair) * kTilePairSums);
  };
  for (int panel = panel_begin; panel < panel_end; panel += panels) {
    for (int group = 0, step = 0; group < weight.groups();) {
      const int first_group = group, count = unpack_block<panels>(weight, panel, group, step, block, pieces);
      const bool last_block = group == weight.groups();
      TilePrefetch prefetch{
          last_block ? weight.panel(panel + panels) : weight.panel(panel) + int64_t(step) * (kTileBytes / 2),
          weight.panel_bytes(), divide_up(kTileRows / 2, pairs)};
      for (int pair = 0; pair < pairs; ++pair) {
        int32_t* const kept = kept_sums + int64_t(pair) * kTilePairSums;
        int ended_groups = 0;
        for (int i = 0; i < count; ++i) {
          const Piece& piece = pieces[i];
          const uint8_t* a = tile.q.q + 2 * pair * tile_stride + int64_t(piece.step) * kTileBytes;
          const uint8_t* w = block[0] + piece.place * kTileBytes;
          const int32_t* const before = piece.first ? nullptr : kept;
          if (2 * pair + 1 < row_tiles)
            tile_multiply<true, 2, panels>(a, tile_stride, w, sizeof(block[0]), piece.steps, before, finished,
                                           prefetch);
          else
            tile_multiply<true, 1, panels>(a, tile_stride, w, sizeof(block[0]), piece.steps, before, finished,
                                           prefetch);
          prefetch.next += int64_t(piece.steps) * prefetch.lines * 64;
          if (i == 0) add_ended();  // now that the first product has stored the last of its sums
          finished = piece.last ? group_sums[ended_groups++] : kept;
        }
        ended = {panel, pair, first_group, ended_groups};
      }
    }
  }
  tile_store_sums<panels>(finished);
  add_ended();
}
#endif

}  // namespace

void gemm_int4_tile(const GemmTile& tile) { multiply_tile<GemmInt4>(tile); }

}  // namespace lepton::LEPTON_ISA
