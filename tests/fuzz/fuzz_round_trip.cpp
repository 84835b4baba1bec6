// fuzz_round_trip.cpp - any bytes, encoded by every encoder, come back. The first byte says how often they are
// repeated.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "codec/huffman.h"
#include "codec/lzw.h"
#include "guarded.h"

using namespace lepton;

namespace {

constexpr size_t kMost = 1 << 18;

void check(bool same, const char* what, int which) {
  if (same) return;
  std::fprintf(stderr, "%s %d does not come back\n", what, which);
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  std::vector<uint8_t> text;
  for (int i = 0; i <= data[0] && text.size() + size - 1 <= kMost; ++i) text.insert(text.end(), data + 1, data + size);
  if (text.empty()) return 0;
  static Guarded in(2 * kMost + 4096), out(kMost);
  for (int which = 0; which < kLayoutCount; ++which) {
    const auto layout = static_cast<Layout>(which);
    const auto n = static_cast<int64_t>(text.size()) / element_bytes(layout) * element_bytes(layout);
    if (n == 0) continue;
    std::vector<uint8_t> coded(static_cast<size_t>(huffman_bound(n)));
    with_buffers(
        size, [&] { coded.resize(static_cast<size_t>(huffman_encode_chunk(text.data(), n, layout, coded.data()))); });
    uint8_t* const from = in.ending(coded.size());
    std::memcpy(from, coded.data(), coded.size());
    uint8_t* const to = out.ending(static_cast<size_t>(n));
    const Status status = huffman_decode_chunk(from, static_cast<int64_t>(coded.size()), layout, to, n);
    check(status == Status::ok && std::memcmp(to, text.data(), static_cast<size_t>(n)) == 0, "layout", which);
  }
  const auto n = static_cast<int64_t>(text.size());
  for (int which = 0; which < kLzwVariantCount; ++which) {
    const auto variant = static_cast<LzwVariant>(which);
    const bool chunk = variant == LzwVariant::lepton;
    std::vector<uint8_t> coded(static_cast<size_t>(lzw_bound(n, variant)) + 1);
    coded.resize(static_cast<size_t>(chunk ? lzw_encode_chunk(text.data(), n, coded.data())
                                           : lzw_encode(text.data(), n, variant, coded.data())));
    const auto bytes = static_cast<int64_t>(coded.size());
    uint8_t* const from = in.ending(coded.size());
    std::memcpy(from, coded.data(), coded.size());
    uint8_t* const to = out.ending(text.size());
    const LzwGrow grow = [&](int64_t, int64_t* room) { return *room = n, to; };
    int64_t decoded = n;
    const Status status =
        chunk ? lzw_decode_chunk(from, bytes, to, n) : lzw_decode(from, bytes, variant, grow, &decoded);
    check(status == Status::ok && decoded == n && std::memcmp(to, text.data(), text.size()) == 0, "variant", which);
  }
  return 0;
}
