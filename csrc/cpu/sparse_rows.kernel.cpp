// sparse_rows.kernel.cpp - the streams of nonzeros (sparse_rows.h) against turned activations, or against one row.
#include "cpu/sparse_rows.h"

#include "cpu/simd/epilogue.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/transpose.h"

namespace lepton::LEPTON_ISA {
namespace {

constexpr Isa kIsa = Isa::LEPTON_ISA;

// Vectors of float sums in registers: as many as hide the latency of a multiply-add.
#if defined(LEPTON_ISA_GENERIC) || defined(LEPTON_ISA_SSSE3)
constexpr int kSums = 2;  // 8 of 16 registers
#else
constexpr int kSums = kDirectSums;
#endif

// Sums of the same that are added up at the end. Without 512-bit registers integers are added in a cycle, but for the
// instructions that multiply bytes and add; those of pairs wait for what interleaves the columns.
template <SparseForm form, int vectors>
constexpr int kChains = form == SparseForm::floats ? kSums / vectors
                        : has_wide_registers(kIsa) ? kDirectSums / (vectors < 2 ? 2 : vectors)
                        : form == SparseForm::groups && group_columns(kIsa) == 4 && vectors <= kDirectSums / 2 ? 2
                                                                                                               : 1;

LEPTON_INLINE int32_t multiply_add(int32_t a, int32_t b, int32_t c) { return a * b + c; }
LEPTON_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// sum[vectors] += what add_one(i, sums) adds for every item, `chains` of them in sums of their own.
template <int chains, int vectors, typename Vector, typename AddOne>
LEPTON_INLINE void add_items(Vector (&sum)[vectors], int count, const AddOne& add_one) {
  static_assert(chains == 1 || chains == 2 || chains == 4 || chains == 8);
  Vector more[chains][vectors];
  unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE {
    more[0][v] = sum[v];
    unroll<chains - 1>([&]<int c>() LEPTON_LAMBDA_INLINE { more[c + 1][v] = Vector{}; });
  });
  int i = 0;
  for (; i + chains <= count; i += chains)
    unroll<chains>([&]<int c>() LEPTON_LAMBDA_INLINE { add_one(i + c, more[c]); });
  const auto add_rest = [&]<int rest>() LEPTON_LAMBDA_INLINE {
    if ((count & rest) == 0) return;
    unroll<rest>([&]<int c>() LEPTON_LAMBDA_INLINE { add_one(i + c, more[c]); });
    i += rest;
  };
  if constexpr (chains > 4) add_rest.template operator()<4>();
  if constexpr (chains > 2) add_rest.template operator()<2>();
  if constexpr (chains > 1) add_rest.template operator()<1>();
  unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE {
    unroll<chains - 1>([&]<int c>() LEPTON_LAMBDA_INLINE { more[0][v] = add(more[0][v], more[c + 1][v]); });
    sum[v] = more[0][v];
  });
}

// sums[vectors of 16] of one row of W += its items' products with a slice of turned X.
template <int vectors>
LEPTON_INLINE void add_floats(const void* value, const uint16_t* place, int count, const char* x, char* sums,
                              bool first) {
  F32x16 sum[vectors];
  unroll<vectors>(
      [&]<int v>() LEPTON_LAMBDA_INLINE { sum[v] = first ? broadcast_f32(0) : load_f32<Dtype::f32>(sums + 64 * v); });
  const auto add_one = [&](int i, F32x16(&to)[vectors]) LEPTON_LAMBDA_INLINE {
    const F32x16 weight = broadcast_f32(static_cast<const float*>(value)[i]);
    const char* const column = x + size_t(place[i]) * (64 * vectors);
    unroll<vectors>([&]<int v>()
                        LEPTON_LAMBDA_INLINE { to[v] = fmadd(weight, load_f32<Dtype::f32>(column + 64 * v), to[v]); });
  };
  add_items<kChains<SparseForm::floats, vectors>>(sum, count, add_one);
  unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE { store_f32<Dtype::f32>(sums + 64 * v, sum[v]); });
}

