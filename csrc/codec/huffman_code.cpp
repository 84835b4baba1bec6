// huffman_code.cpp - see huffman_code.h.
#include "codec/huffman_code.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cstring>

namespace lepton {
namespace {

constexpr uint8_t kPlainTree = 0, kGroupTree = 1;

// What a level of the tree costs besides its bit, in 256ths of one: a merge more for every symbol below it.
constexpr uint64_t kMergePrice = 5;

// The plain bits that tell `symbols` symbols apart.
constexpr int bits_for(int symbols) {
  int bits = 0;
  while (1 << bits < symbols) ++bits;
  return bits;
}

// log2 of 1 + i / 256 in 16 bits after the point, by squaring: the same everywhere.
struct LogTable {
  uint32_t log2[257];
};
constexpr LogTable make_log_table() {
  LogTable table{};
  for (int i = 0; i <= 256; ++i) {
    uint64_t x = (uint64_t{256} + i) << 23;  // 1 is 2^31
    for (int bit = 15; i < 256 && bit >= 0; --bit) {
      x = x * x >> 31;
      if (x >> 32) table.log2[i] |= 1u << bit, x >>= 1;
    }
  }
  table.log2[256] = 1 << 16;
  return table;
}
constexpr LogTable kLog = make_log_table();

// log2(x), x >= 1, in 16 bits after the point.
uint32_t log2_of(uint32_t x) {
  const int whole = 31 - __builtin_clz(x);
  const uint32_t fraction = static_cast<uint32_t>(uint64_t{x} << (32 - whole));  // of 2^32
  const uint32_t i = fraction >> 24, rest = fraction >> 8 & 0xffff;
  return (static_cast<uint32_t>(whole) << 16) + kLog.log2[i] + ((kLog.log2[i + 1] - kLog.log2[i]) * rest >> 16);
}

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

  for (int i = 0; i < leaf; ++i)
    code->leaf_bits[i] = static_cast<uint8_t>(bits_for(code->leaf_begin[i + 1] - code->leaf_begin[i]));

