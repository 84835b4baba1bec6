// blockwise.h - gradients as int8 or int4 with one scale a block of 128 values: error feedback on the way in, the mean
// of several senders on the way out.
//
//   v = x + residual,  code = round(v / scale): -127 to 127 or -7 to 7,  residual = v - code * scale
//
// A packed vector of n values:
//   code   8 bit: int8 [n]; 4 bit: code + 8 in half a byte each, the lower half first. Filled up to a multiple of four
//          bytes with codes of 0
//   scale  f32 [ceil(n / 128)], behind the codes: max |v| of the block times the float 1 / 127 or 1 / 7. Below 2^-126
//          it is 0, as are the codes, and v stays in the residual; NaN where a v is NaN or infinite, codes and residual
//          0
//
// With the product in place of the quotient code * scale is finite for every finite v.
#pragma once

#include <stdint.h>

#include "cpu/kernel_table.h"

namespace lepton {

constexpr int kScaleBlock = 128;

constexpr int block_bytes(int bits) { return kScaleBlock * bits / 8; }  // of a block's codes

struct BlockwiseLayout {
  int64_t blocks, scale, bytes;  // scale: where scales begin

  constexpr BlockwiseLayout(int64_t n, int bits)
      : blocks(n / kScaleBlock + (n % kScaleBlock != 0)),
        scale(n / kScaleBlock * block_bytes(bits) + (n % kScaleBlock * bits + 31) / 32 * 4),
        bytes(scale + blocks * int64_t(sizeof(float))) {}
};

// What the kernels do is of whole blocks; scales need not be aligned.
struct QuantizeBlocksArgs {
  const float* x;   // [blocks][128]
  float* residual;  // [blocks][128], or null: v = x
  int64_t blocks;
  int bits;
  uint8_t* code;
  uint8_t* scale;
};
using QuantizeBlocksFn = void(const QuantizeBlocksArgs&);
LEPTON_KERNEL(quantize_blocks, QuantizeBlocksFn)

// code * scale of all rows, added in order from 0 on, times the float 1 / rows.
struct MeanBlocksArgs {
  const uint8_t* code;
  const uint8_t* scale;
  int rows;
  int64_t stride;  // bytes from a row to the next, of codes and of scales
  int64_t blocks;
  int bits;
  float* mean;  // [blocks][128], or null: the mean is quantized again, in place if need be
  uint8_t* mean_code;
  uint8_t* mean_scale;
};
using MeanBlocksFn = void(const MeanBlocksArgs&);
LEPTON_KERNEL(mean_blocks, MeanBlocksFn)

// x f32 [n] and residual f32 [n], or null, to a packed vector.
void quantize_blockwise(const float* x, float* residual, int64_t n, int bits, uint8_t* packed, int threads);

// The mean of `rows` packed vectors, one behind the other: to mean f32 [n] or, where that is null, to a packed vector,
// which may be one of them.
void mean_blockwise(const uint8_t* packed, int rows, int64_t n, int bits, float* mean, uint8_t* mean_packed,
                    int threads);

}  // namespace lepton
