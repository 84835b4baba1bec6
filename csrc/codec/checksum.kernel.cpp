// checksum.kernel.cpp - see checksum.h.
#include "codec/checksum.h"

#include "cpu/simd/unroll.h"
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace lepton::LEPTON_ISA {
namespace {

constexpr uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F, kPrime64_3 = 0x165667B19E3779F9,
                   kPrime64_4 = 0x85EBCA77C2B2AE63, kPrime64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t kMix1 = 0x165667919E3779F9, kMix2 = 0x9FB21C651E98DF25;

constexpr int kSecretBytes = 192;
constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

LEPTON_INLINE uint64_t load64(const uint8_t* p) {
  uint64_t word;
  __builtin_memcpy(&word, p, 8);
  return word;
}
LEPTON_INLINE uint32_t load32(const uint8_t* p) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}

// The upper and the lower half of the product, folded.
LEPTON_INLINE uint64_t multiply_fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

LEPTON_INLINE uint64_t avalanche(uint64_t h) {
  h ^= h >> 37;
  h *= kMix1;
  return h ^ h >> 32;
}
LEPTON_INLINE uint64_t avalanche64(uint64_t h) {
  h ^= h >> 33;
  h *= kPrime64_2;
  h ^= h >> 29;
  h *= kPrime64_3;
  return h ^ h >> 32;
}

LEPTON_INLINE uint64_t mix16(const uint8_t* data, const uint8_t* secret) {
  return multiply_fold(load64(data) ^ load64(secret), load64(data + 8) ^ load64(secret + 8));
}

uint64_t up_to_16(const uint8_t* data, int64_t size) {
  const auto n = static_cast<uint64_t>(size);
  if (size > 8) {
    const uint64_t low = load64(data) ^ (load64(kSecret + 24) ^ load64(kSecret + 32));
    const uint64_t high = load64(data + size - 8) ^ (load64(kSecret + 40) ^ load64(kSecret + 48));
    return avalanche(n + __builtin_bswap64(low) + high + multiply_fold(low, high));
  }
  if (size >= 4) {
    const uint64_t both = load32(data + size - 4) + (static_cast<uint64_t>(load32(data)) << 32);
    uint64_t h = both ^ (load64(kSecret + 8) ^ load64(kSecret + 16));
    h ^= (h << 49 | h >> 15) ^ (h << 24 | h >> 40);
    h *= kMix2;
    h ^= (h >> 35) + n;
    h *= kMix2;
    return h ^ h >> 28;
  }
  if (size > 0) {
    const uint32_t word = static_cast<uint32_t>(data[0]) << 16 | static_cast<uint32_t>(data[size >> 1]) << 24 |
                          data[size - 1] | static_cast<uint32_t>(n) << 8;
    return avalanche64(word ^ static_cast<uint64_t>(load32(kSecret) ^ load32(kSecret + 4)));
  }
  return avalanche64(load64(kSecret + 56) ^ load64(kSecret + 64));
}

uint64_t up_to_240(const uint8_t* data, int64_t size) {
  uint64_t h = static_cast<uint64_t>(size) * kPrime64_1;
  if (size <= 128) {
    for (int64_t i = (size - 1) / 32; i >= 0; --i)
      h += mix16(data + 16 * i, kSecret + 32 * i) + mix16(data + size - 16 * (i + 1), kSecret + 32 * i + 16);
    return avalanche(h);
  }
  constexpr int kStart = 3, kLast = 17, kSmallestSecret = 136;
  const int rounds = static_cast<int>(size / 16);
  for (int i = 0; i < 8; ++i) h += mix16(data + 16 * i, kSecret + 16 * i);
  h = avalanche(h);
  for (int i = 8; i < rounds; ++i) h += mix16(data + 16 * i, kSecret + 16 * (i - 8) + kStart);
  return avalanche(h + mix16(data + size - 16, kSecret + kSmallestSecret - kLast));
}

constexpr int kStripe = 64, kLanes = 8, kSecretStep = 8, kStripesInBlock = (kSecretBytes - kStripe) / kSecretStep;

// A stripe: sums[i] += word i ^ 1 + the product of the halves of (word i ^ secret i). After a block of them each sum is
// scrambled: (sum ^ sum >> 47 ^ secret) * kPrime32_1.
// 64-bit lanes; multiply_low: the product of the lower halves.
#if defined(__AVX512F__)
using Lanes = __m512i;
LEPTON_INLINE Lanes load_lanes(const void* p) { return _mm512_loadu_si512(p); }
LEPTON_INLINE void store_lanes(void* p, Lanes v) { _mm512_storeu_si512(p, v); }
LEPTON_INLINE Lanes splat(uint64_t word) { return _mm512_set1_epi64(static_cast<int64_t>(word)); }
LEPTON_INLINE Lanes add(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
LEPTON_INLINE Lanes flip(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
LEPTON_INLINE Lanes multiply_low(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
LEPTON_INLINE Lanes swap_pairs(Lanes a) { return _mm512_shuffle_epi32(a, _MM_PERM_BADC); }
template <int bits>
LEPTON_INLINE Lanes shift_right(Lanes a) {
  return _mm512_srli_epi64(a, bits);
}
template <int bits>
LEPTON_INLINE Lanes shift_left(Lanes a) {
  return _mm512_slli_epi64(a, bits);
}
#elif defined(__AVX2__)
using Lanes = __m256i;
LEPTON_INLINE Lanes load_lanes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
LEPTON_INLINE void store_lanes(void* p, Lanes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
LEPTON_INLINE Lanes splat(uint64_t word) { return _mm256_set1_epi64x(static_cast<int64_t>(word)); }
LEPTON_INLINE Lanes add(Lanes a, Lanes b) { return _mm256_add_epi64(a, b); }
LEPTON_INLINE Lanes flip(Lanes a, Lanes b) { return _mm256_xor_si256(a, b); }
LEPTON_INLINE Lanes multiply_low(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
LEPTON_INLINE Lanes swap_pairs(Lanes a) { return _mm256_shuffle_epi32(a, _MM_SHUFFLE(1, 0, 3, 2)); }
template <int bits>
LEPTON_INLINE Lanes shift_right(Lanes a) {
  return _mm256_srli_epi64(a, bits);
}
template <int bits>
LEPTON_INLINE Lanes shift_left(Lanes a) {
  return _mm256_slli_epi64(a, bits);
}
#elif defined(__SSE2__)
using Lanes = __m128i;
LEPTON_INLINE Lanes load_lanes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
LEPTON_INLINE void store_lanes(void* p, Lanes v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
LEPTON_INLINE Lanes splat(uint64_t word) { return _mm_set1_epi64x(static_cast<int64_t>(word)); }
LEPTON_INLINE Lanes add(Lanes a, Lanes b) { return _mm_add_epi64(a, b); }
LEPTON_INLINE Lanes flip(Lanes a, Lanes b) { return _mm_xor_si128(a, b); }
LEPTON_INLINE Lanes multiply_low(Lanes a, Lanes b) { return _mm_mul_epu32(a, b); }
LEPTON_INLINE Lanes swap_pairs(Lanes a) { return _mm_shuffle_epi32(a, _MM_SHUFFLE(1, 0, 3, 2)); }
template <int bits>
LEPTON_INLINE Lanes shift_right(Lanes a) {
  return _mm_srli_epi64(a, bits);
}
template <int bits>
LEPTON_INLINE Lanes shift_left(Lanes a) {
  return _mm_slli_epi64(a, bits);
}
#else
// The compiler's vectors.
typedef uint64_t Lanes __attribute__((vector_size(16)));
LEPTON_INLINE Lanes load_lanes(const void* p) {
  Lanes lanes;
  __builtin_memcpy(&lanes, p, sizeof lanes);
  return lanes;
}
LEPTON_INLINE void store_lanes(void* p, Lanes v) { __builtin_memcpy(p, &v, sizeof v); }
LEPTON_INLINE Lanes splat(uint64_t word) { return Lanes{word, word}; }
LEPTON_INLINE Lanes add(Lanes a, Lanes b) { return a + b; }
LEPTON_INLINE Lanes flip(Lanes a, Lanes b) { return a ^ b; }
LEPTON_INLINE Lanes swap_pairs(Lanes a) { return Lanes{a[1], a[0]}; }
#if defined(__ARM_NEON)
LEPTON_INLINE Lanes multiply_low(Lanes a, Lanes b) {
  return (Lanes)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
}
#else
LEPTON_INLINE Lanes multiply_low(Lanes a, Lanes b) { return (a & 0xffffffff) * (b & 0xffffffff); }
#endif
template <int bits>
LEPTON_INLINE Lanes shift_right(Lanes a) {
  return a >> bits;
}
template <int bits>
LEPTON_INLINE Lanes shift_left(Lanes a) {
  return a << bits;
}
#endif

LEPTON_INLINE Lanes multiply_halves(Lanes data, Lanes secret) {
  const Lanes key = flip(data, secret);
  return multiply_low(key, shift_right<32>(key));
}
LEPTON_INLINE Lanes scramble(Lanes sum, Lanes secret) {
  const Lanes key = flip(flip(sum, shift_right<47>(sum)), secret), prime = splat(kPrime32_1);
  return add(multiply_low(key, prime), shift_left<32>(multiply_low(shift_right<32>(key), prime)));
}

struct Sums {
  static constexpr int kRegisters = kStripe / static_cast<int>(sizeof(Lanes));
  static constexpr int kStep = static_cast<int>(sizeof(Lanes));
  Lanes part[kRegisters];

  LEPTON_INLINE explicit Sums(const uint64_t* sums) {
    for (int i = 0; i < kRegisters; ++i) part[i] = load_lanes(reinterpret_cast<const uint8_t*>(sums) + kStep * i);
  }
  LEPTON_INLINE void store(uint64_t* sums) const {
    for (int i = 0; i < kRegisters; ++i) store_lanes(reinterpret_cast<uint8_t*>(sums) + kStep * i, part[i]);
  }
  LEPTON_INLINE void add_stripe(const uint8_t* data, const uint8_t* secret) {
    unroll<kRegisters>([&]<int i>() LEPTON_LAMBDA_INLINE {
      const Lanes words = load_lanes(data + kStep * i);
      part[i] = add(part[i], add(swap_pairs(words), multiply_halves(words, load_lanes(secret + kStep * i))));
    });
  }
  LEPTON_INLINE void scramble_all(const uint8_t* secret) {
    unroll<kRegisters>([&]<int i>()
                           LEPTON_LAMBDA_INLINE { part[i] = scramble(part[i], load_lanes(secret + kStep * i)); });
  }
};

uint64_t long_data(const uint8_t* data, int64_t size) {
  uint64_t sums[kLanes] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                           kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};
  Sums running(sums);
  const int64_t blocks = (size - 1) / (kStripe * kStripesInBlock);
  for (int64_t block = 0; block < blocks; ++block, data += kStripe * kStripesInBlock) {
    for (int i = 0; i < kStripesInBlock; ++i) running.add_stripe(data + kStripe * i, kSecret + kSecretStep * i);
    running.scramble_all(kSecret + kSecretBytes - kStripe);
  }
  const int64_t rest = size - blocks * kStripe * kStripesInBlock;
  for (int64_t i = 0; i < (rest - 1) / kStripe; ++i) running.add_stripe(data + kStripe * i, kSecret + kSecretStep * i);
  constexpr int kLastStart = 7, kMergeStart = 11;
  running.add_stripe(data + rest - kStripe, kSecret + kSecretBytes - kStripe - kLastStart);
  running.store(sums);
  uint64_t h = static_cast<uint64_t>(size) * kPrime64_1;
  for (int i = 0; i < kLanes; i += 2) {
    const uint8_t* const secret = kSecret + kMergeStart + 8 * i;
    h += multiply_fold(sums[i] ^ load64(secret), sums[i + 1] ^ load64(secret + 8));
  }
  return avalanche(h);
}

}  // namespace

uint64_t xxh3(const uint8_t* data, int64_t size) {
  if (size <= 16) return up_to_16(data, size);
  return size <= 240 ? up_to_240(data, size) : long_data(data, size);
}

}  // namespace lepton::LEPTON_ISA
