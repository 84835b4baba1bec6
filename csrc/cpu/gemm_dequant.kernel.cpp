// gemm_dequant.kernel.cpp - Y = X @ dequant(W)^T with f32 activations: int8 or 4-bit weights are widened to f32, a
// panel and a block of k at a time, into a buffer that stays in the first-level cache, and used from there by every
// row.
//
// 8 bit: the buffer holds the integers and the channel's scale is applied to the sums. 4 bit: it holds (q - zero) *
// scale.
#include "cpu/simd/epilogue.h"

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kBlock = 256;  // k in the buffer: 256 x 16 floats = 16 KiB, half of a first-level cache

// W[4, 16 columns] of int8 to four rows of f32: byte i of each lane is k + i.
LEPTON_INLINE void widen_s8(const int8_t* w, float* out) {
  const I32x16 quad = load_i32(w);
  store_f32<Dtype::f32>(out, to_f32(shift_right_signed<24>(shift_left<24>(quad))));
  store_f32<Dtype::f32>(out + 16, to_f32(shift_right_signed<24>(shift_left<16>(quad))));
  store_f32<Dtype::f32>(out + 32, to_f32(shift_right_signed<24>(shift_left<8>(quad))));
  store_f32<Dtype::f32>(out + 48, to_f32(shift_right_signed<24>(quad)));
}

template <int k>
LEPTON_INLINE void widen_nibble(I32x16 word, I32x16 zero, F32x16 scale, float* out) {
  constexpr int shift = k < 4 ? 8 * k : 8 * (k - 4) + 4;
  const I32x16 nibble = bit_and(shift_right<shift>(word), broadcast_i32(0xf));
  store_f32<Dtype::f32>(out + 16 * k, mul(to_f32(sub(nibble, zero)), scale));
}

// W[8, 16 columns] of nibbles to eight rows of f32.
LEPTON_INLINE void widen_u4(const uint8_t* w, I32x16 zero, F32x16 scale, float* out) {
  const I32x16 word = load_i32(w);
  widen_nibble<0>(word, zero, scale, out);
  widen_nibble<1>(word, zero, scale, out);
  widen_nibble<2>(word, zero, scale, out);
  widen_nibble<3>(word, zero, scale, out);
  widen_nibble<4>(word, zero, scale, out);
  widen_nibble<5>(word, zero, scale, out);
  widen_nibble<6>(word, zero, scale, out);
  widen_nibble<7>(word, zero, scale, out);
}

// The f32 weights of k in [k0, k0 + kBlock), as far as they exist, rounded up to the layout's block.
LEPTON_INLINE void widen(const PackedWeight& weight, int panel, int k0, float* out) {
  const uint8_t* data = weight.data + panel * weight.panel_bytes();
  if (weight.bits == 8) {
    const int end = k0 + kBlock < weight.k ? k0 + kBlock : weight.k;
    for (int k = k0; k < end; k += kQuad, out += kQuad * kPanel)
      widen_s8(reinterpret_cast<const int8_t*>(data) + int64_t(k) * kPanel, out);
    return;
  }
  const Int4Meta* meta = static_cast<const Int4Meta*>(weight.meta) + int64_t(panel) * weight.groups();
  const int end = k0 + kBlock < weight.k ? k0 + kBlock : weight.k;
  for (int k = k0; k < end;) {
    const int group = k / weight.group;
    const int64_t next_group = int64_t(group + 1) * weight.group;
    const int group_end = next_group < end ? int(next_group) : end;
    const I32x16 zero = load_i32(meta[group].zero);
    const F32x16 scale = load_f32<Dtype::f32>(meta[group].scale);
    for (; k < group_end; k += 8, out += 8 * kPanel) widen_u4(data + int64_t(k) * kPanel / 2, zero, scale, out);
  }
}

template <int rows>
LEPTON_INLINE void multiply(const float* x, int64_t x_stride, const float* w, int count, float* sums) {
  F32x16 acc[rows];
  for (int r = 0; r < rows; ++r) acc[r] = load_f32<Dtype::f32>(sums + r * kPanel);
  for (int k = 0; k < count; ++k) {
    const F32x16 column = load_f32<Dtype::f32>(w + k * kPanel);
    for (int r = 0; r < rows; ++r) acc[r] = fmadd(broadcast_f32(x[r * x_stride + k]), column, acc[r]);
  }
  for (int r = 0; r < rows; ++r) store_f32<Dtype::f32>(sums + r * kPanel, acc[r]);
}

}  // namespace

void gemm_dequant_tile(const GemmTile& tile) {
  alignas(64) float block[(kBlock + kNibbleBlock) * kPanel];
  const int k = tile.weight.k;
  for (int panel = tile.panel_begin; panel < tile.panel_end; ++panel) {
    __builtin_memset(tile.sums, 0, sizeof(float) * kPanel * size_t(tile.rows));
    for (int k0 = 0; k0 < k; k0 += kBlock) {
      const int count = k - k0 < kBlock ? k - k0 : kBlock;
      widen(tile.weight, panel, k0, block);
      for_row_blocks<kFloatRows>(tile.rows, [&]<int rows>(int row) {
        multiply<rows>(tile.x + row * tile.x_stride + k0, tile.x_stride, block, count, tile.sums + row * kPanel);
      });
    }
    const F32x16 bias = load_bias(tile, panel);
    const F32x16 scale = tile.weight.bits == 8
                             ? load_f32<Dtype::f32>(static_cast<const Int8Meta*>(tile.weight.meta)[panel].scale)
                             : broadcast_f32(1);
    for (int r = 0; r < tile.rows; ++r)
      store_output(tile, r, panel, add(mul(load_f32<Dtype::f32>(tile.sums + r * kPanel), scale), bias));
  }
}

namespace {

template <Dtype dtype>
void convert_rows(const ToF32Args& args) {
  for (int r = 0; r < args.rows; ++r) {
    const char* x = static_cast<const char*>(args.x) + r * args.x_stride * dtype_bytes(dtype);
    float* out = args.out + r * args.out_stride;
    int i = 0;
    for (; i + 16 <= args.k; i += 16) store_f32<Dtype::f32>(out + i, load_f32<dtype>(x + i * dtype_bytes(dtype)));
    if (i == args.k) continue;
    alignas(64) char tail[16 * dtype_bytes(dtype)] = {};
    float values[16];
    __builtin_memcpy(tail, x + i * dtype_bytes(dtype), size_t(args.k - i) * dtype_bytes(dtype));
    store_f32<Dtype::f32>(values, load_f32<dtype>(tail));
    for (int j = i; j < args.k; ++j) out[j] = values[j - i];
  }
}

}  // namespace

void to_f32_rows(const ToF32Args& args) {
  switch (args.dtype) {
    case Dtype::f32:
      return convert_rows<Dtype::f32>(args);
    case Dtype::bf16:
      return convert_rows<Dtype::bf16>(args);
    case Dtype::f16:
      return convert_rows<Dtype::f16>(args);
  }
}

}  // namespace lepton::LEPTON_ISA