  // From the deepest level up: child p of depth d is the leaf p, or else the inner node p - leaves[d].
  for (int depth = code->max_depth - 1; depth >= 0; --depth) {
    const int below = depth + 1, leaves_below = code->leaves[below];
    const auto first_rank = [&](int p) {
      return p < leaves_below ? code->leaf_begin[code->first_leaf[below] + p]
                              : code->begin[code->first_node[below] + p - leaves_below];
    };
    const int first = code->first_node[depth], count = code->first_node[depth + 1] - first;
    for (int j = 0; j < count; ++j) {
      code->begin[first + j] = static_cast<uint16_t>(first_rank(2 * j));
      code->middle[first + j] = static_cast<uint16_t>(first_rank(2 * j + 1));
    }
    for (int j = 0; j < count; ++j)
      code->end[first + j] = static_cast<uint16_t>(j + 1 < count ? code->begin[first + j + 1] : code->symbol_count());
  }
  return true;
}

// A leaf on its way into the tree.
struct Leaf {
  uint64_t count = 0;
  int depth = 0, size = 0;
  std::array<uint8_t, kMaxLeaves> symbols;  // size of them, in rising order
};

// Cuts by_count[n], the symbols from the most frequent one down, into leaves.
int cut_into_leaves(const uint32_t* counts, const std::array<uint8_t, kMaxLeaves>& by_count, int n, Leaf* leaves) {
  std::array<uint64_t, kMaxLeaves + 1> sum{};
  for (int i = 0; i < n; ++i) sum[i + 1] = sum[i] + counts[by_count[i]];
  const uint32_t log_total = log2_of(static_cast<uint32_t>(sum[n]));
  std::array<uint64_t, kMaxLeaves + 1> cost{};  // of the symbols from i on, in 2^16ths of a bit
  std::array<int, kMaxLeaves> size;
  for (int i = n - 1; i >= 0; --i) {
    cost[i] = ~uint64_t{0};
    for (int bits = 0; bits <= 8 && (bits == 0 || 1 << (bits - 1) < n - i); ++bits) {
      const int most = std::min(1 << bits, n - i);
      const uint64_t count = sum[i + most] - sum[i];
      const uint64_t depth = (log_total - log2_of(static_cast<uint32_t>(count))) * (256 + kMergePrice) >> 8;
      const uint64_t total = count * (depth + (static_cast<uint64_t>(bits) << 16)) + cost[i + most];
      if (total < cost[i]) cost[i] = total, size[i] = most;
    }
  }
  int n_leaves = 0;
  for (int i = 0; i < n; i += size[i]) {
    Leaf& leaf = leaves[n_leaves++];
    leaf.size = size[i];
    leaf.count = sum[i + size[i]] - sum[i];
    std::copy_n(by_count.begin() + i, size[i], leaf.symbols.begin());
    std::sort(leaf.symbols.begin(), leaf.symbols.begin() + size[i]);
  }
  return n_leaves;
}

// The depths of a Huffman tree over leaves in rising order of their counts.
void assign_depths(Leaf* const* leaves, int n) {
  // Two queues: leaves sorted by count, and inner nodes, which come out sorted by themselves.
  struct Node {
    uint64_t count;
    int parent, depth;
  };
  std::array<Node, 2 * kMaxLeaves> nodes;
  for (int i = 0; i < n; ++i) nodes[i] = {leaves[i]->count, 0, 0};
  int leaf = 0, inner = n;
  for (int next = n; next < 2 * n - 1; ++next) {
    const auto take = [&] {
      return leaf < n && (inner >= next || nodes[leaf].count <= nodes[inner].count) ? leaf++ : inner++;
    };
    const int a = take(), b = take();
    nodes[next] = {nodes[a].count + nodes[b].count, 0, 0};
    nodes[a].parent = nodes[b].parent = next;
  }
  for (int i = 2 * n - 3; i >= 0; --i) nodes[i].depth = nodes[nodes[i].parent].depth + 1;
  for (int i = 0; i < n; ++i) leaves[i]->depth = nodes[i].depth;
}

}  // namespace

void build_code(const uint32_t* counts, HuffmanCode* code) {
  std::array<uint8_t, kMaxLeaves> by_count;
  int n = 0;
  for (int symbol = 0; symbol < kMaxLeaves; ++symbol)
    if (counts[symbol] > 0) by_count[n++] = static_cast<uint8_t>(symbol);
  std::stable_sort(by_count.begin(), by_count.begin() + n, [&](int a, int b) { return counts[a] > counts[b]; });
  std::array<Leaf, kMaxLeaves> leaves;
  const int leaf_count = cut_into_leaves(counts, by_count, n, leaves.data());
  std::array<Leaf*, kMaxLeaves> order;
  for (int i = 0; i < leaf_count; ++i) order[i] = &leaves[i];
  std::stable_sort(order.begin(), order.begin() + leaf_count,
                   [](const Leaf* a, const Leaf* b) { return a->count < b->count; });
  assign_depths(order.data(), leaf_count);
  std::sort(order.begin(), order.begin() + leaf_count, [](const Leaf* a, const Leaf* b) {
    if (a->depth != b->depth) return a->depth < b->depth;
    if ((a->size == 1) != (b->size == 1)) return a->size == 1;
    return a->symbols[0] < b->symbols[0];
  });

  std::memset(code, 0, sizeof *code);
  code->leaf_count = leaf_count;
  int rank = 0;
  for (int i = 0; i < leaf_count; ++i) {
    const Leaf& leaf = *order[i];
    code->leaf_begin[i] = static_cast<uint16_t>(rank);
    std::copy_n(leaf.symbols.begin(), leaf.size, code->symbols + rank);
    rank += leaf.size;
    ++code->leaves[leaf.depth];
    code->singles[leaf.depth] += leaf.size == 1;
    code->max_depth = leaf.depth;
  }
  code->leaf_begin[leaf_count] = static_cast<uint16_t>(rank);
  derive_shape(code);
}

