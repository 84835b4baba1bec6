// huffman_vbmi2.h - huffman_simd.h on 64 symbols at a time: vpexpandb merges, vpcompressb partitions.
#pragma once

#include <immintrin.h>

namespace lepton::LEPTON_ISA {
namespace {

// The lowest n bits, all of them for n >= 64.
LEPTON_INLINE uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// The first `bytes` bytes at p, at most 64; no byte behind them is read.
LEPTON_INLINE __m512i load_bytes(const uint8_t* p, int64_t bytes) {
  return bytes >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, p);
}

// Calls step(i, word) for every 64 of n bits, those past n being 0.
template <typename Step>
LEPTON_INLINE void for_words(const uint8_t* bits, int n, const Step& step) {
  int i = 0;
  for (; i + 64 <= n; i += 64, bits += 8) {
    uint64_t word;
    __builtin_memcpy(&word, bits, 8);
    step(i, word);
  }
  if (i == n) return;
  const __m512i last = load_bytes(bits, (n - i + 7) / 8);
  step(i, static_cast<uint64_t>(_mm_cvtsi128_si64(_mm512_castsi512_si128(last))));
}
template <typename Step>
LEPTON_INLINE void for_words(const uint8_t* bits, int n, Ahead* ahead, const Step& step) {
  Ahead lines = *ahead;  // in registers: what is written might be *ahead, as far as the compiler knows
  for_words(bits, n, [&](int i, uint64_t word) LEPTON_LAMBDA_INLINE {
    lines.fetch();
    step(i, word);
  });
  *ahead = lines;
}

LEPTON_INLINE void merge_nodes(uint8_t* out, int n, const uint8_t* bits, const uint8_t* left, const uint8_t* right,
                               Ahead* ahead) {
  for_words(bits, n, ahead, [&](int i, uint64_t word) LEPTON_LAMBDA_INLINE {
    const __m512i zeros = _mm512_maskz_expand_epi8(~word, _mm512_loadu_si512(left));
    _mm512_storeu_si512(out + i, _mm512_mask_expand_epi8(zeros, word, _mm512_loadu_si512(right)));
    const int64_t ones = __builtin_popcountll(word);
    right += ones;
    left += 64 - ones;
  });
}

LEPTON_INLINE void merge_leaf(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol, const uint8_t* right,
                              Ahead* ahead) {
  const __m512i left = _mm512_set1_epi8(static_cast<char>(symbol));
  for_words(bits, n, ahead, [&](int i, uint64_t word) LEPTON_LAMBDA_INLINE {
    _mm512_storeu_si512(out + i, _mm512_mask_expand_epi8(left, word, _mm512_loadu_si512(right)));
    right += __builtin_popcountll(word);
  });
}

LEPTON_INLINE void blend(uint8_t* out, int n, const uint8_t* bits, uint8_t symbol0, uint8_t symbol1) {
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(symbol0)), one = _mm512_set1_epi8(static_cast<char>(symbol1));
  for_words(bits, n, [&](int i, uint64_t word) LEPTON_LAMBDA_INLINE {
    _mm512_storeu_si512(out + i, _mm512_mask_blend_epi8(word, zero, one));
  });
}

// Where the numbers of k bits lie: each 64-bit lane gets the bytes of its eight, then shifts each to its own byte.
struct UnpackTables {
  alignas(64) uint8_t bytes[9][64];
  alignas(64) uint8_t shifts[9][64];
};
constexpr UnpackTables make_unpack_tables() {
  UnpackTables tables{};
  for (int k = 1; k <= 8; ++k) {
    for (int i = 0; i < 64; ++i) {
      const int byte = i / 8 * k + i % 8;
      tables.bytes[k][i] = static_cast<uint8_t>(byte < 64 ? byte : 63);
      tables.shifts[k][i] = static_cast<uint8_t>(i % 8 * k);
    }
  }
  return tables;
}
constexpr UnpackTables kUnpack = make_unpack_tables();

// 256 bytes, 64 of which are looked up at a time.
struct ByteTable {
  __m512i part[4];
  LEPTON_INLINE explicit ByteTable(const uint8_t* table) {
    for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(table + 64 * i);
  }
  LEPTON_INLINE __m512i at(__m512i places) const {
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(places), _mm512_permutex2var_epi8(part[0], places, part[1]),
                                  _mm512_permutex2var_epi8(part[2], places, part[3]));
  }
};

