// huffman_generic.h - huffman_simd.h in plain C++.
#pragma once

namespace lepton::LEPTON_ISA {
namespace {

// one where bit is 1, zero where it is 0: both are read, for a branch on such bits is a coin toss.
LEPTON_INLINE uint8_t select(int bit, uint8_t zero, uint8_t one) {
  return static_cast<uint8_t>(zero ^ ((zero ^ one) & -bit));
}

LEPTON_INLINE int bit_at(const uint8_t* bits, int i) { return bits[i >> 3] >> (i & 7) & 1; }

LEPTON_INLINE void merge_nodes(uint8_t* out, int n, const uint8_t* bits, const uint8_t* left, const uint8_t* right) {
  for (int i = 0; i < n; ++i) {
    const int bit = bit_at(bits, i);
    out[i] = select(bit, *left, *right);
    right += bit;
    left += 1 - bit;
  }
}

LEPTON_INLINE void merge_leaf(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol, const uint8_t* right) {
  for (int i = 0; i < n; ++i) {
    const int bit = bit_at(bits, i);
    out[i] = select(bit, symbol, *right);
    right += bit;
  }
}

LEPTON_INLINE void blend(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol0, uint8_t symbol1) {
  for (int i = 0; i < n; ++i) out[i] = select(bit_at(bits, i), symbol0, symbol1);
}

LEPTON_INLINE void unpack(uint8_t* out, int n, const uint8_t* bits, int k, const uint8_t* symbols) {
  look_up_words(out, n, bits, k, symbols);
}

LEPTON_INLINE int count_ones(const uint8_t* bits, int n) {
  int ones = 0;
  for (int i = 0; i < n / 8; ++i) ones += __builtin_popcount(bits[i]);
  if (n % 8 != 0) ones += __builtin_popcount(bits[n / 8] & ((1u << n % 8) - 1));
  return ones;
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
    ones += __builtin_popcount(byte);
  }
  return ones;
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
