// huffman_generic.h - huffman_simd.h in plain C++, on words of 8 bytes.
#pragma once

namespace lepton::LEPTON_ISA {
namespace {

// Two words of 8 bytes side by side, by the compiler's vectors: SSE2 registers where there are any.
typedef uint64_t Words __attribute__((vector_size(16)));

// expand(words, b): the lowest bytes of words[0] move up to where b has its zeros, in order, in three steps of 4, 2 and
// 1 bytes, and those of words[1] to where it has its ones; the others become 0. compress is the reverse. mask[b]: 255
// where b has its zeros; where it has its ones.
struct ExpandTables {
  Words moves[256][3];
  Words mask[256];
  uint8_t ones[256];  // popcount, for the processor may have no instruction
};

constexpr ExpandTables make_tables() {
  ExpandTables tables{};
  for (int b = 0; b < 256; ++b) {
    uint64_t moves[3][2] = {}, mask[2] = {};
    int placed[2] = {};
    for (int i = 0; i < 8; ++i) {
      const int side = b >> i & 1, from = placed[side]++;
      int at = from;
      // The longest step comes first: no byte meets another.
      for (int step = 0, length = 4; step < 3; ++step, length /= 2) {
        if (!((i - from) & length)) continue;
        at += length;
        moves[step][side] |= uint64_t{0xff} << 8 * at;
      }
      mask[side] |= uint64_t{0xff} << 8 * i;
    }
    for (int step = 0; step < 3; ++step) tables.moves[b][step] = Words{moves[step][0], moves[step][1]};
    tables.mask[b] = Words{mask[0], mask[1]};
    tables.ones[b] = static_cast<uint8_t>(placed[1]);
  }
  return tables;
}

constexpr ExpandTables kExpand = make_tables();

LEPTON_INLINE Words expand(Words words, unsigned b) {
  const Words* const moves = kExpand.moves[b];
  words = (words & ~moves[0]) | (words << 32 & moves[0]);
  words = (words & ~moves[1]) | (words << 16 & moves[1]);
  words = (words & ~moves[2]) | (words << 8 & moves[2]);
  return words & kExpand.mask[b];
}

LEPTON_INLINE Words compress(Words words, unsigned b) {
  const Words* const moves = kExpand.moves[b];
  words &= kExpand.mask[b];
  words = (words & ~moves[2]) | (words & moves[2]) >> 8;
  words = (words & ~moves[1]) | (words & moves[1]) >> 16;
  return (words & ~moves[0]) | (words & moves[0]) >> 32;
}

LEPTON_INLINE uint64_t splat(uint8_t byte) { return byte * uint64_t{0x0101010101010101}; }

LEPTON_INLINE void merge_nodes(uint8_t* out, int n, const uint8_t* bits, const uint8_t* left, const uint8_t* right,
                               Ahead*) {
  for (int i = 0; i < n; i += 8) {
    const unsigned b = *bits++;
    const Words sides = expand(Words{load_word(left, 8), load_word(right, 8)}, b);
    store_word(out + i, sides[0] | sides[1], 8);
    right += kExpand.ones[b];
    left += 8 - kExpand.ones[b];
  }
}

LEPTON_INLINE void merge_leaf(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol, const uint8_t* right, Ahead*) {
  const uint64_t left = splat(symbol);
  for (int i = 0; i < n; i += 8) {
    const unsigned b = *bits++;
    const Words sides = expand(Words{left, load_word(right, 8)}, b);
    store_word(out + i, sides[0] | sides[1], 8);
    right += kExpand.ones[b];
  }
}

LEPTON_INLINE void blend(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol0, uint8_t symbol1) {
  const uint64_t zeros = splat(symbol0), change = zeros ^ splat(symbol1);
  for (int i = 0; i < n; i += 8) store_word(out + i, zeros ^ (change & kExpand.mask[bits[i / 8]][1]), 8);
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

template <bool keep_left, bool keep_right>
LEPTON_INLINE int partition(const uint8_t* in, int n, uint8_t middle, uint8_t* bits, uint8_t* left, uint8_t* right,
                            Lines*) {
  int total = 0;
  for (int i = 0; i < n; i += 8) {
    const uint64_t x = load_word(in + i, 8);
    unsigned b = at_least(x, middle);
    if (n - i < 8) b &= (1u << (n - i)) - 1;
    bits[i / 8] = static_cast<uint8_t>(b);
    const int ones = kExpand.ones[b];
    if constexpr (keep_right) {
      const Words sides = compress(Words{x, x}, b);
      store_word(right, sides[1], 8), right += ones;
      if constexpr (keep_left) store_word(left, sides[0], 8), left += 8 - ones;
    }
    total += ones;
  }
  return total;
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
