// pack.cpp - from the saved, device-neutral layout to packed_weight.h's tiles. Runs once a layer.
#include <cstring>

#include "cpu/gemm.h"

namespace lepton {

void pack_int8(const int8_t* weight, const float* scale, int n, int k, uint8_t* packed) {
  const PackedWeight view{packed, nullptr, n, k, 8, k};
  std::memset(packed, 0, size_t(view.total_bytes()));
  auto* meta = reinterpret_cast<Int8Meta*>(packed + view.data_bytes());
  for (int column = 0; column < n; ++column) {
    const int8_t* row = weight + int64_t(column) * k;
    const int panel = column / kPanel, c = column % kPanel;
    uint8_t* out = packed + panel * view.panel_bytes() + c * kQuad;
    int32_t sum = 0;
    for (int i = 0; i < k; ++i) {
      out[int64_t(i / kQuad) * kPanel * kQuad + i % kQuad] = static_cast<uint8_t>(row[i]);
      sum += row[i];
    }
    meta[panel].scale[c] = scale[column];
    meta[panel].column_sum[c] = sum;
  }
}

void pack_int4(const uint8_t* weight, int64_t row_bytes, const float* scale, const int8_t* zero, int n, int k,
               int group, uint8_t* packed) {
  const PackedWeight view{packed, nullptr, n, k, 4, group};
  const int groups = view.groups();
  std::memset(packed, 0, size_t(view.total_bytes()));
  auto* meta = reinterpret_cast<Int4Meta*>(packed + view.data_bytes());
  for (int column = 0; column < n; ++column) {
    const uint8_t* row = weight + column * row_bytes;
    const int panel = column / kPanel, c = column % kPanel;
    uint8_t* out = packed + panel * view.panel_bytes() + c * kQuad;
    for (int g = 0; g < groups; ++g) {
      Int4Meta& m = meta[int64_t(panel) * groups + g];
      m.scale[c] = scale[int64_t(column) * groups + g];
      m.zero[c] = 8 + (zero ? zero[int64_t(column) * groups + g] : 0);
    }
    for (int i = 0; i < k; ++i) {
      const int nibble = (row[i / 2] >> (4 * (i % 2))) & 0xf;
      const int in_vector = i % 8;  // 0..3 in low nibbles, 4..7 in high ones
      out[int64_t(i / 8) * kPanel * kQuad + in_vector % 4] |= static_cast<uint8_t>(nibble << (in_vector < 4 ? 0 : 4));
      Int4Meta& m = meta[int64_t(panel) * groups + i / group];
      m.column_sum[c] += nibble - m.zero[c];
    }
  }
}

}  // namespace lepton
