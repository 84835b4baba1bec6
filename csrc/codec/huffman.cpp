// huffman.cpp - see huffman.h.
//
// A coded chunk:
//
//   uint8   block_log2, 12 to 20 (0 in its place: the rest of the payload is the chunk, stored)
//   planes x (uint8 mode, uint32 size)     mode 0: raw, 1: tree
//   planes x size bytes                    raw: the plane; tree: table (huffman_code.h), then blocks of 2^block_log2
//                                          symbols, the last one shorter
#include "codec/huffman.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "codec/huffman_block.h"
#include "codec/huffman_code.h"

namespace lepton {
namespace {

constexpr int kStored = 0;
constexpr int kMinBlockLog2 = 12, kMaxBlockLog2 = 20;
// Larger blocks waste less padding (half a byte a node and block), smaller ones stay in the second-level cache.
constexpr int kBlockLog2 = 16;
constexpr int64_t kBlock = int64_t{1} << kBlockLog2;
constexpr uint8_t kPlaneRaw = 0, kPlaneTree = 1;
constexpr int kPlaneHeader = 5;

// Coding must save one byte in 32, else the data is left as it is, which decodes at the speed of a copy.
constexpr bool pays(int64_t coded, int64_t raw) { return coded <= raw - raw / 32; }

// A plane with more bits of entropy a symbol is not looked at any further. Its bits might be regular all the same, but
// not while no symbol is frequent.
constexpr double kRandom = 8 * 31.0 / 32 + 0.05;

uint32_t load32(const uint8_t* p) { return p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24; }

void store32(uint8_t* p, uint32_t value) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8_t>(value >> 8 * i);
}

// Buffers that live as long as the thread: allocating them for every chunk would cost more than decoding it. They begin
// at a cache line: vectors that cross two took up to a tenth of the time.
uint8_t* scratch(std::vector<uint8_t>& buffer, int64_t size) {
  constexpr uintptr_t kLine = 64;
  const auto wanted = static_cast<size_t>(size) + kLine - 1;
  if (buffer.size() < wanted) buffer.resize(wanted);
  return buffer.data() + (-reinterpret_cast<uintptr_t>(buffer.data()) & (kLine - 1));
}
thread_local std::vector<uint8_t> plane_buffer[kMaxPlanes], level_buffer[2], node_bits_buffer, encode_buffer,
    last_block, block_buffer, sample_buffer;

// Without a next chunk `hot`, memory that is in the cache anyway.
Lines lines_of(NextChunk next, const uint8_t* hot) {
  return next.data != nullptr ? Lines(next.data, next.size) : Lines(hot, 0);
}

// Counts symbols; in four tables, so that equal neighbours do not wait for each other's store.
class Histogram {
 public:
  void add(const uint8_t* symbols, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, symbols + i, 8);
      for (int t = 0; t < 8; ++t) ++table_[t % 4][eight >> 8 * t & 0xff];
    }
    for (; i < n; ++i) ++table_[0][symbols[i]];
    total_ += n;
  }
  Counts counts() const {
    Counts counts;
    for (int s = 0; s < 256; ++s) counts.of[s] = table_[0][s] + table_[1][s] + table_[2][s] + table_[3][s];
    counts.total = total_;
    return counts;
  }

 private:
  uint32_t table_[4][256] = {};
  int64_t total_ = 0;
};

// Planes of so many symbols and more are counted in part: kSample symbols, at most one of every kLeastShare pieces of
// kSamplePiece symbols; not the same one each time, for rows of a matrix have such lengths. Counting a byte takes as
// long as encoding it.
constexpr int64_t kSampledPlane = 1 << 16, kSample = 1 << 15, kSamplePiece = 1024, kLeastShare = 2;
// A sample may lack rare symbols: those that are near to what it has, half its range to either side, get a code too,
// and count for one where a symbol seen counts for kSeen. With fewer symbols than kLeastSymbols that could cost many
// bits, and all are counted.
constexpr uint32_t kSeen = 16;
constexpr int kLeastSymbols = 16;
// The sample is counted in so many parts: a mantissa is found to be random after the first.
constexpr int64_t kSampleParts = 4;
// A plane that takes more than its sample promised by this part is not like it, and all of it is counted. What that
// saves grows with the square of the error: pruned weights that were off by 1/16 got 1/2000 smaller.
constexpr int64_t kSampleError = 16;

