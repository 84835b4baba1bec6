// quantize_rows.h - X to uint8, a scale and a zero point for every row.
//
//   lo = min(0, min x), hi = max(0, max x), scale = hi / 255 - lo / 255, zero = round(-lo / scale)
//   q = clamp(round(x / scale) + zero, 0, 255),   x ~ scale * (q - zero)
//
// Divisions are products with a reciprocal, rounded to nearest even at every step: the same bits on every level. A row
// of zeros has scale 0; a row that holds a NaN or an infinity has scale NaN, which makes its outputs NaN.
#pragma once

#include <stdint.h>

#include "cpu/dtype.h"
#include "cpu/kernel_table.h"

namespace lepton {

enum class QuantizedLayout : int {
  bytes,  // uint8 in order
  quads,  // the level's quads (simd.h): kQuadBytes for every four
};

// Bytes of four activations in QuantizedLayout::quads; AVX2 keeps them as int16 (simd/avx2.h says why).
constexpr int quad_bytes(Isa isa) { return isa == Isa::avx2 ? 8 : 4; }

struct QuantizeRowsArgs {
  const void* x;  // [rows, k], rows x_stride elements apart
  Dtype dtype;
  int64_t x_stride;
  int rows, k;
  QuantizedLayout layout;
  uint8_t* q;  // rows q_stride bytes apart, with room for k rounded up to 16 values; the bytes past k are 0
  int64_t q_stride;
  float* scale;        // [rows]
  int32_t* zero;       // [rows]
  int32_t* group_sum;  // [rows, groups] sums of q over each group of k, or null
  int group;
};

using QuantizeRowsFn = void(const QuantizeRowsArgs&);
LEPTON_KERNEL(quantize_rows, QuantizeRowsFn)

}  // namespace lepton
