// quantize_rows.h - X to integers, a scale and a zero point for every row: 8 bits (w8a8, w4a8), or 16 bits (w8a16,
// w4a16) as a plane of high bytes and one of low bytes where bytes are multiplied fast, else as int16 around zero.
//
//   lo = min(0, min x), hi = max(0, max x), scale = hi / L - lo / L, zero = round(-lo / scale), L = 255 or 65535
//   q = clamp(round(x / scale) + zero, 0, L),   x ~ scale * (q - zero)
//   int16: scale = max |x| / 32767, q = clamp(round(x / scale), -32767, 32767), zero = 0
//
// Divisions are products with a reciprocal, rounded to nearest even at every step: the same bits on every level. A row
// of zeros has scale 0; a row that holds a NaN or an infinity has scale NaN, which makes its outputs NaN.
#pragma once

#include <stdint.h>

#include "cpu/dtype.h"
#include "cpu/kernel_table.h"
#include "cpu/packed_weight.h"

namespace lepton {

enum class RowLayout : int {
  bytes,       // a row's uint8 in order
  quads,       // the level's quads (simd.h): quad_bytes() for every four
  int16,       // int16 around zero, 8 bytes for every four (simd.h)
  tiles,       // what tile registers load, 64 k of h = tile_rows rows together: [rows / h][planes][stride / 64][h][64]
  bf16_tiles,  // the same with 32 k of X rounded to bf16, without scale and zero: [rows / h][stride / 64][h][32]
  pairs,       // two rows in turn, eight k of each: [rows / 2][stride / 8][2][8]; each plane counts as a row
};

constexpr int kTileRows = 16;  // of a tile register
constexpr int kTileStep = 64;  // bytes, and k of 8 bits, in a row of a tile
constexpr int kPairStep = 8;   // k of a row between those of the other

// Rows of a tile for products of m rows. One takes a cycle for each row of its tile, so m is dealt evenly to as few
// tiles as hold it: 33 rows are three times 11, not 16, 16 and 1.
constexpr int even_tile_rows(int m) { return divide_up(m, divide_up(m, kTileRows)); }

// Bytes of four activations in RowLayout::quads; levels that multiply int16 keep them so (simd/avx2.h says why).
constexpr int quad_bytes(Isa isa) { return isa <= Isa::avx2 ? 8 : 4; }

// Levels whose int8 products take activations as int8: there all quantized rows are biased.
constexpr bool signed_quads(Isa isa) { return isa >= Isa::neondot; }

// Rows, and quads of k, that a level's int8 product takes together. 2: its quantized rows are in RowLayout::pairs.
constexpr int rows_together(Isa isa) { return isa == Isa::neoni8mm ? 2 : 1; }

// Levels where w8a16 and w4a16 split 16-bit integers into two products of bytes; the others multiply int16.
constexpr bool splits_activations(Isa isa) { return isa >= Isa::avxvnni; }

// Levels that multiply narrow weights (packed_weight.h) by bytes, which for all int8 would saturate.
constexpr bool multiplies_narrow(Isa isa) { return isa == Isa::avx2; }

// Whether w4a16 multiplies bf16 weights that hold their scales, in tile registers, and not groups of two planes.
// Unpacking such weights takes as long as 16 rows of products; with 48 rows some shapes were still slower.
constexpr int kBf16LeastRows = 64;
constexpr bool multiplies_bf16(Isa isa, int bits, int rows) {
  return isa == Isa::amx && bits == 4 && rows >= kBf16LeastRows;
}

// Quantized rows in memory. A row has one plane or two (high bytes, low bytes), which count as rows of their own.
struct QuantizedRows {
  RowLayout layout;
  int tile_rows;  // at most kTileRows; where the layout is tiles
  int planes;
  // Every byte is less by 128, as int8 (w4a8, w4a16; signed_quads): the zero points and sums are those of such bytes.
  bool biased;
  uint8_t* q;
  int64_t stride;  // bytes from a row to the next; a multiple of 64. What lies between a row's end and the stride is 0
  float* scale;    // [rows]
  int32_t* zero;   // [rows, planes]
  int32_t* group_sum;  // [rows, planes, groups]: sums of a plane's integers over each group of k, or null

  bool in_tiles() const { return layout == RowLayout::tiles || layout == RowLayout::bf16_tiles; }
  // k in a row of a tile (layouts tiles and bf16_tiles).
  int step_k() const { return layout == RowLayout::bf16_tiles ? kTileStep / 2 : kTileStep; }
  uint8_t* row(int r, int plane) const {
    if (in_tiles()) return q + int64_t(r / tile_rows * planes + plane) * tile_stride() + r % tile_rows * kTileStep;
    return q + (int64_t(r) * planes + plane) * stride;
  }
  // Layout pairs.
  uint8_t* row_of_pair(int r, int plane) const {
    const int64_t i = int64_t(r) * planes + plane;
    return q + i / 2 * 2 * stride + i % 2 * kPairStep;
  }
  // Bytes from one block of 64 k of a row to the next (layouts bytes and tiles).
  int step_bytes() const { return in_tiles() ? tile_rows * kTileStep : kTileStep; }
  // Bytes from a tile's rows to the next tile's, a plane's to the next plane's (layout tiles).
  int64_t tile_stride() const { return tile_rows * stride; }
  // Tiles of `rows` rows, of all planes.
  int tiles_of(int rows) const { return divide_up(rows, tile_rows) * planes; }
  // From row r on: a multiple of tile_rows where the layout is tiles, of two rows where it is pairs.
  QuantizedRows from(int r, int groups) const {
    QuantizedRows rows = *this;
    rows.q += int64_t(r) * planes * stride;
    rows.scale += r;
    rows.zero += int64_t(r) * planes;
    if (rows.group_sum) rows.group_sum += int64_t(r) * planes * groups;
    return rows;
  }
};

struct QuantizeRowsArgs {
  const void* x;  // [rows, k], rows x_stride elements apart
  Dtype dtype;
  int64_t x_stride;
  int row_begin, row_end;
  int k, group;  // of group_sum
  QuantizedRows out;
};

using QuantizeRowsFn = void(const QuantizeRowsArgs&);
LEPTON_KERNEL(quantize_rows, QuantizeRowsFn)

}  // namespace lepton