Counts count_all(const uint8_t* plane, int64_t n) {
  Histogram histogram;
  histogram.add(plane, n);
  return histogram.counts();
}

// Calls see(piece) for one of every `share` pieces of kSamplePiece symbols; of each `step` such calls for the one
// numbered `part` alone.
template <typename See>
void for_sample(const uint8_t* plane, int64_t n, int64_t share, const See& see, int64_t part = 0, int64_t step = 1) {
  for (int64_t first = part * share; first + share <= n / kSamplePiece; first += step * share) {
    const int64_t chosen = first + (static_cast<int64_t>(static_cast<uint32_t>(first) * 0x9e3779b1u) * share >> 32);
    see(plane + chosen * kSamplePiece);
  }
}

// Counts without a symbol where there are too few for a sample.
Counts count_sample(const uint8_t* plane, int64_t n, int last_symbol) {
  Histogram histogram;
  const int64_t share = std::max(n / kSample, kLeastShare);
  for (int64_t part = 0; part < kSampleParts; ++part) {
    for_sample(plane, n, share, [&](const uint8_t* piece) { histogram.add(piece, kSamplePiece); }, part, kSampleParts);
    if (part > 0) continue;
    const Counts random = histogram.counts();
    if (entropy_bits(random) > kRandom) return random;  // few symbols look less random than more of the same kind
  }
  Counts counts = histogram.counts();
  if (std::count_if(std::begin(counts.of), std::end(counts.of), [](uint32_t c) { return c > 0; }) < kLeastSymbols)
    return {};
  int lowest = 0, highest = 255;
  while (counts.of[lowest] == 0) ++lowest;
  while (counts.of[highest] == 0) --highest;
  const int near = (highest - lowest) / 2;
  counts.total = 0;
  for (int s = std::max(lowest - near, 0); s <= std::min(highest + near, last_symbol); ++s)
    counts.total += counts.of[s] = std::max(counts.of[s] * kSeen, 1u);
  return counts;
}

// The bytes that n symbols take, of which `counts` were counted, but for padding.
int64_t expected_bytes(const HuffmanCode& code, const Counts& counts, int64_t n) {
  int64_t bits = 0;
  for (int depth = 0, leaf = 0; depth <= code.max_depth; ++depth)
    for (int i = 0; i < code.leaves[depth]; ++i, ++leaf)
      bits += counts.in_ranks(code, code.leaf_begin[leaf], code.leaf_begin[leaf + 1]) * (depth + code.leaf_bits[leaf]);
  return tree_table_bytes(code) + bits * n / counts.total / 8;
}

void rank_symbols(const HuffmanCode& code, uint8_t* rank_of) {
  std::fill_n(rank_of, 256, kNoRank);
  for (int rank = 0; rank < code.symbol_count(); ++rank) rank_of[code.symbols[rank]] = static_cast<uint8_t>(rank);
}
using RankTables = std::array<uint8_t[256], 1 + kMaxCodedNodes>;
RankTables rank_tables(const TreeCode& code) {
  RankTables tables;
  rank_symbols(code.tree, tables[0]);
  for (int i = 0; i < code.coded_nodes; ++i) rank_symbols(code.bits[i], tables[1 + i]);
  return tables;
}

// A node's bits may be worth a code if one side has this part of its symbols and more, or if one side is a single
// symbol with that part: the zeros of a sparsity pattern. And if they are a part of all bits.
constexpr double kSkewed = 0.7, kSingle = 0.4, kLeastNode = 1.0 / 8;
// ... and have one if they then take at most this part of what they took.
constexpr double kCodedBits = 15.0 / 16;
constexpr int64_t kSampleForBits = 1 << 15;

