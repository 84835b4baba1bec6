// add_norm.kernel.cpp - three passes over a row while it is in the first-level cache: sum, squares, output.
#include "cpu/add_norm.h"

#include "cpu/simd/partial.h"
#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

// Calls body(i, count) for every sixteen elements, and for the rest of them.
template <typename Body>
LEPTON_INLINE void for_lanes(int n, const Body& body) {
  for (int i = 0; i < n; i += kLanes) body(i, n - i < kLanes ? n - i : kLanes);
}

template <Dtype dtype>
LEPTON_INLINE F32x16 load(const void* p, int i, int count) {
  return load_partial<dtype>(static_cast<const char*>(p) + int64_t(i) * dtype_bytes(dtype), count);
}

template <Dtype dtype>
LEPTON_INLINE void store(void* p, int i, int count, F32x16 v) {
  store_partial<dtype>(static_cast<char*>(p) + int64_t(i) * dtype_bytes(dtype), count, v);
}

LEPTON_INLINE float sum_of_lanes(F32x16 v) {
  float lanes[kLanes], sum = 0;
  store_f32<Dtype::f32>(lanes, v);
  for (const float lane : lanes) sum += lane;
  return sum;
}

template <Dtype dtype>
LEPTON_INLINE void add_norm_row(const AddNormArgs& args, float* h, const void* residual, void* y) {
  F32x16 sum = broadcast_f32(0), squares = sum;
  for_lanes(args.n, [&](int i, int count) LEPTON_LAMBDA_INLINE {
    F32x16 v = load<Dtype::f32>(h, i, count);
    if (residual) v = add(v, load<dtype>(residual, i, count));
    if (args.weight == nullptr) return store<dtype>(y, i, count, v);
    store<Dtype::f32>(h, i, count, v);
    sum = add(sum, v);
  });
  if (args.weight == nullptr) return;
  const float mean = sum_of_lanes(sum) / float(args.n);
  for_lanes(args.n, [&](int i, int count) LEPTON_LAMBDA_INLINE {
    if (count < kLanes) {  // lanes past n are not part of the variance
      float rest = 0;
      for (int j = i; j < args.n; ++j) rest += (h[j] - mean) * (h[j] - mean);
      float lanes[kLanes] = {rest};
      squares = add(squares, load_f32<Dtype::f32>(lanes));
      return;
    }
    const F32x16 d = sub(load_f32<Dtype::f32>(h + i), broadcast_f32(mean));
    squares = add(squares, mul(d, d));
  });
  const float inverse = 1.0f / __builtin_sqrtf(sum_of_lanes(squares) / float(args.n) + args.eps);
  for_lanes(args.n, [&](int i, int count) LEPTON_LAMBDA_INLINE {
    const F32x16 d = sub(load<Dtype::f32>(h, i, count), broadcast_f32(mean));
    const F32x16 scaled = mul(mul(d, broadcast_f32(inverse)), load<Dtype::f32>(args.weight, i, count));
    store<dtype>(y, i, count, add(scaled, load<Dtype::f32>(args.bias, i, count)));
  });
}

template <Dtype dtype>
void add_norm_rows(const AddNormArgs& args) {
  for (int r = 0; r < args.rows; ++r) {
    const void* residual = args.residual
                               ? static_cast<const char*>(args.residual) + r * args.residual_stride * dtype_bytes(dtype)
                               : nullptr;
    void* y = static_cast<char*>(args.y) + int64_t(r) * args.n * dtype_bytes(dtype);
    add_norm_row<dtype>(args, args.h + int64_t(r) * args.n, residual, y);
  }
}

}  // namespace

void add_norm(const AddNormArgs& args) {
  switch (args.dtype) {
    case Dtype::f32:
      return add_norm_rows<Dtype::f32>(args);
    case Dtype::bf16:
      return add_norm_rows<Dtype::bf16>(args);
    case Dtype::f16:
      return add_norm_rows<Dtype::f16>(args);
  }
}

}  // namespace lepton::LEPTON_ISA
