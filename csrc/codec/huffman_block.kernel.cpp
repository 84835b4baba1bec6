// huffman_block.kernel.cpp - encodes and decodes one block of huffman_block.h, level by level of the tree.
//
// Decoding: (1) from the root down, the popcount of a node's bitmap gives its children's counts, so all bitmaps are
// found and checked before a symbol is written; (2) from the deepest level up, every inner node of a level merges its
// children, which are leaves or arrays of the level below, into the next array of its own level. A merge writes up to
// a vector too much; the node to its right, which comes next, writes over that.
#include "codec/huffman_block.h"

#include "codec/huffman_simd.h"

namespace lepton::LEPTON_ISA {
namespace {

// Where one inner node's bitmap is and how many bits it has.
struct Bitmap {
  const uint8_t* bits;
  int n;
};

}  // namespace

int64_t huffman_decode_block(const DecodeBlockArgs& args) {
  const HuffmanCode& code = *args.code;
  if (code.max_depth == 0) {
    __builtin_memset(args.out, code.symbols[0], static_cast<size_t>(args.n));
    return 0;
  }
  Bitmap node[kMaxLeaves];
  node[0].n = args.n;
  const uint8_t* bits = args.bits;
  for (int depth = 0; depth < code.max_depth; ++depth) {
    const int first = code.first_node[depth], count = code.first_node[depth + 1] - first;
    const int leaves_below = code.leaves[depth + 1], below = code.first_node[depth + 1] - leaves_below;
    for (int j = 0; j < count; ++j) {
      const int n = node[first + j].n, bytes = (n + 7) / 8;
      if (args.bits_end - bits < bytes) return -static_cast<int64_t>(Status::truncated);
      if (n % 8 != 0 && bits[bytes - 1] >> n % 8 != 0) return -static_cast<int64_t>(Status::bad_padding);
      const int ones = count_ones(bits, n);
      node[first + j].bits = bits;
      bits += bytes;
      if (2 * j >= leaves_below) node[below + 2 * j].n = n - ones;
      if (2 * j + 1 >= leaves_below) node[below + 2 * j + 1].n = ones;
    }
  }

  for (int depth = code.max_depth - 1; depth >= 0; --depth) {
    const int first = code.first_node[depth], count = code.first_node[depth + 1] - first;
    const int leaves_below = code.leaves[depth + 1], below = code.first_node[depth + 1] - leaves_below;
    const uint8_t* const leaf = code.symbols + code.first_leaf[depth + 1];
    const uint8_t* in = args.level[(depth + 1) & 1];
    uint8_t* out = depth == 0 ? args.out : args.level[depth & 1];
    for (int j = 0; j < count; ++j) {
      const Bitmap& self = node[first + j];
      const int p = 2 * j;
      if (p + 1 < leaves_below) {
        blend(out, self.n, self.bits, leaf[p], leaf[p + 1]);
      } else if (p < leaves_below) {
        merge_leaf(out, self.n, self.bits, leaf[p], in);
        in += node[below + p + 1].n;
      } else {
        merge_nodes(out, self.n, self.bits, in, in + node[below + p].n);
        in += self.n;
      }
      out += self.n;
    }
  }
  return bits - args.bits;
}

void huffman_encode_block(const EncodeBlockArgs& args) {
  const HuffmanCode& code = *args.code;
  uint8_t* bits = args.out;
  for (int depth = 0; depth < code.max_depth; ++depth) {
    const int first = code.first_node[depth], count = code.first_node[depth + 1] - first;
    const int leaves_below = code.leaves[depth + 1];
    const uint8_t* in = depth == 0 ? args.ranks : args.level[depth & 1];
    uint8_t* out = args.level[(depth + 1) & 1];
    for (int j = 0; j < count; ++j) {
      const int begin = static_cast<int>(args.rank_begin[code.begin[first + j]]);
      const int middle = static_cast<int>(args.rank_begin[code.middle[first + j]]);
      const int n = static_cast<int>(args.rank_begin[code.end[first + j]]) - begin;
      const auto threshold = static_cast<uint8_t>(code.middle[first + j]);
      if (2 * j + 1 < leaves_below) {
        partition<false, false>(in, n, threshold, bits, nullptr, nullptr);
      } else if (2 * j < leaves_below) {
        partition<false, true>(in, n, threshold, bits, nullptr, out);
        out += begin + n - middle + kVectorSlack;
      } else {
        uint8_t* const right = out + (middle - begin) + kVectorSlack;
        partition<true, true>(in, n, threshold, bits, out, right);
        out = right + (begin + n - middle) + kVectorSlack;
      }
      bits += (n + 7) / 8;
      in += n + (depth == 0 ? 0 : kVectorSlack);
    }
  }
}

}  // namespace lepton::LEPTON_ISA