// The same of two rows of W, whose sums follow each other: each X is loaded once.
template <int vectors>
LEPTON_INLINE void add_twins(const void* value, const uint16_t* place, int count, const char* x, char* sums,
                             bool first) {
  F32x16 sum[2 * vectors];
  unroll<2 * vectors>(
      [&]<int v>() LEPTON_LAMBDA_INLINE { sum[v] = first ? broadcast_f32(0) : load_f32<Dtype::f32>(sums + 64 * v); });
  const auto add_one = [&](int i, F32x16(&to)[2 * vectors]) LEPTON_LAMBDA_INLINE {
    const float* const weights = static_cast<const float*>(value) + size_t(i) * 2;
    const F32x16 upper = broadcast_f32(weights[0]), lower = broadcast_f32(weights[1]);
    const char* const column = x + size_t(place[i]) * (64 * vectors);
    unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE {
      const F32x16 activations = load_f32<Dtype::f32>(column + 64 * v);
      to[v] = fmadd(upper, activations, to[v]);
      to[vectors + v] = fmadd(lower, activations, to[vectors + v]);
    });
  };
  add_items<1>(sum, count, add_one);
  unroll<2 * vectors>([&]<int v>() LEPTON_LAMBDA_INLINE { store_f32<Dtype::f32>(sums + 64 * v, sum[v]); });
}

template <int vectors, SparseForm form>
LEPTON_INLINE void add_integers(const void* value, const uint16_t* place, int count, const char* x, char* sums,
                                bool first) {
  I32x16 sum[vectors];
  unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE { sum[v] = first ? broadcast_i32(0) : load_i32(sums + 64 * v); });
  const auto add_one = [&](int i, I32x16(&to)[vectors]) LEPTON_LAMBDA_INLINE {
    const uint8_t* const weights = static_cast<const uint8_t*>(value) + size_t(i) * 4;
    if constexpr (form == SparseForm::groups) {
      dot_group<vectors>(to, x + size_t(place[i]) * (64 * vectors), weights);
    } else {
      const size_t column0 = place[2 * i], column1 = place[2 * i + 1];
      dot_pair<vectors>(to, x + column0 * (32 * vectors), x + column1 * (32 * vectors), weights);
    }
  };
  add_items<kChains<form, vectors>>(sum, count, add_one);
  unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE { store_i32(sums + 64 * v, sum[v]); });
}

LEPTON_INLINE F32x16 scaled(I32x16 sum, float row_scale, F32x16 scale) {
  return mul(to_f32(sum), mul(broadcast_f32(row_scale), scale));
}

// Y[rows of X, rows of W of the block] from sums [rows of W][rows of X]; those of rows of W past n are not stored.
template <int vectors, SparseForm form>
void write_output(const SparseRowsTile& tile) {
  constexpr int kWidth = kLanes * vectors;
  // The bytes that groups meet are q, or q - 128.
  constexpr bool kShifted = form == SparseForm::groups && group_columns(kIsa) == 4;
  const int rows = tile.weight.rows_of(tile.block);
  // Row after row, of Y: its lines follow each other, and 16 rows are as many pages.
  for (int row0 = 0; row0 < tile.out.rows; row0 += kLanes) {
    const int end = tile.out.rows - row0 < kLanes ? tile.out.rows : row0 + kLanes;
    for (int column = 0; column < rows; column += kPanel) {
      const int panel = (tile.block * kSparseRows + column) / kPanel, n0 = panel * kPanel, count = tile.weight.n - n0;
      const F32x16 bias = load_bias(tile.out, panel);
      F32x16 scale = broadcast_f32(1);
      I32x16 weight_sum = broadcast_i32(0);
      if constexpr (!is_float(form)) scale = load_partial<Dtype::f32>(tile.scale + n0, count);
      if constexpr (kShifted) weight_sum = as_i32(load_partial<Dtype::f32>(tile.weight.sum + n0, count));
      alignas(64) float lines[kLanes][kPanel];
      transpose_16x16(static_cast<const float*>(tile.sums) + column * kWidth + row0, kWidth, lines[0], kPanel);
      for (int r = row0; r < end; ++r) {
        F32x16 y = load_f32<Dtype::f32>(lines[r - row0]);
        if constexpr (!is_float(form)) {
          I32x16 sum = load_i32(lines[r - row0]);
          if constexpr (kShifted) {
            const int32_t zero = tile.out.q.zero[r] - (signed_quads(kIsa) ? 128 : 0);
            sum = sub(sum, mul(broadcast_i32(zero), weight_sum));
          }
          y = scaled(sum, tile.out.q.scale[r], scale);
        }
        store_output(tile.out, r, panel, add(y, bias));
      }
    }
  }
}

