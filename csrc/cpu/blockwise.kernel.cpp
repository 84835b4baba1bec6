// blockwise.kernel.cpp - two passes over a block while it is in the first-level cache: its largest magnitude, codes.
#include "cpu/blockwise.h"

#include "cpu/simd/partial.h"
#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

constexpr float kSmallestNormal = 0x1p-126f;  // below it 1 / scale could overflow
constexpr int32_t kInfinity = 0x7f800000;     // as bits; those of a NaN without its sign are larger
constexpr uint32_t kNan = 0x7fc00000;
constexpr int kPart = 4;  // vectors that store_s8 takes
constexpr int kPartValues = kPart * kLanes, kParts = kScaleBlock / kPartValues;

template <int bits>
constexpr int kMost = bits == 8 ? 127 : 7;
constexpr int kNibbleBias = 8;  // a code is stored as code + 8

template <bool feedback>
LEPTON_INLINE F32x16 load_value(const float* x, const float* residual, int i) {
  const F32x16 v = load_f32<Dtype::f32>(x + i);
  return feedback ? add(v, load_f32<Dtype::f32>(residual + i)) : v;
}

// max |v| as bits, whose order is that of the magnitudes, with infinity and NaN above all numbers.
template <bool feedback>
LEPTON_INLINE int32_t largest_bits(const float* x, const float* residual) {
  I32x16 largest[2];
  unroll<kScaleBlock / kLanes>([&]<int i>() LEPTON_LAMBDA_INLINE {
    const F32x16 v = load_value<feedback>(x, residual, i * kLanes);
    const I32x16 magnitude = bit_and(as_i32(v), broadcast_i32(0x7fffffff));
    largest[i % 2] = i < 2 ? magnitude : max(largest[i % 2], magnitude);
  });
  int32_t lanes[kLanes], result = 0;
  store_i32(lanes, max(largest[0], largest[1]));
  for (const int32_t lane : lanes) result = lane > result ? lane : result;
  return result;
}

// Bytes of 0..15 to halves of bytes. The compiler makes vectors of this loop.
LEPTON_INLINE void pack_nibbles(const uint8_t* bytes, uint8_t* nibbles) {
  for (int i = 0; i < kScaleBlock / 2; ++i) nibbles[i] = uint8_t(bytes[2 * i] | bytes[2 * i + 1] << 4);
}

// Writes a block's codes and residual; returns its scale. Nothing is clamped: scale, inverse and product are each
// rounded once, so a magnitude times the inverse is at most kMost and a few units of its last place.
template <int bits, bool feedback>
LEPTON_INLINE float quantize_block(const float* x, float* residual, uint8_t* code) {
  const int32_t largest = largest_bits<feedback>(x, residual);
  if (largest >= kInfinity) {
    __builtin_memset(code, bits == 8 ? 0 : kNibbleBias * 0x11, size_t(block_bytes(bits)));
    if (feedback) __builtin_memset(residual, 0, kScaleBlock * sizeof(float));
    return __builtin_bit_cast(float, kNan);
  }
  float scale = __builtin_bit_cast(float, largest) * (1.0f / kMost<bits>);
  if (scale < kSmallestNormal) scale = 0;
  const float inverse = scale > 0 ? 1 / scale : 0;
  alignas(64) uint8_t unpacked[kScaleBlock];
  uint8_t* const bytes = bits == 8 ? code : unpacked;
  unroll<kParts>([&]<int part>() LEPTON_LAMBDA_INLINE {
    I32x16 codes[kPart];
    unroll<kPart>([&]<int c>() LEPTON_LAMBDA_INLINE {
      constexpr int i = part * kPartValues + c * kLanes;
      const F32x16 v = load_value<feedback>(x, residual, i);
      codes[c] = round_i32(mul(v, broadcast_f32(inverse)));
      if (feedback) store_f32<Dtype::f32>(residual + i, sub(v, mul(to_f32(codes[c]), broadcast_f32(scale))));
      if (bits == 4) codes[c] = add(codes[c], broadcast_i32(kNibbleBias));
    });
    store_s8(bytes + part * kPartValues, codes);
  });
  if (bits == 4) pack_nibbles(bytes, code);
  return scale;
}

