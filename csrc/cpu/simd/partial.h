// partial.h - sixteen elements of which only the first `count` exist.
#pragma once

#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

constexpr int kLanes = 16;

// Lanes from count on are 0.
template <Dtype dtype>
LEPTON_INLINE F32x16 load_partial(const void* p, int count) {
  if (count >= kLanes) return load_f32<dtype>(p);
  alignas(64) char part[kLanes * dtype_bytes(dtype)] = {};
  __builtin_memcpy(part, p, size_t(count) * dtype_bytes(dtype));
  return load_f32<dtype>(part);
}

template <Dtype dtype>
LEPTON_INLINE void store_partial(void* p, int count, F32x16 v) {
  if (count >= kLanes) return store_f32<dtype>(p, v);
  alignas(64) char part[kLanes * dtype_bytes(dtype)];
  store_f32<dtype>(part, v);
  __builtin_memcpy(p, part, size_t(count) * dtype_bytes(dtype));
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