int table_bytes(const HuffmanCode& code) {
  const bool groups = code.symbol_count() > code.leaf_count;
  return 3 + 2 * code.max_depth + (groups ? code.leaf_count : 0) + code.symbol_count();
}

void write_table(const HuffmanCode& code, uint8_t* out) {
  const bool groups = code.symbol_count() > code.leaf_count;
  *out++ = groups ? kGroupTree : kPlainTree;
  *out++ = static_cast<uint8_t>(code.leaf_count - 1);
  *out++ = static_cast<uint8_t>(code.max_depth);
  for (int depth = 1; depth <= code.max_depth; ++depth) {
    *out++ = static_cast<uint8_t>(code.leaves[depth]);
    *out++ = static_cast<uint8_t>(code.leaves[depth] >> 8);
  }
  for (int leaf = 0; groups && leaf < code.leaf_count; ++leaf)
    *out++ = static_cast<uint8_t>(code.leaf_begin[leaf + 1] - code.leaf_begin[leaf] - 1);
  std::memcpy(out, code.symbols, static_cast<size_t>(code.symbol_count()));
}

Status read_table(const uint8_t** in, const uint8_t* end, HuffmanCode* code) {
  const uint8_t* p = *in;
  if (end - p < 3) return Status::truncated;
  const bool groups = p[0] == kGroupTree;
  if (!groups && p[0] != kPlainTree) return Status::bad_mode;
  std::memset(code, 0, sizeof *code);
  code->leaf_count = p[1] + 1;
  code->max_depth = p[2];
  p += 3;
  if (code->max_depth > kMaxDepth || (code->max_depth == 0) != (code->leaf_count == 1)) return Status::bad_table;
  if (end - p < 2 * code->max_depth + (groups ? code->leaf_count : 0)) return Status::truncated;
  code->leaves[0] = code->max_depth == 0;
  for (int depth = 1; depth <= code->max_depth; ++depth, p += 2) {
    code->leaves[depth] = static_cast<uint16_t>(p[0] | p[1] << 8);
    if (code->leaves[depth] > kMaxLeaves) return Status::bad_table;
  }
  int symbol_count = 0;
  for (int leaf = 0; leaf < code->leaf_count; ++leaf) {
    code->leaf_begin[leaf] = static_cast<uint16_t>(symbol_count);
    symbol_count += groups ? *p++ + 1 : 1;
    if (symbol_count > kMaxLeaves) return Status::bad_table;
  }
  code->leaf_begin[code->leaf_count] = static_cast<uint16_t>(symbol_count);
  if (groups && symbol_count == code->leaf_count) return Status::bad_table;
  if (end - p < symbol_count) return Status::truncated;
  if (!derive_shape(code) || code->leaves[code->max_depth] == 0) return Status::bad_table;
  std::memcpy(code->symbols, p, static_cast<size_t>(symbol_count));
  std::bitset<kMaxLeaves> seen;
  for (int depth = 0, leaf = 0; depth <= code->max_depth; ++depth) {
    for (int i = 0; i < code->leaves[depth]; ++i, ++leaf) {
      const int begin = code->leaf_begin[leaf], size = code->leaf_begin[leaf + 1] - begin;
      const bool single = size == 1, after_group = i > code->singles[depth];
      if (single && after_group) return Status::bad_table;
      if (i > 0 && (after_group || single) && p[begin] <= p[code->leaf_begin[leaf - 1]]) return Status::bad_table;
      code->singles[depth] += single;
      for (int s = 0; s < size; ++s) {
        if (seen[p[begin + s]] || (s > 0 && p[begin + s] <= p[begin + s - 1])) return Status::bad_table;
        seen[p[begin + s]] = true;
      }
    }
  }
  *in = p + symbol_count;
  return Status::ok;
}

}  // namespace lepton
