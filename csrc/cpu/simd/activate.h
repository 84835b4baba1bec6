// activate.h - ReLU, SiLU and GELU of sixteen lanes, in a fixed order of operations: the same bits on every level.
#pragma once

#include "cpu/activation.h"
#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

// c[0] x^(count - 1) + ... + c[count - 1]
template <int count>
LEPTON_INLINE F32x16 polynomial(F32x16 x, const float (&c)[count]) {
  F32x16 sum = broadcast_f32(c[0]);
  for (int i = 1; i < count; ++i) sum = add(mul(sum, x), broadcast_f32(c[i]));
  return sum;
}

// e^x, clamped to 2^-126 and 2^127; relative error between them below 2.5e-7 + 1e-7 |x|, every x tried. 2^n times a
// polynomial, made to be off least, of what is left in -1/2..1/2.
LEPTON_INLINE F32x16 exp_f32(F32x16 x) {
  const F32x16 power = max(min(mul(x, broadcast_f32(1.44269504f)), broadcast_f32(127)), broadcast_f32(-126));
  const I32x16 n = round_i32(power);
  const F32x16 f = sub(power, to_f32(n));
  const F32x16 p =
      polynomial(f, {0.001327647129f, 0.009675541893f, 0.05550713093f, 0.2402212024f, 0.6931469440f, 1.0000001192f});
  return mul(p, as_f32(shift_left<23>(add(n, broadcast_i32(127)))));
}

// x / (1 + e^-u), where u has x's sign and is larger; below -100 as at -100, where it is 0 to 36 places.
LEPTON_INLINE F32x16 times_sigmoid(F32x16 x, F32x16 u) {
  x = max(broadcast_f32(-100), x);
  return div(x, add(broadcast_f32(1), exp_f32(sub(broadcast_f32(0), u))));
}

// x (1 + erf(x / sqrt 2)) / 2 = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, with erfc(z) = 1 / (1 + a1 z + ... + a6 z^6)^16
// by Abramowitz and Stegun 7.1.28: off by at most 1e-6 |x| for every normal x. NaN stays NaN.
LEPTON_INLINE F32x16 gelu(F32x16 x) {
  const F32x16 size = min(broadcast_f32(30), as_f32(bit_and(as_i32(x), broadcast_i32(0x7fffffff))));
  // a_k / sqrt(2)^k: a polynomial of |x|
  F32x16 p = polynomial(size, {0.0000430638f / 8, 0.0002765672f * 0.17677670f, 0.0001520143f / 4,
                               0.0092705272f * 0.35355339f, 0.0422820123f / 2, 0.0705230784f * 0.70710678f, 1.0f});
  for (int i = 0; i < 4; ++i) p = mul(p, p);
  return sub(max(broadcast_f32(0), x), div(mul(size, broadcast_f32(0.5f)), p));
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
