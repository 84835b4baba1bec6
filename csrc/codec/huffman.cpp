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

uint32_t load32(const uint8_t* p) { return p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24; }

void store32(uint8_t* p, uint32_t value) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8_t>(value >> 8 * i);
}

// Buffers that live as long as the thread: allocating them for every chunk would cost more than decoding it.
uint8_t* scratch(std::vector<uint8_t>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}
thread_local std::vector<uint8_t> plane_buffer[kMaxPlanes], level_buffer[2], rank_buffer, last_block, block_buffer;

// counts[256] of symbols[n]; four tables, so that equal neighbours do not wait for each other's store.
void count_symbols(const uint8_t* symbols, int64_t n, uint32_t* counts) {
  uint32_t table[4][256] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, symbols + i, 8);
    for (int t = 0; t < 8; ++t) ++table[t % 4][eight >> 8 * t & 0xff];
  }
  for (; i < n; ++i) ++table[0][symbols[i]];
  for (int s = 0; s < 256; ++s) counts[s] = table[0][s] + table[1][s] + table[2][s] + table[3][s];
}

// Planes of so many symbols and more are counted in part: of every kSampleShare pieces of kSamplePiece symbols one, not
// the same one each time, for rows of a matrix have such lengths. Counting a byte takes longer than encoding it.
constexpr int64_t kSampledPlane = 1 << 16, kSamplePiece = 1024, kSampleShare = 4;
// A sample may lack rare symbols: those that are near to what it has get a code too. With fewer symbols than
// kLeastSymbols that could cost many bits, and all are counted.
constexpr int kNearSymbols = 8, kLeastSymbols = 16;
// A plane that takes more than its sample promised by this part is not like it, and all of it is counted.
constexpr int64_t kSampleError = 64;

// What a code is made for, and how many of the plane's symbols that is.
struct Counts {
  std::array<uint32_t, 256> of{};
  int64_t total = 0;
};

Counts count_all(const uint8_t* plane, int64_t n) {
  Counts counts;
  count_symbols(plane, n, counts.of.data());
  counts.total = n;
  return counts;
}

// Counts without a symbol where there are too few for a sample.
Counts count_sample(const uint8_t* plane, int64_t n, int last_symbol) {
  Counts counts;
  std::array<uint32_t, 256> piece;
  for (int64_t first = 0; first + kSampleShare <= n / kSamplePiece; first += kSampleShare) {
    const int64_t chosen = first + (static_cast<uint32_t>(first) * 0x9e3779b1u >> 30);
    count_symbols(plane + chosen * kSamplePiece, kSamplePiece, piece.data());
    for (int s = 0; s < 256; ++s) counts.of[s] += piece[s];
    counts.total += kSamplePiece;
  }
  if (std::count_if(counts.of.begin(), counts.of.end(), [](uint32_t c) { return c > 0; }) < kLeastSymbols) return {};
  int lowest = 0, highest = 255;
  while (counts.of[lowest] == 0) ++lowest;
  while (counts.of[highest] == 0) --highest;
  for (int s = std::max(lowest - kNearSymbols, 0); s <= std::min(highest + kNearSymbols, last_symbol); ++s) {
    counts.total += counts.of[s] == 0;
    counts.of[s] = std::max(counts.of[s], 1u);
  }
  return counts;
}

// The bytes that n symbols take, of which `counts` were counted, but for padding.
int64_t expected_bytes(const HuffmanCode& code, const Counts& counts, int64_t n) {
  uint64_t bits = 0;
  for (int depth = 0, leaf = 0; depth <= code.max_depth; ++depth) {
    for (int i = 0; i < code.leaves[depth]; ++i, ++leaf) {
      uint64_t count = 0;
      for (int rank = code.leaf_begin[leaf]; rank < code.leaf_begin[leaf + 1]; ++rank)
        count += counts.of[code.symbols[rank]];
      bits += count * static_cast<uint64_t>(depth + code.leaf_bits[leaf]);
    }
  }
  return table_bytes(code) +
         static_cast<int64_t>(bits * static_cast<uint64_t>(n) / static_cast<uint64_t>(counts.total) / 8);
}

