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

// Rows of X that are turned at a time, of m.
int rows_at_a_time(int m) { return m == 0 ? 0 : round_up(divide_up(m, divide_up(m, kMostRows)), kLanes); }

// Below this many multiplications a second thread costs more than it saves (gemm.cpp); those of a single row of X are
// not done in vectors, and count for as many as a vector's.
constexpr int64_t kParallelWork = 1000 * 1000;

// A panel of rows of X, and how many vectors hold it.
struct Panel {
  int row0, rows, vectors;
};

std::vector<Panel> panels_of(int rows, SparseVectors allowed) {
  std::vector<Panel> panels;
  for (int row0 = 0; row0 < rows;) {
    // The fewest vectors that hold the rows. Two or four, a part of them empty, take no longer than half of them and
    // another panel; but 96 rows are panels of 64 and 32 rather than one of 128 with a quarter empty.
    const int fewest = int(std::bit_ceil(unsigned(divide_up(rows - row0, kLanes))));
    int vectors = std::clamp(fewest, allowed.least, allowed.most);
    if (vectors == 8 && rows - row0 <= 96) vectors /= 2;
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

void one_row(const SparseRowsArgs& args, Isa isa, int threads) {
  thread_local Scratch scratch, quantized;
  float* x = scratch.floats(round_up(args.weight.k, kLanes));
  const QuantizedRows q = args.scale == nullptr ? QuantizedRows{} : quantize(args, isa, 0, 1, 1, quantized);
  select_widen_row(isa)({args.x, args.dtype, q, args.weight.k, x});
  parallel_for(args.weight.blocks(), threads, [&](int block) {
    alignas(64) float sums[kSparseRows];
    GemmTile out = output_of(args, 0, 1);
    out.q = q;
    select_sparse_rows_vector(isa)({args.weight, block, 0, x, sums, out, args.scale});
  });
}

// The rows of a panel, which begins at a multiple of 16 rows.
QuantizedRows of_panel(const QuantizedRows& q, const Panel& panel) {
  return q.q == nullptr ? q : q.from(panel.row0, 1);
}

void many_rows(const SparseRowsArgs& args, Isa isa, int row_begin, int rows, int threads) {
  thread_local Scratch turned;
  const int k = args.weight.k, blocks = args.weight.blocks();
  const SparseForm form = args.weight.form;
  const SparseVectors allowed(isa, form);
  const std::vector<Panel> panels = panels_of(rows, allowed);
  // Bytes of a vector of 16 rows.
  const int64_t line = int64_t(divide_up(k, turned_columns(form, isa))) * turned_bytes(form) * kLanes;
  char* next = static_cast<char*>(turned.get(size_t(panels.size()) * allowed.most * line));
  std::vector<char*> places;
  for (const Panel& panel : panels) {
    places.push_back(next);
    next += panel.vectors * line;
  }
  const int slice = args.weight.slice, parts = divide_up(k, slice);
  thread_local Scratch quantized;
  const QuantizedRows q =
      args.scale == nullptr ? QuantizedRows{} : quantize(args, isa, row_begin, rows, threads, quantized);
  parallel_for(int(panels.size()) * parts, threads, [&](int i) {
    const Panel& panel = panels[i / parts];
    const int begin = i % parts * slice;
    select_turn_rows(isa)({form, row_of(args, row_begin + panel.row0), args.dtype, args.x_stride, of_panel(q, panel),
                           panel.rows, panel.vectors, begin, std::min(begin + slice, k), places[i / parts]});
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
  const int64_t rows = args.m == 1 ? kLanes : args.m;
  const SparseForm form = args.weight.form;
  const int threads = rows * args.weight.items() * places_of(form) * rows_per_item(form) < kParallelWork
                          ? 1
                          : std::max(1, args.threads);
  advise_huge_pages(args.y, int64_t(args.m) * args.weight.n * dtype_bytes(args.dtype));
  if (args.m == 1 && (form == SparseForm::floats || form == SparseForm::pairs)) return one_row(args, isa, threads);
  const int each = rows_at_a_time(args.m);
  for (int row = 0; row < args.m; row += each) many_rows(args, isa, row, std::min(each, args.m - row), threads);
}

int count_panels(int m, SparseForm form, int vectors) {
  int count = 0;
  for (int row = 0, each = rows_at_a_time(m); row < m; row += each)
    for (const Panel& panel : panels_of(std::min(each, m - row), SparseVectors(isa_in_use(), form)))
      count += panel.vectors == vectors;
  return count;
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

namespace {

// The columns of a row's nonzeros from column `begin` on, a multiple of 8, less it, up to `length` columns. Returns how
// many there are.
int columns_of(const uint8_t* mask, int mask_bytes, int begin, int length, uint16_t* columns) {
  const int first = begin / 8, last = std::min(mask_bytes, first + length / 8);
  int count = 0;
  for (int b = first; b < last; ++b)
    for (unsigned bits = mask[b]; bits != 0; bits &= bits - 1)
      columns[count++] = uint16_t((b - first) * 8 + std::countr_zero(bits));
  return count;
}

// The bitmask of a row of the stream: of one row of W, or of two that end up in one.
std::vector<uint8_t> mask_of(const uint8_t* bitmask, int mask_bytes, int row, int rows) {
  std::vector<uint8_t> mask(bitmask + int64_t(row) * mask_bytes, bitmask + int64_t(row + 1) * mask_bytes);
  for (int i = 1; i < rows; ++i)
    for (int b = 0; b < mask_bytes; ++b) mask[b] |= bitmask[int64_t(row + i) * mask_bytes + b];
  return mask;
}

// Items of so many columns with a nonzero.
int items_of(const uint16_t* columns, int count, SparseForm form, int group) {
  if (is_float(form)) return count;
  if (form == SparseForm::pairs) return divide_up(count, 2);
  int items = 0;
  for (int i = 0; i < count; ++i) items += i == 0 || columns[i] / group != columns[i - 1] / group;
  return items;
}

// Writes the items of one row of a slice.
void write_floats(const float* values, const uint16_t* columns, int count, float* value, uint16_t* place) {
  std::copy_n(values, count, value);
  std::copy_n(columns, count, place);
}

// One of two rows: every second value, 0 where the row has none. Returns how many values were taken.
int write_twin(const float* values, const uint8_t* mask, const uint16_t* columns, int count, float* value) {
  int taken = 0;
  for (int i = 0; i < count; ++i) {
    const bool there = mask[columns[i] / 8] >> columns[i] % 8 & 1;
    value[2 * i] = there ? values[taken++] : 0.f;
  }
  return taken;
}

void write_pairs(const int8_t* values, const uint16_t* columns, int count, int16_t* value, uint16_t* place) {
  std::copy_n(values, count, value);
  std::copy_n(columns, count, place);
  if (count % 2 == 1) {
    value[count] = 0;
    place[count] = columns[count - 1];
  }
}

template <typename Weight>  // int16 [2] or int8 [4]
void write_groups(const int8_t* values, const uint16_t* columns, int count, Weight* value, uint16_t* place) {
  constexpr int kGroup = 4 / sizeof(Weight);
  int item = -1;
  for (int i = 0; i < count; ++i) {
    if (item < 0 || columns[i] / kGroup != place[item]) {
      place[++item] = uint16_t(columns[i] / kGroup);
      std::fill_n(value + item * kGroup, kGroup, Weight(0));
    }
    value[item * kGroup + columns[i] % kGroup] = values[i];
  }
}

}  // namespace

int64_t count_items(const uint8_t* bitmask, int n, int k, SparseForm form, int slice) {
  const int mask_bytes = divide_up(k, 8), group = group_columns(isa_in_use()), together = rows_per_item(form);
  std::vector<uint16_t> columns(std::min(k, slice));
  int64_t items = 0;
  for (int r = 0; r < n; r += together) {
    const std::vector<uint8_t> mask = mask_of(bitmask, mask_bytes, r, std::min(together, n - r));
    for (int begin = 0; begin < k; begin += slice) {
      const int count = columns_of(mask.data(), mask_bytes, begin, slice, columns.data());
      items += items_of(columns.data(), count, form, group);
    }
  }
  return items;
}

void pack_sparse_rows(const void* values, const uint8_t* bitmask, int n, int k, SparseForm form, int slice,
                      int64_t items, uint8_t* packed) {
  const SparseRowsLayout layout(n, k, form, slice, items);
  advise_huge_pages(packed, layout.bytes);
  auto* const begin = reinterpret_cast<int64_t*>(packed + layout.begin);
  auto* const count = reinterpret_cast<uint16_t*>(packed + layout.count);
  auto* const place = reinterpret_cast<uint16_t*>(packed + layout.place);
  uint8_t *const row = packed + layout.row, *const value = packed + layout.value;
  const auto* const floats = static_cast<const float*>(values);
  const auto* const integers = static_cast<const int8_t*>(values);
  std::memset(row, 0, size_t(layout.value - layout.row));
  const int mask_bytes = divide_up(k, 8), group = group_columns(isa_in_use()), together = rows_per_item(form);
  static_assert(kShortSlice % 8 == 0 && kSparseSlice % 8 == 0 && kSparseRows % 2 == 0);

  // Of each row of W: where its nonzeros of the slice at hand begin among the values.
  std::vector<int64_t> next(n);
  int64_t before = 0;
  for (int r = 0; r < n; ++r) {
    next[r] = before;
    const uint8_t* const mask = bitmask + int64_t(r) * mask_bytes;
    for (int b = 0; b < mask_bytes; ++b) before += std::popcount(mask[b]);
    if (form == SparseForm::groups)
      reinterpret_cast<int32_t*>(packed + layout.sum)[r] = std::accumulate(integers + next[r], integers + before, 0);
  }
  int64_t at = 0, cell = 0;
  const int most = std::min(k, slice);
  std::vector<uint16_t> columns(size_t(kSparseRows) * most);  // of each row of the stream
  for (int block = 0; block < n; block += kSparseRows) {
    const int end = std::min(n, block + kSparseRows), rows = divide_up(end - block, together);
    std::vector<std::vector<uint8_t>> masks;
    for (int r = block; r < end; r += together)
      masks.push_back(mask_of(bitmask, mask_bytes, r, std::min(together, end - r)));
    for (int first = 0; first < k; first += slice, ++cell) {
      begin[cell] = at;
      int nonzeros[kSparseRows], lengths[kSparseRows], order[kSparseRows];
      std::iota(order, order + rows, 0);
      for (int r = 0; r < rows; ++r) {
        uint16_t* const of_row = columns.data() + size_t(r) * most;
        nonzeros[r] = columns_of(masks[r].data(), mask_bytes, first, slice, of_row);
        lengths[r] = items_of(of_row, nonzeros[r], form, group);
      }
      std::stable_sort(order, order + rows, [&](int a, int b) { return lengths[a] > lengths[b]; });
      for (int i = 0; i < rows; ++i) {
        const int r = order[i], row_of_w = block + r * together;
        const uint16_t* const of_row = columns.data() + size_t(r) * most;
        row[cell * kSparseRows + i] = uint8_t(r);
        count[cell * kSparseRows + i] = uint16_t(lengths[r]);
        uint8_t* const values_at = value + at * value_bytes(form);
        uint16_t* const places_at = place + at * places_of(form);
        const int64_t from = next[row_of_w];
        switch (form) {
          case SparseForm::floats:
            write_floats(floats + from, of_row, nonzeros[r], reinterpret_cast<float*>(values_at), places_at);
            break;
          case SparseForm::twins: {
            std::copy_n(of_row, nonzeros[r], places_at);
            auto* const twins = reinterpret_cast<float*>(values_at);
            for (int twin = 0; twin < together; ++twin) {
              const int w = row_of_w + twin;
              if (w < end) {
                const uint8_t* const mask = bitmask + int64_t(w) * mask_bytes + first / 8;
                next[w] += write_twin(floats + next[w], mask, of_row, nonzeros[r], twins + twin);
              } else {
                for (int j = 0; j < nonzeros[r]; ++j) twins[2 * j + twin] = 0;
              }
            }
            break;
          }
          case SparseForm::pairs:
            write_pairs(integers + from, of_row, nonzeros[r], reinterpret_cast<int16_t*>(values_at), places_at);
            break;
          case SparseForm::groups:
            if (group == 2)
              write_groups(integers + from, of_row, nonzeros[r], reinterpret_cast<int16_t*>(values_at), places_at);
            else
              write_groups(integers + from, of_row, nonzeros[r], reinterpret_cast<int8_t*>(values_at), places_at);
        }
        if (form != SparseForm::twins) next[row_of_w] += nonzeros[r];
        at += lengths[r];
      }
    }
  }
  begin[cell] = at;
}

}  // namespace lepton
