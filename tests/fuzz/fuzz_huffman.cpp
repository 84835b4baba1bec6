// fuzz_huffman.cpp - any bytes as the payload of a Huffman chunk. The first byte is the layout, the next two the size.
#include <cstring>

#include "codec/huffman.h"
#include "guarded.h"

using namespace lepton;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr size_t kHead = 3, kMost = 1 << 16;
  if (size < kHead || size - kHead > kMost) return 0;
  const auto layout = static_cast<Layout>(data[0] % kLayoutCount);
  const int64_t elements = 1 + (data[1] | data[2] << 8);
  static Guarded in(kMost), out(4 * kMost);
  const size_t payload = size - kHead, decoded = static_cast<size_t>(elements * element_bytes(layout));
  uint8_t* const from = in.ending(payload);
  if (payload > 0) std::memcpy(from, data + kHead, payload);
  uint8_t* const to = out.ending(decoded);
  with_buffers(size, [&] {
    huffman_decode_chunk(from, static_cast<int64_t>(payload), layout, to, static_cast<int64_t>(decoded));
  });
  return 0;
}
