// huffman_code.cpp - see huffman_code.h.
#include "codec/huffman_code.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

namespace lepton {
namespace {

// What a level of the tree costs besides its bit, in 256ths of one: a merge more for every symbol below it.
constexpr uint64_t kMergePrice = 4;
// The cut into leaves reckons with depths that are fractions. Of few symbols, cuts for other prices may make a tree
// that costs less.
constexpr int kFewSymbols = 64;
constexpr uint64_t kOtherPrices[] = {0, 16};
constexpr int kMaxPlaceBits = 8;  // of a place in a group

// The plain bits that tell `symbols` symbols apart.
constexpr int bits_for(int symbols) {
  int bits = 0;
  while (1 << bits < symbols) ++bits;
  return bits;
}

// log2 of 1 + i / 256 in 16 bits after the point, by squaring: the same everywhere.
struct LogTable {
  uint32_t log2[256];
};
constexpr LogTable make_log_table() {
  LogTable table{};
  for (int i = 0; i < 256; ++i) {
    uint64_t x = (uint64_t{256} + i) << 23;  // 1 is 2^31
    for (int bit = 15; bit >= 0; --bit) {
      x = x * x >> 31;
      if (x >> 32) table.log2[i] |= 1u << bit, x >>= 1;
    }
  }
  return table;
}
constexpr LogTable kLog = make_log_table();

// log2(x), x >= 1, in 16 bits after the point; too small by up to 0.006.
uint32_t log2_of(uint32_t x) {
  const int whole = 31 - __builtin_clz(x);
  const uint64_t fraction = uint64_t{x} << (32 - whole);  // of 2^32
  return (static_cast<uint32_t>(whole) << 16) + kLog.log2[fraction >> 24 & 0xff];
}

// Fills in what follows from the leaves at each depth, which fill a binary tree exactly.
void derive_shape(HuffmanCode* code) {
  int nodes = code->max_depth > 0 ? 1 : 0, node = 0, leaf = code->max_depth > 0 ? 0 : 1;
  code->first_leaf[0] = 0;
  for (int depth = 0; depth < code->max_depth; ++depth) {
    code->first_node[depth] = static_cast<uint16_t>(node);
    node += nodes;
    code->first_leaf[depth + 1] = static_cast<uint16_t>(leaf);
    leaf += code->leaves[depth + 1];
    nodes = 2 * nodes - code->leaves[depth + 1];
  }
  code->first_node[code->max_depth] = code->first_node[code->max_depth + 1] = static_cast<uint16_t>(node);

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
}

// The symbols from the most frequent one down, of equals the lower one first, and how often those before the i-th
// occur; from the n-th on all of them.
struct ByCount {
  int n = 0;
  std::array<uint8_t, kMaxLeaves> symbols;
  std::array<uint32_t, 2 * kMaxLeaves> sum;

  explicit ByCount(const Counts& counts) {
    for (int symbol = 0; symbol < kMaxLeaves; ++symbol)
      if (counts.of[symbol] > 0) symbols[n++] = static_cast<uint8_t>(symbol);
    const uint32_t most = *std::max_element(std::begin(counts.of), std::end(counts.of));
    for (int shift = 0; shift < 32 && most >> shift > 0; shift += 8) sort_by_digit(counts, shift);
    sum[0] = 0;
    for (int i = 0; i < n; ++i) sum[i + 1] = sum[i] + counts.of[symbols[i]];
    std::fill(sum.begin() + n + 1, sum.end(), sum[n]);
  }