template <typename Lookup>
LEPTON_INLINE void unpack_vectors(uint8_t* out, int n, const uint8_t* bits, int k, const Lookup& lookup) {
  const __m512i bytes = _mm512_load_si512(kUnpack.bytes[k]), shifts = _mm512_load_si512(kUnpack.shifts[k]);
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << k) - 1));
  const uint8_t* const end = bits + (int64_t{n} * k + 7) / 8;
  for (int i = 0; i < n; i += 64, bits += 8 * k) {
    const __m512i lanes = _mm512_permutexvar_epi8(bytes, load_bytes(bits, end - bits));
    const __m512i places = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, lanes), mask);
    _mm512_storeu_si512(out + i, lookup(places));
  }
}

LEPTON_INLINE void unpack(uint8_t* out, int n, const uint8_t* bits, int k, const uint8_t* symbols) {
  const __m512i table0 = _mm512_loadu_si512(symbols);
  if (k <= 6)
    return unpack_vectors(out, n, bits, k,
                          [&](__m512i places) LEPTON_LAMBDA_INLINE { return _mm512_permutexvar_epi8(places, table0); });
  const __m512i table1 = _mm512_loadu_si512(symbols + 64);
  if (k == 7)
    return unpack_vectors(out, n, bits, k, [&](__m512i places) LEPTON_LAMBDA_INLINE {
      return _mm512_permutex2var_epi8(table0, places, table1);
    });
  const ByteTable table(symbols);
  unpack_vectors(out, n, bits, k, [&](__m512i places) LEPTON_LAMBDA_INLINE { return table.at(places); });
}

LEPTON_INLINE bool translate(const uint8_t* in, int n, const uint8_t* table, uint8_t* out) {
  const ByteTable bytes(table);
  const __m512i none = _mm512_set1_epi8(static_cast<char>(kNoRank));
  uint64_t missing = 0;
  for (int i = 0; i < n; i += 64) {
    const __m512i ranks = bytes.at(_mm512_loadu_si512(in + i));
    _mm512_storeu_si512(out + i, ranks);
    const uint64_t here = _mm512_cmpeq_epi8_mask(ranks, none);
    missing |= n - i < 64 ? here & ((uint64_t{1} << (n - i)) - 1) : here;
  }
  return missing == 0;
}

// Where the bytes of packed numbers lie: eight numbers of k bits are k bytes, which each 64-bit lane has as its lowest.
struct PackTable {
  alignas(64) uint8_t bytes[9][64];
};
constexpr PackTable make_pack_table() {
  PackTable table{};
  for (int k = 1; k <= 8; ++k)
    for (int i = 0; i < 8 * k; ++i) table.bytes[k][i] = static_cast<uint8_t>(i / k * 8 + i % k);
  return table;
}
constexpr PackTable kPack = make_pack_table();

// Packs 64 numbers at a time, which joined(numbers) has put together in each 64-bit lane.
template <typename Joined>
LEPTON_INLINE void pack_vectors(const uint8_t* in, int n, uint8_t first, int k, uint8_t* bits, const Joined& joined) {
  const __m512i bytes = _mm512_load_si512(kPack.bytes[k]), least = _mm512_set1_epi8(static_cast<char>(first));
  for (int i = 0; i < n; i += 64, bits += 8 * k) {
    const uint64_t some = low_bits(n - i);  // what lies past n becomes 0
    const __m512i numbers = _mm512_maskz_sub_epi8(some, _mm512_loadu_si512(in + i), least);
    const int64_t left = (int64_t{n - i} * k + 7) / 8;
    _mm512_mask_storeu_epi8(bits, low_bits(left < 8 * k ? left : 8 * k),
                            _mm512_permutexvar_epi8(bytes, joined(numbers)));
  }
}

LEPTON_INLINE void pack(const uint8_t* in, int n, uint8_t first, int k, uint8_t* bits) {
  if (k == 8) return pack_vectors(in, n, first, k, bits, [](__m512i numbers) LEPTON_LAMBDA_INLINE { return numbers; });
  // Neighbours are joined: numbers to pairs, pairs to fours, fours to eights.
  const __m512i pairs = _mm512_set1_epi16(static_cast<int16_t>(1 | 1 << (8 + k)));
  const __m512i fours = _mm512_set1_epi32(1 | 1 << (16 + 2 * k));
  const __m512i down = _mm512_set1_epi64(32 - 4 * k), low = _mm512_set1_epi64((int64_t{1} << 4 * k) - 1);
  pack_vectors(in, n, first, k, bits, [&](__m512i numbers) LEPTON_LAMBDA_INLINE {
    const __m512i four = _mm512_madd_epi16(_mm512_maddubs_epi16(pairs, numbers), fours);
    return _mm512_ternarylogic_epi64(low, four, _mm512_srlv_epi64(four, down), 0xca);  // low ? four : shifted
  });
}