bool may_be_coded(const HuffmanCode& code, const Counts& counts, int node) {
  const auto left = static_cast<double>(counts.in_ranks(code, code.begin[node], code.middle[node]));
  const auto right = static_cast<double>(counts.in_ranks(code, code.middle[node], code.end[node]));
  const double all = left + right;
  return all >= kLeastNode * static_cast<double>(counts.total) &&
         (std::max(left, right) >= kSkewed * all ||
          (code.middle[node] == code.begin[node] + 1 && left >= kSingle * all));
}

// Gives codes to nodes' bits, where that pays for a plane of n symbols. Returns the bytes that it saves, about.
int64_t code_node_bits(const uint8_t* plane, int64_t n, const Counts& counts, Lines* ahead, TreeCode* code) {
  const HuffmanCode& tree = code->tree;
  std::array<int, kMaxCodedNodes> candidates;
  int found = 0;
  for (int node = 0; node + 1 < tree.leaf_count && found < kMaxCodedNodes; ++node)
    if (may_be_coded(tree, counts, node)) candidates[found++] = node;
  if (found == 0) return 0;

  uint8_t* const sample = scratch(sample_buffer, kSampleForBits + kVectorSlack);
  uint8_t* end = sample;
  if (n <= kSampleForBits) {
    end = std::copy_n(plane, n, sample);
  } else {
    for_sample(plane, n, (n + kSampleForBits - 1) / kSampleForBits,
               [&](const uint8_t* piece) { end = std::copy_n(piece, kSamplePiece, end); });
  }
  const int sampled = static_cast<int>(end - sample);
  NodeBits bits[kMaxLeaves];
  const RankTables ranks = rank_tables(*code);
  const EncodeBlockArgs args{code,
                             sample,
                             ranks.data(),
                             sampled,
                             scratch(block_buffer, block_bound(*code, sampled)),
                             scratch(encode_buffer, encode_scratch(sampled)),
                             bits,
                             ahead};
  if (select_huffman_encode_block(isa_in_use())(args) < 0) return 0;  // a symbol that nobody had counted

  int64_t saved = 0;
  for (int i = 0; i < found; ++i) {
    const int node = candidates[i];
    const int64_t seen = bits[node].n / 8;
    if (seen == 0) continue;
    Counts bytes = count_all(bits[node].bits, seen);
    bytes.total = 0;  // a byte that the sample lacks counts for one
    for (auto& count : bytes.of) bytes.total += count = std::max(count * kSeen, 1u);
    if (entropy_bits(bytes) > 8 * kCodedBits) continue;
    HuffmanCode& own = code->bits[code->coded_nodes];
    build_code(bytes, &own);
    const int64_t plain =
        static_cast<int64_t>(static_cast<double>(bits[node].n) / sampled * static_cast<double>(n) / 8);
    const int64_t coded = expected_bytes(own, bytes, plain);
    if (static_cast<double>(coded) > kCodedBits * static_cast<double>(plain)) continue;
    code->node[code->coded_nodes++] = static_cast<uint8_t>(node);
    saved += plain - coded;
  }
  return saved;
}

constexpr int64_t kNoRoom = -2;

// Writes a plane's table and blocks to out[room]. Returns the bytes written, kNoCode or kNoRoom.
int64_t encode_tree(const uint8_t* plane, int64_t n, const TreeCode& code, Lines* ahead, uint8_t* out, int64_t room) {
  uint8_t* const begin = out;
  uint8_t table[kMaxTable];
  const int table_bytes = write_table(code, table);
  if (room < table_bytes) return kNoRoom;
  out = std::copy_n(table, table_bytes, out);
  const RankTables ranks = rank_tables(code);
  const int64_t most = std::min(kBlock, n), bound = block_bound(code, most);
  EncodeBlockArgs args{&code,   nullptr, ranks.data(), 0, nullptr, scratch(encode_buffer, encode_scratch(most)),
                       nullptr, ahead};
  EncodeBlockFn* const encode_block = select_huffman_encode_block(isa_in_use());
  for (int64_t start = 0; start < n; start += kBlock) {
    args.symbols = plane + start;
    args.n = static_cast<int>(std::min(kBlock, n - start));
    if (n - start < args.n + kVectorSlack) {
      uint8_t* const copy = scratch(last_block, args.n + kVectorSlack);
      args.symbols = static_cast<const uint8_t*>(std::memcpy(copy, plane + start, static_cast<size_t>(args.n)));
    }
    const int64_t left = room - (out - begin);
    args.out = left >= bound ? out : scratch(block_buffer, bound);
    const int64_t bytes = encode_block(args);
    if (bytes < 0) return bytes;
    if (bytes > left) return kNoRoom;
    if (args.out != out) std::memcpy(out, args.out, static_cast<size_t>(bytes));
    out += bytes;
  }
  return out - begin;
}