 private:
  // A pass of a radix sort: comparisons of counts are what a processor cannot predict.
  void sort_by_digit(const Counts& counts, int shift) {
    const auto digit_of = [&](int symbol) { return 255 - (counts.of[symbol] >> shift & 255); };
    std::array<uint16_t, 257> place{};
    for (int i = 0; i < n; ++i) ++place[digit_of(symbols[i]) + 1];
    for (int digit = 0; digit < 256; ++digit) place[digit + 1] += place[digit];
    const auto before = symbols;
    for (int i = 0; i < n; ++i) symbols[place[digit_of(before[i])]++] = before[i];
  }
};

// A leaf on its way into the tree: `size` symbols of ByCount from `begin` on.
struct Leaf {
  uint32_t count;
  int begin, size, depth;
};

struct Tree {
  std::array<Leaf, kMaxLeaves> leaves;  // in rising order of their counts
  int n = 0;
  uint64_t cost = 0;  // in 256ths of a bit, and of a merge at its price
};

// The depths of a Huffman tree.
void assign_depths(Tree* tree) {
  // Two queues: leaves sorted by count, and inner nodes, which come out sorted by themselves.
  struct Node {
    uint64_t count;
    int parent, depth;
  };
  const int n = tree->n;
  std::array<Node, 2 * kMaxLeaves> nodes;
  for (int i = 0; i < n; ++i) nodes[i] = {tree->leaves[i].count, 0, 0};
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
  for (int i = 0; i < n; ++i) tree->leaves[i].depth = nodes[i].depth;
}

// Cuts the symbols into the leaves that would take the fewest bits if depths could be fractions, a level at this price,
// and makes a tree of them.
Tree cut(const ByCount& by_count, uint64_t merge_price) {
  const int n = by_count.n;
  const auto& sum = by_count.sum;
  const uint32_t log_total = log2_of(sum[n]);
  // What the symbols from i on take, in 2^16ths of a bit; in the lowest kBitsOf bits how many a place in their first
  // group has. Groups may reach beyond the last symbol: the smallest one that does costs least.
  constexpr int kBitsOf = 4;
  constexpr uint64_t kCost = ~uint64_t{0} << kBitsOf;
  std::array<uint64_t, 2 * kMaxLeaves> best{};
  for (int i = n - 1; i >= 0; --i) {
    uint64_t least = ~uint64_t{0};
    for (int bits = 0; bits <= kMaxPlaceBits; ++bits) {
      const uint32_t count = sum[i + (1 << bits)] - sum[i];
      const uint32_t depth = (log_total - log2_of(count)) * static_cast<uint32_t>(256 + merge_price) >> 8;
      const uint64_t group = uint64_t{count} * (depth + (static_cast<uint32_t>(bits) << 16)) << kBitsOf | bits;
      least = std::min(least, group + (best[i + (1 << bits)] & kCost));
    }
    best[i] = least;
  }
  Tree tree;
  std::array<uint64_t, kMaxLeaves> order;  // rising counts; of equals the one that begins first
  const auto size_from = [&](int i) { return std::min(1 << (best[i] & ~kCost), n - i); };
  for (int i = 0; i < n; i += size_from(i))
    order[tree.n++] = static_cast<uint64_t>(sum[i + size_from(i)] - sum[i]) << 8 | static_cast<uint64_t>(i);
  std::sort(order.begin(), order.begin() + tree.n);
  for (int i = 0; i < tree.n; ++i) {
    const int begin = static_cast<int>(order[i] & 255);
    tree.leaves[i] = {static_cast<uint32_t>(order[i] >> 8), begin, size_from(begin), 0};
  }
  assign_depths(&tree);
  for (int i = 0; i < tree.n; ++i) {
    const Leaf& leaf = tree.leaves[i];
    tree.cost +=
        uint64_t{leaf.count} * (static_cast<uint64_t>(leaf.depth) * (256 + kMergePrice) + 256 * bits_for(leaf.size));
  }
  return tree;
}

// The table's numbers from 1 on are Elias gamma codes: as many 0 bits as follow the leading 1, the 1, and those bits.
class GammaWriter {
 public:
  explicit GammaWriter(uint8_t* out) : out_(out) {}

  // Up to 8 bytes behind what was written may change.
  void put(uint32_t value) {
    const int below = 31 - __builtin_clz(value);
    word_ |= static_cast<uint64_t>((value ^ 1u << below) << (below + 1) | 1u << below) << used_;
    used_ += 2 * below + 1;
    std::memcpy(out_, &word_, sizeof word_);
    out_ += used_ / 8;
    word_ >>= used_ / 8 * 8;
    used_ %= 8;
  }
  uint8_t* finish() { return out_ + (used_ > 0); }

 private:
  uint8_t* out_;
  uint64_t word_ = 0;
  int used_ = 0;
};

class GammaReader {
 public:
  GammaReader(const uint8_t* in, const uint8_t* end) : in_(in), bits_(8 * static_cast<uint64_t>(end - in)) {}

