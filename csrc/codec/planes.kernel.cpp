// planes.kernel.cpp - the layouts of planes.h, as loops that the compiler vectorizes for every level.
#include "codec/planes.h"

namespace lepton::LEPTON_ISA {
namespace {

template <typename Word>
LEPTON_INLINE Word load(const uint8_t* p) {
  Word word;
  __builtin_memcpy(&word, p, sizeof(Word));
  return word;
}

void split16(const uint8_t* __restrict src, int64_t n, uint8_t* __restrict high, uint8_t* __restrict low) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t word = load<uint16_t>(src + 2 * i);
    const uint16_t rotated = static_cast<uint16_t>(word << 1 | word >> 15);
    high[i] = static_cast<uint8_t>(rotated >> 8);
    low[i] = static_cast<uint8_t>(rotated);
  }
}

void join16(const uint8_t* __restrict high, const uint8_t* __restrict low, int64_t n, uint8_t* __restrict dst) {
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t rotated = static_cast<uint16_t>(high[i] << 8 | low[i]);
    const uint16_t word = static_cast<uint16_t>(rotated >> 1 | rotated << 15);
    __builtin_memcpy(dst + 2 * i, &word, 2);
  }
}

void split32(const uint8_t* __restrict src, int64_t n, uint8_t* __restrict p0, uint8_t* __restrict p1,
             uint8_t* __restrict p2, uint8_t* __restrict p3) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t word = load<uint32_t>(src + 4 * i);
    const uint32_t rotated = word << 1 | word >> 31;
    p0[i] = static_cast<uint8_t>(rotated >> 24);
    p1[i] = static_cast<uint8_t>(rotated >> 16);
    p2[i] = static_cast<uint8_t>(rotated >> 8);
    p3[i] = static_cast<uint8_t>(rotated);
  }
}

void join32(const uint8_t* __restrict p0, const uint8_t* __restrict p1, const uint8_t* __restrict p2,
            const uint8_t* __restrict p3, int64_t n, uint8_t* __restrict dst) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t rotated = static_cast<uint32_t>(p0[i]) << 24 | static_cast<uint32_t>(p1[i]) << 16 |
                             static_cast<uint32_t>(p2[i]) << 8 | p3[i];
    const uint32_t word = rotated >> 1 | rotated << 31;
    __builtin_memcpy(dst + 4 * i, &word, 4);
  }
}

}  // namespace

void split_planes(Layout layout, const uint8_t* src, int64_t elements, uint8_t* const* planes) {
  switch (layout) {
    case Layout::bytes:
      __builtin_memcpy(planes[0], src, static_cast<size_t>(elements));
      return;
    case Layout::nibbles: {
      uint8_t* __restrict low = planes[0], * __restrict high = planes[1];
      for (int64_t i = 0; i < elements; ++i) {
        low[i] = src[i] & 15;
        high[i] = src[i] >> 4;
      }
      return;
    }
    case Layout::bf16:
    case Layout::fp16:
      return split16(src, elements, planes[0], planes[1]);
    case Layout::fp32:
      return split32(src, elements, planes[0], planes[1], planes[2], planes[3]);
  }
}

void join_planes(Layout layout, const uint8_t* const* planes, int64_t elements, uint8_t* dst) {
  switch (layout) {
    case Layout::bytes:
      __builtin_memcpy(dst, planes[0], static_cast<size_t>(elements));
      return;
    case Layout::nibbles: {
      const uint8_t *low = planes[0], *high = planes[1];
      uint8_t* __restrict out = dst;
      for (int64_t i = 0; i < elements; ++i) out[i] = static_cast<uint8_t>(low[i] | high[i] << 4);
      return;
    }
    case Layout::bf16:
    case Layout::fp16:
      return join16(planes[0], planes[1], elements, dst);
    case Layout::fp32:
      return join32(planes[0], planes[1], planes[2], planes[3], elements, dst);
  }
}

}  // namespace lepton::LEPTON_ISA
