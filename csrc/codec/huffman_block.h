// huffman_block.h - one block of symbols, coded in tree order.
//
// The bits of a Huffman code, stored node by node instead of symbol by symbol: an inner node that n symbols reach
// stores n bits, bit i of them saying whether the i-th goes to the left (0) or right (1) child; a leaf that holds a
// group of symbols stores the place in the group, leaf_bits for each of the n. In whole bytes each, lowest bit first,
// zero-padded; depth by depth, from the left. The same number of bits as Huffman's usual order, but no code length to
// discover: decoding merges the children's symbols under each bitmap, from the deepest level up, 8 to 64 symbols an
// instruction. (A Huffman-shaped wavelet tree; arXiv 2606.05765, "pivot-coded Huffman".) In place of a coded node's
// bits stand its bytes, as a block of their own code.
#pragma once

#include <stdint.h>

#include "codec/huffman_code.h"
#include "cpu/kernel_table.h"

namespace lepton {

constexpr int kVectorSlack = 64;  // kernels read and write up to one vector past the end of a buffer of symbols

// Memory that is fetched to the second-level cache line by line.
struct Lines {
  static constexpr int kBytes = 64;
  const uint8_t *next, *last;

  LEPTON_INLINE Lines(const uint8_t* begin, int64_t bytes) : next(begin), last(begin + (bytes > 0 ? bytes - 1 : 0)) {}
  LEPTON_INLINE void fetch_one() {
    __builtin_prefetch(next, 0, 2);
    next += last - next < kBytes ? 0 : kBytes;
  }
};
// What a decoder will read and what it will write soon. While symbols are moved from one level to the next the memory
// has nothing to do: where 64 are moved at a time, lines are fetched with them. Slower steps have no use for it.
struct Ahead {
  Lines in, out;
  LEPTON_INLINE void fetch() {
    in.fetch_one();
    out.fetch_one();
  }
};

struct DecodeBlockArgs {
  const TreeCode* code;
  const uint8_t *bits, *bits_end;
  uint8_t* out;  // n symbols, with kVectorSlack
  int n;
  uint8_t* level[2];   // n bytes each, with kVectorSlack
  uint8_t* node_bits;  // node_bits_bound(n) bytes, for coded nodes
  Ahead* ahead;
};
// Returns how many bytes of `bits` the block took, or -Status.
using DecodeBlockFn = int64_t(const DecodeBlockArgs& args);
LEPTON_KERNEL(huffman_decode_block, DecodeBlockFn)

// The bytes that n plain numbers of `bits` bits take.
constexpr int64_t plain_bytes(int64_t n, int bits) { return (n * bits + 7) / 8; }
// The bits of all coded nodes of a block.
constexpr int64_t node_bits_bound(int64_t n) { return kMaxCodedNodes * (plain_bytes(n, 1) + kVectorSlack); }

struct NodeBits {
  const uint8_t* bits;
  int n;
};

struct EncodeBlockArgs {
  const TreeCode* code;
  const uint8_t* symbols;         // n of them, with kVectorSlack
  const uint8_t (*rank_of)[256];  // of the tree, then of each coded node; kNoRank for symbols without a code
  int n;
  uint8_t* out;      // block_bound bytes
  uint8_t* scratch;  // encode_scratch(n) bytes
  NodeBits*
      node_bits;  // [kMaxLeaves]: receives where in `out` each inner node's bits are; nullptr if there are coded ones
  Lines* ahead;   // what will be read soon
};
constexpr uint8_t kNoRank = 255;

constexpr int64_t kNoCode = -1;

// Returns how many bytes the block takes, or kNoCode where a symbol has none.
using EncodeBlockFn = int64_t(const EncodeBlockArgs& args);
LEPTON_KERNEL(huffman_encode_block, EncodeBlockFn)

// The most bytes that a block of n symbols takes: all of them at the deepest leaf, and padding.
constexpr int64_t tree_bound(const HuffmanCode& code, int64_t n) {
  return (n * (code.max_depth + 8) + 7) / 8 + 2 * kMaxLeaves;
}
constexpr int64_t block_bound(const TreeCode& code, int64_t n) {
  int64_t bytes = tree_bound(code.tree, n);
  for (int i = 0; i < code.coded_nodes; ++i) bytes += tree_bound(code.bits[i], plain_bytes(n, 1));
  return bytes;
}
// The ranks of n symbols and two levels of them. A node's two sides lie side by side before it is known how large they
// are.
constexpr int64_t level_bound(int64_t n) { return 2 * (n + kVectorSlack * kMaxLeaves); }
constexpr int64_t tree_scratch(int64_t n) { return n + kVectorSlack + 2 * level_bound(n); }
// Those of a block, a node's bits, and those of the bits.
constexpr int64_t encode_scratch(int64_t n) {
  return tree_scratch(n) + plain_bytes(n, 1) + kVectorSlack + tree_scratch(plain_bytes(n, 1));
}

}  // namespace lepton
