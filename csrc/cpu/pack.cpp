// pack.cpp - from the saved, device-neutral layout to packed_weight.h's tiles. Runs once a layer.
#include <cstring>
#include <vector>

#include "cpu/gemm.h"

namespace lepton {

void pack_int8(const int8_t* weight, const float* scale, int n, int k, uint8_t* packed) {
  const PackedWeight view = packed_weight(packed, n, k, 8, k, true);
  const PackedLayout layout(view);
  std::memset(packed, 0, size_t(layout.bytes));
  auto* scales = reinterpret_cast<float*>(packed + layout.scales);
  auto* sums = reinterpret_cast<int32_t*>(packed + layout.sums);
  for (int column = 0; column < n; ++column) {
    const int8_t* row = weight + int64_t(column) * k;
    uint8_t* out = packed + column / kPanel * view.panel_bytes() + column % kPanel * kQuad;
    int32_t sum = 0;
    for (int i = 0; i < k; ++i) {
      out[int64_t(i / kQuad) * kPanel * kQuad + i % kQuad] = static_cast<uint8_t>(row[i]);
      sum += row[i];
    }
    scales[column] = scale[column];
    sums[column] = sum;
  }
}

void pack_int4(const uint8_t* weight, int64_t row_bytes, const float* scale, const int8_t* zero, int n, int k,
               int group, uint8_t* packed) {
  const PackedWeight view = packed_weight(packed, n, k, 4, group, zero == nullptr);
  const PackedLayout layout(view);
  const int groups = view.groups();
  std::memset(packed, 0, size_t(layout.bytes));
  auto* scales = reinterpret_cast<float*>(packed + layout.scales);
  auto* sums = reinterpret_cast<float*>(packed + layout.sums);
  std::vector<int32_t> group_sums(groups);
  for (int column = 0; column < n; ++column) {
    const uint8_t* row = weight + column * row_bytes;
    const int panel = column / kPanel, c = column % kPanel;
    uint8_t* out = packed + panel * view.panel_bytes() + c * kQuad;
    group_sums.assign(groups, 0);
    for (int i = 0; i < k; ++i) {
      const int nibble = (row[i / 2] >> (4 * (i % 2))) & 0xf;
      const int in_vector = i % 8;  // 0..3 in low nibbles, 4..7 in high ones
      out[int64_t(i / 8) * kPanel * kQuad + in_vector % 4] |= static_cast<uint8_t>(nibble << (in_vector < 4 ? 0 : 4));
      group_sums[i / group] += nibble;
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