  // Two numbers, 0 each where the data ends or it is larger than the table has any.
  std::array<uint32_t, 2> get_two() {
    uint64_t word = 0;
    if (bits_ - at_ >= 64)
      std::memcpy(&word, in_ + at_ / 8, 8);
    else
      std::memcpy(&word, in_ + at_ / 8, bits_ / 8 - at_ / 8);
    word >>= at_ % 8;
    const uint32_t first = take(&word);
    return {first, first == 0 ? 0 : take(&word)};
  }
  bool near_end() const { return bits_ - at_ < 2 * kMostBelow + 1; }
  // Where the next byte begins, or nullptr if the bits before it are not 0.
  const uint8_t* finish() const {
    const uint8_t* const p = in_ + at_ / 8;
    return at_ % 8 == 0 ? p : *p >> at_ % 8 == 0 ? p + 1 : nullptr;
  }

 private:
  static constexpr unsigned kMostBelow = 8;

  uint32_t take(uint64_t* word) {
    const auto below = static_cast<unsigned>(__builtin_ctzll(*word | 1u << (kMostBelow + 1)));
    if (below > kMostBelow || 2 * below + 1 > bits_ - at_) return 0;
    const auto number = static_cast<uint32_t>(*word >> below);
    at_ += 2 * below + 1;
    *word >>= 2 * below + 1;
    return 1u << below | (number >> 1 & ((1u << below) - 1));
  }

  const uint8_t* in_;
  uint64_t bits_, at_ = 0;
};

// The leaves of a tree and `none`, for symbols that it lacks, the latest named one first; the first place is that of
// the last one named, which is not named again. For a writer, who asks for places:
class PlacesOfLeaves {
 public:
  explicit PlacesOfLeaves(int leaf_count) : size_((leaf_count + 2 + 7) / 8 * 8) {
    // Nobody came last, before him `none`, then the leaves; what fills the last vector never came.
    named_at_[leaf_count + 1] = 0;
    named_at_[leaf_count] = -1;
    for (int leaf = 0; leaf < leaf_count; ++leaf) named_at_[leaf] = static_cast<int16_t>(-2 - leaf);
    std::fill(named_at_.begin() + leaf_count + 2, named_at_.begin() + size_, INT16_MIN);
  }
  // From 1 on; names it.
  uint32_t take(int leaf) {
    const int16_t at = named_at_[leaf];
    int16_t later = 0;
    for (int other = 0; other < size_; ++other) later = static_cast<int16_t>(later + (named_at_[other] > at));
    named_at_[leaf] = ++now_;
    return static_cast<uint32_t>(later);
  }

 private:
  int size_;
  int16_t now_ = 0;
  std::array<int16_t, kMaxLeaves + 8> named_at_;
};

// For a reader, who asks for leaves:
class LeavesByPlace {
 public:
  explicit LeavesByPlace(int leaf_count) : size_(leaf_count + 2) {
    order_[0] = kNobody;
    order_[1] = static_cast<uint16_t>(leaf_count);  // none
    for (int leaf = 0; leaf < leaf_count; ++leaf) order_[leaf + 2] = static_cast<uint16_t>(leaf);
    std::memcpy(front_.data(), order_.data(), sizeof front_);
  }
  // kNobody where nobody is.
  uint16_t take(uint32_t place) {
    if (place == 0 || place >= static_cast<uint32_t>(size_)) return kNobody;
    if (place >= kFront) [[unlikely]] {
      const uint16_t leaf = order_[place];
      std::memmove(&order_[kFront + 1], &order_[kFront], (place - kFront) * sizeof order_[0]);
      order_[kFront] = static_cast<uint16_t>(front_.back() >> 48);
      move_to_front(kFront - 1, leaf);
      return leaf;
    }
    const auto leaf = static_cast<uint16_t>(front_[place / 4] >> 16 * (place % 4));
    move_to_front(place, leaf);
    return leaf;
  }

  static constexpr uint16_t kNobody = 0xffff;

 private:
  static constexpr uint32_t kFront = 16;
  using Front = std::array<uint64_t, kFront / 4>;
  // moved[p]: the places up to p.
  struct Moved {
    Front moved[kFront];
  };
  static constexpr Moved kMoved = [] {
    Moved table{};
    for (uint32_t place = 0; place < kFront; ++place)
      for (uint32_t p = 0; p <= place; ++p) table.moved[place][p / 4] |= uint64_t{0xffff} << 16 * (p % 4);
    return table;
  }();

