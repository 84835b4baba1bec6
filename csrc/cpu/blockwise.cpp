// blockwise.cpp - deals whole blocks to threads; a last block that is not whole is filled up with zeros.
#include "cpu/blockwise.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace lepton {
namespace {

// Blocks of a task, 256 KiB of floats: tens of microseconds, beside which the start of a second thread is little.
constexpr int64_t kSpan = 512;
constexpr int kMostBlockBytes = block_bytes(8);

template <typename T>
T* at(T* p, int64_t i) {
  return p ? p + i : nullptr;
}

// Calls body(begin, count) for all spans of blocks.
template <typename Body>
void for_spans(int64_t blocks, int threads, const Body& body) {
  parallel_for(int((blocks + kSpan - 1) / kSpan), threads,
               [&](int i) { body(i * kSpan, std::min(kSpan, blocks - i * kSpan)); });
}

// A vector's whole blocks, and what is behind them.
struct Parts {
  int64_t whole, code, scale;  // bytes before the codes and the scale of what is behind them
  size_t rest_bytes, rest_code;

  Parts(int64_t n, const BlockwiseLayout& layout, int bits)
      : whole(n / kScaleBlock),
        code(whole * block_bytes(bits)),
        scale(layout.scale + whole * int64_t(sizeof(float))),
        rest_bytes(size_t(n % kScaleBlock) * sizeof(float)),
        rest_code(size_t(layout.scale - code)) {}
};

// x, residual: of what is behind the whole blocks.
void quantize_rest(const float* x, float* residual, int bits, const Parts& parts, uint8_t* packed) {
  float padded_x[kScaleBlock] = {}, padded_residual[kScaleBlock] = {};
  uint8_t code[kMostBlockBytes];
  std::memcpy(padded_x, x, parts.rest_bytes);
  if (residual) std::memcpy(padded_residual, residual, parts.rest_bytes);
  select_quantize_blocks(isa_in_use())(
      {padded_x, residual ? padded_residual : nullptr, 1, bits, code, packed + parts.scale});
  std::memcpy(packed + parts.code, code, parts.rest_code);
  if (residual) std::memcpy(residual, padded_residual, parts.rest_bytes);
}

}  // namespace

void quantize_blockwise(const float* x, float* residual, int64_t n, int bits, uint8_t* packed, int threads) {
  const BlockwiseLayout layout(n, bits);
  const Parts parts(n, layout, bits);
  advise_huge_pages(packed, layout.bytes);
  const auto kernel = select_quantize_blocks(isa_in_use());
  for_spans(parts.whole, threads, [&](int64_t begin, int64_t count) {
    const int64_t i = begin * kScaleBlock;
    kernel({x + i, at(residual, i), count, bits, packed + begin * block_bytes(bits),
            packed + layout.scale + begin * int64_t(sizeof(float))});
  });
  if (parts.whole == layout.blocks) return;
  const int64_t rest = parts.whole * kScaleBlock;
  quantize_rest(x + rest, at(residual, rest), bits, parts, packed);
}

void mean_blockwise(const uint8_t* packed, int rows, int64_t n, int bits, float* mean, uint8_t* mean_packed,
                    int threads) {
  const BlockwiseLayout layout(n, bits);
  const Parts parts(n, layout, bits);
  advise_huge_pages(mean, mean ? n * int64_t(sizeof(float)) : 0);
  advise_huge_pages(mean_packed, mean_packed ? layout.bytes : 0);
  const auto kernel = select_mean_blocks(isa_in_use());
  for_spans(parts.whole, threads, [&](int64_t begin, int64_t count) {
    const int64_t code = begin * block_bytes(bits), scale = layout.scale + begin * int64_t(sizeof(float));
    kernel({packed + code, packed + scale, rows, layout.bytes, count, bits, at(mean, begin * kScaleBlock),
            at(mean_packed, code), at(mean_packed, scale)});
  });
  if (parts.whole == layout.blocks) return;
  constexpr int64_t kStride = kMostBlockBytes + sizeof(float);
  std::vector<uint8_t> last(size_t(rows * kStride));  // of each row the codes and the scale
  for (int r = 0; r < rows; ++r) {
    const uint8_t* const row = packed + r * layout.bytes;
    std::memcpy(last.data() + r * kStride, row + parts.code, parts.rest_code);
    std::memcpy(last.data() + r * kStride + kMostBlockBytes, row + parts.scale, sizeof(float));
  }
  float last_mean[kScaleBlock];
  kernel({last.data(), last.data() + kMostBlockBytes, rows, kStride, 1, bits, last_mean, nullptr, nullptr});
  if (mean)
    std::memcpy(mean + parts.whole * kScaleBlock, last_mean, parts.rest_bytes);
  else
    quantize_rest(last_mean, nullptr, bits, parts, mean_packed);
}

}  // namespace lepton
