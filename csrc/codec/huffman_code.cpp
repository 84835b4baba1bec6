// huffman_code.cpp - see huffman_code.h.
#include "codec/huffman_code.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cstring>

namespace lepton {
namespace {

constexpr uint8_t kPlainTree = 0;

// False when the leaves do not fill a binary tree exactly.
bool derive_shape(HuffmanCode* code) {
  int nodes = code->max_depth > 0 ? 1 : 0, node = 0, leaf = code->max_depth > 0 ? 0 : 1;
  code->first_leaf[0] = 0;
  for (int depth = 0; depth < code->max_depth; ++depth) {
    code->first_node[depth] = static_cast<uint16_t>(node);
    node += nodes;
    code->first_leaf[depth + 1] = static_cast<uint16_t>(leaf);
    leaf += code->leaves[depth + 1];
    nodes = 2 * nodes - code->leaves[depth + 1];
    if (nodes < 0 || node + nodes >= kMaxLeaves) return false;
  }
  code->first_node[code->max_depth] = code->first_node[code->max_depth + 1] = static_cast<uint16_t>(node);
  if (nodes != 0 || leaf != code->leaf_count) return false;

  // From the deepest level up: child p of depth d is the leaf p, or else the inner node p - leaves[d].
  for (int depth = code->max_depth - 1; depth >= 0; --depth) {
    const int below = depth + 1, leaves_below = code->leaves[below];
    const auto first_rank = [&](int p) {
      return p < leaves_below ? code->first_leaf[below] + p : code->begin[code->first_node[below] + p - leaves_below];
    };
    const int first = code->first_node[depth], count = code->first_node[depth + 1] - first;
    for (int j = 0; j < count; ++j) {
      code->begin[first + j] = static_cast<uint16_t>(first_rank(2 * j));
      code->middle[first + j] = static_cast<uint16_t>(first_rank(2 * j + 1));
    }
    for (int j = 0; j < count; ++j)
      code->end[first + j] = static_cast<uint16_t>(j + 1 < count ? code->begin[first + j + 1] : code->leaf_count);
  }
  return true;
}

}  // namespace

void build_code(const uint32_t* counts, HuffmanCode* code) {
  // Two queues: leaves sorted by count, and inner nodes, which come out sorted by themselves.
  struct Node {
    uint64_t count;
    int parent;
  };
  std::array<uint8_t, kMaxLeaves> by_count;
  int n = 0;
  for (int symbol = 0; symbol < kMaxLeaves; ++symbol)
    if (counts[symbol] > 0) by_count[n++] = static_cast<uint8_t>(symbol);
  std::stable_sort(by_count.begin(), by_count.begin() + n, [&](int a, int b) { return counts[a] < counts[b]; });
  std::array<Node, 2 * kMaxLeaves> nodes;
  for (int i = 0; i < n; ++i) nodes[i] = {counts[by_count[i]], 0};
  int leaf = 0, inner = n;
  for (int next = n; next < 2 * n - 1; ++next) {
    const auto take = [&] {
      return leaf < n && (inner >= next || nodes[leaf].count <= nodes[inner].count) ? leaf++ : inner++;
    };
    const int a = take(), b = take();
    nodes[next] = {nodes[a].count + nodes[b].count, 0};
    nodes[a].parent = nodes[b].parent = next;
  }
  std::array<int, 2 * kMaxLeaves> depth;
  std::array<int, kMaxLeaves> leaf_depth{};
  if (n > 0) depth[2 * n - 2] = 0;
  for (int i = 2 * n - 3; i >= 0; --i) depth[i] = depth[nodes[i].parent] + 1;
  for (int i = 0; i < n; ++i) leaf_depth[by_count[i]] = depth[i];

  std::memset(code, 0, sizeof *code);
  code->leaf_count = n;
  std::sort(by_count.begin(), by_count.begin() + n,
            [&](int a, int b) { return leaf_depth[a] != leaf_depth[b] ? leaf_depth[a] < leaf_depth[b] : a < b; });
  for (int rank = 0; rank < n; ++rank) {
    code->symbols[rank] = by_count[rank];
    ++code->leaves[leaf_depth[by_count[rank]]];
    code->max_depth = leaf_depth[by_count[rank]];
  }
  derive_shape(code);
}

int table_bytes(const HuffmanCode& code) { return 3 + 2 * code.max_depth + code.leaf_count; }

void write_table(const HuffmanCode& code, uint8_t* out) {
  *out++ = kPlainTree;
  *out++ = static_cast<uint8_t>(code.leaf_count - 1);
  *out++ = static_cast<uint8_t>(code.max_depth);
  for (int depth = 1; depth <= code.max_depth; ++depth) {
    *out++ = static_cast<uint8_t>(code.leaves[depth]);
    *out++ = static_cast<uint8_t>(code.leaves[depth] >> 8);
  }
  std::memcpy(out, code.symbols, static_cast<size_t>(code.leaf_count));
}

Status read_table(const uint8_t** in, const uint8_t* end, HuffmanCode* code) {
  const uint8_t* p = *in;
  if (end - p < 3) return Status::truncated;
  if (p[0] != kPlainTree) return Status::bad_mode;
  std::memset(code, 0, sizeof *code);
  code->leaf_count = p[1] + 1;
  code->max_depth = p[2];
  p += 3;
  if (code->max_depth > kMaxDepth || (code->max_depth == 0) != (code->leaf_count == 1)) return Status::bad_table;
  if (end - p < 2 * code->max_depth + code->leaf_count) return Status::truncated;
  code->leaves[0] = code->max_depth == 0;
  for (int depth = 1; depth <= code->max_depth; ++depth, p += 2) {
    code->leaves[depth] = static_cast<uint16_t>(p[0] | p[1] << 8);
    if (code->leaves[depth] > kMaxLeaves) return Status::bad_table;
  }
  if (!derive_shape(code) || code->leaves[code->max_depth] == 0) return Status::bad_table;
  std::memcpy(code->symbols, p, static_cast<size_t>(code->leaf_count));
  std::bitset<kMaxLeaves> seen;
  for (int depth = 0, rank = 0; depth <= code->max_depth; ++depth) {
    for (int i = 0; i < code->leaves[depth]; ++i, ++rank) {
      if (seen[p[rank]] || (i > 0 && p[rank] <= p[rank - 1])) return Status::bad_table;
      seen[p[rank]] = true;
    }
  }
  *in = p + code->leaf_count;
  return Status::ok;
}

}  // namespace lepton