LEPTON_INLINE int count_ones(const uint8_t* bits, int n) {
  __m512i ones = _mm512_setzero_si512();
  int i = 0;
  for (; i + 512 <= n; i += 512) ones = _mm512_add_epi64(ones, _mm512_popcnt_epi64(_mm512_loadu_si512(bits + i / 8)));
  const int left = n - i;  // the bits past n are 0
  ones = _mm512_add_epi64(ones, _mm512_popcnt_epi64(load_bytes(bits + i / 8, (left + 7) / 8)));
  return static_cast<int>(_mm512_reduce_add_epi64(ones));
}

// What is partitioned, 64 ranks at a time: looked up for symbols, which tells whether all of them have one, or in
// memory.
class RankSource {
 public:
  LEPTON_INLINE RankSource(const uint8_t* symbols, int n, const uint8_t* table)
      : symbols_(symbols), n_(n), ranks_(table) {}
  LEPTON_INLINE __m512i at(int i) {
    const __m512i ranks = ranks_.at(_mm512_loadu_si512(symbols_ + i));
    most_ = _mm512_max_epu8(most_, i + 64 <= n_ ? ranks : _mm512_maskz_mov_epi8(low_bits(n_ - i), ranks));
    return ranks;
  }
  LEPTON_INLINE bool all() const {
    return _mm512_cmpeq_epi8_mask(most_, _mm512_set1_epi8(static_cast<char>(kNoRank))) == 0;
  }

 private:
  const uint8_t* symbols_;
  int n_;
  ByteTable ranks_;
  __m512i most_ = _mm512_setzero_si512();
};
struct RanksInMemory {
  const uint8_t* ranks;
  LEPTON_INLINE __m512i at(int i) const { return _mm512_loadu_si512(ranks + i); }
};

// What is not in the first-level cache when it is stored to holds up the stores behind it.
constexpr int kStoreAhead = 128;

template <bool keep_left, bool keep_right, typename Source>
LEPTON_INLINE int partition_from(Source& source, int n, uint8_t middle, uint8_t* bits, uint8_t* left, uint8_t* right,
                                 Lines* ahead) {
  const __m512i threshold = _mm512_set1_epi8(static_cast<char>(middle));
  int64_t total = 0;
  const auto split = [&](int i) LEPTON_LAMBDA_INLINE {
    const __m512i x = source.at(i);
    const uint64_t word = _mm512_cmpge_epu8_mask(x, threshold);
    const int64_t ones = __builtin_popcountll(word);
    total += ones;
    if constexpr (keep_left) __builtin_prefetch(left + kStoreAhead, 1);
    if constexpr (keep_right) __builtin_prefetch(right + kStoreAhead, 1);
    // Compressed into a register, then stored: with a memory destination it is microcode on Zen 4.
    if constexpr (keep_left) _mm512_storeu_si512(left, _mm512_maskz_compress_epi8(~word, x)), left += 64 - ones;
    if constexpr (keep_right) _mm512_storeu_si512(right, _mm512_maskz_compress_epi8(word, x)), right += ones;
    return word;
  };
  Lines lines = *ahead;
  int i = 0;
  for (; i + 64 <= n; i += 64) {
    lines.fetch_one();
    const uint64_t word = split(i);
    __builtin_memcpy(bits + i / 8, &word, 8);
  }
  *ahead = lines;
  if (i == n) return static_cast<int>(total);
  // What lies past n goes to the ends of both sides, where nobody looks.
  const uint64_t before = static_cast<uint64_t>(total), word = split(i) & ((uint64_t{1} << (n - i)) - 1);
  store_word(bits + i / 8, word, (n - i + 7) / 8);
  return static_cast<int>(before) + __builtin_popcountll(word);
}

template <bool keep_left, bool keep_right>
LEPTON_INLINE int partition(const uint8_t* in, int n, uint8_t middle, uint8_t* bits, uint8_t* left, uint8_t* right,
                            Lines* ahead) {
  RanksInMemory source{in};
  return partition_from<keep_left, keep_right>(source, n, middle, bits, left, right, ahead);
}

template <bool keep_left, bool keep_right>
LEPTON_INLINE int partition_symbols(const uint8_t* in, int n, const uint8_t* table, uint8_t*, bool* all, uint8_t middle,
                                    uint8_t* bits, uint8_t* left, uint8_t* right, Lines* ahead) {
  RankSource source(in, n, table);
  const int ones = partition_from<keep_left, keep_right>(source, n, middle, bits, left, right, ahead);
  *all = source.all();
  return ones;
}

}  // namespace
}  // namespace lepton::LEPTON_ISA
