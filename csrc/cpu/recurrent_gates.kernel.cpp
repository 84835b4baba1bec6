// recurrent_gates.kernel.cpp - sigmoid, tanh and the state's update, sixteen units at a time.
//
// Both functions come from one e = exp(v) - 1, good near 0 too: sigmoid(v) = 1 / (2 + (exp(-v) - 1)) and
// tanh(v) = e / (e + 2) of 2 v. Products, sums and divisions alone, each rounded: the same bits on every level.
// Divisions cost the most: where a sigmoid multiplies a tanh they share one.
#include "cpu/recurrent_gates.h"

#include "cpu/simd/activate.h"
#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

// exp(87) is finite and exp(-87) normal, and so is what is divided; tanh(10) rounds to 1.
constexpr float kSigmoidLimit = 87, kTanhLimit = 20;

// v within [-limit, limit]; NaN stays NaN, because min and max return their second argument then.
LEPTON_INLINE F32x16 clamp(F32x16 v, float limit) { return max(broadcast_f32(-limit), min(broadcast_f32(limit), v)); }

// exp(v) - 1, |v| <= 87: v = n ln 2 + r with ln 2 in two parts, a polynomial in r (Cephes' expf), and 2^n.
LEPTON_INLINE F32x16 expm1(F32x16 v) {
  const I32x16 n = round_i32(mul(v, broadcast_f32(1.44269504088896341f)));
  const F32x16 whole = to_f32(n);
  F32x16 r = sub(v, mul(whole, broadcast_f32(0.693359375f)));
  r = sub(r, mul(whole, broadcast_f32(-2.12194440e-4f)));
  const F32x16 series = polynomial(
      r, {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f});
  const F32x16 p = add(mul(mul(series, r), r), r);
  const F32x16 power = as_f32(shift_left<23>(add(n, broadcast_i32(127))));
  return add(mul(power, p), sub(power, broadcast_f32(1)));
}

// sigmoid(v) = 1 / sigmoid_divisor(v), at most 2^126.
LEPTON_INLINE F32x16 sigmoid_divisor(F32x16 v) {
  return add(broadcast_f32(2), expm1(sub(broadcast_f32(0), clamp(v, kSigmoidLimit))));
}
LEPTON_INLINE F32x16 sigmoid(F32x16 v) { return div(broadcast_f32(1), sigmoid_divisor(v)); }

LEPTON_INLINE F32x16 tanh(F32x16 v) {
  const F32x16 e = expm1(clamp(add(v, v), kTanhLimit));
  return div(e, add(e, broadcast_f32(2)));
}
// sigmoid(a) * tanh(b) with one division. Where the product of the divisors is infinite the result is below 2^-125: 0.
LEPTON_INLINE F32x16 sigmoid_tanh(F32x16 a, F32x16 b) {
  const F32x16 e = expm1(clamp(add(b, b), kTanhLimit));
  return div(e, mul(sigmoid_divisor(a), add(e, broadcast_f32(2))));
}

LEPTON_INLINE F32x16 load(const float* p) { return load_f32<Dtype::f32>(p); }

// The new h of one block, and its c.
template <Cell cell>
LEPTON_INLINE F32x16 step(const float* x, const float* hidden, const float* h, float* c) {
  const auto gate = [&](int g)
                        LEPTON_LAMBDA_INLINE { return add(load(x + kUnitBlock * g), load(hidden + kUnitBlock * g)); };
  if constexpr (cell == Cell::lstm) {
    const F32x16 next = add(mul(sigmoid(gate(1)), load(c)), sigmoid_tanh(gate(0), gate(2)));
    store_f32<Dtype::f32>(c, next);
    return sigmoid_tanh(gate(3), next);
  } else if constexpr (cell == Cell::gru) {
    const F32x16 reset = sigmoid(gate(0)), update = sigmoid(gate(1));
    const F32x16 candidate = tanh(add(load(x + 2 * kUnitBlock), mul(reset, load(hidden + 2 * kUnitBlock))));
    return add(candidate, mul(update, sub(load(h), candidate)));
  } else if constexpr (cell == Cell::rnn_tanh) {
    return tanh(gate(0));
  } else {
    return max(broadcast_f32(0), gate(0));
  }
}

template <Cell cell>
LEPTON_INLINE void gates(const RecurrentGates& args) {
  constexpr int width = cell_gates(cell) * kUnitBlock;
  for (int row = 0; row < args.rows; ++row) {
    const float* x = args.x_gates + row * args.x_stride;
    const float* hidden = args.h_gates + row * args.h_stride;
    const int64_t state = row * args.state_stride;
    float* y = args.y + row * args.y_stride;
    for (int b = 0; b < args.blocks; ++b) {
      const int unit = b * kUnitBlock;
      const F32x16 next = step<cell>(x + b * width, hidden + b * width, args.h + state + unit,
                                     cell == Cell::lstm ? args.c + state + unit : nullptr);
      store_f32<Dtype::f32>(args.h_next + state + unit, next);
      if (unit + kUnitBlock <= args.columns) {
        store_f32<Dtype::f32>(y + unit, next);
      } else {
        const float* padded = args.h_next + state + unit;
        for (int i = 0; i < args.columns - unit; ++i) y[unit + i] = padded[i];
      }
    }
  }
}

}  // namespace

void recurrent_gates(const RecurrentGates& args) {
  switch (args.cell) {
    case Cell::lstm:
      return gates<Cell::lstm>(args);
    case Cell::gru:
      return gates<Cell::gru>(args);
    case Cell::rnn_tanh:
      return gates<Cell::rnn_tanh>(args);
    case Cell::rnn_relu:
      return gates<Cell::rnn_relu>(args);
  }
}

}  // namespace lepton::LEPTON_ISA
