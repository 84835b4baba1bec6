// quantize_rows.kernel.cpp - two passes over a row while it is in the first-level cache: range, then rounding.
#include "cpu/quantize_rows.h"

#include "cpu/packed_weight.h"
#include "cpu/simd/partial.h"
#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

static_assert(kQuadBytes == quad_bytes(Isa::LEPTON_ISA));

constexpr int kChains = 4;                    // vectors side by side, which hide the latency of a minimum
constexpr float kSmallestNormal = 0x1p-126f;  // below it 1 / scale could overflow: such a row counts as zeros

struct Extremes {
  float lo, hi;  // with 0 among them
  float check;   // 0, or NaN if a value is no number
};

struct RowRange {
  float scale, inverse;
  int32_t zero;
};

template <int planes>
constexpr int kLevels = planes == 1 ? 255 : 65535;  // the largest q
constexpr int kMostInt16 = 32767;

// Sixteen elements from x[i]; those past k read as 0.
template <Dtype dtype>
LEPTON_INLINE F32x16 load_padded(const char* x, int i, int k) {
  return i < k ? load_partial<dtype>(x + int64_t(i) * dtype_bytes(dtype), k - i) : broadcast_f32(0);
}

// Not inlined: once for every type is enough for the compiler.
template <Dtype dtype>
__attribute__((noinline)) Extremes extremes_of(const char* x, int k) {
  F32x16 lowest[kChains], highest[kChains], finite[kChains];
  unroll<kChains>([&]<int c>() LEPTON_LAMBDA_INLINE { lowest[c] = highest[c] = finite[c] = broadcast_f32(0); });
  for (int i = 0; i < k; i += kChains * kLanes) {
    unroll<kChains>([&]<int c>() LEPTON_LAMBDA_INLINE {
      const F32x16 v = load_padded<dtype>(x, i + c * kLanes, k);
      lowest[c] = min(lowest[c], v);
      highest[c] = max(highest[c], v);
      finite[c] = add(finite[c], mul(v, broadcast_f32(0)));  // turns into NaN where v is NaN or infinite
    });
  }
  unroll<kChains - 1>([&]<int c>() LEPTON_LAMBDA_INLINE {
    lowest[0] = min(lowest[0], lowest[c + 1]);
    highest[0] = max(highest[0], highest[c + 1]);
    finite[0] = add(finite[0], finite[c + 1]);
  });
  float low[kLanes], high[kLanes], check[kLanes];
  store_f32<Dtype::f32>(low, lowest[0]);
  store_f32<Dtype::f32>(high, highest[0]);
  store_f32<Dtype::f32>(check, finite[0]);
  float lo = 0, hi = 0, sum = 0;
  for (int i = 0; i < kLanes; ++i) {
    lo = low[i] < lo ? low[i] : lo;
    hi = high[i] > hi ? high[i] : hi;
    sum += check[i];
  }
  return {lo, hi, sum};
}

template <int planes>
LEPTON_INLINE RowRange range_of(const Extremes& of) {
  if (of.check != of.check) return {of.check, 0, 0};
  constexpr float kStep = 1.0f / kLevels<planes>;
  const float scale = of.hi * kStep - of.lo * kStep;
  if (scale < kSmallestNormal) return {0, 0, 0};
  const float inverse = 1.0f / scale;
  const float zero = (-of.lo * inverse + 0x1.8p23f) - 0x1.8p23f;  // rounds to nearest even
  return {scale, inverse, int32_t(zero > kLevels<planes> ? kLevels<planes> : zero)};
}

LEPTON_INLINE RowRange int16_range_of(const Extremes& of) {
  if (of.check != of.check) return {of.check, 0, 0};
  const float scale = (of.hi > -of.lo ? of.hi : -of.lo) * (1.0f / kMostInt16);
  if (scale < kSmallestNormal) return {0, 0, 0};
  return {scale, 1.0f / scale, 0};
}

LEPTON_INLINE I32x16 with_zeros_from(I32x16 value, int lane) {
  int32_t lanes[kLanes];
  store_i32(lanes, value);
  for (int i = lane; i < kLanes; ++i) lanes[i] = 0;
  return load_i32(lanes);
}

LEPTON_INLINE uint8_t* row_of(const QuantizedRows& out, int row, int plane) {
  return kTogether == 2 ? out.row_of_pair(row, plane) : out.row(row, plane);
}

