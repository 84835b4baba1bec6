// dtype.h - the floating-point types that activations and outputs come in.
#pragma once

#include <stdint.h>

namespace lepton {

enum class Dtype : int { f32, bf16, f16 };

constexpr int dtype_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace lepton
