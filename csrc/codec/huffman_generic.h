// huffman_generic.h - huffman_simd.h in plain C++, on words of 8 bytes.
#pragma once

namespace lepton::LEPTON_ISA {
namespace {

// expand(word, b): the lowest bytes of a word move up to where b has its ones, in order, in three steps of 4, 2 and 1
// bytes; the others become 0. mask[b]: 255 where b has its ones.
struct ExpandTables {
  uint64_t moves[256][3];
  uint64_t mask[256];
  uint8_t ones[256];  // popcount, for the processor may have no instruction
};

constexpr ExpandTables make_tables() {
  ExpandTables tables{};
  for (int b = 0; b < 256; ++b) {
    int ones = 0;
    for (int i = 0; i < 8; ++i) {
      if (!(b >> i & 1)) continue;
      // Byte `ones` has a way of i - ones to go. The longest step comes first: none meets another byte.
      const int way = i - ones;
      int at = ones++;
      for (int step = 0; step < 3; ++step) {
        const int length = 4 >> step;
        if (!(way & length)) continue;
        at += length;
        tables.moves[b][step] |= uint64_t{0xff} << 8 * at;
      }
      tables.mask[b] |= uint64_t{0xff} << 8 * i;
    }
    tables.ones[b] = static_cast<uint8_t>(ones);
  }
  return tables;
}

constexpr ExpandTables kExpand = make_tables();

LEPTON_INLINE uint64_t expand(uint64_t word, unsigned b) {
  const uint64_t* const moves = kExpand.moves[b];
  word = (word & ~moves[0]) | (word << 32 & moves[0]);
  word = (word & ~moves[1]) | (word << 16 & moves[1]);
  word = (word & ~moves[2]) | (word << 8 & moves[2]);
  return word & kExpand.mask[b];
}

LEPTON_INLINE uint64_t splat(uint8_t byte) { return byte * uint64_t{0x0101010101010101}; }

LEPTON_INLINE void merge_nodes(uint8_t* out, int n, const uint8_t* bits, const uint8_t* left, const uint8_t* right) {
  for (int i = 0; i < n; i += 8) {
    const unsigned b = *bits++;
    store_word(out + i, expand(load_word(left, 8), b ^ 0xff) | expand(load_word(right, 8), b), 8);
    right += kExpand.ones[b];
    left += 8 - kExpand.ones[b];
  }
}

LEPTON_INLINE void merge_leaf(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol, const uint8_t* right) {
  const uint64_t left = splat(symbol);
  for (int i = 0; i < n; i += 8) {
    const unsigned b = *bits++;
    store_word(out + i, (left & ~kExpand.mask[b]) | expand(load_word(right, 8), b), 8);
    right += kExpand.ones[b];
  }
}

LEPTON_INLINE void blend(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol0, uint8_t symbol1) {
  const uint64_t zeros = splat(symbol0), change = zeros ^ splat(symbol1);
  for (int i = 0; i < n; i += 8) store_word(out + i, zeros ^ (change & kExpand.mask[bits[i / 8]]), 8);
}

LEPTON_INLINE void unpack(uint8_t* out, int n, const uint8_t* bits, int k, const uint8_t* symbols) {
  const uint8_t* const end = bits + (int64_t{n} * k + 7) / 8;
  const uint64_t mask = (1u << k) - 1;
  for (int i = 0; i < n; i += 8, bits += k) {
    const uint64_t places = load_word(bits, end - bits);
    for (int j = 0; j < 8; ++j) out[i + j] = symbols[places >> j * k & mask];
  }
}

template <bool keep_left, bool keep_right>
LEPTON_INLINE int partition(const uint8_t* in, int n, uint8_t middle, uint8_t* bits, uint8_t* left, uint8_t* right) {
  int ones = 0;
  for (int i = 0; i < n; i += 8) {
    unsigned byte = 0;
    for (int j = i; j < n && j < i + 8; ++j) {
      const unsigned bit = in[j] >= middle;
      byte |= bit << (j - i);
      if constexpr (keep_left) *left = in[j], left += 1 - bit;
      if constexpr (keep_right) *right = in[j], right += bit;
    }
    bits[i / 8] = static_cast<uint8_t>(byte);
    ones += kExpand.ones[byte];
  }
  return ones;
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
