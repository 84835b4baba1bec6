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

template <int k>
LEPTON_INLINE void unpack_numbers(uint8_t* out, int n, const uint8_t* bits, const uint8_t* symbols) {
  const uint8_t* const end = bits + (int64_t{n} * k + 7) / 8;
  for (int i = 0; i < n; i += 8, bits += k) {
    const uint64_t places = load_word(bits, end - bits);
    unroll<8>([&]<int j>() LEPTON_LAMBDA_INLINE { out[i + j] = symbols[places >> j * k & ((1u << k) - 1)]; });
  }
}

LEPTON_INLINE void unpack(uint8_t* out, int n, const uint8_t* bits, int k, const uint8_t* symbols) {
  switch (k) {
    case 1:
      return unpack_numbers<1>(out, n, bits, symbols);
    case 2:
      return unpack_numbers<2>(out, n, bits, symbols);
    case 3:
      return unpack_numbers<3>(out, n, bits, symbols);
    case 4:
      return unpack_numbers<4>(out, n, bits, symbols);
    case 5:
      return unpack_numbers<5>(out, n, bits, symbols);
    case 6:
      return unpack_numbers<6>(out, n, bits, symbols);
    case 7:
      return unpack_numbers<7>(out, n, bits, symbols);
    default:
      return unpack_numbers<8>(out, n, bits, symbols);
  }
}

LEPTON_INLINE bool translate(const uint8_t* in, int n, const uint8_t* table, uint8_t* out) {
  bool all = true;
  for (int i = 0; i < n; ++i) {
    out[i] = table[in[i]];
    all &= out[i] != kNoRank;
  }
  return all;
}

// A bit for each byte of x that is `middle` and more.
LEPTON_INLINE unsigned at_least(uint64_t x, uint8_t middle) {
  const uint64_t high = splat(0x80), m = splat(middle);
  // The lower seven bits of each byte, compared without a borrow from the next; then the highest bits decide.
  const uint64_t low = (x | high) - (m & ~high);
  const uint64_t ge = ((x & ~m) | (~(x ^ m) & low)) & high;
  return static_cast<unsigned>((ge >> 7) * 0x0102040810204080 >> 56);
}

// The reverse of expand: the bytes where b has its ones, side by side from the lowest on.
LEPTON_INLINE uint64_t compress(uint64_t word, unsigned b) {
  const uint64_t* const moves = kExpand.moves[b];
  word &= kExpand.mask[b];
  word = (word & ~moves[2]) | (word & moves[2]) >> 8;
  word = (word & ~moves[1]) | (word & moves[1]) >> 16;
  return (word & ~moves[0]) | (word & moves[0]) >> 32;
}

template <bool keep_left, bool keep_right>
LEPTON_INLINE int partition(const uint8_t* in, int n, uint8_t middle, uint8_t* bits, uint8_t* left, uint8_t* right) {
  int total = 0;
  for (int i = 0; i < n; i += 8) {
    const uint64_t x = load_word(in + i, 8);
    unsigned b = at_least(x, middle);
    if (n - i < 8) b &= (1u << (n - i)) - 1;
    bits[i / 8] = static_cast<uint8_t>(b);
    const int ones = kExpand.ones[b];
    if constexpr (keep_left) store_word(left, compress(x, b ^ 0xff), 8), left += 8 - ones;
    if constexpr (keep_right) store_word(right, compress(x, b), 8), right += ones;
    total += ones;
  }
  return total;
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
