// sparse_rows.h - Y = activation(X @ W^T + bias) on the CPU, for a W whose zeros lie anywhere.
//
// W is stored as streams of its nonzeros: for each block of 256 rows and each slice of columns, row after row. Rows
// of as many nonzeros follow each other within a block of a slice: where a loop ends is then foreseen. X is turned so
// that one column of it lies in vectors, and a nonzero is a broadcast and a few multiply-adds, at any sparsity; a slice
// of 128 or 256 columns of turned X stays close to the core while a block passes by. For a single row of X, which all
// of it fits there, slices are as long as a place can say.
//
//   begin  int64  [blocks][slices] and one more   where the block of the slice begins in the stream
//   row    uint8  [blocks][slices][256]           of the block, in the order of the stream; past n there are none
//   count  uint16 [blocks][slices][256]           items of that row in the stream
//   sum    int32  [n]                             of the row's weights (groups)
//   value  4 or 8 bytes [items]
//   place  uint16 [items][1 or 2]                 the column, less the slice's first; of groups in units of their size
//
// An item is
//   floats  one nonzero, f32
//   twins   one column of two rows, f32 [2]: for zeros that neighbouring rows share. Rows 2 i and 2 i + 1 are row i of
//           the stream
//   pairs   two int8 nonzeros of a row as int16, each with its place; a row's odd one has a 0 beside it
//   groups  2 or 4 neighbours, group_columns(isa), as int16 or int8: for zeros that come in groups of a row
//
// int8 weights (w8a8) meet quantized activations in int32 sums: the results are those of gemm_int8 to the last bit.
// Pairs meet q - zero as int16: two columns of turned X are interleaved, and one instruction adds x[k0] w0 + x[k1] w1.
// In groups nothing has to be interleaved: X is turned by groups.
#pragma once

#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/dtype.h"
#include "cpu/gemm_tile.h"
#include "cpu/kernel_table.h"
#include "cpu/packed_weight.h"

namespace lepton {

constexpr int kSparseRows = 256, kSparseSlice = 256;
constexpr int kShortSlice = 128;     // of floats that four vectors of 16 rows of X meet: 32 KiB of turned X
constexpr int kLongSlice = 1 << 15;  // of weights for a single row of X
constexpr int kSparseAhead = 1024;   // bytes that are fetched ahead, and may lie past the end

enum class SparseForm : int { floats, pairs, groups, twins };

constexpr int places_of(SparseForm form) { return form == SparseForm::pairs ? 2 : 1; }
// Rows of W that are one row of the stream.
constexpr int rows_per_item(SparseForm form) { return form == SparseForm::twins ? 2 : 1; }
constexpr int value_bytes(SparseForm form) { return 4 * rows_per_item(form); }
constexpr bool is_float(SparseForm form) { return form == SparseForm::floats || form == SparseForm::twins; }

// Columns of a group: as many weights as the level's int8 products multiply at once.
constexpr int group_columns(Isa isa) { return isa <= Isa::avx2 ? 2 : 4; }

constexpr bool has_wide_registers(Isa isa) { return isa >= Isa::avx512vnni && isa <= Isa::amx; }

// Bytes of turned X for a row and an item.
constexpr int turned_bytes(SparseForm form) { return form == SparseForm::pairs ? 2 : 4; }
// Columns of X that lie together in turned X.
constexpr int turned_columns(SparseForm form, Isa isa) { return form == SparseForm::groups ? group_columns(isa) : 1; }

// A view of packed nonzeros.
struct SparseRows {
  int n, k;
  SparseForm form;
  int slice;  // kSparseSlice, kShortSlice or kLongSlice
  const int64_t* begin;
  const uint8_t* row;
  const uint16_t* count;
  const int32_t* sum;
  const void* value;
  const uint16_t* place;

  int blocks() const { return divide_up(n, kSparseRows); }
  int slices() const { return divide_up(k, slice); }
  int64_t cell(int block, int slice) const { return int64_t(block) * slices() + slice; }
  int64_t items() const { return begin[cell(blocks(), 0)]; }
  int rows_of(int block) const { return n - block * kSparseRows < kSparseRows ? n - block * kSparseRows : kSparseRows; }
};

// Where the parts begin, in bytes.
struct SparseRowsLayout {
  int64_t begin = 0, row, count, sum, value, place, bytes;