template <bool quads>
LEPTON_INLINE void store_q(uint8_t* q, I32x16 value) {
  if constexpr (quads)
    store_quads(q, value);
  else
    store_u8(q, value);
}

// Writes a row's planes, zeros up to the stride included.
template <Dtype dtype, int planes, bool quads>
LEPTON_INLINE void quantize_row(const char* x, int k, const RowRange& range, const QuantizedRows& out, int row) {
  const F32x16 inverse = broadcast_f32(range.inverse);
  const I32x16 zero = broadcast_i32(range.zero), low = broadcast_i32(0), high = broadcast_i32(kLevels<planes>);
  constexpr int kVector = quads ? kLanes / kQuad * kQuadBytes : kLanes;  // bytes of sixteen values
  uint8_t* const first = row_of(out, row, 0);
  uint8_t* const second = row_of(out, row, planes - 1);
  const I32x16 bias = broadcast_i32(out.biased ? 128 : 0);
  const int step = out.step_bytes() * kTogether, padded = int(out.stride / kVector * kLanes);
  int i = 0;
  if constexpr (kVector == kLanes) {  // whole blocks of 64 bytes
    static_assert(kTileStep == kChains * kLanes);
    const int whole = range.scale == range.scale ? k / kTileStep * kTileStep : 0;
    for (int64_t at = 0; i < whole; i += kTileStep, at += step) {
      I32x16 bytes[2][kChains];  // less 128
      unroll<kChains>([&]<int c>() LEPTON_LAMBDA_INLINE {
        const F32x16 v = load_f32<dtype>(x + int64_t(i + c * kLanes) * dtype_bytes(dtype));
        const I32x16 value = add(round_i32(mul(v, inverse)), zero);
        if constexpr (planes == 1) {
          bytes[0][c] = sub(value, broadcast_i32(128));
        } else {
          const I32x16 inside = min(max(value, low), high);
          bytes[0][c] = sub(shift_right<8>(inside), broadcast_i32(128));
          bytes[1][c] = sub(bit_and(inside, broadcast_i32(255)), broadcast_i32(128));
        }
      });
      store_64(first + at, bytes[0], out.biased);
      if constexpr (planes == 2) store_64(second + at, bytes[1], out.biased);
    }
  }
  for (; i < padded; i += kLanes) {
    I32x16 bytes[2] = {low, low};
    if (i < k && range.scale == range.scale) {
      const F32x16 v = load_padded<dtype>(x, i, k);
      const I32x16 value = min(max(add(round_i32(mul(v, inverse)), zero), low), high);
      bytes[0] = bit_xor(planes == 1 ? value : shift_right<8>(value), bias);
      bytes[1] = bit_xor(bit_and(value, broadcast_i32(255)), bias);
      if (i + kLanes > k)
        for (I32x16& part : bytes) part = with_zeros_from(part, k - i);
    }
    const int64_t at = quads ? i / kLanes * kVector : int64_t(i / kTileStep) * step + i % kTileStep * kTogether;
    store_q<quads>(first + at, bytes[0]);
    if constexpr (planes == 2) store_q<quads>(second + at, bytes[1]);
  }
}

// The same of int16 around zero.
template <Dtype dtype>
LEPTON_INLINE void quantize_row_int16(const char* x, int k, const RowRange& range, const QuantizedRows& out, int row) {
  const F32x16 inverse = broadcast_f32(range.inverse);
  const I32x16 low = broadcast_i32(-kMostInt16), high = broadcast_i32(kMostInt16);
  constexpr int kVector = kLanes * int(sizeof(int16_t));
  uint8_t* q = out.row(row, 0);
  if (range.scale != range.scale) k = 0;
  for (int i = 0; i < int(out.stride) / kVector * kLanes; i += kLanes, q += kVector)
    store_int16_quads(q, min(max(round_i32(mul(load_padded<dtype>(x, i, k), inverse)), low), high));
}

template <typename Integer>
LEPTON_INLINE void sum_groups(const Integer* q, int k, int group, int32_t* sums) {
  constexpr int kPiece = kTogether == 1 ? 1 : kPairStep;  // past k there are zeros
  for (int k0 = 0; k0 < k; k0 += group) {
    const int end = k0 + group < k ? k0 + group : k;
    int32_t sum = 0;
    for (int i = k0; i < end; i += kPiece)
      for (int j = 0; j < kPiece; ++j) sum += q[i * kTogether + j];
    *sums++ = sum;
  }
}

