// huffman_simd.h - the steps of huffman_block.kernel.cpp, per level.
//
//   merge_nodes(out, n, bits, left, right)   out[i] = the next unread byte of right where bit i is 1, else of left
//   merge_leaf(out, n, bits, symbol, right)  the same, left being one symbol for ever
//   blend(out, n, bits, symbol0, symbol1)    the same, both being one symbol for ever
//   count_ones(bits, n)                      how many of the n bits are 1
//   partition<keep_left, keep_right>(in, n, middle, bits, left, right)
//                                            the reverse: bit i = in[i] >= middle; the two sides, where they are kept
//
// Arrays of symbols have kVectorSlack bytes of slack, bitmaps have none.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpu/kernel_table.h"

#if defined(__AVX512VBMI2__)
#include "codec/huffman_vbmi2.h"
#elif defined(__SSSE3__)
#include "codec/huffman_ssse3.h"
#else
#include "codec/huffman_generic.h"
#endif
