// sparse_rows.kernel.cpp - the streams of nonzeros (sparse_rows.h) against turned activations, or against one row.
#include "cpu/sparse_rows.h"

#include "cpu/simd/epilogue.h"
#include "cpu/simd/simd.h"

namespace lepton::LEPTON_ISA {
namespace {

// Vectors of sums in registers: as many as hide the latency of a multiply-add.
#if defined(LEPTON_ISA_GENERIC) || defined(LEPTON_ISA_SSSE3)
constexpr int kSums = 2;  // 8 of 16 registers
#else
constexpr int kSums = kDirectSums;
#endif
static_assert(kSums >= sparse_vectors(Isa::LEPTON_ISA));

LEPTON_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// The stream of one block of one slice.
struct Stream {
  const float* value;
  const uint16_t* place;
  const uint8_t* row;
  const uint16_t* count;

  LEPTON_INLINE Stream(const SparseRows& weight, int block, int slice) {
    const int64_t cell = int64_t(block) * weight.slices() + slice;
    value = weight.value + weight.begin[cell];
    place = weight.place + weight.begin[cell];
    row = weight.row + cell * kSparseRows;
    count = weight.count + cell * kSparseRows;
  }
  LEPTON_INLINE void skip(int count) {
    value += count;
    place += count;
  }
};

// sum[vectors] += the products of one row's nonzeros; `chains` of them in sums of their own, which hides the latency of
// a multiply-add.
template <int vectors, int chains>
LEPTON_INLINE void add_products(F32x16 (&sum)[vectors], const Stream& from, int count, const float* x) {
  constexpr int kWidth = kLanes * vectors;
  F32x16 more[chains][vectors];
  unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE {
    more[0][v] = sum[v];
    unroll<chains - 1>([&]<int c>() LEPTON_LAMBDA_INLINE { more[c + 1][v] = broadcast_f32(0); });
  });
  const auto add_one = [&]<int c>(int i) LEPTON_LAMBDA_INLINE {
    const F32x16 value = broadcast_f32(from.value[i]);
    const float* const of_column = x + size_t(from.place[i]) * kWidth;
    unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE {
      more[c][v] = fmadd(value, load_f32<Dtype::f32>(of_column + kLanes * v), more[c][v]);
    });
  };
  int i = 0;
  for (; i + chains <= count; i += chains)
    unroll<chains>([&]<int c>() LEPTON_LAMBDA_INLINE { add_one.template operator()<c>(i + c); });
  for (; i < count; ++i) add_one.template operator()<0>(i);
  unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE {
    unroll<chains - 1>([&]<int c>() LEPTON_LAMBDA_INLINE { more[0][v] = add(more[0][v], more[c + 1][v]); });
    sum[v] = more[0][v];
  });
}

// Y[rows of X, rows of W of the block] from sums [rows of W][rows of X].
template <int vectors, bool exact>
void write_output(const SparseRowsTile& tile) {
  constexpr int kWidth = kLanes * vectors, kSumBytes = 4;
  const int rows = tile.weight.rows_of(tile.block);
  for (int column = 0; column < rows; column += kPanel) {
    const int panel = (tile.block * kSparseRows + column) / kPanel, n0 = panel * kPanel;
    const F32x16 bias = load_bias(tile.out, panel);
    F32x16 scale = broadcast_f32(1);
    if constexpr (exact) scale = load_partial<Dtype::f32>(tile.scale + n0, tile.weight.n - n0);
    for (int r = 0; r < tile.out.rows; ++r) {
      alignas(64) char line[kPanel * kSumBytes];  // of rows of W past n: whatever was there, not stored
      const char* const sums = static_cast<const char*>(tile.sums) + (column * kWidth + r) * kSumBytes;
      for (int i = 0; i < kPanel; ++i) __builtin_memcpy(line + i * kSumBytes, sums + i * kWidth * kSumBytes, kSumBytes);
      F32x16 y = load_f32<Dtype::f32>(line);
      if constexpr (exact) y = mul(to_f32(load_i32(line)), mul(broadcast_f32(tile.out.q.scale[r]), scale));
      store_output(tile.out, r, panel, add(y, bias));
    }
  }
}

// sums[row of W] += float sums of a row's products of floats.
template <int vectors>
LEPTON_INLINE void add_row(const Stream& stream, int count, const float* x, float* sums, bool first) {
  F32x16 sum[vectors];
  unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE {
    sum[v] = first ? broadcast_f32(0) : load_f32<Dtype::f32>(sums + kLanes * v);
  });
  add_products<vectors, kSums / vectors>(sum, stream, count, x);
  unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE { store_f32<Dtype::f32>(sums + kLanes * v, sum[v]); });
}

// The same of integers, in pieces whose sums are exact.
template <int vectors>
LEPTON_INLINE void add_row(Stream stream, int count, const float* x, int32_t* sums, bool first) {
  constexpr int kPiece = 128;
  static_assert(kPiece * 255 * 127 < 1 << 22);
  for (int left = count; left > 0 || first; left -= kPiece, stream.skip(kPiece), first = false) {
    F32x16 sum[vectors];
    unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE { sum[v] = broadcast_f32(0); });
    add_products<vectors, kSums / vectors>(sum, stream, left < kPiece ? left : kPiece, x);
    unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE {
      int32_t* const place = sums + kLanes * v;
      const I32x16 exact = round_i32(sum[v]);
      store_i32(place, first ? exact : add(load_i32(place), exact));
    });
  }
}

