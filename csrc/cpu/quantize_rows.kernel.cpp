// quantize_rows.kernel.cpp - two passes over a row while it is in the first-level cache: range, then rounding.
#include "cpu/quantize_rows.h"

#include "cpu/packed_weight.h"
#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

static_assert(kQuadBytes == quad_bytes(Isa::LEPTON_ISA));

constexpr int kLanes = 16;
constexpr float kSmallestNormal = 0x1p-126f;  // below it 1 / scale could overflow: such a row counts as zeros

struct RowRange {
  float scale, inverse;
  int32_t zero;
};

// Sixteen elements from x[i]; those past k read as 0.
template <Dtype dtype>
LEPTON_INLINE F32x16 load_padded(const char* x, int i, int k) {
  constexpr int bytes = dtype_bytes(dtype);
  if (i + kLanes <= k) return load_f32<dtype>(x + int64_t(i) * bytes);
  alignas(64) char tail[kLanes * bytes] = {};
  __builtin_memcpy(tail, x + int64_t(i) * bytes, size_t(k - i) * bytes);
  return load_f32<dtype>(tail);
}

template <Dtype dtype>
LEPTON_INLINE RowRange range_of(const char* x, int k) {
  F32x16 lowest = broadcast_f32(0), highest = lowest, finite = lowest;
  for (int i = 0; i < k; i += kLanes) {
    const F32x16 v = load_padded<dtype>(x, i, k);
    lowest = min(lowest, v);
    highest = max(highest, v);
    finite = add(finite, mul(v, broadcast_f32(0)));  // turns into NaN where v is NaN or infinite
  }
  float low[kLanes], high[kLanes], check[kLanes];
  store_f32<Dtype::f32>(low, lowest);
  store_f32<Dtype::f32>(high, highest);
  store_f32<Dtype::f32>(check, finite);
  float lo = 0, hi = 0, sum = 0;
  for (int i = 0; i < kLanes; ++i) {
    lo = low[i] < lo ? low[i] : lo;
    hi = high[i] > hi ? high[i] : hi;
    sum += check[i];
  }
  if (sum != sum) return {sum, 0, 0};
  const float scale = hi * (1.0f / 255) - lo * (1.0f / 255);
  if (scale < kSmallestNormal) return {0, 0, 0};
  const float inverse = 1.0f / scale;
  const float zero = (-lo * inverse + 0x1.8p23f) - 0x1.8p23f;  // rounds to nearest even
  return {scale, inverse, int32_t(zero > 255 ? 255 : zero)};
}

// Returns the bytes written.
template <Dtype dtype, QuantizedLayout layout>
LEPTON_INLINE int quantize_row(const char* x, int k, const RowRange& range, uint8_t* q) {
  constexpr int stride = layout == QuantizedLayout::quads ? kLanes / 4 * kQuadBytes : kLanes;
  const F32x16 inverse = broadcast_f32(range.inverse);
  const I32x16 zero = broadcast_i32(range.zero), low = broadcast_i32(0), high = broadcast_i32(255);
  for (int i = 0; i < k; i += kLanes, q += stride) {
    const F32x16 v = load_padded<dtype>(x, i, k);
    I32x16 value = min(max(add(round_i32(mul(v, inverse)), zero), low), high);
    if (i + kLanes > k) {  // the values past k are 0, not the zero point: weights there are 0, but sums of q are taken
      int32_t tail[kLanes];
      __builtin_memcpy(tail, &value, sizeof(tail));
      for (int j = k - i; j < kLanes; ++j) tail[j] = 0;
      value = load_i32(tail);
    }
    if constexpr (layout == QuantizedLayout::quads)
      store_quads(q, value);
    else
      store_u8(q, value);
  }
  return divide_up(k, kLanes) * stride;
}

LEPTON_INLINE void sum_groups(const uint8_t* q, int k, int group, int32_t* sums) {
  for (int k0 = 0; k0 < k; k0 += group) {
    const int end = k0 + group < k ? k0 + group : k;
    int32_t sum = 0;
    for (int i = k0; i < end; ++i) sum += q[i];
    *sums++ = sum;
  }
}

template <Dtype dtype, QuantizedLayout layout>
void quantize(const QuantizeRowsArgs& args) {
  const int groups = args.group_sum ? (args.k + args.group - 1) / args.group : 0;
  for (int r = 0; r < args.rows; ++r) {
    const char* x = static_cast<const char*>(args.x) + r * args.x_stride * dtype_bytes(dtype);
    uint8_t* q = args.q + r * args.q_stride;
    RowRange range = range_of<dtype>(x, args.k);
    args.scale[r] = range.scale;
    args.zero[r] = range.zero;
    int written = 0;
    if (range.scale == range.scale) written = quantize_row<dtype, layout>(x, args.k, range, q);
    __builtin_memset(q + written, 0, size_t(args.q_stride - written));
    if (args.group_sum) sum_groups(q, args.k, args.group, args.group_sum + int64_t(r) * groups);
  }
}

template <QuantizedLayout layout>
LEPTON_INLINE void quantize(const QuantizeRowsArgs& args) {
  switch (args.dtype) {
    case Dtype::f32:
      return quantize<Dtype::f32, layout>(args);
    case Dtype::bf16:
      return quantize<Dtype::bf16, layout>(args);
    case Dtype::f16:
      return quantize<Dtype::f16, layout>(args);
  }
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& args) {
  if (args.layout == QuantizedLayout::quads)
    quantize<QuantizedLayout::quads>(args);
  else
    quantize<QuantizedLayout::bytes>(args);
}

}  // namespace lepton::LEPTON_ISA
