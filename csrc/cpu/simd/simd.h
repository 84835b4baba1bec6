// simd.h - the vector operations that kernels are written in, chosen for the level a .kernel.cpp is compiled for.
//
// F32x16 and I32x16 are sixteen lanes: one column each of a weight panel. Every header gives the same names with the
// same results to the last bit (fmadd alone may round once or twice):
//
//   load_f32<dtype>(p)  store_f32<dtype>(p, v)   16 elements of f32, bf16 or f16; bf16 and f16 round to nearest even
//   broadcast_f32  add  sub  mul  div  min  max (b where one is NaN)  fmadd(a, b, c) = a * b + c
//   round_i32(v)        to nearest even; |v| < 2^22      to_f32(i)      as_i32(v)  as_f32(i)  the same bits
//   broadcast_i32  load_i32  load_u8  load_s8 (16 bytes)  store_i32  add  sub  mul  min  max  bit_and  bit_xor
//   shift_left<n>  shift_right<n> (logical)  shift_right_signed<n>
//   store_quads(p, i)   16 values in 0..255 as 4 quads of the level's layout, kQuadBytes a quad
//   store_int16_quads(p, i)     16 values as 4 quads of int16, in the order k0 k2 k1 k3
//   store_u8(p, i)      16 values in 0..255 as bytes of a row
//   store_64(p, i[4], biased)   64 values clamped to -128..127 as int8 (biased), or with 128 added as uint8: of a row
//   store_s8(p, i[4])   64 values clamped to -128..127 as int8, one behind the other
//   dot_s8<rows>        acc[r] += A[r, 0..4] . W[0..4, 16 columns]: A in quads (uint8, or int8 where signed_quads), W
//                       int8 [16][4]
//   dot_u4<rows>        acc[r] += A[r, 0..16] . W[0..16, 16 columns]: A int8, W 4 bit, [2][16][4] (packed_weight.h)
//   dot_u4<rows>(low, high, ...)   the same in two sums, low + high / 16; for at most kSplitSums of low
//   store_turned(p, rows[])             a column of 16 or 32 rows of X as int16, in the level's own order
//   dot_pair<vectors>(acc, x0, x1, w)   acc[v] += w[0] * x0 + w[1] * x1: 16 rows of two such columns, int16 weights
//   dot_group<vectors>(acc, x, w)       acc[v] += X[16 rows, 2 or 4] . w: neighbours as int16, or as bytes (X uint8, or
//                                       int8 where signed_quads); sparse_rows.h has both
//   sums_to_rows<rows>  behind the last product: acc[r] becomes the sums of row r
//   dot_int16_s8<rows>  dot_int16_u4<rows>   the same with A in quads of int16
//   dot_unpacked<rows>  acc[r] += A[r, 0..kUnpackedStep] . W[0..kUnpackedStep, 16 columns]: A int8, W nibbles as uint8
//                       [kUnpackedStep / 4][16][4] on 64 bytes
//
// kTogether is 1, or 2 where an instruction multiplies two rows by two columns: there rows are in RowLayout::pairs,
// dot_s8 adds two quads, and acc is in the level's own order until sums_to_rows.
//
// kInt8Rows x kInt8Panels, kInt4Rows x kInt4Panels and kInt16Rows x 1 are the tiles whose sums fit the registers,
// kDirectSums the sums for one row. What is of int16 exists at the levels that do not multiply bytes fast
// (splits_activations), what is of unpacked nibbles on AVX2 and AVX-512. amx.h adds tile registers to the operations of
// avx512vnni.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/dtype.h"
#include "cpu/kernel_table.h"
#include "cpu/packed_weight.h"
#include "cpu/quantize_rows.h"
#include "cpu/simd/unroll.h"

namespace lepton::LEPTON_ISA {
namespace {
constexpr int kTogether = rows_together(Isa::LEPTON_ISA);

// Nibble 0 of the int16 in four bytes of 4-bit weights holds k0 and k2, nibble 1 k4 and k6, then k1, k3 and k5, k7: its
// place among the pairs of activations.
template <int nibble>
constexpr int kPairOfNibble = nibble % 2 * 2 + nibble / 2;
}  // namespace
}  // namespace lepton::LEPTON_ISA

#if defined(LEPTON_ISA_AMX)
#include "cpu/simd/amx.h"
#elif defined(__AVX512VNNI__)
#include "cpu/simd/avx512vnni.h"
#elif defined(LEPTON_ISA_AVXVNNI)
#include "cpu/simd/avxvnni.h"
#elif defined(LEPTON_ISA_AVX2)
#include "cpu/simd/avx2.h"
#elif defined(LEPTON_ISA_NEONI8MM)
#include "cpu/simd/neoni8mm.h"
#elif defined(LEPTON_ISA_NEONDOT)
#include "cpu/simd/neon.h"
#else
#include "cpu/simd/generic.h"
#endif

#if !defined(LEPTON_ISA_NEONI8MM)
namespace lepton::LEPTON_ISA {
namespace {
template <int rows>
LEPTON_INLINE void sums_to_rows(I32x16 (&)[rows]) {}
LEPTON_INLINE void store_s8(uint8_t* p, const I32x16 (&x)[4]) { store_64(p, x, true); }
}  // namespace
}  // namespace lepton::LEPTON_ISA
#endif
