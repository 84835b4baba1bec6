// packed_weight.h - the tiled layouts that the CPU kernels read, made from the saved layout once and never saved.
//
// A panel is 16 columns of W^T (16 output features): one 512-bit register of int32 sums. One layout serves every level.
//
//   8 bit   data    int8  [panels][k4 / 4][16][4]      k4 = k rounded up to 4; zero-padded. Tile registers read whole
//                                                      steps of 64 k: on into the next panel, against activations that
//                                                      are 0 there, and behind the end
//           scale   f32   [panels][16]
//           sum     i32   [panels][16]                 of the column's integers
//   4 bit   data    uint8 [panels][k16 / 16][2][16][4] k16 = k rounded up to 16. Byte [b][j][c][i] holds k = 16 b + 8 j
//                                                      + i in its low nibble and k + 4 in its high one, as 0..15
//           scale   f32   [panels][groups][16]
//           zero    uint8 [panels][groups][16]         in 0..15; absent where the weight is symmetric (8 everywhere)
//           sum     f32   [panels][16]                 of scale * (sum over the group of nibble - zero), added in order
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

// A view of a packed weight; `group` is the number of k that share a scale (4 bit; the last group may be shorter).
struct PackedWeight {
  const uint8_t* data;
  int n, k;
  int bits;
  int group;
  bool symmetric;  // 4 bit: every zero point is 8

  int panels() const { return divide_up(n, kPanel); }
  int groups() const { return bits == 8 ? 1 : divide_up(k, group); }
  // Bytes of one panel's data.
  int64_t panel_bytes() const {
    return bits == 8 ? int64_t(kPanel) * round_up(k, kQuad) : int64_t(kPanel) * round_up(k, kNibbleBlock) / 2;
  }
  int64_t scale_offset() const { return panels() * panel_bytes(); }
  int64_t zero_offset() const { return scale_offset() + int64_t(panels()) * groups() * kPanel * 4; }
  int64_t sum_offset() const {
    return zero_offset() + (bits == 8 || symmetric ? 0 : int64_t(panels()) * groups() * kPanel);
  }
  // What to allocate: with the bytes behind the last panel that a step of 64 k may read.
  int64_t total_bytes() const { return sum_offset() + int64_t(panels()) * kPanel * 4 + (bits == 8 ? 64 * kPanel : 0); }

  const uint8_t* panel(int p) const { return data + p * panel_bytes(); }
  const float* scale(int p, int g = 0) const {
    return reinterpret_cast<const float*>(data + scale_offset()) + (int64_t(p) * groups() + g) * kPanel;
  }
  const uint8_t* zero(int p, int g) const { return data + zero_offset() + (int64_t(p) * groups() + g) * kPanel; }
  const int32_t* sum_i32(int p) const {
    return reinterpret_cast<const int32_t*>(data + sum_offset()) + int64_t(p) * kPanel;
  }
  const float* sum_f32(int p) const { return reinterpret_cast<const float*>(data + sum_offset()) + int64_t(p) * kPanel; }
};

}  // namespace lepton