template <int vectors, SparseForm form>
void multiply(const SparseRowsTile& tile) {
  const SparseRows& weight = tile.weight;
  const int slice_bytes = weight.slice / turned_columns(form, kIsa) * turned_bytes(form) * kLanes * vectors;
  const int rows = divide_up(weight.rows_of(tile.block), rows_per_item(form));
  for (int slice = 0; slice < weight.slices(); ++slice) {
    const int64_t cell = weight.cell(tile.block, slice);
    const uint8_t* const row = weight.row + cell * kSparseRows;
    const uint16_t* const counts = weight.count + cell * kSparseRows;
    const char* value = static_cast<const char*>(weight.value) + weight.begin[cell] * value_bytes(form);
    const uint16_t* place = weight.place + weight.begin[cell] * places_of(form);
    const char* const x = static_cast<const char*>(tile.x) + int64_t(slice) * slice_bytes;
    for (int i = 0; i < rows; ++i) {
      const int count = counts[i];
      char* const sums = static_cast<char*>(tile.sums) + row[i] * (64 * vectors * rows_per_item(form));
      if constexpr (form == SparseForm::floats)
        add_floats<vectors>(value, place, count, x, sums, slice == 0);
      else if constexpr (form == SparseForm::twins)
        add_twins<vectors>(value, place, count, x, sums, slice == 0);
      else
        add_integers<vectors, form>(value, place, count, x, sums, slice == 0);
      value += count * value_bytes(form);
      place += count * places_of(form);
    }
  }
  write_output<vectors, form>(tile);
}

template <SparseForm form>
void multiply_form(const SparseRowsTile& tile) {
  constexpr SparseVectors kAllowed(kIsa, form);
  if constexpr (kAllowed.least <= 1)
    if (tile.vectors == 1) return multiply<1, form>(tile);
  if (tile.vectors == 2) return multiply<2, form>(tile);
  if constexpr (kAllowed.most >= 8)
    if (tile.vectors == 8) return multiply<8, form>(tile);
  if constexpr (kAllowed.most >= 4) return multiply<4, form>(tile);
}

// Calls store(i, values[vectors]) for i in [begin, end), values: the i-th of 16 rows each, from row0 on.
// load(row, i): sixteen of a row, from the i-th on.
template <int vectors, typename Vector, typename Load, typename Store>
LEPTON_INLINE void turn(const TurnArgs& args, int row0, int begin, int end, const Load& load, const Store& store) {
  alignas(64) float lines[vectors * kLanes][kLanes], columns[kLanes][vectors * kLanes];
  for (int i = begin; i < end; i += kLanes) {
    for (int r = 0; r < vectors * kLanes; ++r) {
      const Vector values = row0 + r < args.rows ? load(row0 + r, i) : Vector{};
      __builtin_memcpy(lines[r], &values, sizeof(lines[r]));
    }
    unroll<vectors>([&]<int v>() LEPTON_LAMBDA_INLINE {
      transpose_16x16(lines[kLanes * v], kLanes, columns[0] + kLanes * v, vectors * kLanes);
    });
    for (int c = 0; c < kLanes && i + c < end; ++c) {
      Vector values[vectors];
      __builtin_memcpy(values, columns[c], sizeof(values));
      store(i + c, values);
    }
  }
}