// Writes a plane to out[room], as a tree where that pays, else as it is. Returns the bytes written, or kNoRoom.
int64_t encode_plane(const uint8_t* plane, int64_t n, Layout layout, Lines* ahead, uint8_t* out, int64_t room,
                     uint8_t* mode) {
  const bool nibbles = layout == Layout::nibbles, may_be_raw = !nibbles;  // raw, each would take a byte
  TreeCode code;
  *mode = kPlaneTree;
  for (bool sampled = n >= kSampledPlane;; sampled = false) {
    const Counts counts = sampled ? count_sample(plane, n, nibbles ? 15 : 255) : count_all(plane, n);
    if (counts.total == 0) continue;
    if (may_be_raw && entropy_bits(counts) > kRandom) break;
    build_code(counts, &code.tree);
    code.coded_nodes = 0;
    const int64_t expected = expected_bytes(code.tree, counts, n) - code_node_bits(plane, n, counts, ahead, &code);
    if (may_be_raw && !pays(expected, n)) break;
    const int64_t bytes = encode_tree(plane, n, code, ahead, out, room);
    if (sampled && (bytes < 0 || bytes > expected + expected / kSampleError)) continue;
    if (!may_be_raw || (bytes >= 0 && pays(bytes, n))) return bytes;
    break;
  }
  *mode = kPlaneRaw;
  if (room < n) return kNoRoom;
  std::memcpy(out, plane, static_cast<size_t>(n));
  return n;
}

}  // namespace

int64_t huffman_encode_chunk(const uint8_t* src, int64_t size, Layout layout, uint8_t* dst, NextChunk next) {
  const int planes = plane_count(layout);
  const int64_t n = size / element_bytes(layout);
  const uint8_t* plane[kMaxPlanes] = {src};
  if (layout != Layout::bytes) {
    uint8_t* split[kMaxPlanes] = {};
    for (int p = 0; p < planes; ++p) plane[p] = split[p] = scratch(plane_buffer[p], n);
    select_split_planes(isa_in_use())(layout, src, n, split);
  }
  Lines ahead = lines_of(next, dst);
  dst[0] = kBlockLog2;
  int64_t total = 1 + planes * kPlaneHeader;
  for (int p = 0; p < planes; ++p) {
    uint8_t* const header = dst + 1 + p * kPlaneHeader;
    const int64_t bytes =
        total > size ? kNoRoom : encode_plane(plane[p], n, layout, &ahead, dst + total, size - total, header);
    total += bytes;
    if (bytes < 0 || !pays(total, size)) {
      dst[0] = kStored;
      std::memcpy(dst + 1, src, static_cast<size_t>(size));
      return size + 1;
    }
    store32(header + 1, static_cast<uint32_t>(bytes));
  }
  return total;
}