template <int vectors, typename Sum>
void multiply(const SparseRowsTile& tile) {
  constexpr int kWidth = kLanes * vectors;
  const SparseRows& weight = tile.weight;
  const int rows = weight.rows_of(tile.block);
  for (int slice = 0; slice < weight.slices(); ++slice) {
    Stream stream(weight, tile.block, slice);
    const float* const x = tile.x + int64_t(slice) * kSparseSlice * kWidth;
    for (int i = 0; i < rows; ++i) {
      const int count = stream.count[i];
      add_row<vectors>(stream, count, x, static_cast<Sum*>(tile.sums) + stream.row[i] * kWidth, slice == 0);
      stream.skip(count);
    }
  }
  write_output<vectors, Sum(0.5f) == 0>(tile);
}

template <int vectors>
void multiply(const SparseRowsTile& tile) {
  tile.scale == nullptr ? multiply<vectors, float>(tile) : multiply<vectors, int32_t>(tile);
}

// load(row, k, count): sixteen values of a row from k on, of which `count` exist.
template <typename Load>
LEPTON_INLINE void turn(const TurnArgs& args, const Load& load) {
  const int width = kLanes * args.vectors;
  for (int k0 = args.k_begin; k0 < args.k_end; k0 += kLanes) {
    const int columns = args.k_end - k0 < kLanes ? args.k_end - k0 : kLanes;
    for (int row0 = 0; row0 < width; row0 += kLanes) {
      alignas(64) float square[kLanes][kLanes];
      for (int r = 0; r < kLanes; ++r)
        store_f32<Dtype::f32>(square[r], row0 + r < args.rows ? load(row0 + r, k0, columns) : broadcast_f32(0));
      float* const out = args.turned + int64_t(k0) * width + row0;
      for (int column = 0; column < columns; ++column)
        for (int r = 0; r < kLanes; ++r) out[column * width + r] = square[r][column];
    }
  }
}

template <Dtype dtype>
void turn_floats(const TurnArgs& args) {
  turn(args, [&](int row, int k, int count) LEPTON_LAMBDA_INLINE {
    return load_partial<dtype>(static_cast<const char*>(args.x) + (row * args.x_stride + k) * dtype_bytes(dtype),
                               count);
  });
}

// Sixteen q - zero of a row; between a row's end and its stride q is 0, and no weight meets it.
LEPTON_INLINE F32x16 load_q(const QuantizedRows& q, int row, int k) {
  const I32x16 zero = broadcast_i32(q.zero[row]);
  if constexpr (kTogether == 1) {
    return to_f32(sub(load_u8(q.row(row, 0) + k), zero));
  } else {
    uint8_t bytes[kLanes];
    for (int i = 0; i < kLanes; i += kPairStep)
      __builtin_memcpy(bytes + i, q.row_of_pair(row, 0) + (k + i) * kTogether, kPairStep);
    return to_f32(sub(load_u8(bytes), zero));
  }
}

void turn_integers(const TurnArgs& args) {
  turn(args, [&](int row, int k, int) LEPTON_LAMBDA_INLINE { return load_q(args.q, row, k); });
}

template <Dtype dtype>
void widen(const WidenArgs& args) {
  for (int i = 0; i < args.k; i += kLanes) {
    const char* x = static_cast<const char*>(args.x) + int64_t(i) * dtype_bytes(dtype);
    store_partial<Dtype::f32>(args.out + i, args.k - i, load_partial<dtype>(x, args.k - i));
  }
}

}  // namespace

void widen_row(const WidenArgs& args) {
  switch (args.dtype) {
    case Dtype::f32:
      return widen<Dtype::f32>(args);
    case Dtype::bf16:
      return widen<Dtype::bf16>(args);
    case Dtype::f16:
      return widen<Dtype::f16>(args);
  }
}

void turn_rows(const TurnArgs& args) {
  if (args.q.q != nullptr) return turn_integers(args);
  switch (args.dtype) {
    case Dtype::f32:
      return turn_floats<Dtype::f32>(args);
    case Dtype::bf16:
      return turn_floats<Dtype::bf16>(args);
    case Dtype::f16:
      return turn_floats<Dtype::f16>(args);
  }
}

void sparse_rows_tile(const SparseRowsTile& tile) {
  if (tile.vectors == 1) return multiply<1>(tile);
  if (tile.vectors == 2) return multiply<2>(tile);
  if constexpr (sparse_vectors(Isa::LEPTON_ISA) >= 4) multiply<4>(tile);
}

void sparse_rows_vector(const SparseRowsTile& tile) {
  constexpr int kChains = 4;
  const SparseRows& weight = tile.weight;
  const int rows = weight.rows_of(tile.block);
  for (int slice = 0; slice < weight.slices(); ++slice) {
    Stream stream(weight, tile.block, slice);
    const float* const x = tile.x + slice * kSparseSlice;
    for (int r = 0; r < rows; ++r) {
      const int count = stream.count[r];
      float sum[kChains] = {};
      int i = 0;
      for (; i + kChains <= count; i += kChains) {
        __builtin_prefetch(reinterpret_cast<const char*>(stream.value + i) + kSparseAhead);
        for (int c = 0; c < kChains; ++c) sum[c] = multiply_add(stream.value[i + c], x[stream.place[i + c]], sum[c]);
      }
      for (; i < count; ++i) sum[0] = multiply_add(stream.value[i], x[stream.place[i]], sum[0]);
      float* const place = static_cast<float*>(tile.sums) + stream.row[r];
      *place = (slice == 0 ? 0 : *place) + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
      stream.skip(count);
    }
  }
  for (int column = 0; column < rows; column += kPanel) {
    const int panel = (tile.block * kSparseRows + column) / kPanel;
    store_output(tile.out, 0, panel,
                 add(load_f32<Dtype::f32>(static_cast<float*>(tile.sums) + column), load_bias(tile.out, panel)));
  }
}

}  // namespace lepton::LEPTON_ISA
