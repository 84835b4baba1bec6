// packed_weight.h - the tiled layouts that the CPU kernels read, made from the saved layout once and never saved.
//
// A panel is 16 columns of W^T (16 output features): one 512-bit register of int32 sums. One layout serves every level.
// Tile registers read whole steps of 64 k, neoni8mm of 8: on into the next panel, against activations that are 0 there,
// and behind the end of the data.
//
//   8 bit   data    int8  [panels][k4 / 4][16][4]      k4 = k rounded up to 4; zero-padded
//           scale   f32   [panels][16]
//           sum     i32   [panels][16]                 of the column's integers
//           most    i32                                the largest magnitude of all integers
//   8 bit in blocks: of each panel only the steps of k that hold a weight other than 0; a step is one quad, or two
//   where the level multiplies two at a time (rows_together in quantize_rows.h)
//           data    int8  [steps][16][4] or [steps][2][16][4]
//           scale, sum as above
//           begin   i64   [panels + 1]                 a panel's first step among all
//           place   u16   [steps]                      of the step in k, in steps
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
constexpr int kNibbleVector = 8;  // k in 64 bytes of nibbles
constexpr int kNibbleBlock = 16;  // consecutive k in two 64-byte vectors of nibbles; group sizes are multiples of it

// Weights of at most this magnitude are narrow: two uint8 products of two pairs each, 4 * 255 * 31, fit int16.
constexpr int kNarrow = 31;

// 255 * 128 * k must stay below 2^31.
constexpr int kMaxK = 65536;

constexpr int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr int divide_up(int x, int divisor) { return (x + divisor - 1) / divisor; }

// A view of a packed weight, or of some of its panels; `group` is the number of k that share a scale (4 bit; the last
// group may be shorter).
struct PackedWeight {
  int n, k;
  int bits;
  int group;
  bool symmetric;  // 4 bit: every zero point is 8
  const uint8_t* data;
  const float* scales;
  const uint8_t* zeros;                 // null where absent
  const void* sums;                     // int32_t or float
  const int32_t* most = nullptr;        // 8 bit, not in blocks; else null
  const int64_t* step_begin = nullptr;  // in blocks; else null
  const uint16_t* step_place = nullptr;

  int panels() const { return divide_up(n, kPanel); }
  bool narrow() const { return most != nullptr && *most <= kNarrow; }
  int groups() const { return bits == 8 ? 1 : divide_up(k, group); }
  // Steps of 64 k in tile registers, each of one group: a step that groups share counts once for each.
  int group_steps() const {
    int steps = 0;
    for (int begin = 0; begin < k; begin += groups() == 1 ? k : group) {
      const int left = k - begin;
      steps += divide_up(begin + (left < group ? left : group), 64) - begin / 64;
    }
    return steps;
  }
  // Bytes of one panel's data.
  int64_t panel_bytes() const {
    return bits == 8 ? int64_t(kPanel) * round_up(k, kQuad) : int64_t(kPanel) * round_up(k, kNibbleBlock) / 2;
  }

  const uint8_t* panel(int p) const { return data + p * panel_bytes(); }
  const float* scale(int p, int g = 0) const { return scales + (int64_t(p) * groups() + g) * kPanel; }
  const uint8_t* zero(int p, int g) const { return zeros + (int64_t(p) * groups() + g) * kPanel; }
  const int32_t* sum_i32(int p) const { return static_cast<const int32_t*>(sums) + int64_t(p) * kPanel; }
  const float* sum_f32(int p) const { return static_cast<const float*>(sums) + int64_t(p) * kPanel; }

  // `count` panels from panel `begin` on.
  PackedWeight slice(int begin, int count) const {
    PackedWeight part = *this;
    part.n = count * kPanel;
    part.data = panel(begin);
    part.scales = scale(begin);
    if (zeros) part.zeros = zero(begin, 0);
    part.sums = static_cast<const char*>(sums) + int64_t(begin) * kPanel * 4;
    return part;
  }
};

// Where the parts of a whole packed weight lie, in bytes from its beginning.
struct PackedLayout {
  int64_t scales, zeros, sums, most;
  int64_t bytes;  // what to allocate: with the bytes behind the last panel that a step of 64 k may read

  explicit PackedLayout(const PackedWeight& shape) {
    const int64_t values = int64_t(shape.panels()) * shape.groups() * kPanel;
    const bool has_zeros = shape.bits == 4 && !shape.symmetric;
    scales = shape.panels() * shape.panel_bytes();
    zeros = scales + values * 4;
    sums = zeros + (has_zeros ? values : 0);
    most = sums + int64_t(shape.panels()) * kPanel * 4;
    bytes = most + 4 + 64 * kPanel * shape.bits / 8;
  }
};

// The same of 8-bit weights in blocks. step_quads: quads in a step.
struct PackedBlocksLayout {
  int64_t scales, sums, begin, place, bytes;

  PackedBlocksLayout(int n, int64_t steps, int step_quads) {
    const int64_t panels = divide_up(n, kPanel);
    scales = steps * step_quads * kPanel * kQuad;
    sums = scales + panels * kPanel * 4;
    begin = sums + panels * kPanel * 4;
    place = begin + (panels + 1) * 8;
    bytes = place + steps * 2;
  }
};

inline PackedWeight packed_blocks(const uint8_t* packed, int n, int k, int64_t steps, int step_quads) {
  const PackedBlocksLayout layout(n, steps, step_quads);
  PackedWeight weight{n, k, 8, k, true, packed, nullptr, nullptr, nullptr};
  weight.scales = reinterpret_cast<const float*>(packed + layout.scales);
  weight.sums = packed + layout.sums;
  weight.step_begin = reinterpret_cast<const int64_t*>(packed + layout.begin);
  weight.step_place = reinterpret_cast<const uint16_t*>(packed + layout.place);
  return weight;
}

// The view of a packed weight of this shape at `packed`.
inline PackedWeight packed_weight(const uint8_t* packed, int n, int k, int bits, int group, bool symmetric) {
  PackedWeight weight{n, k, bits, group, symmetric, packed, nullptr, nullptr, nullptr};
  const PackedLayout layout(weight);
  weight.scales = reinterpret_cast<const float*>(packed + layout.scales);
  if (bits == 4 && !symmetric) weight.zeros = packed + layout.zeros;
  weight.sums = packed + layout.sums;
  if (bits == 8) weight.most = reinterpret_cast<const int32_t*>(packed + layout.most);
  return weight;
}

}  // namespace lepton