template <int bits, bool feedback>
void quantize(const QuantizeBlocksArgs& args) {
  for (int64_t block = 0; block < args.blocks; ++block) {
    float* const residual = feedback ? args.residual + block * kScaleBlock : nullptr;
    const float scale =
        quantize_block<bits, feedback>(args.x + block * kScaleBlock, residual, args.code + block * block_bytes(bits));
    __builtin_memcpy(args.scale + block * int64_t(sizeof(scale)), &scale, sizeof(scale));
  }
}

// Adds code * scale of 64 values. 4 bit: 16 even values and 16 odd ones in turn, which lie in the same bytes.
template <int bits>
LEPTON_INLINE void add_codes(const uint8_t* code, float scale, F32x16 (&sums)[kPart]) {
  unroll<kPart>([&]<int c>() LEPTON_LAMBDA_INLINE {
    I32x16 value;
    if constexpr (bits == 8) {
      value = load_s8(code + c * kLanes);
    } else {
      const I32x16 bytes = load_u8(code + c / 2 * kLanes);
      value = sub(c % 2 ? shift_right<4>(bytes) : bit_and(bytes, broadcast_i32(0xf)), broadcast_i32(kNibbleBias));
    }
    sums[c] = add(sums[c], mul(to_f32(value), broadcast_f32(scale)));
  });
}

// Stores what add_codes summed up, times the share, in order.
template <int bits>
LEPTON_INLINE void store_sums(float* mean, const F32x16 (&sums)[kPart], F32x16 share) {
  alignas(64) float in_turn[kPartValues];
  unroll<kPart>([&]<int c>() LEPTON_LAMBDA_INLINE {
    store_f32<Dtype::f32>((bits == 8 ? mean : in_turn) + c * kLanes, mul(sums[c], share));
  });
  if constexpr (bits == 4) {
    for (int c = 0; c < kPart; c += 2)
      for (int i = 0; i < kLanes; ++i) {
        mean[c * kLanes + 2 * i] = in_turn[c * kLanes + i];
        mean[c * kLanes + 2 * i + 1] = in_turn[(c + 1) * kLanes + i];
      }
  }
}

template <int bits>
LEPTON_INLINE void mean_block(const MeanBlocksArgs& args, int64_t block, float* mean) {
  const F32x16 share = broadcast_f32(1.0f / float(args.rows));
  unroll<kParts>([&]<int part>() LEPTON_LAMBDA_INLINE {
    F32x16 sums[kPart];
    unroll<kPart>([&]<int c>() LEPTON_LAMBDA_INLINE { sums[c] = broadcast_f32(0); });
    const uint8_t* code = args.code + block * block_bytes(bits) + part * (block_bytes(bits) / kParts);
    const uint8_t* scale_at = args.scale + block * int64_t(sizeof(float));
    for (int r = 0; r < args.rows; ++r, code += args.stride, scale_at += args.stride) {
      float scale;
      __builtin_memcpy(&scale, scale_at, sizeof(scale));
      add_codes<bits>(code, scale, sums);
    }
    store_sums<bits>(mean + part * kPartValues, sums, share);
  });
}

template <int bits>
void mean(const MeanBlocksArgs& args) {
  for (int64_t block = 0; block < args.blocks; ++block) {
    if (args.mean) {
      mean_block<bits>(args, block, args.mean + block * kScaleBlock);
      continue;
    }
    alignas(64) float values[kScaleBlock];
    mean_block<bits>(args, block, values);
    const float scale = quantize_block<bits, false>(values, nullptr, args.mean_code + block * block_bytes(bits));
    __builtin_memcpy(args.mean_scale + block * int64_t(sizeof(scale)), &scale, sizeof(scale));
  }
}

}  // namespace

void quantize_blocks(const QuantizeBlocksArgs& args) {
  if (args.bits == 8) return args.residual ? quantize<8, true>(args) : quantize<8, false>(args);
  return args.residual ? quantize<4, true>(args) : quantize<4, false>(args);
}

void mean_blocks(const MeanBlocksArgs& args) { return args.bits == 8 ? mean<8>(args) : mean<4>(args); }

}  // namespace lepton::LEPTON_ISA
