// huffman_code.h - a Huffman code whose leaves hold one symbol or a group of symbols: its construction from counts, its
// table, and the shape of its tree.
//
// A group's symbols are about equally frequent. A symbol's place in its group is written in plain bits, which a decoder
// reads at once, instead of one merge a bit.
//
// At every depth the leaves come first, then the inner nodes, so the number of inner nodes at each depth gives the
// whole tree: inner node j of one depth has the nodes 2j and 2j + 1 of the next as children. Of the leaves at one
// depth, those of one symbol come first. A symbol's `rank` is its place in the order of the leaves, which is also the
// order from left to right, so a subtree is a range of ranks.
#pragma once

#include <stdint.h>

#include "codec/status.h"

namespace lepton {

// A leaf deeper than this needs Fibonacci counts of more than 2^38 symbols, more than a chunk holds (2^24).
constexpr int kMaxDepth = 56;
constexpr int kMaxLeaves = 256;
constexpr int kGroupSlack = 256;  // a place in a group is looked up in as many symbols as its bits can name

struct HuffmanCode {
  int leaf_count;                             // 1 to 256
  int max_depth;                              // 0 for one leaf
  uint16_t leaves[kMaxDepth + 1];             // at each depth
  uint16_t singles[kMaxDepth + 1];            // ... of which so many, the first ones, hold one symbol
  uint16_t leaf_begin[kMaxLeaves + 1];        // the rank of each leaf's first symbol, then the number of symbols
  uint8_t symbols[kMaxLeaves + kGroupSlack];  // by rank

  // Derived by derive_shape. Inner nodes are numbered depth by depth, from the left: leaf_count - 1 of them.
  uint8_t leaf_bits[kMaxLeaves];       // plain bits for a symbol of the leaf: 0 for one, 8 for more than 128
  uint16_t first_node[kMaxDepth + 2];  // of each depth; first_node[d + 1] - first_node[d] inner nodes at depth d
  uint16_t first_leaf[kMaxDepth + 1];  // of each depth
  uint16_t begin[kMaxLeaves];          // a node covers the ranks from begin
  uint16_t middle[kMaxLeaves];         // ... its right child those from middle
  uint16_t end[kMaxLeaves];            // ... up to, not including, end

  int symbol_count() const { return leaf_begin[leaf_count]; }
};

// How often each symbol occurs, and the sum.
struct Counts {
  uint32_t of[256] = {};
  int64_t total = 0;

  // The symbols of `code` with ranks from `begin` to, not including, `end`.
  int64_t in_ranks(const HuffmanCode& code, int begin, int end) const {
    int64_t sum = 0;
    for (int rank = begin; rank < end; ++rank) sum += of[code.symbols[rank]];
    return sum;
  }
};

// Order-0 entropy in bits a symbol, within 0.006.
double entropy_bits(const Counts& counts);

// A code for symbols so frequent, at least one of them above 0; the sum is at most 2^26. Of all ways to cut the
// symbols, in the order of their counts, into groups it takes the shortest, where a level of the tree counts for a
// little more than the bit it writes (kMergePrice).
void build_code(const Counts& counts, HuffmanCode* code);

// A node's bits may be coded in turn, where they are skewed (a whole bit for a symbol that three of four are) or
// regular (sparsity patterns): eight of them are a byte, and bytes are symbols of a code of their own.
constexpr int kMaxCodedNodes = 4;

struct TreeCode {
  HuffmanCode tree;
  int coded_nodes;
  uint8_t node[kMaxCodedNodes];  // rising numbers of inner nodes
  HuffmanCode bits[kMaxCodedNodes];
};

// The table; docs/codec-format.md describes it.
constexpr int kTableSlack = 8;  // a writer writes up to so many bytes too many
constexpr int kMaxTreeTable = kMaxDepth + 1 + (2 * kMaxLeaves * 17 + 7) / 8 + kTableSlack;
constexpr int kMaxTable = (kMaxCodedNodes + 1) * kMaxTreeTable + 1 + kMaxCodedNodes;
// Writes it to out[kMaxTable] and returns its size.
int write_table(const TreeCode& code, uint8_t* out);
// The bytes of a tree's part of it.
int tree_table_bytes(const HuffmanCode& code);
// Reads a table from [*in, end) and moves *in past it.
Status read_table(const uint8_t** in, const uint8_t* end, TreeCode* code);

}  // namespace lepton