Status huffman_decode_chunk(const uint8_t* payload, int64_t payload_size, Layout layout, uint8_t* dst, int64_t size,
                            NextChunk next, bool streams) {
  if (payload_size < 1) return Status::truncated;
  const uint8_t* const end = payload + payload_size;
  const int block_log2 = *payload++;
  if (block_log2 == kStored) {
    if (end - payload < size) return Status::truncated;
    if (end - payload > size) return Status::trailing;
    std::memcpy(dst, payload, static_cast<size_t>(size));
    return Status::ok;
  }
  if (block_log2 < kMinBlockLog2 || block_log2 > kMaxBlockLog2) return Status::bad_mode;

  struct Plane {
    uint8_t mode;
    const uint8_t *next, *end;
    TreeCode code;
  };
  const int planes = plane_count(layout);
  const int64_t n = size / element_bytes(layout), block = std::min(int64_t{1} << block_log2, n);
  if (end - payload < planes * kPlaneHeader) return Status::truncated;
  Plane plane[kMaxPlanes];
  const uint8_t* body = payload + planes * kPlaneHeader;
  for (int p = 0; p < planes; ++p, payload += kPlaneHeader) {
    Plane& self = plane[p];
    const int64_t bytes = load32(payload + 1);
    if (end - body < bytes) return Status::truncated;
    self.mode = payload[0];
    self.next = body;
    self.end = body += bytes;
    if (self.mode == kPlaneTree) {
      const Status status = read_table(&self.next, self.end, &self.code);
      if (status != Status::ok) return status;
      if (layout == Layout::nibbles &&
          std::any_of(self.code.tree.symbols, self.code.tree.symbols + self.code.tree.symbol_count(),
                      [](uint8_t symbol) { return symbol > 15; }))
        return Status::bad_table;
    } else if (self.mode != kPlaneRaw || layout == Layout::nibbles) {
      return Status::bad_mode;
    } else if (bytes != n) {
      return bytes < n ? Status::truncated : Status::trailing;
    }
  }
  if (body != end) return Status::trailing;

  DecodeBlockFn* const decode_block = select_huffman_decode_block(isa_in_use());
  streams = streams && planes > 1;
  JoinPlanesFn* const join = streams ? select_stream_planes(isa_in_use()) : select_join_planes(isa_in_use());
  Ahead ahead{lines_of(next, dst), {dst, streams ? 0 : size}};
  DecodeBlockArgs args{};
  args.ahead = &ahead;
  for (int i = 0; i < 2; ++i) args.level[i] = scratch(level_buffer[i], block + kVectorSlack);
  args.node_bits = scratch(node_bits_buffer, node_bits_bound(block));
  for (int64_t start = 0; start < n; start += block) {
    const int64_t count = std::min(block, n - start);
    uint8_t* const out = dst + start * element_bytes(layout);
    const uint8_t* symbols[kMaxPlanes] = {};
    for (int p = 0; p < planes; ++p) {
      Plane& self = plane[p];
      if (self.mode == kPlaneRaw) {
        symbols[p] = self.next;
        self.next += count;
        continue;
      }
      // The next block writes over this one's slack, and whole vectors have none; else a buffer with slack is needed.
      const bool in_place = layout == Layout::bytes && (start + count + kVectorSlack <= n || count % kVectorSlack == 0);
      args.code = &self.code;
      args.bits = self.next;
      args.bits_end = self.end;
      args.n = static_cast<int>(count);
      args.out = in_place ? out : scratch(plane_buffer[p], block + kVectorSlack);
      const int64_t used = decode_block(args);
      if (used < 0) return static_cast<Status>(-used);
      self.next += used;
      symbols[p] = args.out;
    }
    if (symbols[0] != out) join(layout, symbols, count, out);
  }
  for (int p = 0; p < planes; ++p)
    if (plane[p].next != plane[p].end) return Status::trailing;
  return Status::ok;
}

void count_planes(const uint8_t* src, int64_t size, Layout layout, int64_t* counts) {
  const int64_t n = size / element_bytes(layout);
  uint8_t* plane[kMaxPlanes] = {};
  for (int p = 0; p < plane_count(layout); ++p) plane[p] = scratch(plane_buffer[p], kBlock);
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = std::min(kBlock, n - start);
    select_split_planes(isa_in_use())(layout, src + start * element_bytes(layout), count, plane);
    for (int p = 0; p < plane_count(layout); ++p) {
      const Counts block = count_all(plane[p], count);
      for (int s = 0; s < 256; ++s) counts[256 * p + s] += block.of[s];
    }
  }
}

}  // namespace lepton
