// fuzz_codec.cpp - hostile payloads for every decoder, every level, with the input's and the output's last byte against
// an unmapped page, under the address and undefined-behaviour sanitizers (`make fuzz`).
//
//   fuzz_codec SECONDS [SEED]
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "codec/huffman.h"
#include "codec/lzw.h"

using namespace lepton;

namespace {

// A buffer that ends where an unmapped page begins.
class Guarded {
 public:
  explicit Guarded(size_t capacity) : capacity_((capacity + kPage - 1) / kPage * kPage) {
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, capacity_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + capacity_, kPage, PROT_NONE) != 0) std::abort();
  }
  uint8_t* ending(size_t size) { return base_ + capacity_ - size; }

 private:
  static constexpr size_t kPage = 4096;
  size_t capacity_;
  uint8_t* base_;
};

constexpr int64_t kMost = 1 << 18;

std::vector<uint8_t> sample(std::mt19937_64& rng) {
  std::vector<uint8_t> data(4 * (1 + rng() % (rng() % 4 ? 2000 : kMost / 4)));
  const int kind = static_cast<int>(rng() % 4), spread = 1 + static_cast<int>(rng() % 255);
  for (auto& byte : data) {
    const auto r = rng();
    byte = static_cast<uint8_t>(kind == 0   ? r
                                : kind == 1 ? (r % spread + (r >> 20) % spread) / 2
                                : kind == 2 ? (r % 5 == 0) * (r >> 8)
                                            : __builtin_ctzll(r | 1ull << 40));
  }
  return data;
}

void damage(std::mt19937_64& rng, std::vector<uint8_t>& payload) {
  for (uint64_t edits = 1 + rng() % 4; edits > 0; --edits) {
    const size_t reach = std::min<size_t>(payload.size(), rng() % 3 ? 40 : 400);
    payload[rng() % (rng() % 4 ? reach : payload.size())] = static_cast<uint8_t>(rng() >> 11);
  }
  if (rng() % 4 == 0) payload.resize(rng() % (payload.size() + 1));
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
  std::mt19937_64 rng(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}());
  Guarded in(4 * kMost), out(2 * kMost);
  const auto begin = std::chrono::steady_clock::now();
  int64_t rounds = 0, refused = 0;
  while (std::chrono::steady_clock::now() - begin < std::chrono::duration<double>(seconds)) {
    const std::vector<uint8_t> data = sample(rng);
    const auto size = static_cast<int64_t>(data.size());
    const auto layout = static_cast<Layout>(rng() % kLayoutCount);
    const auto variant = static_cast<LzwVariant>(1 + rng() % (kLzwVariantCount - 1));
    const int what = static_cast<int>(rng() % 3);  // Huffman, LZW chunk, LZW stream
    std::vector<uint8_t> payload(static_cast<size_t>(what == 2 ? lzw_bound(size, variant) : huffman_bound(size)));
    payload.resize(static_cast<size_t>(what == 0   ? huffman_encode_chunk(data.data(), size, layout, payload.data())
                                       : what == 1 ? lzw_encode_chunk(data.data(), size, payload.data())
                                                   : lzw_encode(data.data(), size, variant, payload.data())));
    for (int attempt = 0; attempt < 8; ++attempt) {
      std::vector<uint8_t> hostile = payload;
      if (attempt > 0) damage(rng, hostile);
      uint8_t* const from = in.ending(hostile.size());
      if (!hostile.empty()) std::memcpy(from, hostile.data(), hostile.size());
      const auto n = static_cast<int64_t>(hostile.size());
      int64_t decoded = size;
      if (what == 2 && lzw_decoded_size(from, n, variant, 2 * kMost, &decoded) != Status::ok) {
        ++refused;
        continue;
      }
      uint8_t* const to = out.ending(static_cast<size_t>(decoded));
      const Status status = what == 0   ? huffman_decode_chunk(from, n, layout, to, decoded)
                            : what == 1 ? lzw_decode_chunk(from, n, to, decoded)
                                        : lzw_decode(from, n, variant, to, decoded);
      refused += status != Status::ok;
      if (attempt == 0 && (status != Status::ok || decoded != size || std::memcmp(to, data.data(), data.size()) != 0)) {
        std::fprintf(stderr, "round trip failed: kind %d, %lld bytes: %s\n", what, static_cast<long long>(size),
                     status_text(status));
        return 1;
      }
    }
    ++rounds;
  }
  std::printf("%s: %lld rounds of 8, %lld refused\n", isa_name(isa_in_use()), static_cast<long long>(rounds),
              static_cast<long long>(refused));
  return 0;
}
