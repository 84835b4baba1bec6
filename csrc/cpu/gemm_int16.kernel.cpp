// gemm_int16.kernel.cpp - Y = Xq @ dequant(W)^T with activations as int16 around zero and int8 or 4-bit weights: w8a16
// and w4a16 at the levels whose fastest exact product is that of int16 pairs (splits_activations).
//
//   8 bit  y[r,c] = (S_0 + S_1 + ...) * (row_scale[r] * scale[c]) + bias[c],   S_p = sum of q[r, k] w[c, k]
//   4 bit  y[r,c] = (S_0 scale[c, 0] + ...) * row_scale[r] + bias[c],          S_p = sum of q[r, k] (nibble - zero)
//
// over pieces of k so short that their int32 sums are exact (int16_piece); pieces are added in float, in order.
#include "cpu/simd/epilogue.h"
#include "cpu/simd/panels.h"

namespace lepton::LEPTON_ISA {
namespace {

// What makes floats of a piece's sums, of one panel.
template <int bits>
struct Piece {
  F32x16 scale;
  I32x16 zero;

  LEPTON_INLINE Piece(const PackedWeight& weight, int panel, int index) {
    if constexpr (bits == 4) {
      const int group = index * int16_piece(weight) / weight.group;
      scale = load_f32<Dtype::f32>(weight.scale(panel, group));
      zero = load_zeros(weight, panel, group);
    }
  }
  // q_sum: of the piece's activations, one row's.
  LEPTON_INLINE F32x16 scaled(I32x16 sum, const int32_t* q_sum) const {
    if constexpr (bits == 8) return to_f32(sum);
    return mul(to_f32(sub(sum, mul(zero, broadcast_i32(*q_sum)))), scale);
  }
};

// Not inlined: activation functions and types of Y for every number of rows took the compiler a minute.
template <int bits>
__attribute__((noinline)) void write_output(const GemmTile& tile, int row, int panel, F32x16 sum) {
  F32x16 scale = broadcast_f32(tile.q.scale[row]);
  if constexpr (bits == 8) scale = mul(scale, load_f32<Dtype::f32>(tile.weight.scale(panel)));
  store_output(tile, row, panel, add(mul(sum, scale), load_bias(tile, panel)));
}

template <int bits>
struct GemmInt16 {
  static constexpr int kRows = kInt16Rows, kPanels = 1;
  template <int planes, int rows, int panels>
  static void multiply(const GemmTile& tile, int row, int panel0);
};

template <int bits>
template <int planes, int rows, int panels>
LEPTON_INLINE void GemmInt16<bits>::multiply(const GemmTile& tile, int row, int panel0) {
  constexpr int kStep = bits == 8 ? kQuad : kNibbleBlock, kWeightBytes = kStep * kPanel * bits / 8;
  const PackedWeight& weight = tile.weight;
  const int64_t panel_bytes = weight.panel_bytes(), stride = tile.q.stride;
  const int piece = int16_piece(weight), pieces = divide_up(weight.k, piece);
  const uint8_t* w = weight.panel(panel0);
  const uint8_t* a = tile.q.row(row, 0);

  alignas(64) float y[panels * rows][kPanel];
  unroll<panels * rows>([&]<int i>() LEPTON_LAMBDA_INLINE { store_f32<Dtype::f32>(y[i], broadcast_f32(0)); });
  for (int index = 0; index < pieces; ++index) {
    const int k0 = index * piece, left = weight.k - k0;
    const int steps = divide_up(left < piece ? left : piece, kStep);
    // Past the end of a panel: of the panels that come next.
    const int64_t place = int64_t(k0) * kPanel * bits / 8 + kPrefetchBytes;
    const int64_t ahead = kPrefetchBytes + (place < panel_bytes ? 0 : (panels - 1) * panel_bytes);
    I32x16 acc[panels][rows];
    unroll<panels * rows>([&]<int i>() LEPTON_LAMBDA_INLINE { acc[i / rows][i % rows] = broadcast_i32(0); });
    for (int s = 0; s < steps; ++s, a += kStep * int(sizeof(int16_t)), w += kWeightBytes) {
      unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
        const uint8_t* const of_panel = w + p * panel_bytes;
        for (int line = 0; line < kWeightBytes; line += 64) __builtin_prefetch(of_panel + ahead + line);
        if constexpr (bits == 8)
          dot_int16_s8<rows>(acc[p], a, stride, reinterpret_cast<const int8_t*>(of_panel));
        else
          dot_int16_u4<rows>(acc[p], a, stride, of_panel);
      });
    }
    const int32_t* q_sum = tile.q.group_sum + int64_t(row) * pieces + index;
    unroll<panels>([&]<int p>() LEPTON_LAMBDA_INLINE {
      const Piece<bits> of(weight, panel0 + p, index);
      unroll<rows>([&]<int r>() LEPTON_LAMBDA_INLINE {
        float* const sum = y[p * rows + r];
        store_f32<Dtype::f32>(sum, add(load_f32<Dtype::f32>(sum), of.scaled(acc[p][r], q_sum + r * pieces)));
      });
    });
  }
  for (int p = 0; p < panels; ++p)
    for (int r = 0; r < rows; ++r) write_output<bits>(tile, row + r, panel0 + p, load_f32<Dtype::f32>(y[p * rows + r]));
}

}  // namespace

void gemm_int16_tile(const GemmTile& tile) {
  tile.weight.bits == 8 ? multiply_tile<GemmInt16<8>>(tile) : multiply_tile<GemmInt16<4>>(tile);
}

}  // namespace lepton::LEPTON_ISA
