// transpose.h - squares of 32-bit values from memory to memory.
#pragma once

#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

#if defined(__AVX512F__)
// 16 x 16: pairs of rows, fours of them, quarters of registers. Whole registers are stored: a load of one would wait
// for two halves to reach the cache.
LEPTON_INLINE void transpose_registers(const float* in, int in_stride, float* out, int out_stride) {
  __m512 row[16], four[4][4];
  unroll<16>([&]<int r>() LEPTON_LAMBDA_INLINE { row[r] = _mm512_loadu_ps(in + r * in_stride); });
  unroll<4>([&]<int i>() LEPTON_LAMBDA_INLINE {  // four[i][c]: column c of rows 4 i to 4 i + 3, beside c + 4, ...
    const __m512d upper_low = _mm512_castps_pd(_mm512_unpacklo_ps(row[4 * i], row[4 * i + 1]));
    const __m512d upper_high = _mm512_castps_pd(_mm512_unpackhi_ps(row[4 * i], row[4 * i + 1]));
    const __m512d lower_low = _mm512_castps_pd(_mm512_unpacklo_ps(row[4 * i + 2], row[4 * i + 3]));
    const __m512d lower_high = _mm512_castps_pd(_mm512_unpackhi_ps(row[4 * i + 2], row[4 * i + 3]));
    four[i][0] = _mm512_castpd_ps(_mm512_unpacklo_pd(upper_low, lower_low));
    four[i][1] = _mm512_castpd_ps(_mm512_unpackhi_pd(upper_low, lower_low));
    four[i][2] = _mm512_castpd_ps(_mm512_unpacklo_pd(upper_high, lower_high));
    four[i][3] = _mm512_castpd_ps(_mm512_unpackhi_pd(upper_high, lower_high));
  });
  unroll<4>([&]<int c>() LEPTON_LAMBDA_INLINE {
    const __m512 upper_low = _mm512_shuffle_f32x4(four[0][c], four[1][c], 0x44);
    const __m512 upper_high = _mm512_shuffle_f32x4(four[0][c], four[1][c], 0xee);
    const __m512 lower_low = _mm512_shuffle_f32x4(four[2][c], four[3][c], 0x44);
    const __m512 lower_high = _mm512_shuffle_f32x4(four[2][c], four[3][c], 0xee);
    _mm512_storeu_ps(out + c * out_stride, _mm512_shuffle_f32x4(upper_low, lower_low, 0x88));
    _mm512_storeu_ps(out + (c + 4) * out_stride, _mm512_shuffle_f32x4(upper_low, lower_low, 0xdd));
    _mm512_storeu_ps(out + (c + 8) * out_stride, _mm512_shuffle_f32x4(upper_high, lower_high, 0x88));
    _mm512_storeu_ps(out + (c + 12) * out_stride, _mm512_shuffle_f32x4(upper_high, lower_high, 0xdd));
  });
}
#elif defined(__AVX2__)
// 8 x 8: pairs of rows, pairs of those, halves of registers.
LEPTON_INLINE void transpose_8x8(const float* in, int in_stride, float* out, int out_stride) {
  __m256 row[8], pair[8];
  unroll<8>([&]<int r>() LEPTON_LAMBDA_INLINE { row[r] = _mm256_loadu_ps(in + r * in_stride); });
  unroll<4>([&]<int r>() LEPTON_LAMBDA_INLINE {
    pair[2 * r] = _mm256_unpacklo_ps(row[2 * r], row[2 * r + 1]);
    pair[2 * r + 1] = _mm256_unpackhi_ps(row[2 * r], row[2 * r + 1]);
  });
  unroll<4>([&]<int i>() LEPTON_LAMBDA_INLINE {  // column i of rows 0 to 3 and 4 to 7, beside column i + 4
    constexpr int from = i / 2, picked = i % 2 ? 0xee : 0x44;
    const __m256 upper = _mm256_shuffle_ps(pair[from], pair[from + 2], picked);
    const __m256 lower = _mm256_shuffle_ps(pair[from + 4], pair[from + 6], picked);
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(upper, lower, 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(upper, lower, 0x31));
  });
}
#endif

// out[c][r] = in[r][c], 16 x 16; strides in values.
LEPTON_INLINE void transpose_16x16(const float* in, int in_stride, float* out, int out_stride) {
#if defined(__AVX512F__)
  transpose_registers(in, in_stride, out, out_stride);
#elif defined(__AVX2__)
  for (int r = 0; r < 16; r += 8)
    for (int c = 0; c < 16; c += 8)
      transpose_8x8(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
#else
  for (int c = 0; c < 16; ++c)
    for (int r = 0; r < 16; ++r) __builtin_memcpy(out + c * out_stride + r, in + r * in_stride + c, 4);  // any 32 bits
#endif
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
