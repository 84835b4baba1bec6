// pack.cpp - from the saved, device-neutral layout to packed_weight.h's tiles. Runs once a layer.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/pages.h"

namespace lepton {
namespace {

// Eight nibbles of a row, the first one lowest.
uint32_t load_nibbles(const uint8_t* p) { return p[0] | p[1] << 8 | p[2] << 16 | uint32_t(p[3]) << 24; }

void store_bytes(uint8_t* p, uint32_t bytes) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8_t>(bytes >> (8 * i));
}

// Four nibbles, of the low half of a word, to the low halves of four bytes.
uint32_t spread_nibbles(uint32_t nibbles) {
  const uint32_t pairs = (nibbles | nibbles << 8) & 0x00ff00ff;
  return (pairs | pairs << 4) & 0x0f0f0f0f;
}

}  // namespace

void pack_int8(const int8_t* weight, const float* scale, int n, int k, uint8_t* packed) {
  const PackedWeight view = packed_weight(packed, n, k, 8, k, true);
  const PackedLayout layout(view);
  advise_huge_pages(packed, layout.bytes);
  std::memset(packed, 0, size_t(layout.bytes));
  auto* scales = reinterpret_cast<float*>(packed + layout.scales);
  auto* sums = reinterpret_cast<int32_t*>(packed + layout.sums);
  int most = 0;
  for (int column = 0; column < n; ++column) {
    const int8_t* row = weight + int64_t(column) * k;
    uint8_t* out = packed + column / kPanel * view.panel_bytes() + column % kPanel * kQuad;
    int32_t sum = 0;
    for (int i = 0; i < k; ++i) {
      sum += row[i];
      most = std::max(most, std::abs(row[i]));
    }
    const int quads = k / kQuad;
    for (int q = 0; q < quads; ++q) std::memcpy(out + q * kPanel * kQuad, row + q * kQuad, kQuad);
    std::memcpy(out + quads * kPanel * kQuad, row + quads * kQuad, size_t(k % kQuad));
    scales[column] = scale[column];
    sums[column] = sum;
  }
  std::memcpy(packed + layout.most, &most, sizeof(most));
}

namespace {

// Calls body(panel, step, rows) for every step of k in a panel that holds a weight other than 0.
template <typename Body>
void for_steps(const int8_t* weight, int n, int k, int step_quads, const Body& body) {
  const int step_k = step_quads * kQuad;
  for (int panel = 0; panel < divide_up(n, kPanel); ++panel) {
    const int rows = std::min(kPanel, n - panel * kPanel);
    const int8_t* first = weight + int64_t(panel) * kPanel * k;
    for (int step = 0; step < divide_up(k, step_k); ++step) {
      const int k0 = step * step_k, width = std::min(step_k, k - k0);
      bool any = false;
      for (int r = 0; r < rows && !any; ++r)
        for (int i = 0; i < width; ++i) any = any || first[int64_t(r) * k + k0 + i] != 0;
      if (any) body(panel, step, rows);
    }
  }
}

}  // namespace

int64_t count_steps(const int8_t* weight, int n, int k, int step_quads) {
  int64_t steps = 0;
  for_steps(weight, n, k, step_quads, [&](int, int, int) { ++steps; });
  return steps;
}

void pack_int8_blocks(const int8_t* weight, const float* scale, int n, int k, int64_t steps, int step_quads,
                      uint8_t* packed) {
  const PackedBlocksLayout layout(n, steps, step_quads);
  const int panels = divide_up(n, kPanel), step_k = step_quads * kQuad;
  std::memset(packed, 0, size_t(layout.bytes));
  auto* scales = reinterpret_cast<float*>(packed + layout.scales);
  auto* sums = reinterpret_cast<int32_t*>(packed + layout.sums);
  auto* begin = reinterpret_cast<int64_t*>(packed + layout.begin);
  auto* place = reinterpret_cast<uint16_t*>(packed + layout.place);
  for (int column = 0; column < n; ++column) {
    scales[column] = scale[column];
    for (int i = 0; i < k; ++i) sums[column] += weight[int64_t(column) * k + i];
  }
  int64_t at = 0;
  for_steps(weight, n, k, step_quads, [&](int panel, int step, int rows) {
    uint8_t* out = packed + at * step_quads * kPanel * kQuad;
    for (int r = 0; r < rows; ++r) {
      const int8_t* row = weight + int64_t(panel * kPanel + r) * k;
      for (int i = step * step_k; i < std::min(k, (step + 1) * step_k); ++i) {
        const int quad = i % step_k / kQuad;
        out[(quad * kPanel + r) * kQuad + i % kQuad] = static_cast<uint8_t>(row[i]);
      }
    }
    place[at++] = uint16_t(step);
    ++begin[panel + 1];
  });
  for (int panel = 0; panel < panels; ++panel) begin[panel + 1] += begin[panel];
}

void pack_int4(const uint8_t* weight, int64_t row_bytes, const float* scale, const int8_t* zero, int n, int k,
               int group, uint8_t* packed) {
  const PackedWeight view = packed_weight(packed, n, k, 4, group, zero == nullptr);
  const PackedLayout layout(view);
  const int groups = view.groups();
  advise_huge_pages(packed, layout.bytes);
  std::memset(packed, 0, size_t(layout.bytes));
  auto* scales = reinterpret_cast<float*>(packed + layout.scales);
  auto* sums = reinterpret_cast<float*>(packed + layout.sums);
  std::vector<int32_t> group_sums(groups);
  for (int column = 0; column < n; ++column) {
    const uint8_t* row = weight + column * row_bytes;
    const int panel = column / kPanel, c = column % kPanel;
    uint8_t* out = packed + panel * view.panel_bytes() + c * kQuad;
    group_sums.assign(groups, 0);
    for (int i = 0; i < k; i += 2 * kQuad, out += kPanel * kQuad) {
      uint32_t nibbles = load_nibbles(row + i / 2);
      if (k - i < 2 * kQuad) nibbles &= (1u << (4 * (k - i))) - 1;
      const uint32_t low = spread_nibbles(nibbles & 0xffff), high = spread_nibbles(nibbles >> 16);
      store_bytes(out, low | high << 4);  // k 0..3 of the eight in low nibbles, 4..7 in high ones
      group_sums[i / group] += int32_t((low + high) * 0x01010101u >> 24);
    }
    float sum = 0;
    for (int g = 0; g < groups; ++g) {
      const int64_t source = int64_t(column) * groups + g, place = (int64_t(panel) * groups + g) * kPanel + c;
      const int zero_point = 8 + (zero ? zero[source] : 0), size = g + 1 < groups ? group : k - g * group;
      scales[place] = scale[source];
      if (zero) packed[layout.zeros + place] = static_cast<uint8_t>(zero_point);
      const float part = float(group_sums[g] - zero_point * size) * scale[source];
      sum = sum + part;
    }
    sums[column] = sum;
  }
}

}  // namespace lepton