constexpr int64_t kNoRoom = -2;

// Writes a plane's table and blocks to out[room]. Returns the bytes written, kNoCode or kNoRoom.
int64_t encode_tree(const uint8_t* plane, int64_t n, const HuffmanCode& code, uint8_t* out, int64_t room) {
  uint8_t* const begin = out;
  if (room < table_bytes(code)) return kNoRoom;
  write_table(code, out);
  out += table_bytes(code);
  uint8_t rank_of[256];
  std::fill_n(rank_of, 256, kNoRank);
  for (int rank = 0; rank < code.symbol_count(); ++rank) rank_of[code.symbols[rank]] = static_cast<uint8_t>(rank);
  const int64_t most = std::min(kBlock, n), bound = block_bound(code, most);
  EncodeBlockArgs args{&code, nullptr, rank_of, 0, nullptr, scratch(rank_buffer, most + kVectorSlack), {}};
  for (int i = 0; i < 2; ++i) args.level[i] = scratch(level_buffer[i], level_bound(most));
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
int64_t encode_plane(const uint8_t* plane, int64_t n, Layout layout, uint8_t* out, int64_t room, uint8_t* mode) {
  const bool nibbles = layout == Layout::nibbles, may_be_raw = !nibbles;  // raw, each would take a byte
  HuffmanCode code;
  *mode = kPlaneTree;
  for (bool sampled = n >= kSampledPlane;; sampled = false) {
    const Counts counts = sampled ? count_sample(plane, n, nibbles ? 15 : 255) : count_all(plane, n);
    if (counts.total == 0) continue;
    build_code(counts.of.data(), &code);
    const int64_t expected = expected_bytes(code, counts, n);
    if (may_be_raw && !pays(expected, n)) break;
    const int64_t bytes = encode_tree(plane, n, code, out, room);
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

int64_t huffman_encode_chunk(const uint8_t* src, int64_t size, Layout layout, uint8_t* dst) {
  const int planes = plane_count(layout);
  const int64_t n = size / element_bytes(layout);
  const uint8_t* plane[kMaxPlanes] = {src};
  if (layout != Layout::bytes) {
    uint8_t* split[kMaxPlanes] = {};
    for (int p = 0; p < planes; ++p) plane[p] = split[p] = scratch(plane_buffer[p], n);
    select_split_planes(isa_in_use())(layout, src, n, split);
  }
  dst[0] = kBlockLog2;
  int64_t total = 1 + planes * kPlaneHeader;
  for (int p = 0; p < planes; ++p) {
    uint8_t* const header = dst + 1 + p * kPlaneHeader;
    const int64_t bytes = total > size ? kNoRoom : encode_plane(plane[p], n, layout, dst + total, size - total, header);
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

Status huffman_decode_chunk(const uint8_t* payload, int64_t payload_size, Layout layout, uint8_t* dst, int64_t size) {
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
    HuffmanCode code;
    int64_t last_block = 0;  // its bytes
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
      if (layout == Layout::nibbles && std::any_of(self.code.symbols, self.code.symbols + self.code.symbol_count(),
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
  JoinPlanesFn* const join = select_join_planes(isa_in_use());
  DecodeBlockArgs args{};
  for (int i = 0; i < 2; ++i) args.level[i] = scratch(level_buffer[i], block + kVectorSlack);
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
      // The next block writes over this one's slack; only the last needs a buffer with slack of its own.
      const bool in_place = layout == Layout::bytes && start + count + kVectorSlack <= n;
      args.code = &self.code;
      args.bits = self.next;
      args.bits_end = self.end;
      args.n = static_cast<int>(count);
      args.out = in_place ? out : scratch(plane_buffer[p], block + kVectorSlack);
      args.ahead = self.last_block;
      const int64_t used = decode_block(args);
      if (used < 0) return static_cast<Status>(-used);
      self.last_block = used;
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
      uint32_t block[256];
      count_symbols(plane[p], count, block);
      for (int s = 0; s < 256; ++s) counts[256 * p + s] += block[s];
    }
  }
}

}  // namespace lepton