template <Dtype dtype>
void turn_floats(const TurnArgs& args) {
  const int width = kLanes * args.vectors;
  for (int row0 = 0; row0 < width; row0 += kLanes) {
    const auto load = [&](int row, int k) LEPTON_LAMBDA_INLINE {
      return load_partial<dtype>(static_cast<const char*>(args.x) + (row * args.x_stride + k) * dtype_bytes(dtype),
                                 args.k_end - k);
    };
    const auto store = [&](int k, const F32x16(&column)[1]) LEPTON_LAMBDA_INLINE {
      store_f32<Dtype::f32>(static_cast<float*>(args.turned) + int64_t(k) * width + row0, column[0]);
    };
    turn<1, F32x16>(args, row0, args.k_begin, args.k_end, load, store);
  }
}

// q of a row from k on, `bytes` of them. Between a row's end and its stride they are 0, and meet weights that are.
template <int bytes>
LEPTON_INLINE void copy_q(const QuantizedRows& q, int row, int k, uint8_t (&out)[bytes]) {
  if constexpr (kTogether == 1) {
    __builtin_memcpy(out, q.row(row, 0) + k, bytes);
  } else {
    for (int i = 0; i < bytes; i += kPairStep)
      __builtin_memcpy(out + i, q.row_of_pair(row, 0) + (k + i) * kTogether, kPairStep);
  }
}

// Sixteen q - zero.
LEPTON_INLINE I32x16 load_q(const QuantizedRows& q, int row, int k) {
  uint8_t bytes[kLanes];
  copy_q(q, row, k, bytes);
  return sub(load_u8(bytes), broadcast_i32(q.zero[row]));
}

void turn_pairs(const TurnArgs& args) {
  constexpr int kVectors = SparseVectors(kIsa, SparseForm::pairs).least;
  const int width = kLanes * args.vectors;
  for (int row0 = 0; row0 < width; row0 += kLanes * kVectors) {
    const auto load = [&](int row, int k) LEPTON_LAMBDA_INLINE { return load_q(args.q, row, k); };
    const auto store = [&](int k, const I32x16(&column)[kVectors]) LEPTON_LAMBDA_INLINE {
      store_turned(static_cast<int16_t*>(args.turned) + int64_t(k) * width + row0, column);
    };
    turn<kVectors, I32x16>(args, row0, args.k_begin, args.k_end, load, store);
  }
}

void turn_groups(const TurnArgs& args) {
  const int width = kLanes * args.vectors;
  for (int row0 = 0; row0 < width; row0 += kLanes) {
    int32_t* const turned = static_cast<int32_t*>(args.turned) + row0;
    if constexpr (group_columns(kIsa) == 4) {
      const auto load = [&](int row, int group) LEPTON_LAMBDA_INLINE {
        alignas(64) uint8_t bytes[4 * kLanes];
        copy_q(args.q, row, 4 * group, bytes);
        return bit_xor(load_i32(bytes), broadcast_i32(signed_quads(kIsa) ? int32_t(0x80808080) : 0));
      };
      const auto store = [&](int group, const I32x16(&columns)[1])
                             LEPTON_LAMBDA_INLINE { store_i32(turned + int64_t(group) * width, columns[0]); };
      turn<1, I32x16>(args, row0, args.k_begin / 4, divide_up(args.k_end, 4), load, store);
    } else {
      I32x16 even;
      const auto load = [&](int row, int k) LEPTON_LAMBDA_INLINE { return load_q(args.q, row, k); };
      const auto store = [&](int k, const I32x16(&column)[1]) LEPTON_LAMBDA_INLINE {
        if (k % 2 == 0) {
          even = bit_and(column[0], broadcast_i32(0xffff));
          return;
        }
        store_i32(turned + int64_t(k / 2) * width, bit_xor(even, shift_left<16>(column[0])));
      };
      turn<1, I32x16>(args, row0, args.k_begin, round_up(args.k_end, 2), load, store);
    }
  }
}

