// gemm_dequant.kernel.cpp - Y = X @ dequant(W)^T with f32 activations and int8 or 4-bit weights: w8a16 and w4a16 at the
// levels below AVX-512 (splits_activations).
//
// Few rows: weights are widened to f32 in registers and used at once. More: a panel and a block of k at a time is
// widened into a buffer that stays in the first-level cache and is used from there by every row of the tile.
//
// 8 bit: the integers are multiplied and the channel's scale is applied to the sums. 4 bit: (q - zero), and the group's
// scale on the group's sums, or in the buffer.
#include "cpu/simd/epilogue.h"

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kBlock = 256;  // k in the buffer: 256 x 16 floats = 16 KiB, half of a first-level cache
// k that are summed in a row, at most: with one sum over 65536 k rounding alone took 2e-3 of it. A multiple of a word's
// k.
constexpr int kPiece = 2048;

// Column k + i of a panel's word of 8 (4 bit) or 4 (8 bit) k.
template <int bits, int i>
LEPTON_INLINE F32x16 widened(I32x16 word, F32x16 zero) {
  if constexpr (bits == 8) return to_f32(shift_right_signed<24>(shift_left<24 - 8 * i>(word)));
  constexpr int shift = i < 4 ? 8 * i : 8 * (i - 4) + 4;
  return sub(nibble_f32<shift>(word), zero);
}

LEPTON_INLINE F32x16 group_zero(const PackedWeight& weight, int panel, int group) {
  return weight.symmetric ? broadcast_f32(8) : to_f32(load_u8(weight.zero(panel, group)));
}

// The f32 weights of k in [k0, k0 + kBlock), as far as they exist, rounded up to a word, to out[k - k0][16].
template <int bits>
LEPTON_INLINE void widen(const PackedWeight& weight, int panel, int k0, float* out) {
  constexpr int kWord = 32 / bits;
  const uint8_t* data = weight.panel(panel);
  const int end = k0 + kBlock < weight.k ? k0 + kBlock : weight.k;
  for (int k = k0; k < end;) {
    F32x16 zero = broadcast_f32(0), scale = broadcast_f32(1);
    int group_end = end;
    if constexpr (bits == 4) {
      const int group = k / weight.group;
      const int64_t next_group = int64_t(group + 1) * weight.group;
      group_end = next_group < end ? int(next_group) : end;
      zero = group_zero(weight, panel, group);
      scale = load_f32<Dtype::f32>(weight.scale(panel, group));
    }
    for (; k < group_end; k += kWord, out += kWord * kPanel) {
      const I32x16 word = load_i32(data + int64_t(k) * kPanel * bits / 8);
      unroll<kWord>([&]<int i>() LEPTON_LAMBDA_INLINE {
        F32x16 column = widened<bits, i>(word, zero);
        if constexpr (bits == 4) column = mul(column, scale);
        store_f32<Dtype::f32>(out + 16 * i, column);
      });
    }
  }
}

// acc[p][r] += X[row + r, k..k + count) . W[panel p, the same k]: `count` a multiple of the word's k.
template <int bits, int rows, int panels, int chains>
LEPTON_INLINE void multiply_words(const float* x, int64_t x_stride, const uint8_t* w, int64_t panel_bytes, int count,
                                  const F32x16 (&zero)[panels], F32x16 (&acc)[panels][rows * chains]) {
  constexpr int kWord = 32 / bits;  // k in a word
  for (int k = 0; k < count; k += kWord, x += kWord, w += kPanel * 4) {
    unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
      __builtin_prefetch(w + p * panel_bytes + kPrefetchBytes);
      const I32x16 word = load_i32(w + p * panel_bytes);
      unroll<kWord>([&]<int i>() LEPTON_LAMBDA_INLINE {
        const F32x16 column = widened<bits, i>(word, zero[p]);
        unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
          F32x16& sum = acc[p][r * chains + i % chains];
          sum = fmadd(broadcast_f32(x[r * x_stride + i]), column, sum);
        });
      });
    });
  }
}

// Y[0..rows, panel] = y + bias. Not inlined: activations of every type for every number of rows took the compiler
// minutes.
__attribute__((noinline)) void store_rows(const GemmTile& tile, int panel, const F32x16* y, int rows) {
  const F32x16 bias = load_bias(tile, panel);
  for (int r = 0; r < rows; ++r) store_output(tile, r, panel, add(y[r], bias));
}