template <Dtype dtype, int planes, bool quads>
LEPTON_INLINE void quantize(const QuantizeRowsArgs& args) {
  const QuantizedRows& out = args.out;
  for (int r = args.row_begin; r < args.row_end; ++r) {
    const char* x = static_cast<const char*>(args.x) + r * args.x_stride * dtype_bytes(dtype);
    const RowRange range = range_of<planes>(extremes_of<dtype>(x, args.k));
    out.scale[r] = range.scale;
    const int bias = out.biased ? 128 : 0;
    out.zero[r * planes] = (planes == 1 ? range.zero : range.zero >> 8) - bias;
    if constexpr (planes == 2) out.zero[r * planes + 1] = (range.zero & 255) - bias;
    quantize_row<dtype, planes, quads>(x, args.k, range, out, r);
    if (out.group_sum == nullptr) continue;
    const int groups = divide_up(args.k, args.group);
    for (int plane = 0; plane < planes; ++plane)
      sum_groups(reinterpret_cast<const int8_t*>(row_of(out, r, plane)), args.k, args.group,
                 out.group_sum + (int64_t(r) * planes + plane) * groups);
  }
}

template <Dtype dtype>
void quantize_int16(const QuantizeRowsArgs& args) {
  const QuantizedRows& out = args.out;
  const int groups = divide_up(args.k, args.group);
  for (int r = args.row_begin; r < args.row_end; ++r) {
    const char* x = static_cast<const char*>(args.x) + r * args.x_stride * dtype_bytes(dtype);
    const RowRange range = int16_range_of(extremes_of<dtype>(x, args.k));
    out.scale[r] = range.scale;
    quantize_row_int16<dtype>(x, args.k, range, out, r);
    // Within four k the order is the level's; groups are multiples of four.
    if (out.group_sum)
      sum_groups(reinterpret_cast<const int16_t*>(out.row(r, 0)), round_up(args.k, kQuad), args.group,
                 out.group_sum + int64_t(r) * groups);
  }
}

// Calls body.operator()<dtype>().
template <typename Body>
LEPTON_INLINE void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f32:
      return body.template operator()<Dtype::f32>();
    case Dtype::bf16:
      return body.template operator()<Dtype::bf16>();
    case Dtype::f16:
      return body.template operator()<Dtype::f16>();
  }
}

template <int planes, bool quads>
void quantize(const QuantizeRowsArgs& args) {
  with_dtype(args.dtype, [&]<Dtype dtype>() LEPTON_LAMBDA_INLINE { quantize<dtype, planes, quads>(args); });
}

template <Dtype dtype>
void to_bf16(const QuantizeRowsArgs& args) {
  constexpr int kStep = kTileStep / 2;
  for (int r = args.row_begin; r < args.row_end; ++r) {
    const char* x = static_cast<const char*>(args.x) + r * args.x_stride * dtype_bytes(dtype);
    uint8_t* out = args.out.row(r, 0);
    for (int k = 0; k < args.k; k += kStep, out += args.out.step_bytes()) {
      store_f32<Dtype::bf16>(out, load_padded<dtype>(x, k, args.k));
      store_f32<Dtype::bf16>(out + kTileStep / 2, load_padded<dtype>(x, k + kLanes, args.k));
    }
  }
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& args) {
  if (args.out.layout == RowLayout::bf16_tiles)
    return with_dtype(args.dtype, [&]<Dtype dtype>() LEPTON_LAMBDA_INLINE { to_bf16<dtype>(args); });
  if constexpr (!splits_activations(Isa::LEPTON_ISA)) {
    if (args.out.layout == RowLayout::int16)
      return with_dtype(args.dtype, [&]<Dtype dtype>() LEPTON_LAMBDA_INLINE { quantize_int16<dtype>(args); });
  }
  const bool quads = args.out.layout == RowLayout::quads;
  if (args.out.planes == 1) return quads ? quantize<1, true>(args) : quantize<1, false>(args);
  if constexpr (splits_activations(Isa::LEPTON_ISA)) return quads ? quantize<2, true>(args) : quantize<2, false>(args);
}

}  // namespace lepton::LEPTON_ISA
