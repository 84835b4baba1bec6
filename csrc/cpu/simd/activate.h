// activate.h - ReLU, SiLU and GELU of sixteen lanes, in a fixed order of operations: the same bits on every level.
#pragma once

#include "cpu/activation.h"
#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

// e^x for x clamped to [-87, 88]; relative error below 3e-7. Cephes' expf: 2^n times a polynomial of the rest.
LEPTON_INLINE F32x16 exp_f32(F32x16 x) {
  x = max(min(x, broadcast_f32(88)), broadcast_f32(-87));
  const I32x16 n = round_i32(mul(x, broadcast_f32(1.44269504f)));
  const F32x16 whole = to_f32(n);
  const F32x16 r = sub(sub(x, mul(whole, broadcast_f32(0.693359375f))), mul(whole, broadcast_f32(-2.12194440e-4f)));
  F32x16 p = broadcast_f32(1.9875691500e-4f);
  const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                5.0000001201e-1f};
  for (const float c : coefficients) p = add(mul(p, r), broadcast_f32(c));
  const F32x16 fraction = add(add(mul(mul(p, r), r), r), broadcast_f32(1));
  return mul(fraction, as_f32(shift_left<23>(add(n, broadcast_i32(127)))));
}

// x / (1 + e^-u), where u has x's sign and is larger; below -100 as at -100, where it is 0 to 36 places.
LEPTON_INLINE F32x16 times_sigmoid(F32x16 x, F32x16 u) {
  x = max(broadcast_f32(-100), x);
  return div(x, add(broadcast_f32(1), exp_f32(sub(broadcast_f32(0), u))));
}

// x (1 + erf(x / sqrt 2)) / 2 = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, with erfc by Abramowitz and Stegun 7.1.26: off by
// at most 1e-7 |x|. NaN stays NaN.
LEPTON_INLINE F32x16 gelu(F32x16 x) {
  const F32x16 size = min(broadcast_f32(30), as_f32(bit_and(as_i32(x), broadcast_i32(0x7fffffff))));
  const F32x16 z = mul(size, broadcast_f32(0.70710678f));
  const F32x16 t = div(broadcast_f32(1), add(broadcast_f32(1), mul(z, broadcast_f32(0.3275911f))));
  F32x16 p = broadcast_f32(1.061405429f);
  const float coefficients[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  for (const float c : coefficients) p = add(mul(p, t), broadcast_f32(c));
  const F32x16 erfc = mul(mul(p, t), exp_f32(sub(broadcast_f32(0), mul(z, z))));
  return sub(max(broadcast_f32(0), x), mul(mul(size, broadcast_f32(0.5f)), erfc));
}

// GELU's approximation by tanh: x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)).
LEPTON_INLINE F32x16 gelu_tanh(F32x16 x) {
  const F32x16 cubic = mul(mul(mul(x, x), x), broadcast_f32(0.044715f));
  return times_sigmoid(x, mul(add(x, cubic), broadcast_f32(1.59576912f)));
}

LEPTON_INLINE F32x16 activate(F32x16 x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return max(broadcast_f32(0), x);
    case Activation::silu:
      return times_sigmoid(x, x);
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:
      return gelu_tanh(x);
  }
  return x;
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