  // The leaf comes first, those before `place` move on by one. Without a branch, for nothing foretells a place.
  void move_to_front(uint32_t place, uint16_t leaf) {
    const Front& moved = kMoved.moved[place];
    uint64_t from_before = leaf;
    for (size_t i = 0; i < front_.size(); ++i) {
      const uint64_t word = front_[i];
      front_[i] = (word & ~moved[i]) | ((word << 16 | from_before) & moved[i]);
      from_before = word >> 48;
    }
  }

  Front front_;  // the first places, the very first one lowest
  int size_;
  std::array<uint16_t, kMaxLeaves + 2 + kFront> order_;  // of the places behind them
};

// A tree's table: how many inner nodes there are at depth 0, 1, ..., a byte each, to the first 0; then the symbols from
// 0 to 255 in runs of one leaf: its place among the latest leaves, the length of the run.
uint8_t* write_tree(const HuffmanCode& code, uint8_t* out) {
  for (int depth = 0; depth <= code.max_depth; ++depth)
    *out++ = static_cast<uint8_t>(code.first_node[depth + 1] - code.first_node[depth]);
  std::array<int, 256> leaf_of;
  leaf_of.fill(code.leaf_count);
  for (int leaf = 0; leaf < code.leaf_count; ++leaf)
    for (int rank = code.leaf_begin[leaf]; rank < code.leaf_begin[leaf + 1]; ++rank) leaf_of[code.symbols[rank]] = leaf;
  PlacesOfLeaves places(code.leaf_count);
  GammaWriter writer(out);
  for (int symbol = 0; symbol < 256;) {
    int next = symbol + 1;
    while (next < 256 && leaf_of[next] == leaf_of[symbol]) ++next;
    writer.put(places.take(leaf_of[symbol]));
    writer.put(static_cast<uint32_t>(next - symbol));
    symbol = next;
  }
  return writer.finish();
}

Status read_tree(const uint8_t** in, const uint8_t* end, HuffmanCode* code) {
  std::memset(code, 0, sizeof *code);
  const uint8_t* p = *in;
  for (int depth = 0, nodes = 1;; ++depth) {
    if (p == end) return Status::truncated;
    const int inner = *p++, leaves = nodes - inner;
    if (leaves < 0 || (inner > 0 && depth == kMaxDepth) || code->leaf_count + leaves + inner > kMaxLeaves)
      return Status::bad_table;
    code->leaves[depth] = static_cast<uint16_t>(leaves);
    code->leaf_count += leaves;
    code->max_depth = depth;
    if (inner == 0) break;
    nodes = 2 * inner;
  }

  std::array<uint16_t, 256 + 7> leaf_of;  // written eight at a time
  std::array<uint16_t, kMaxLeaves + 1> sizes{};
  LeavesByPlace leaves(code->leaf_count);
  const int none = code->leaf_count;
  GammaReader reader(p, end);
  for (uint32_t symbol = 0; symbol < 256;) {
    const auto [place, run] = reader.get_two();
    if (run == 0) return reader.near_end() ? Status::truncated : Status::bad_table;
    const uint16_t leaf = leaves.take(place);
    if (leaf == LeavesByPlace::kNobody || run > 256 - symbol) return Status::bad_table;
    sizes[leaf] += static_cast<uint16_t>(run);
    std::array<uint16_t, 8> eight;
    eight.fill(leaf);
    for (uint32_t i = symbol; i < symbol + run; i += 8) std::memcpy(&leaf_of[i], eight.data(), sizeof eight);
    symbol += run;
  }
  if ((p = reader.finish()) == nullptr) return Status::bad_padding;

  for (int depth = 0, leaf = 0; depth <= code->max_depth; ++depth) {
    for (int i = 0; i < code->leaves[depth]; ++i, ++leaf) {
      const bool single = sizes[leaf] == 1;
      if (sizes[leaf] == 0 || (single && i > code->singles[depth])) return Status::bad_table;
      code->singles[depth] += single;
      code->leaf_begin[leaf + 1] = static_cast<uint16_t>(code->leaf_begin[leaf] + sizes[leaf]);
    }
  }
  std::array<uint16_t, kMaxLeaves> next;
  std::copy_n(code->leaf_begin, code->leaf_count, next.begin());
  for (int symbol = 0; symbol < 256; ++symbol)
    if (leaf_of[symbol] != none) code->symbols[next[leaf_of[symbol]]++] = static_cast<uint8_t>(symbol);
  derive_shape(code);
  *in = p;
  return Status::ok;
}

}  // namespace

double entropy_bits(const Counts& counts) {
  uint64_t sum = 0;
  const uint32_t log_total = log2_of(static_cast<uint32_t>(counts.total));
  for (const uint32_t count : counts.of)
    if (count > 0) sum += count * uint64_t{log_total - log2_of(count)};
  return static_cast<double>(sum) / (static_cast<double>(counts.total) * 65536);
}

void build_code(const Counts& counts, HuffmanCode* code) {
  ByCount by_count(counts);
  Tree tree = cut(by_count, kMergePrice);
  if (by_count.n <= kFewSymbols) {
    for (const uint64_t price : kOtherPrices) {
      const Tree other = cut(by_count, price);
      if (other.cost < tree.cost) tree = other;
    }
  }
  std::array<int16_t, kMaxLeaves> leaf_of;
  leaf_of.fill(-1);
  std::array<uint32_t, kMaxLeaves> order;  // by depth, single symbols first, by the lowest symbol
  for (int i = 0; i < tree.n; ++i) {
    const Leaf& leaf = tree.leaves[i];
    int lowest = 255;
    for (int j = leaf.begin; j < leaf.begin + leaf.size; ++j) {
      leaf_of[by_count.symbols[j]] = static_cast<int16_t>(i);
      lowest = std::min<int>(lowest, by_count.symbols[j]);
    }
    order[i] = static_cast<uint32_t>(((leaf.depth << 1 | (leaf.size > 1)) << 8 | lowest) << 8 | i);
  }
  std::sort(order.begin(), order.begin() + tree.n);

  std::memset(code, 0, sizeof *code);
  code->leaf_count = tree.n;
  std::array<int, kMaxLeaves> next;  // the rank of a leaf's next symbol
  int rank = 0;
  for (int i = 0; i < tree.n; ++i) {
    const Leaf& leaf = tree.leaves[order[i] & 255];
    code->leaf_begin[i] = static_cast<uint16_t>(next[order[i] & 255] = rank);
    rank += leaf.size;
    ++code->leaves[leaf.depth];
    code->singles[leaf.depth] += leaf.size == 1;
    code->max_depth = leaf.depth;
  }
  for (int symbol = 0; symbol < kMaxLeaves; ++symbol)
    if (leaf_of[symbol] >= 0) code->symbols[next[leaf_of[symbol]]++] = static_cast<uint8_t>(symbol);
  code->leaf_begin[tree.n] = static_cast<uint16_t>(rank);
  derive_shape(code);
}

int tree_table_bytes(const HuffmanCode& code) {
  uint8_t table[kMaxTreeTable];
  return static_cast<int>(write_tree(code, table) - table);
}

int write_table(const TreeCode& code, uint8_t* out) {
  uint8_t* p = write_tree(code.tree, out);
  *p++ = static_cast<uint8_t>(code.coded_nodes);
  for (int i = 0; i < code.coded_nodes; ++i) {
    *p++ = code.node[i];
    p = write_tree(code.bits[i], p);
  }
  return static_cast<int>(p - out);
}

Status read_table(const uint8_t** in, const uint8_t* end, TreeCode* code) {
  Status status = read_tree(in, end, &code->tree);
  if (status != Status::ok) return status;
  if (*in == end) return Status::truncated;
  code->coded_nodes = *(*in)++;
  if (code->coded_nodes > kMaxCodedNodes) return Status::bad_table;
  for (int i = 0; i < code->coded_nodes; ++i) {
    if (*in == end) return Status::truncated;
    code->node[i] = *(*in)++;
    if (code->node[i] + 1 >= code->tree.leaf_count || (i > 0 && code->node[i] <= code->node[i - 1]))
      return Status::bad_table;
    status = read_tree(in, end, &code->bits[i]);
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

}  // namespace lepton
