// huffman_block.kernel.cpp - encodes and decodes one block of huffman_block.h, level by level of the tree.
//
// Decoding: (1) from the root down, the popcount of a node's bitmap gives its children's counts, so all bitmaps and
// plain bits are found and checked before a symbol is written; (2) from the deepest level up, every group's symbols are
// looked up and every inner node merges its children, which are single symbols or arrays of the level below, into the
// next array of its own level. Both write up to a vector too much; what is to the right, which comes next, writes over
// that.
#include "codec/huffman_block.h"

#include "codec/huffman_simd.h"

namespace lepton::LEPTON_ISA {
namespace {

// Child p of the inner nodes of `depth`, counted from the left: one of the leaves below, or else of the inner nodes.
template <typename T>
LEPTON_INLINE T& child_of(const HuffmanCode& code, int depth, T* leaf, T* node, int p) {
  const int leaves = code.leaves[depth + 1];
  return p < leaves ? leaf[code.first_leaf[depth + 1] + p] : node[code.first_node[depth + 1] + p - leaves];
}

// Takes n bits off *bits. False where there are not as many, or the padding is not 0.
LEPTON_INLINE bool take_bits(const uint8_t** bits, const uint8_t* end, int64_t n) {
  const int64_t bytes = (n + 7) / 8;
  if (end - *bits < bytes || (n % 8 != 0 && (*bits)[bytes - 1] >> n % 8 != 0)) return false;
  *bits += bytes;
  return true;
}

// Decodes n symbols of `code` from args.bits to out; the bits of the first `coded_nodes` of args.code->node are coded.
// NOLINTNEXTLINE(misc-no-recursion): of depth 1
int64_t decode_tree(const HuffmanCode& code, const DecodeBlockArgs& args, int coded_nodes) {
  if (code.symbol_count() == 1) {
    __builtin_memset(args.out, code.symbols[0], static_cast<size_t>(args.n));
    return 0;
  }
  NodeBits node[kMaxLeaves], leaf[kMaxLeaves];
  (code.max_depth == 0 ? leaf : node)[0].n = args.n;
  const uint8_t* bits = args.bits;
  const auto take = [&](int64_t n) LEPTON_LAMBDA_INLINE { return take_bits(&bits, args.bits_end, n); };
  const auto bad = [&](int64_t n) {
    return -static_cast<int64_t>(args.bits_end - bits < (n + 7) / 8 ? Status::truncated : Status::bad_padding);
  };
  int next_coded = 0;
  uint8_t* decoded_bits = args.node_bits;
  for (int depth = 0; depth <= code.max_depth; ++depth) {
    const int first_leaf = code.first_leaf[depth];
    for (int i = first_leaf + code.singles[depth]; i < first_leaf + code.leaves[depth]; ++i) {
      const int64_t n = int64_t{leaf[i].n} * code.leaf_bits[i];
      leaf[i].bits = bits;
      if (!take(n)) return bad(n);
    }
    if (depth == code.max_depth) break;
    const int first = code.first_node[depth], count = code.first_node[depth + 1] - first;
    const auto child = [&](int p) LEPTON_LAMBDA_INLINE -> NodeBits& { return child_of(code, depth, leaf, node, p); };
    for (int j = 0; j < count; ++j) {
      NodeBits& self = node[first + j];
      self.bits = bits;
      if (next_coded < coded_nodes && args.code->node[next_coded] == first + j) {
        DecodeBlockArgs of_bits = args;
        of_bits.bits = bits;
        of_bits.out = decoded_bits;
        of_bits.n = (self.n + 7) / 8;
        const int64_t used = decode_tree(args.code->bits[next_coded++], of_bits, 0);
        if (used < 0) return used;
        bits += used;
        self.bits = decoded_bits;
        decoded_bits += of_bits.n + kVectorSlack;
        if (self.n % 8 != 0 && self.bits[self.n / 8] >> self.n % 8 != 0)
          return -static_cast<int64_t>(Status::bad_padding);
      } else if (!take(self.n)) {
        return bad(self.n);
      }
      const int ones = count_ones(self.bits, self.n), p = 2 * j;
      child(p).n = self.n - ones;
      child(p + 1).n = ones;
    }
  }

  for (int depth = code.max_depth; depth >= 0; --depth) {
    uint8_t* out = depth == 0 ? args.out : args.level[depth & 1];
    const int first_leaf = code.first_leaf[depth];
    for (int i = first_leaf + code.singles[depth]; i < first_leaf + code.leaves[depth]; out += leaf[i++].n) {
      unpack(out, leaf[i].n, leaf[i].bits, code.leaf_bits[i], code.symbols + code.leaf_begin[i]);
    }
    if (depth == code.max_depth) continue;
    const int first = code.first_node[depth], count = code.first_node[depth + 1] - first;
    const int singles_below = code.singles[depth + 1];
    const auto child = [&](int p) LEPTON_LAMBDA_INLINE -> NodeBits& { return child_of(code, depth, leaf, node, p); };
    const uint8_t* const single = code.symbols + code.leaf_begin[code.first_leaf[depth + 1]];
    const uint8_t* in = args.level[(depth + 1) & 1];
    for (int j = 0; j < count; ++j) {
      const NodeBits& self = node[first + j];
      const int p = 2 * j;
      if (p + 1 < singles_below) {
        blend(out, self.n, self.bits, single[p], single[p + 1]);
      } else if (p < singles_below) {
        merge_leaf(out, self.n, self.bits, single[p], in, args.ahead);
        in += child(p + 1).n;
      } else {
        merge_nodes(out, self.n, self.bits, in, in + child(p).n, args.ahead);
        in += self.n;
      }
      out += self.n;
    }
  }
  return bits - args.bits;
}

// Writes n symbols as `code` and returns how many bytes that took, or kNoCode. A node's bits are written to
// place_for(node), then seen by written(node, bits, n), which returns where the next bits go.
struct EncodeTreeArgs {
  const HuffmanCode* code;
  const uint8_t *symbols, *rank_of;
  int n;
  uint8_t *out, *scratch;
  Lines* ahead;
};
template <typename PlaceFor, typename Written>
int64_t encode_tree(const EncodeTreeArgs& args, const PlaceFor& place_for, const Written& written) {
  const HuffmanCode& code = *args.code;
  uint8_t* const ranks = args.scratch;
  uint8_t* const level[2] = {ranks + args.n + kVectorSlack, ranks + args.n + kVectorSlack + level_bound(args.n)};
  struct Ranks {
    const uint8_t* ranks;
    int n;
  } node[kMaxLeaves], leaf[kMaxLeaves];
  (code.max_depth == 0 ? leaf : node)[0] = {ranks, args.n};
  bool all_coded = true;
  if (code.max_depth == 0) all_coded = translate(args.symbols, args.n, args.rank_of, ranks);
  uint8_t* bits = args.out;
  for (int depth = 0; depth <= code.max_depth; ++depth) {
    const int first_leaf = code.first_leaf[depth];
    for (int i = first_leaf + code.singles[depth]; i < first_leaf + code.leaves[depth]; ++i) {
      pack(leaf[i].ranks, leaf[i].n, static_cast<uint8_t>(code.leaf_begin[i]), code.leaf_bits[i], bits);
      bits += plain_bytes(leaf[i].n, code.leaf_bits[i]);
    }
    if (depth == code.max_depth) break;
    const int first = code.first_node[depth], count = code.first_node[depth + 1] - first;
    const int singles_below = code.singles[depth + 1];
    uint8_t* out = level[(depth + 1) & 1];
    for (int j = 0; j < count; ++j) {
      const Ranks self = node[first + j];
      const auto threshold = static_cast<uint8_t>(code.middle[first + j]);
      const int p = 2 * j;
      Ranks& left = child_of(code, depth, leaf, node, p);
      Ranks& right = child_of(code, depth, leaf, node, p + 1);
      uint8_t* const to = place_for(first + j, bits);
      // The root's symbols are not ranks yet.
      const auto split = [&]<bool keep_left, bool keep_right>(uint8_t* to_left,
                                                              uint8_t* to_right) LEPTON_LAMBDA_INLINE {
        return depth == 0
                   ? partition_symbols<keep_left, keep_right>(args.symbols, self.n, args.rank_of, ranks, &all_coded,
                                                              threshold, to, to_left, to_right, args.ahead)
                   : partition<keep_left, keep_right>(self.ranks, self.n, threshold, to, to_left, to_right, args.ahead);
      };
      if (p + 1 < singles_below) {
        split.template operator()<false, false>(nullptr, nullptr);
      } else if (p < singles_below) {
        right = {out, split.template operator()<false, true>(nullptr, out)};
        out += right.n + kVectorSlack;
      } else {
        uint8_t* const second = out + self.n + kVectorSlack;
        right = {second, split.template operator()<true, true>(out, second)};
        left = {out, self.n - right.n};
        out = second + right.n + kVectorSlack;
      }
      bits = written(first + j, to, self.n);
      if (bits == nullptr) return kNoCode;
    }
  }
  return all_coded || code.symbol_count() == kMaxLeaves ? bits - args.out : kNoCode;
}

}  // namespace

int64_t huffman_decode_block(const DecodeBlockArgs& args) {
  return decode_tree(args.code->tree, args, args.code->coded_nodes);
}

int64_t huffman_encode_block(const EncodeBlockArgs& args) {
  const TreeCode& code = *args.code;
  uint8_t* const node_bits = args.scratch + tree_scratch(args.n);
  uint8_t* const scratch = node_bits + plain_bytes(args.n, 1) + kVectorSlack;
  const auto behind = [](int, uint8_t* bits, int n) { return bits + plain_bytes(n, 1); };
  int next = 0;
  uint8_t* out = nullptr;
  const auto is_coded = [&](int node) { return next < code.coded_nodes && code.node[next] == node; };
  return encode_tree(
      {&code.tree, args.symbols, args.rank_of[0], args.n, args.out, args.scratch, args.ahead},
      [&](int node, uint8_t* bits) {
        out = bits;
        return is_coded(node) ? node_bits : bits;
      },
      [&](int node, uint8_t* bits, int n) -> uint8_t* {
        if (args.node_bits != nullptr) args.node_bits[node] = {bits, n};
        if (!is_coded(node)) return behind(node, bits, n);
        const HuffmanCode& of_bits = code.bits[next++];
        const auto in_place = [](int, uint8_t* to) { return to; };
        const int64_t bytes = encode_tree(
            {&of_bits, bits, args.rank_of[next], static_cast<int>(plain_bytes(n, 1)), out, scratch, args.ahead},
            in_place, behind);
        return bytes < 0 ? nullptr : out + bytes;
      });
}

}  // namespace lepton::LEPTON_ISA