template <Dtype dtype>
void widen(const WidenArgs& args) {
  for (int i = 0; i < args.k; i += kLanes) {
    const char* x = static_cast<const char*>(args.x) + int64_t(i) * dtype_bytes(dtype);
    store_f32<Dtype::f32>(static_cast<float*>(args.out) + i, load_partial<dtype>(x, args.k - i));
  }
}

// sums[row of W] = the products of its nonzeros with one row of X.
template <typename Value, typename X, typename Sum>
LEPTON_INLINE void add_products(const SparseRowsTile& tile, Sum* sums) {
  constexpr int kAtOnce = 4;  // sums of a row: they hide the latency of a multiply-add
  const SparseRows& weight = tile.weight;
  const int rows = weight.rows_of(tile.block), each = places_of(weight.form);
  for (int slice = 0; slice < weight.slices(); ++slice) {
    const int64_t cell = weight.cell(tile.block, slice);
    const Value* value = static_cast<const Value*>(weight.value) + weight.begin[cell] * each;
    const uint16_t* place = weight.place + weight.begin[cell] * each;
    const X* const x = static_cast<const X*>(tile.x) + slice * weight.slice;
    for (int r = 0; r < rows; ++r) {
      const int count = weight.count[cell * kSparseRows + r] * each;
      Sum sum[kAtOnce] = {};
      int i = 0;
      for (; i + kAtOnce <= count; i += kAtOnce) {
        __builtin_prefetch(reinterpret_cast<const char*>(value + i) + kSparseAhead);
        for (int c = 0; c < kAtOnce; ++c) sum[c] = multiply_add(Sum(value[i + c]), x[place[i + c]], sum[c]);
      }
      for (; i < count; ++i) sum[0] = multiply_add(Sum(value[i]), x[place[i]], sum[0]);
      Sum& of_row = sums[weight.row[cell * kSparseRows + r]];
      of_row = (slice == 0 ? 0 : of_row) + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
      value += count;
      place += count;
    }
  }
}

}  // namespace

void widen_row(const WidenArgs& args) {
  if (args.q.q != nullptr) {
    for (int i = 0; i < args.k; i += kLanes) store_i32(static_cast<int32_t*>(args.out) + i, load_q(args.q, 0, i));
    return;
  }
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
  if (args.form == SparseForm::pairs) return turn_pairs(args);
  if (args.form == SparseForm::groups) return turn_groups(args);
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
  switch (tile.weight.form) {
    case SparseForm::floats:
      return multiply_form<SparseForm::floats>(tile);
    case SparseForm::pairs:
      return multiply_form<SparseForm::pairs>(tile);
    case SparseForm::groups:
      return multiply_form<SparseForm::groups>(tile);
    case SparseForm::twins:
      return multiply_form<SparseForm::twins>(tile);
  }
}

void sparse_rows_vector(const SparseRowsTile& tile) {
  const int rows = tile.weight.rows_of(tile.block);
  if (tile.weight.form == SparseForm::floats)
    add_products<float, float>(tile, static_cast<float*>(tile.sums));
  else
    add_products<int16_t, int32_t>(tile, static_cast<int32_t*>(tile.sums));
  for (int column = 0; column < rows; column += kPanel) {
    const int panel = (tile.block * kSparseRows + column) / kPanel, n0 = panel * kPanel;
    const char* const sums = static_cast<const char*>(tile.sums) + column * 4;
    F32x16 y;
    if (tile.weight.form == SparseForm::floats)
      y = load_f32<Dtype::f32>(sums);
    else
      y = scaled(load_i32(sums), tile.out.q.scale[0], load_partial<Dtype::f32>(tile.scale + n0, tile.weight.n - n0));
    store_output(tile.out, 0, panel, add(y, load_bias(tile.out, panel)));
  }
}

}  // namespace lepton::LEPTON_ISA
