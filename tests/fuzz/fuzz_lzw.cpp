// fuzz_lzw.cpp - any bytes as an LZW chunk or stream. The first byte is the variant; for a chunk the next two are the
// size.
#include <algorithm>
#include <cstring>
#include <utility>

#include "codec/lzw.h"
#include "guarded.h"

using namespace lepton;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr size_t kHead = 3, kMost = 1 << 16, kMostText = 1 << 20;
  if (size < kHead || size - kHead > kMost) return 0;
  static Guarded in(kMost), out(kMostText);
  const size_t payload = size - kHead, wanted = 1 + (data[1] | data[2] << 8);
  uint8_t* const from = in.ending(payload);
  if (payload > 0) std::memcpy(from, data + kHead, payload);
  const auto variant = static_cast<LzwVariant>(data[0] % kLzwVariantCount);
  if (variant == LzwVariant::lepton) {
    lzw_decode_chunk(from, static_cast<int64_t>(payload), out.ending(wanted), static_cast<int64_t>(wanted));
    return 0;
  }
  // The text moves whenever it grows, by little more than it needs, so that its end is near at every time.
  uint8_t* text = out.ending(0);
  size_t had = 0;
  const LzwGrow grow = [&](int64_t needed, int64_t* room) -> uint8_t* {
    if (needed > static_cast<int64_t>(kMostText)) return nullptr;
    *room = std::min<int64_t>(needed + needed / 2 + data[1], kMostText);
    uint8_t* const grown = out.ending(static_cast<size_t>(*room));
    std::memmove(grown, text, std::exchange(had, static_cast<size_t>(*room)));
    return text = grown;
  };
  int64_t decoded = 0;
  lzw_decode(from, static_cast<int64_t>(payload), variant, grow, &decoded);
  return 0;
}
