// planes.h - symbol layouts: how the bytes of a chunk are split into planes of byte symbols, and put together again.
//
//   bytes     1 plane    the bytes
//   nibbles   2 planes   the low halves, the high halves: symbols 0..15
//   bf16 fp16 2 planes   little-endian words rotated left by one bit, the high byte first: bf16's exponent stands alone
//   fp32      4 planes   the same: the exponent; 23 mantissa bits and, last, the sign
//
// Element i of a chunk is entry i of every plane.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/kernel_table.h"

namespace lepton {

enum class Layout : int { bytes, nibbles, bf16, fp16, fp32 };
constexpr int kLayoutCount = 5;
constexpr int kMaxPlanes = 4;

constexpr int plane_count(Layout layout) { return layout == Layout::bytes ? 1 : layout == Layout::fp32 ? 4 : 2; }
constexpr int element_bytes(Layout layout) {
  return layout == Layout::fp32 ? 4 : layout == Layout::bf16 || layout == Layout::fp16 ? 2 : 1;
}

using SplitPlanesFn = void(Layout layout, const uint8_t* src, int64_t elements, uint8_t* const* planes);
LEPTON_KERNEL(split_planes, SplitPlanesFn)

using JoinPlanesFn = void(Layout layout, const uint8_t* const* planes, int64_t elements, uint8_t* dst);
LEPTON_KERNEL(join_planes, JoinPlanesFn)
// The same, written past the caches, as far as the processor can: neither do they read what is overwritten nor lose
// what they hold.
LEPTON_KERNEL(stream_planes, JoinPlanesFn)

}  // namespace lepton
