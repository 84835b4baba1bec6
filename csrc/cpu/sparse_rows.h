// sparse_rows.h - Y = activation(X @ W^T + bias) on the CPU, for a W of float32 whose zeros lie anywhere.
//
// W is stored as streams of its nonzeros: for each block of 128 rows and each slice of 256 columns the values, row
// after row, and the columns' places in the slice. Rows of as many nonzeros follow each other within a block of a
// slice: where a loop ends is then foreseen. X is turned so that one column of it lies in vectors, and a nonzero is a
// broadcast and a few multiply-adds, at any sparsity; a slice of turned X stays close to the core while a block passes
// by.
//
//   begin  int64  [blocks][slices] and one more   where the block of the slice begins among the nonzeros
//   row    uint8  [blocks][slices][128]           of the block, in the order of the stream; past n there are none
//   count  uint16 [blocks][slices][128]           nonzeros of that row
//   value  f32    [nonzeros]
//   place  uint16 [nonzeros]                      the column, less the slice's first
//
// int8 weights (w8a8) run through the same streams, as floats against float(q - zero) of quantized activations: sums of
// up to 128 such products are integers below 2^22, so they are exact, and int32 adds them up. The results are those of
// gemm_int8 to the last bit.
#pragma once

#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/dtype.h"
#include "cpu/gemm_tile.h"
#include "cpu/kernel_table.h"
#include "cpu/packed_weight.h"

namespace lepton {

constexpr int kSparseRows = 128, kSparseSlice = 256;
constexpr int kSparseAhead = 1024;  // bytes that are fetched ahead, and may lie past the end

// A view of packed nonzeros.
struct SparseRows {
  int n, k;
  const int64_t* begin;
  const uint8_t* row;
  const uint16_t* count;
  const float* value;
  const uint16_t* place;

  int blocks() const { return divide_up(n, kSparseRows); }
  int slices() const { return divide_up(k, kSparseSlice); }
  int rows_of(int block) const { return n - block * kSparseRows < kSparseRows ? n - block * kSparseRows : kSparseRows; }
};

// Where the parts begin, in bytes.
struct SparseRowsLayout {
  int64_t begin = 0, row, count, value, place, bytes;

  SparseRowsLayout(int n, int k, int64_t nonzeros) {
    const auto lines = [](int64_t size) { return (size + 63) / 64 * 64; };
    const int64_t cells = int64_t(divide_up(n, kSparseRows)) * divide_up(k, kSparseSlice);
    row = lines((cells + 1) * 8);
    count = row + cells * kSparseRows;
    value = count + cells * kSparseRows * 2;
    place = value + lines(nonzeros * 4);
    bytes = place + lines(nonzeros * 2);
  }
};

inline SparseRows sparse_rows_view(const uint8_t* packed, int n, int k, int64_t nonzeros) {
  const SparseRowsLayout layout(n, k, nonzeros);
  return {n,
          k,
          reinterpret_cast<const int64_t*>(packed + layout.begin),
          packed + layout.row,
          reinterpret_cast<const uint16_t*>(packed + layout.count),
          reinterpret_cast<const float*>(packed + layout.value),
          reinterpret_cast<const uint16_t*>(packed + layout.place)};
}

// How many ones a bitmask uint8 [n, ceil(k / 8)] has; -1 if there are some past column k - 1.
int64_t count_ones(const uint8_t* bitmask, int n, int k);

// From the saved layout: values f32, row after row; bitmask uint8 [n, ceil(k / 8)], bit i % 8 of byte i / 8 for column
// i.
void pack_sparse_rows(const float* values, const uint8_t* bitmask, int n, int k, int64_t nonzeros, uint8_t* packed);

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
  const float* scale = nullptr;  // [n] of int8 weights, whose activations are quantized; null where weights are floats
};

void sparse_rows(const SparseRowsArgs& args);

// A part of a product for the kernels.
struct SparseRowsTile {
  SparseRows weight;
  int block;
  int vectors;         // of 16 rows of X side by side, a power of two up to sparse_vectors(isa)
  const float* x;      // turned: [k][16 * vectors]; of one row: [k]
  void* sums;          // float or int32 [kSparseRows][16 * vectors], 64-byte aligned
  GemmTile out;        // rows, and where Y goes (weight.n, bias, activation, y); of int8 weights also q
  const float* scale;  // as in SparseRowsArgs
};

// Columns [k_begin, k_end) of some rows of X, at most 16 * vectors, to `turned`; rows past them are 0.
struct TurnArgs {
  const void* x;
  Dtype dtype;
  int64_t x_stride;
  QuantizedRows q;  // in place of x where q.q is not null: float(q - zero), layout bytes
  int rows, vectors;
  int k_begin, k_end;
  float* turned;
};

// One row of X as float32.
struct WidenArgs {
  const void* x;
  Dtype dtype;
  int k;
  float* out;
};

// Vectors of 16 rows of X side by side, at most. Two: a slice of them is 32 KiB, and each nonzero's broadcast serves
// four registers of 256 bits.
constexpr int sparse_vectors(Isa isa) { return isa >= Isa::avx512vnni && isa <= Isa::amx ? 4 : 2; }

using TurnFn = void(const TurnArgs&);
using WidenFn = void(const WidenArgs&);
using SparseRowsTileFn = void(const SparseRowsTile&);
LEPTON_KERNEL(turn_rows, TurnFn)
LEPTON_KERNEL(widen_row, WidenFn)
LEPTON_KERNEL(sparse_rows_tile, SparseRowsTileFn)
LEPTON_KERNEL(sparse_rows_vector, SparseRowsTileFn)  // one row of X

}  // namespace lepton
