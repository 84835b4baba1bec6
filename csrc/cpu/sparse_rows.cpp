// sparse_rows.cpp - packs streams of nonzeros, turns activations, and deals blocks of W times panels of X to threads.
#include "cpu/sparse_rows.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace lepton {
namespace {

constexpr int kLanes = 16;
// Rows of X that are turned at a time: what is turned (16 KiB a row with k = 4096) is read again for every block of W.
constexpr int kMostRows = 512;
// Below this many multiplications a second thread costs more than it saves (gemm.cpp).
constexpr int64_t kParallelWork = 1000 * 1000;

// A panel of rows of X, and how many vectors hold it.
struct Panel {
  int row0, rows, vectors;
};

// The fewest vectors that hold the rows, a power of two.
int vectors_for(int rows, int most) { return std::min(int(std::bit_ceil(unsigned(divide_up(rows, kLanes)))), most); }

std::vector<Panel> panels_of(int rows, int most) {
  std::vector<Panel> panels;
  for (int row0 = 0; row0 < rows;) {
    // 48 rows are panels of 32 and 16 rather than one of 64 with a quarter empty.
    int vectors = vectors_for(rows - row0, most);
    if (vectors > 1 && (rows - row0) <= vectors * kLanes * 3 / 4) vectors /= 2;
    const int count = std::min(rows - row0, vectors * kLanes);
    panels.push_back({row0, count, vectors});
    row0 += count;
  }
  return panels;
}

GemmTile output_of(const SparseRowsArgs& args, int row0, int rows) {
  GemmTile tile{};
  tile.weight.n = args.weight.n;
  tile.rows = rows;
  tile.bias = args.bias;
  tile.activation = args.activation;
  tile.y = static_cast<char*>(args.y) + int64_t(row0) * args.weight.n * dtype_bytes(args.dtype);
  tile.y_dtype = args.dtype;
  tile.y_stride = args.weight.n;
  return tile;
}

const void* row_of(const SparseRowsArgs& args, int row) {
  return static_cast<const char*>(args.x) + row * args.x_stride * dtype_bytes(args.dtype);
}

void one_row(const SparseRowsArgs& args, Isa isa, int threads) {
  thread_local Scratch scratch;
  float* x = scratch.floats(args.weight.k);
  select_widen_row(isa)({args.x, args.dtype, args.weight.k, x});
  parallel_for(args.weight.blocks(), threads, [&](int block) {
    alignas(64) float sums[kSparseRows];
    select_sparse_rows_vector(isa)({args.weight, block, 0, x, sums, output_of(args, 0, 1), nullptr});
  });
}

// Rows of X as uint8, each with its scale and zero point.
QuantizedRows quantize(const SparseRowsArgs& args, Isa isa, int row_begin, int rows, int threads, Scratch& scratch) {
  QuantizedRows q{};
  q.layout = RowLayout::bytes;
  q.planes = 1;
  q.stride = round_up(args.weight.k, 64);
  const int padded = round_up(rows, 16);
  char* memory = static_cast<char*>(scratch.get(size_t(padded) * (size_t(q.stride) + 8)));
  q.q = reinterpret_cast<uint8_t*>(memory);
  q.scale = reinterpret_cast<float*>(memory + padded * q.stride);
  q.zero = reinterpret_cast<int32_t*>(q.scale + padded);
  const int parts = std::min(rows, 4 * threads), each = round_up(divide_up(rows, parts), 2);  // 2: of RowLayout::pairs
  parallel_for(divide_up(rows, each), threads, [&](int i) {
    select_quantize_rows(isa)({row_of(args, row_begin), args.dtype, args.x_stride, i * each,
                               std::min((i + 1) * each, rows), args.weight.k, args.weight.k, q});
  });
  return q;
}

// The rows of a panel, which begins at a multiple of 16 rows.
QuantizedRows of_panel(const QuantizedRows& q, const Panel& panel) {
  return q.q == nullptr ? q : q.from(panel.row0, 1);
}

void many_rows(const SparseRowsArgs& args, Isa isa, int row_begin, int rows, int threads) {
  thread_local Scratch turned;
  const int k = args.weight.k, blocks = args.weight.blocks();
  const std::vector<Panel> panels = panels_of(rows, sparse_vectors(isa));
  float* const x = turned.floats(int64_t(panels.size()) * kLanes * sparse_vectors(isa) * k);
  std::vector<float*> places(panels.size());
  float* next = x;
  for (size_t p = 0; p < panels.size(); ++p) {
    places[p] = next;
    next += int64_t(panels[p].vectors) * kLanes * k;
  }
  const int parts = divide_up(k, kSparseSlice);
  thread_local Scratch quantized;
  const QuantizedRows q =
      args.scale == nullptr ? QuantizedRows{} : quantize(args, isa, row_begin, rows, threads, quantized);
  parallel_for(int(panels.size()) * parts, threads, [&](int i) {
    const Panel& panel = panels[i / parts];
    const int begin = i % parts * kSparseSlice;
    select_turn_rows(isa)({row_of(args, row_begin + panel.row0), args.dtype, args.x_stride, of_panel(q, panel),
                           panel.rows, panel.vectors, begin, std::min(begin + kSparseSlice, k), places[i / parts]});
  });
  parallel_for(int(panels.size()) * blocks, threads, [&](int i) {
    thread_local Scratch sums;
    const Panel& panel = panels[i / blocks];
    GemmTile out = output_of(args, row_begin + panel.row0, panel.rows);
    out.q = of_panel(q, panel);
    select_sparse_rows_tile(isa)({args.weight, i % blocks, panel.vectors, places[i / blocks],
                                  sums.floats(int64_t(kSparseRows) * kLanes * panel.vectors), out, args.scale});
  });
  turned.trim();
}

}  // namespace