  SparseRowsLayout(int n, int k, SparseForm form, int slice, int64_t items) {
    const auto lines = [](int64_t size) { return (size + 63) / 64 * 64; };
    const int64_t cells = int64_t(divide_up(n, kSparseRows)) * divide_up(k, slice);
    row = lines((cells + 1) * 8);
    count = row + cells * kSparseRows;
    sum = count + cells * kSparseRows * 2;
    value = sum + lines(form == SparseForm::groups ? n * int64_t(4) : 0);
    place = value + lines(items * value_bytes(form));
    bytes = place + lines(items * places_of(form) * 2);
  }
};

inline SparseRows sparse_rows_view(const uint8_t* packed, int n, int k, SparseForm form, int slice, int64_t items) {
  const SparseRowsLayout layout(n, k, form, slice, items);
  return {n,
          k,
          form,
          slice,
          reinterpret_cast<const int64_t*>(packed + layout.begin),
          packed + layout.row,
          reinterpret_cast<const uint16_t*>(packed + layout.count),
          reinterpret_cast<const int32_t*>(packed + layout.sum),
          packed + layout.value,
          reinterpret_cast<const uint16_t*>(packed + layout.place)};
}

// How many ones a bitmask uint8 [n, ceil(k / 8)] has; -1 if there are some past column k - 1.
int64_t count_ones(const uint8_t* bitmask, int n, int k);

// How many items a weight with this bitmask is made of, at the level in use.
int64_t count_items(const uint8_t* bitmask, int n, int k, SparseForm form, int slice);

// From the saved layout: values f32 (floats, twins) or int8, row after row; bitmask uint8 [n, ceil(k / 8)], bit i % 8
// of byte i / 8 for column i.
void pack_sparse_rows(const void* values, const uint8_t* bitmask, int n, int k, SparseForm form, int slice,
                      int64_t items, uint8_t* packed);

struct SparseRowsArgs {
  const void* x;  // [m, k], rows x_stride elements apart
  Dtype dtype;    // of x and y
  int64_t x_stride;
  int m;
  SparseRows weight;
  const float* bias;  // [n] or null
  Activation activation;
  void* y;  // [m, n], rows contiguous
  int threads;
  const float* scale = nullptr;  // [n] of int8 weights (pairs, groups), whose activations are quantized
};

// Long slices are for one row of X, and for floats and pairs.
void sparse_rows(const SparseRowsArgs& args);

// How many panels of 16 * vectors rows m rows of X are cut into, at the level in use; vectors: 1, 2, 4 or 8.
int count_panels(int m, SparseForm form, int vectors);

// A part of a product for the kernels.
struct SparseRowsTile {
  SparseRows weight;
  int block;
  int vectors;         // of 16 rows of X side by side, as SparseVectors has them
  const void* x;       // turned: [k / turned_columns][16 * vectors]; of one row: as WidenArgs has it
  void* sums;          // float or int32 [kSparseRows][16 * vectors], 64-byte aligned
  GemmTile out;        // rows, and where Y goes (weight.n, bias, activation, y); of int8 weights also q
  const float* scale;  // as in SparseRowsArgs
};

// Columns [k_begin, k_end) of some rows of X, at most 16 * vectors, to `turned`; rows past them are 0. k_begin is a
// multiple of kShortSlice.
struct TurnArgs {
  SparseForm form;
  const void* x;  // floats
  Dtype dtype;
  int64_t x_stride;
  QuantizedRows q;  // pairs, groups: layout bytes
  int rows, vectors;
  int k_begin, k_end;
  void* turned;
};

// One row of X as float32, or its q - zero as int32.
struct WidenArgs {
  const void* x;
  Dtype dtype;
  QuantizedRows q;  // in place of x where q.q is not null: layout bytes
  int k;
  void* out;  // [k], and 15 more
};

// Vectors of 16 rows of X side by side, a power of two: a slice of them, of four vectors of floats a short one, is 32
// KiB or less, and what is broadcast serves as many registers as hide the latency of the sums.
struct SparseVectors {
  int least, most;

  constexpr SparseVectors(Isa isa, SparseForm form) {
    const bool wide = has_wide_registers(isa);
    least = form == SparseForm::pairs && wide ? 2 : 1;  // a register of int16 holds 32 rows
    most = wide && form == SparseForm::groups ? 8 : wide || (!is_float(form) && isa == Isa::avxvnni) ? 4 : 2;
  }
};

using TurnFn = void(const TurnArgs&);
using WidenFn = void(const WidenArgs&);
using SparseRowsTileFn = void(const SparseRowsTile&);
LEPTON_KERNEL(turn_rows, TurnFn)
LEPTON_KERNEL(widen_row, WidenFn)
LEPTON_KERNEL(sparse_rows_tile, SparseRowsTileFn)
LEPTON_KERNEL(sparse_rows_vector, SparseRowsTileFn)  // one row of X

}  // namespace lepton
