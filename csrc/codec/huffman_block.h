// huffman_block.h - one block of symbols, coded in tree order.
//
// The bits of a Huffman code, stored node by node instead of symbol by symbol: an inner node that n symbols reach
// stores n bits, bit i of them saying whether the i-th goes to the left (0) or right (1) child; a leaf that holds a
// group of symbols stores the place in the group, leaf_bits for each of the n. In whole bytes each, lowest bit first,
// zero-padded; depth by depth, from the left. The same number of bits as Huffman's usual order, but no code length to
// discover: decoding merges the children's symbols under each bitmap, from the deepest level up, 8 to 64 symbols an
// instruction. (A Huffman-shaped wavelet tree; arXiv 2606.05765, "pivot-coded Huffman".)
#pragma once

#include <stdint.h>

#include "codec/huffman_code.h"
#include "cpu/kernel_table.h"

namespace lepton {

constexpr int kVectorSlack = 64;  // kernels read and write up to one vector past the end of a buffer of symbols

struct DecodeBlockArgs {
  const HuffmanCode* code;
  const uint8_t *bits, *bits_end;
  uint8_t* out;       // n symbols, with kVectorSlack
  int n;              // 1 or more
  uint8_t* level[2];  // n bytes each, with kVectorSlack
  int64_t ahead;      // about how far behind `bits` the next block is, whose bits are fetched meanwhile
};
// Returns how many bytes of `bits` the block took, or -Status.
using DecodeBlockFn = int64_t(const DecodeBlockArgs& args);
LEPTON_KERNEL(huffman_decode_block, DecodeBlockFn)

// What each level's arrays need so that two neighbours do not overwrite each other by a vector.
constexpr int kEncodeSlack = kVectorSlack * kMaxLeaves;

struct EncodeBlockArgs {
  const HuffmanCode* code;
  const uint32_t* rank_begin;  // [symbol_count + 1]: how many of the block's symbols have a lower rank
  const uint8_t* symbols;      // n of them, with kVectorSlack
  const uint8_t* rank_of;      // [256], of symbols that occur
  int n;
  uint8_t* out;       // block_bytes of them, no slack
  uint8_t* ranks;     // n bytes, with kVectorSlack
  uint8_t* level[2];  // n + kEncodeSlack bytes each
};
using EncodeBlockFn = void(const EncodeBlockArgs& args);
LEPTON_KERNEL(huffman_encode_block, EncodeBlockFn)

// The bytes that n plain numbers of `bits` bits take.
constexpr int64_t plain_bytes(int64_t n, int bits) { return (n * bits + 7) / 8; }

// The bytes that a block takes.
inline int64_t block_bytes(const HuffmanCode& code, const uint32_t* rank_begin) {
  int64_t bytes = 0;
  for (int node = 0; node + 1 < code.leaf_count; ++node)
    bytes += (rank_begin[code.end[node]] - rank_begin[code.begin[node]] + 7) / 8;
  for (int leaf = 0; leaf < code.leaf_count; ++leaf)
    bytes +=
        plain_bytes(rank_begin[code.leaf_begin[leaf + 1]] - rank_begin[code.leaf_begin[leaf]], code.leaf_bits[leaf]);
  return bytes;
}

}  // namespace lepton