void sparse_rows(const SparseRowsArgs& args) {
  const Isa isa = isa_in_use();
  if (args.m == 0 || args.weight.n == 0) return;
  const int64_t nonzeros = args.weight.begin[int64_t(args.weight.blocks()) * args.weight.slices()];
  const int threads = args.m * nonzeros < kParallelWork ? 1 : std::max(1, args.threads);
  advise_huge_pages(args.y, int64_t(args.m) * args.weight.n * dtype_bytes(args.dtype));
  if (args.m == 1 && args.scale == nullptr) return one_row(args, isa, threads);
  const int parts = divide_up(args.m, kMostRows), each = round_up(divide_up(args.m, parts), kLanes);
  for (int row = 0; row < args.m; row += each) many_rows(args, isa, row, std::min(each, args.m - row), threads);
}

int64_t count_ones(const uint8_t* bitmask, int n, int k) {
  const int mask_bytes = divide_up(k, 8);
  const int past = k % 8 == 0 ? 0 : 0xff << k % 8 & 0xff;
  int64_t ones = 0;
  for (int r = 0; r < n; ++r, bitmask += mask_bytes) {
    for (int b = 0; b < mask_bytes; ++b) ones += std::popcount(bitmask[b]);
    if (bitmask[mask_bytes - 1] & past) return -1;
  }
  return ones;
}

void pack_sparse_rows(const float* values, const uint8_t* bitmask, int n, int k, int64_t nonzeros, uint8_t* packed) {
  const SparseRowsLayout layout(n, k, nonzeros);
  advise_huge_pages(packed, layout.bytes);
  auto* begin = reinterpret_cast<int64_t*>(packed + layout.begin);
  auto* count = reinterpret_cast<uint16_t*>(packed + layout.count);
  auto* value = reinterpret_cast<float*>(packed + layout.value);
  auto* place = reinterpret_cast<uint16_t*>(packed + layout.place);
  uint8_t* row = packed + layout.row;
  std::memset(row, 0, size_t(layout.value - layout.row));
  const int mask_bytes = divide_up(k, 8), slices = divide_up(k, kSparseSlice);
  static_assert(kSparseSlice % 8 == 0);

  // Of each row: where its nonzeros of the slice at hand begin.
  std::vector<int64_t> next(n);
  int64_t before = 0;
  for (int r = 0; r < n; ++r) {
    next[r] = before;
    for (int b = 0; b < mask_bytes; ++b) before += std::popcount(bitmask[int64_t(r) * mask_bytes + b]);
  }
  int64_t at = 0, cell = 0;
  for (int block = 0; block < n; block += kSparseRows) {
    const int rows = std::min(kSparseRows, n - block);
    for (int slice = 0; slice < slices; ++slice, ++cell) {
      begin[cell] = at;
      const int first = slice * kSparseSlice / 8, last = std::min(mask_bytes, first + kSparseSlice / 8);
      int counts[kSparseRows], order[kSparseRows];
      std::iota(order, order + rows, 0);
      for (int r = 0; r < rows; ++r) {
        counts[r] = 0;
        const uint8_t* mask = bitmask + int64_t(block + r) * mask_bytes;
        for (int b = first; b < last; ++b) counts[r] += std::popcount(mask[b]);
      }
      std::stable_sort(order, order + rows, [&](int a, int b) { return counts[a] > counts[b]; });
      for (int i = 0; i < rows; ++i) {
        const int r = order[i];
        row[cell * kSparseRows + i] = uint8_t(r);
        count[cell * kSparseRows + i] = uint16_t(counts[r]);
        std::memcpy(value + at, values + next[block + r], size_t(counts[r]) * 4);
        next[block + r] += counts[r];
        const uint8_t* mask = bitmask + int64_t(block + r) * mask_bytes;
        for (int b = first; b < last; ++b)
          for (unsigned bits = mask[b]; bits != 0; bits &= bits - 1)
            place[at++] = uint16_t((b - first) * 8 + std::countr_zero(bits));
      }
    }
  }
  begin[cell] = at;
}

}  // namespace lepton
