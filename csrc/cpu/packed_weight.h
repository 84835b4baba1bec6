// packed_weight.h - the tiled layouts that the CPU kernels read, made from the saved layout once and never saved.
//
// A panel is 16 columns of W^T (16 output features): one 512-bit register of int32 sums. One layout serves every level.
//
//   8 bit   data    int8   [panels][k4 / 4][16][4]          k4 = k rounded up to 4; zero-padded. Tile registers read
//                                                           whole steps of 64 k: on into the next panel, against
//                                                           activations that are 0 there, and behind meta
//           meta    {scale f32 [16], column_sum i32 [16]}   one a panel
//   4 bit   data    uint8  [panels][k16 / 16][2][16][4]     k16 = k rounded up to 16. Byte [b][j][c][i] holds k = 16 b
//   + 8 j + i
//                                                           in its low nibble and k + 4 in its high one, as 0..15
//           meta    {scale f32 [16], zero i32 [16], column_sum i32 [16]}   one a panel and group; zero in 0..15,
//                                                           column_sum = sum over the group of (nibble - zero)
#pragma once

#include <stdint.h>

namespace lepton {

constexpr int kPanel = 16;        // columns in a panel
constexpr int kQuad = 4;          // consecutive k in one int32 lane
constexpr int kNibbleBlock = 16;  // consecutive k in two 64-byte vectors of nibbles; group sizes are multiples of it

// 255 * 128 * k must stay below 2^31.
constexpr int kMaxK = 65536;

constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr int divide_up(int x, int divisor) { return (x + divisor - 1) / divisor; }

struct Int8Meta {
  float scale[kPanel];
  int32_t column_sum[kPanel];
};

struct Int4Meta {
  float scale[kPanel];
  int32_t zero[kPanel];
  int32_t column_sum[kPanel];
};

// A view of a packed weight; `group` is the number of k that share a scale (4 bit; the last group may be shorter).
struct PackedWeight {
  const uint8_t* data;
  const void* meta;  // Int8Meta [panels] or Int4Meta [panels][groups]
  int n, k;
  int bits;
  int group;

  int panels() const { return divide_up(n, kPanel); }
  int groups() const { return bits == 8 ? 1 : divide_up(k, group); }
  // Bytes of one panel's data.
  int64_t panel_bytes() const {
    return bits == 8 ? int64_t(kPanel) * round_up(k, kQuad) : int64_t(kPanel) * round_up(k, kNibbleBlock) / 2;
  }
  int64_t data_bytes() const { return panels() * panel_bytes(); }
  int64_t meta_bytes() const {
    return bits == 8 ? int64_t(panels()) * int64_t(sizeof(Int8Meta))
                     : int64_t(panels()) * groups() * int64_t(sizeof(Int4Meta));
  }
  // What to allocate: with the bytes behind the last panel that a step of 64 k may read.
  int64_t total_bytes() const { return data_bytes() + meta_bytes() + (bits == 8 ? 64 * kPanel : 0); }
};

}  // namespace lepton