template <int bits, int rows, int panels>
LEPTON_INLINE void multiply_direct(const GemmTile& tile, int panel0) {
  constexpr int chains = rows == 1 ? 2 : 1, kWord = 32 / bits;
  const PackedWeight& weight = tile.weight;
  const int64_t panel_bytes = weight.panel_bytes();
  F32x16 y[panels][rows];
  for (int p = 0; p < panels; ++p)
    for (int r = 0; r < rows; ++r) y[p][r] = broadcast_f32(0);
  for (int k0 = 0, count; k0 < weight.k; k0 += count) {
    const int g = k0 / weight.group, left = weight.k - k0;
    const int64_t of_group = int64_t(g + 1) * weight.group - k0;
    count = of_group < left ? int(of_group) : left;
    if (count > kPiece) count = kPiece;
    const int whole = count / kWord * kWord;
    const uint8_t* w = weight.panel(panel0) + int64_t(k0) * kPanel * bits / 8;
    F32x16 zero[panels], acc[panels][rows * chains];
    unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
      zero[p] = bits == 4 ? group_zero(weight, panel0 + p, g) : broadcast_f32(0);
      unroll<rows * chains>([&]<int i>() LEPTON_LAMBDA_INLINE { acc[p][i] = broadcast_f32(0); });
    });
    multiply_words<bits, rows, panels, chains>(tile.x + k0, tile.x_stride, w, panel_bytes, whole, zero, acc);
    if (whole < count) {  // the last word reaches past X: zeros there
      float tail[rows][kWord] = {};
      for (int r = 0; r < rows; ++r)
        for (int k = whole; k < count; ++k) tail[r][k - whole] = tile.x[r * tile.x_stride + k0 + k];
      w += int64_t(whole) * kPanel * bits / 8;
      multiply_words<bits, rows, panels, chains>(tail[0], kWord, w, panel_bytes, kWord, zero, acc);
    }
    unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
      const F32x16 scale = load_f32<Dtype::f32>(weight.scale(panel0 + p, g));
      unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
        F32x16 sum = acc[p][r * chains];
        if constexpr (chains == 2) sum = add(sum, acc[p][r * chains + 1]);
        y[p][r] = fmadd(sum, scale, y[p][r]);
      });
    });
  }
  for (int p = 0; p < panels; ++p) store_rows(tile, panel0 + p, y[p], rows);
}

template <int bits, int rows>
LEPTON_INLINE void multiply_few(const GemmTile& tile) {
  // Enough sums in flight to hide a multiply-add's latency, no more than the registers hold.
  constexpr int panels = rows == 1 ? kDirectSums / 2 : kDirectSums / rows;
  int panel = tile.panel_begin;
  for (; panel + panels <= tile.panel_end; panel += panels) multiply_direct<bits, rows, panels>(tile, panel);
  for (; panel < tile.panel_end; ++panel) multiply_direct<bits, rows, 1>(tile, panel);
}

template <int bits>
void multiply_up_to_four(const GemmTile& tile) {
  switch (tile.rows) {
    case 1:
      return multiply_few<bits, 1>(tile);
    case 2:
      return multiply_few<bits, 2>(tile);
    case 3:
      return multiply_few<bits, 3>(tile);
    default:
      return multiply_few<bits, 4>(tile);
  }
}

template <int rows>
LEPTON_INLINE void multiply(const float* x, int64_t x_stride, const float* w, int count, float* sums) {
  F32x16 acc[rows];
  unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE { acc[r] = broadcast_f32(0); });
  for (int k = 0; k < count; ++k) {
    const F32x16 column = load_f32<Dtype::f32>(w + k * kPanel);
    unroll<rows>([&]<int r>()
                     LEPTON_LAMBDA_INLINE { acc[r] = fmadd(broadcast_f32(x[r * x_stride + k]), column, acc[r]); });
  }
  unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
    store_f32<Dtype::f32>(sums + r * kPanel, add(load_f32<Dtype::f32>(sums + r * kPanel), acc[r]));
  });
}

}  // namespace

void gemm_dequant_tile(const GemmTile& tile) {
  if (tile.rows <= kDirectRows)
    return tile.weight.bits == 8 ? multiply_up_to_four<8>(tile) : multiply_up_to_four<4>(tile);
  alignas(64) float block[(kBlock + kNibbleBlock) * kPanel];
  float* const sums = static_cast<float*>(tile.scratch);
  const int k = tile.weight.k;
  for (int panel = tile.panel_begin; panel < tile.panel_end; ++panel) {
    __builtin_memset(sums, 0, sizeof(float) * kPanel * size_t(tile.rows));
    for (int k0 = 0; k0 < k; k0 += kBlock) {
      const int count = k - k0 < kBlock ? k - k0 : kBlock;
      if (tile.weight.bits == 8)
        widen<8>(tile.weight, panel, k0, block);
      else
        widen<4>(tile.weight, panel, k0, block);
      for_row_blocks<kFloatRows>(tile.rows, [&]<int rows>(int row) {
        multiply<rows>(tile.x + row * tile.x_stride + k0, tile.x_stride, block, count, sums + row * kPanel);
      });
    }
    const F32x16 bias = load_bias(tile, panel);
    const F32x16 scale = tile.weight.bits == 8 ? load_f32<Dtype::f32>(tile.weight.scale(panel)) : broadcast_f32(1);
    for (int r = 0; r < tile.rows; ++r)
      store_output(tile, r, panel, add(mul(load_f32<Dtype::f32>(sums + r * kPanel), scale), bias));
  }
}

namespace {

template <Dtype dtype>
void convert_rows(const ToF32Args& args) {
  for (int r = 0; r < args.rows; ++r) {
    const char* x = static_cast<const char*>(args.x) + r * args.x_stride * dtype_bytes(dtype);
    float* out = args.out + r * args.out_stride;
    for (int i = 0; i < args.k; i += kLanes)
      store_partial<Dtype::f32>(out + i, args.k - i, load_partial<dtype>(x + i * dtype_bytes(dtype), args.k - i));
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
