// check_kernels.cpp - the CPU kernels and the codec against plain scalar code, on the level that LEPTON_MAX_ISA and the
// processor choose. `make arm-check` runs it on this machine and, emulated, on AArch64, and compares what it prints:
//
//   LEVEL COUNT products exact=DIGEST split=DIGEST codec=DIGEST
//
// exact: the outputs of w8a8 and w4a8, activation functions, normalization, recurrent and sparse int8 layers, blockwise
// codes, the same on every level of every architecture. split: those of w8a16 and w4a16 where activations are split
// into 16-bit integers on all such levels, else "-". codec: every encoded chunk. Exit code 1: something differs from
// the scalar code, and standard error says what.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "codec/checksum.h"
#include "codec/huffman.h"
#include "codec/lzw.h"
#include "cpu/add_norm.h"
#include "cpu/blockwise.h"
#include "cpu/gemm.h"
#include "cpu/gemm_tile.h"
#include "cpu/isa.h"
#include "cpu/quantize_rows.h"
#include "cpu/recurrent.h"
#include "cpu/sparse_rows.h"

using namespace lepton;

namespace {

int failures = 0;

template <typename... Values>
void fail(const char* format, Values... values) {
  std::fprintf(stderr, format, values...);
  std::fputc('\n', stderr);
  ++failures;
}

// splitmix64: the same numbers on every machine.
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int below(int n) { return int(next() >> 33) % n; }
  float uniform() { return float(int32_t(next() >> 40)) * 0x1p-23f - 1; }  // -1 to 1
  float bell() { return uniform() + uniform() + uniform(); }
};

struct Digest {
  uint64_t value = 0xcbf29ce484222325;  // FNV-1a
  void add(const void* data, size_t size) {
    for (size_t i = 0; i < size; ++i) value = (value ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3;
  }
};

// The float types by their definition: the nearest multiple of the last place, ties to even.
template <typename Word>
Word word_at(const void* p, int64_t i) {
  Word word;
  std::memcpy(&word, static_cast<const char*>(p) + i * int64_t(sizeof(Word)), sizeof(Word));
  return word;
}

int mantissa_bits(Dtype dtype) { return dtype == Dtype::bf16 ? 7 : 10; }
int least_exponent(Dtype dtype) { return dtype == Dtype::bf16 ? -126 : -14; }

double load(const void* p, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return word_at<float>(p, i);
  const int word = word_at<uint16_t>(p, i), mantissa = mantissa_bits(dtype), top = (1 << (15 - mantissa)) - 1;
  const int exponent = (word & 0x7fff) >> mantissa, fraction = word & ((1 << mantissa) - 1);
  const double sign = word & 0x8000 ? -1 : 1;
  if (exponent == top) return fraction ? NAN : sign * INFINITY;
  const int least = least_exponent(dtype) - mantissa;
  if (exponent == 0) return sign * std::ldexp(fraction, least);
  return sign * std::ldexp(fraction + (1 << mantissa), least + exponent - 1);
}

void store(void* p, Dtype dtype, int64_t i, float x) {
  if (dtype == Dtype::f32) return void(std::memcpy(static_cast<float*>(p) + i, &x, 4));
  const int mantissa = mantissa_bits(dtype), top = (1 << (15 - mantissa)) - 1;
  int word = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) {
    word |= 0x7fff;
  } else if (std::isinf(x)) {
    word |= top << mantissa;
  } else if (x != 0) {
    const int exponent = std::max(std::ilogb(x), least_exponent(dtype));
    // With the implicit one, so that a carry into the exponent comes out right.
    const double units = std::nearbyint(std::ldexp(std::fabs(double(x)), mantissa - exponent));
    const int rounded = (exponent - least_exponent(dtype)) * (1 << mantissa) + int(units);
    word |= std::min(rounded, top << mantissa);
  }
  const auto narrow = uint16_t(word);
  std::memcpy(static_cast<uint16_t*>(p) + i, &narrow, 2);
}

bool same(const void* got, const void* want, Dtype dtype, int64_t i) {
  const double a = load(got, dtype, i), b = load(want, dtype, i);
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

// quantize_rows.h, of one row.
struct Row {
  float scale;
  int zero;
  std::vector<int> q;
};

Row quantize(const std::vector<float>& x, int levels) {
  float lo = 0, hi = 0;
  bool finite = true;
  for (const float v : x) {
    lo = std::min(lo, v);
    hi = std::max(hi, v);
    finite = finite && std::isfinite(v);
  }
  Row row{NAN, 0, std::vector<int>(x.size())};
  if (!finite) return row;
  const float step = 1.0f / float(levels), inverse_least = 0x1p-126f;
  row.scale = hi * step - lo * step;
  if (row.scale < inverse_least) return row.scale = 0, row;
  const float inverse = 1.0f / row.scale;
  row.zero = std::min(levels, int(std::nearbyintf(-lo * inverse)));
  for (size_t i = 0; i < x.size(); ++i)
    row.q[i] = std::clamp(int(std::nearbyintf(x[i] * inverse)) + row.zero, 0, levels);
  return row;
}

struct Problem {
  int m, n, k, group;  // group 0: 8 bit
  bool symmetric, with_bias;
  Dtype dtype;
  std::vector<float> x;  // as the kernel sees it: rounded to the dtype
  std::vector<int> weight, zero;
  std::vector<float> scale, bias;
  std::vector<uint8_t> stored_x, packed;
  int64_t x_stride;

  int groups() const { return group ? divide_up(k, group) : 1; }
  int group_of(int i) const { return group ? i / group : 0; }
};

PackedWeight view_of(const Problem& p) {
  const bool symmetric = p.group == 0 || p.symmetric;
  return packed_weight(p.packed.data(), p.n, p.k, p.group ? 4 : 8, p.group ? p.group : p.k, symmetric);
}

// extremes: activations that become 0 or 255, and the least and largest weights; in the first of three rows and columns
// the least alone, in the second the largest alone.
Problem make_problem(Random& rng, int m, int n, int k, int group, Dtype dtype, bool extremes = false) {
  const auto low = [&](int line) { return line % 3 == 0 || (line % 3 == 2 && rng.below(2) == 0); };
  Problem p{m, n, k, group, rng.below(2) == 0, rng.below(4) != 0, dtype, {}, {}, {}, {}, {}, {}, {}, k + rng.below(3)};
  p.x.resize(size_t(m) * size_t(k));
  p.stored_x.resize(size_t(m) * size_t(p.x_stride) * 4);
  for (int r = 0; r < m; ++r) {
    const int kind = rng.below(16);
    const float magnitude = kind == 0 ? 0 : kind == 1 ? 2e4f : kind == 2 ? 1e-4f : 1;
    for (int i = 0; i < k; ++i) {
      const int64_t place = r * p.x_stride + i;
      float v = rng.bell() * magnitude + (kind == 3 ? 4 : 0);
      if (kind == 4 && i == k / 2) v = r % 2 ? NAN : INFINITY;
      if (extremes) v = low(r) ? -1.0f : 1.0f;
      store(p.stored_x.data(), dtype, place, v);
      p.x[size_t(r) * size_t(k) + size_t(i)] = float(load(p.stored_x.data(), dtype, place));
    }
  }
  const int groups = p.groups();
  const bool narrow = group == 0 && rng.below(3) == 0;  // of level avx2's own kernel
  const int least = group ? -8 : narrow ? -kNarrow : -128, largest = group || !narrow ? -1 - least : kNarrow;
  for (int i = 0; i < n * k; ++i) {
    const int most = narrow ? kNarrow : 127, value = group ? rng.below(16) - 8 : rng.below(2 * most + 1) - most;
    p.weight.push_back(!extremes ? value : low(i / k) ? least : largest);
  }
  for (int i = 0; i < n * groups; ++i) {
    p.scale.push_back((rng.uniform() + 1.01f) * 0.01f);
    p.zero.push_back(p.symmetric || !group ? 0 : rng.below(16) - 8);
  }
  for (int i = 0; i < n; ++i) p.bias.push_back(rng.bell());

  p.packed.resize(size_t(PackedLayout(view_of(p)).bytes));
  uint8_t* const packed = p.packed.data();
  if (group == 0) {
    const std::vector<int8_t> bytes(p.weight.begin(), p.weight.end());
    pack_int8(bytes.data(), p.scale.data(), n, k, packed);
  } else {
    const int row_bytes = round_up(divide_up(k, 2), 4);  // whole words, as pack_int4 wants them
    std::vector<uint8_t> nibbles(size_t(n) * size_t(row_bytes));
    for (int c = 0; c < n; ++c)
      for (int i = 0; i < k; ++i)
        nibbles[size_t(c * row_bytes + i / 2)] |= uint8_t((p.weight[size_t(c * k + i)] + 8) << (4 * (i % 2)));
    const std::vector<int8_t> zeros(p.zero.begin(), p.zero.end());
    pack_int4(nibbles.data(), row_bytes, p.scale.data(), p.symmetric ? nullptr : zeros.data(), n, k, group, packed);
  }
  return p;
}

// gemm_int8.kernel.cpp and gemm_int4.kernel.cpp, their formulas: one row, one column, quantized to 255 or 65535 levels.
float integer_product(const Problem& p, const Row& row, int column, bool two_planes) {
  const int groups = p.groups();
  const int* const w = &p.weight[size_t(column) * size_t(p.k)];
  const float* const scale = &p.scale[size_t(column) * size_t(groups)];
  const float bias = p.with_bias ? p.bias[size_t(column)] : 0;
  const int shift = p.group ? 128 : 0;
  float sum = 0, column_sum = 0;
  for (int g = 0; g < groups; ++g) {
    int64_t high = 0, low = 0, weights = 0;
    const int begin = p.group * g, end = p.group ? std::min(p.k, begin + p.group) : p.k;
    for (int i = begin; i < end; ++i) {
      const int value = w[i] - (p.group ? p.zero[size_t(column) * size_t(groups) + size_t(g)] : 0),
                q = row.q[size_t(i)];
      high += int64_t((two_planes ? q >> 8 : q) - shift) * value;
      low += int64_t((q & 255) - shift) * value;
      weights += value;
    }
    if (p.group == 0) {
      high -= (two_planes ? row.zero >> 8 : row.zero) * weights;
      low -= (row.zero & 255) * weights;
    }
    float both = float(high);
    if (two_planes) both = both * 256 + float(low);
    if (p.group == 0) return both * (row.scale * scale[0]) + bias;
    sum = sum + both * scale[g];
    column_sum = column_sum + float(weights) * scale[g];
  }
  const int high_zero = (two_planes ? row.zero >> 8 : row.zero) - 128, low_zero = (row.zero & 255) - 128;
  const float row_zero = float(two_planes ? high_zero * 256 + low_zero : high_zero);
  return (sum - row_zero * column_sum) * row.scale + bias;
}

// gemm_int16.kernel.cpp's formulas.
float int16_product(const Problem& p, int r, int column) {
  const int groups = p.groups(), piece = int16_piece(view_of(p));
  const float* const x = &p.x[size_t(r) * size_t(p.k)];
  float most = 0, check = 0, sum = 0;
  for (int i = 0; i < p.k; ++i) {
    most = std::max(most, std::fabs(x[i]));
    check += x[i] * 0;
  }
  if (check != 0 || std::isnan(check)) return NAN;
  float row_scale = most * (1.0f / 32767);
  if (row_scale < 0x1p-126f) row_scale = 0;
  const float inverse = row_scale == 0 ? 0 : 1 / row_scale;
  for (int begin = 0; begin < p.k; begin += piece) {
    const size_t group = size_t(column * groups + p.group_of(begin));
    int64_t exact = 0;
    for (int i = begin; i < std::min(p.k, begin + piece); ++i) {
      const int q = int(std::clamp(std::nearbyintf(x[i] * inverse), -32767.0f, 32767.0f));
      exact += int64_t(q) * (p.weight[size_t(column) * size_t(p.k) + size_t(i)] - p.zero[group]);
    }
    if (exact != int32_t(exact)) fail("a piece of k=%d group=%d overflows", p.k, p.group);
    sum = sum + (p.group ? float(exact) * p.scale[group] : float(exact));
  }
  const float scale = p.group ? row_scale : row_scale * p.scale[size_t(column)];
  return sum * scale + (p.with_bias ? p.bias[size_t(column)] : 0);
}

void check_float_product(const Problem& p, int r, int column, double got) {
  double want = p.with_bias ? p.bias[size_t(column)] : 0, magnitude = 1 + std::fabs(want);
  for (int i = 0; i < p.k; ++i) {
    const size_t group = size_t(column * p.groups() + p.group_of(i));
    const double product =
        double(p.x[size_t(r * p.k + i)]) * (p.weight[size_t(column * p.k + i)] - p.zero[group]) * p.scale[group];
    want += product;
    magnitude += std::fabs(product);
  }
  if (std::isnan(want) || std::isinf(want)) {
    if (std::isfinite(got)) fail("row %d of m=%d n=%d k=%d holds no number; got %g", r, p.m, p.n, p.k, got);
    return;
  }
  const double eps = p.dtype == Dtype::f32 ? 0x1p-23 : p.dtype == Dtype::bf16 ? 0x1p-7 : 0x1p-10;
  if (std::isinf(got) && p.dtype == Dtype::f16 && std::fabs(want) > 65000) return;
  const double bf16 = isa_in_use() == Isa::amx ? 1.22 * 0x1p-7 : 0;  // bf16_tiles.h
  if (!(std::fabs(got - want) <= magnitude * (p.k * 0x1p-23 + eps + bf16)))
    fail("float product m=%d n=%d k=%d group=%d row %d column %d: %.9g, not %.9g", p.m, p.n, p.k, p.group, r, column,
         got, want);
}

GemmArgs arguments(const Problem& p, void* y, bool quantize_activations) {
  return {p.stored_x.data(),
          p.dtype,
          p.x_stride,
          p.m,
          view_of(p),
          p.with_bias ? p.bias.data() : nullptr,
          Activation::none,
          y,
          p.dtype,
          quantize_activations,
          1};
}

void check_product(const Problem& p, bool quantize_activations, Digest& exact, Digest& of_16_bits) {
  const bool two_planes = !quantize_activations && splits_activations(isa_in_use());
  const bool int16 = !quantize_activations && !two_planes;
  const bool many = two_planes && multiplies_bf16(Isa::amx, view_of(p).bits, p.m);  // where one level has other bits
  const bool floats = two_planes && multiplies_bf16(isa_in_use(), view_of(p).bits, p.m);
  const size_t bytes = size_t(p.m) * size_t(p.n) * size_t(dtype_bytes(p.dtype));
  std::vector<uint8_t> y(bytes + 1, 0xa5), again(bytes), want(bytes);
  GemmArgs args = arguments(p, y.data(), quantize_activations);
  gemm(args);
  args.y = again.data();
  args.threads = 3;
  gemm(args);
  if (std::memcmp(y.data(), again.data(), bytes) != 0) fail("m=%d n=%d k=%d: threads change the result", p.m, p.n, p.k);
  if (y[bytes] != 0xa5) fail("m=%d n=%d k=%d: written past the end", p.m, p.n, p.k);
  for (int r = 0; r < p.m; ++r) {
    const std::vector<float> x(p.x.begin() + r * p.k, p.x.begin() + (r + 1) * p.k);
    const Row row = quantize(x, two_planes ? 65535 : 255);
    for (int c = 0; c < p.n; ++c) {
      const int64_t i = int64_t(r) * p.n + c;
      if (floats) {
        check_float_product(p, r, c, load(y.data(), p.dtype, i));
        continue;
      }
      store(want.data(), p.dtype, i, int16 ? int16_product(p, r, c) : integer_product(p, row, c, two_planes));
      if (!same(y.data(), want.data(), p.dtype, i))
        return fail("%s m=%d n=%d k=%d group=%d dtype %d row %d column %d: %.9g, not %.9g",
                    quantize_activations ? "a8" : "a16", p.m, p.n, p.k, p.group, int(p.dtype), r, c,
                    load(y.data(), p.dtype, i), load(want.data(), p.dtype, i));
      // The bits of a NaN are the processor's own.
      if (!many && !std::isnan(load(y.data(), p.dtype, i)))
        (quantize_activations ? exact : of_16_bits)
            .add(y.data() + i * dtype_bytes(p.dtype), size_t(dtype_bytes(p.dtype)));
    }
  }
}

double activated(double x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x > 0 ? x : 0;
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::gelu:
      return x * std::erfc(-x / std::sqrt(2.0)) / 2;
    case Activation::gelu_tanh:
      return x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))) / 2;
  }
  return NAN;
}

// activate.h promises the same bits on every level, and to be off by at most 1e-5 of |x|.
void check_activations(Random& rng, Digest& digest) {
  for (const Activation activation : {Activation::relu, Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
    const Problem p = make_problem(rng, 19, 37, 70, 0, Dtype::f32);
    std::vector<float> y(size_t(p.m) * size_t(p.n)), plain(y.size());
    GemmArgs args = arguments(p, plain.data(), true);
    gemm(args);
    args.activation = activation;
    args.y = y.data();
    gemm(args);
    for (size_t i = 0; i < y.size(); ++i) {
      if (std::isnan(plain[i]) && std::isnan(y[i])) continue;
      digest.add(&y[i], 4);
      const double want = activated(plain[i], activation);
      if (!(std::fabs(y[i] - want) <= 1e-5 * std::fabs(plain[i])))
        fail("activation %d of %.9g is %.9g, not %.9g", int(activation), plain[i], y[i], want);
    }
  }
}

// add_norm.h: (v - mean) / sqrt(variance + eps) * weight + bias of v = h + residual.
void check_add_norm(Random& rng, Digest& digest) {
  constexpr int kRows = 5, kColumns = 77;
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
    std::vector<float> h(kRows * kColumns), weight(kColumns), bias(kColumns);
    std::vector<uint8_t> residual(h.size() * 4), y(h.size() * 4);
    for (int i = 0; i < kRows * kColumns; ++i) {
      h[size_t(i)] = rng.bell();
      store(residual.data(), dtype, i, rng.bell());
    }
    for (int i = 0; i < kColumns; ++i) {
      weight[size_t(i)] = rng.bell();
      bias[size_t(i)] = rng.bell();
    }
    const std::vector<float> before = h;  // the kernel overwrites h
    select_add_norm(isa_in_use())(
        {h.data(), kRows, kColumns, residual.data(), kColumns, weight.data(), bias.data(), 1e-5f, y.data(), dtype});
    digest.add(y.data(), h.size() * size_t(dtype_bytes(dtype)));
    const double eps = dtype == Dtype::f32 ? 1e-5 : dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-10;
    for (int r = 0; r < kRows; ++r) {
      const auto value = [&](int c) {
        return before[size_t(r * kColumns + c)] + load(residual.data(), dtype, r * kColumns + c);
      };
      double mean = 0, variance = 0;
      for (int c = 0; c < kColumns; ++c) mean += value(c) / kColumns;
      for (int c = 0; c < kColumns; ++c) variance += (value(c) - mean) * (value(c) - mean) / kColumns;
      for (int c = 0; c < kColumns; ++c) {
        const double want = (value(c) - mean) / std::sqrt(variance + 1e-5) * weight[size_t(c)] + bias[size_t(c)];
        const double got = load(y.data(), dtype, r * kColumns + c);
        if (!(std::fabs(got - want) <= eps * (1 + std::fabs(want))))
          fail("add_norm row %d column %d: %g, not %g", r, c, got, want);
      }
    }
  }
}

// Recurrent layers: the same bits with one thread and three, and by the digest on every level. What they should be is
// asked by tests/kernels.
void check_recurrent(Random& rng, Digest& digest) {
  constexpr int kSteps = 4, kBatch = 3, kHidden = 20, kInput = 33, kPadded = 32;
  for (const Cell cell : {Cell::lstm, Cell::gru, Cell::rnn_tanh, Cell::rnn_relu}) {
    const int n = cell_gates(cell) * kPadded;
    const Problem input = make_problem(rng, kSteps * kBatch, n, kInput, 0, Dtype::f32);
    const Problem hidden = make_problem(rng, 1, n, kHidden, 0, Dtype::f32);
    std::vector<float> x(kSteps * kBatch * kInput);
    for (float& value : x) value = rng.bell();
    std::vector<float> results[2];
    for (const int threads : {1, 3}) {
      std::vector<float>& y = results[threads == 3];
      y.resize(kSteps * kBatch * kHidden);
      std::vector<float> h_last(kBatch * kHidden), c_last(kBatch * kHidden);
      RecurrentArgs args{};
      args.cell = cell;
      args.x = x.data();
      args.steps = kSteps;
      args.batch = kBatch;
      args.hidden = kHidden;
      args.directions = 1;
      args.direction[0] = {view_of(input), view_of(hidden), input.bias.data(), hidden.bias.data(),
                           nullptr,        nullptr,         h_last.data(),     c_last.data()};
      args.y = y.data();
      args.threads = threads;
      recurrent(args);
      y.insert(y.end(), h_last.begin(), h_last.end());
      if (cell == Cell::lstm) y.insert(y.end(), c_last.begin(), c_last.end());
    }
    if (results[0] != results[1]) fail("recurrent cell %d: threads change the result, or it holds a NaN", int(cell));
    digest.add(results[0].data(), results[0].size() * sizeof(float));
  }
}

// Values of all magnitudes, some of whose blocks are zeros, denormal, nearly too large, infinite or no number.
std::vector<float> make_gradient(Random& rng, int n) {
  constexpr float kSpecial[] = {0, 0x1p-140f, 0x1.fffffep127f, INFINITY, NAN};
  std::vector<float> x(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) {
    const int block = i / kScaleBlock % 16;
    x[size_t(i)] = block == 0 ? 0.0f : std::ldexp(rng.bell(), 2 * (block - 8));
    if (block >= 11 && i % kScaleBlock == 7) x[size_t(i)] = kSpecial[block - 11];
    if (block == 12) x[size_t(i)] = rng.bell() * kSpecial[1];
  }
  return x;
}

// blockwise.h, of one value after the other.
void check_blocks(const std::vector<float>& v, const std::vector<float>& left, const uint8_t* packed, int bits) {
  const int n = int(v.size());
  const int64_t scales = BlockwiseLayout(n, bits).scale;
  const float most = bits == 8 ? 127 : 7;
  for (int begin = 0; begin < n; begin += kScaleBlock) {
    const int end = std::min(n, begin + kScaleBlock);
    float largest = 0;
    bool finite = true;
    for (int i = begin; i < end; ++i) {
      largest = std::max(largest, std::fabs(v[size_t(i)]));
      finite = finite && std::isfinite(v[size_t(i)]);
    }
    float scale = finite ? largest * (1 / most) : NAN;
    if (scale < 0x1p-126f) scale = 0;
    const float got_scale = word_at<float>(packed + scales, begin / kScaleBlock);
    if (!same(&got_scale, &scale, Dtype::f32, 0)) fail("blockwise %d bits: scale %g, not %g", bits, got_scale, scale);
    for (int i = begin; i < end; ++i) {
      const float code = scale > 0 ? std::nearbyintf(v[size_t(i)] * (1 / scale)) : 0;
      const float residual = std::isnan(scale) ? 0 : v[size_t(i)] - code * scale;
      const int byte = packed[i * bits / 8], got = bits == 8 ? int8_t(byte) : (byte >> 4 * (i % 2) & 15) - 8;
      if (float(got) != code || left[size_t(i)] != residual)
        return fail("blockwise %d bits: %g became %d and left %g, not %g and %g", bits, v[size_t(i)], got,
                    left[size_t(i)], code, residual);
    }
  }
}

// What is packed again is the mean quantized; one thread and three give the same.
void check_mean(const std::vector<uint8_t>& packed, int rows, int n, int bits, Digest& digest) {
  const size_t bytes = packed.size() / size_t(rows);
  std::vector<float> mean(static_cast<size_t>(n)), again(mean.size(), NAN);
  mean_blockwise(packed.data(), rows, n, bits, mean.data(), nullptr, 1);
  mean_blockwise(packed.data(), rows, n, bits, again.data(), nullptr, 3);
  std::vector<uint8_t> repacked(bytes), want(bytes);
  mean_blockwise(packed.data(), rows, n, bits, nullptr, repacked.data(), 3);
  quantize_blockwise(mean.data(), nullptr, n, bits, want.data(), 1);
  if (repacked != want) fail("blockwise %d bits: %d means packed again are others", bits, n);
  const int64_t scales = BlockwiseLayout(n, bits).scale;
  for (int i = 0; i < n; ++i) {
    float sum = 0;
    for (int r = 0; r < rows; ++r) {
      const uint8_t* const row = packed.data() + size_t(r) * bytes;
      const int byte = row[i * bits / 8], code = bits == 8 ? int8_t(byte) : (byte >> 4 * (i % 2) & 15) - 8;
      sum = sum + float(code) * word_at<float>(row + scales, i / kScaleBlock);
    }
    const float mean_of = sum * (1 / float(rows));
    if (!same(&mean[size_t(i)], &mean_of, Dtype::f32, 0) || !same(&again[size_t(i)], &mean_of, Dtype::f32, 0))
      return fail("blockwise %d bits: mean %d of %d is %g, not %g", bits, i, n, mean[size_t(i)], mean_of);
    if (!std::isnan(mean_of)) digest.add(&mean_of, sizeof(mean_of));
  }
  digest.add(repacked.data(), bytes);
}

void check_blockwise(Random& rng, Digest& digest) {
  constexpr int kRows = 3;
  for (const int n : {1, 127, 128, 3001, 140000}) {
    for (const int bits : {8, 4}) {
      const auto bytes = size_t(BlockwiseLayout(n, bits).bytes);
      std::vector<uint8_t> rows(kRows * bytes), again(bytes);
      for (int r = 0; r < kRows; ++r) {
        uint8_t* const packed = rows.data() + size_t(r) * bytes;
        const std::vector<float> x = make_gradient(rng, n);
        std::vector<float> residual(x.size()), v(x.size());
        for (size_t i = 0; i < x.size(); ++i) v[i] = x[i] + (residual[i] = 0.1f * rng.bell());
        std::vector<float> left = residual, left_again = residual;
        quantize_blockwise(x.data(), left.data(), n, bits, packed, 1);
        quantize_blockwise(x.data(), left_again.data(), n, bits, again.data(), 3);
        if (left != left_again || std::memcmp(packed, again.data(), bytes) != 0)
          fail("blockwise %d bits, n=%d: threads change the result", bits, n);
        check_blocks(v, left, packed, bits);
        digest.add(packed, bytes);
        digest.add(left.data(), left.size() * sizeof(float));
        quantize_blockwise(v.data(), nullptr, n, bits, again.data(), 1);
        if (std::memcmp(packed, again.data(), bytes) != 0)
          fail("blockwise %d bits, n=%d: without a residual codes are others", bits, n);
      }
      check_mean(rows, kRows, n, bits, digest);
    }
  }
}

void check_codec(Random& rng, Digest& digest) {
  for (int round = 0; round < 60; ++round) {
    const int64_t size = 4 * (1 + rng.below(round % 4 ? 3000 : 40000));
    std::vector<uint8_t> data(static_cast<size_t>(size));
    const int kind = round % 5, spread = 1 + rng.below(255);
    for (auto& byte : data) {
      const uint64_t r = rng.next();
      byte = uint8_t(kind == 0   ? r
                     : kind == 1 ? (r % uint64_t(spread) + (r >> 20) % uint64_t(spread)) / 2
                     : kind == 2 ? 7
                     : kind == 3 ? (r % 5 == 0) * (r >> 8)
                                 : uint64_t(__builtin_ctzll(r | uint64_t{1} << 40)));
    }
    std::vector<uint8_t> back(data.size());
    const auto check = [&](const char* what, const std::vector<uint8_t>& code, Status status) {
      const uint64_t sum = select_xxh3(isa_in_use())(code.data(), int64_t(code.size()));
      digest.add(code.data(), code.size());
      digest.add(&sum, sizeof sum);
      if (status != Status::ok || back != data) fail("%s, %d bytes: %s", what, int(size), status_text(status));
      std::fill(back.begin(), back.end(), uint8_t{0x5a});
    };
    for (int layout = 0; layout < kLayoutCount; ++layout) {
      std::vector<uint8_t> code(static_cast<size_t>(huffman_bound(size)));
      code.resize(size_t(huffman_encode_chunk(data.data(), size, Layout(layout), code.data())));
      check("huffman", code,
            huffman_decode_chunk(code.data(), int64_t(code.size()), Layout(layout), back.data(), size, {},
                                 round % 2 != 0));
    }
    for (int variant = 1; variant < kLzwVariantCount; ++variant) {
      std::vector<uint8_t> code(static_cast<size_t>(lzw_bound(size, LzwVariant(variant))));
      code.resize(size_t(lzw_encode(data.data(), size, LzwVariant(variant), code.data())));
      const LzwGrow room_for_all = [&](int64_t, int64_t* room) { return *room = size, back.data(); };
      int64_t decoded = 0;
      check("lzw", code, lzw_decode(code.data(), int64_t(code.size()), LzwVariant(variant), room_for_all, &decoded));
      if (decoded != size) fail("lzw: %d bytes became %d", int(size), int(decoded));
    }
    std::vector<uint8_t> code(static_cast<size_t>(lzw_bound(size, LzwVariant::lepton)));
    code.resize(size_t(lzw_encode_chunk(data.data(), size, code.data())));
    check("lzw chunk", code, lzw_decode_chunk(code.data(), int64_t(code.size()), back.data(), size));
  }
}

// m, n, k with the reasons of tests/shapes.py: one, odd, one past a panel, a quad or a block, several of each.
constexpr int kShapes[][3] = {{1, 1, 1},   {1, 16, 16},   {2, 17, 3},    {1, 130, 300}, {3, 40, 64},  {5, 33, 31},
                              {6, 64, 64}, {7, 15, 65},   {13, 49, 257}, {9, 20, 130},  {24, 80, 96}, {67, 23, 520},
                              {40, 36, 8}, {1, 70, 1030}, {7, 18, 2600}, {4, 16, 4},    {3, 20, 7},   {11, 18, 12}};
constexpr int kExtremes[][3] = {{7, 19, 44}, {3, 17, kMaxK}};
constexpr int kGroups[] = {0, 16, 32, 128, 1040, -1};  // 0: 8 bit; -1: the whole row

}  // namespace

// A sparse int8 weight as blocks and as streams of nonzeros: the bits of the dense kernel on the same weight.
void check_sparse(Random& rng, Digest& digest) {
  constexpr int kN = 150, kK = 300;
  for (const int rows : {1, 2, 7, 16, 33, 65}) {
    for (const int kept_of_16 : {0, 3, 16}) {
      std::vector<int8_t> weight(size_t(kN * kK));
      std::vector<int8_t> values;
      std::vector<float> scale, bias, x(size_t(rows * kK));
      std::vector<uint8_t> mask(size_t(kN * divide_up(kK, 8)));
      for (int c = 0; c < kN; ++c) {
        for (int i = 0; i < kK; ++i) {
          // Blocks of 16 x 4, most of whose places hold a weight, and some that stand alone.
          const bool in_block = int((c / 16 * 2654435761u + i / 4 * 40503u) >> 7) % 16 < kept_of_16;
          if (rng.below(8) == 0 || !(in_block || rng.below(200) == 0)) continue;
          const int w = rng.below(255) - 127;
          weight[size_t(c * kK + i)] = int8_t(w);
          values.push_back(int8_t(w));
          mask[size_t(c * divide_up(kK, 8) + i / 8)] |= uint8_t(1 << i % 8);
        }
        scale.push_back((rng.uniform() + 1.01f) * 0.01f);
        bias.push_back(rng.bell());
      }
      for (float& value : x) value = rng.bell();
      const int64_t nonzeros = int64_t(values.size());
      const int quads = rows_together(isa_in_use());
      const int64_t steps = count_steps(weight.data(), kN, kK, quads);
      std::vector<uint64_t> dense(size_t(PackedLayout(packed_weight(nullptr, kN, kK, 8, kK, true)).bytes / 8 + 8));
      std::vector<uint64_t> blocks(size_t(PackedBlocksLayout(kN, steps, quads).bytes / 8 + 8));
      const auto bytes = [](std::vector<uint64_t>& words) { return reinterpret_cast<uint8_t*>(words.data()); };
      pack_int8(weight.data(), scale.data(), kN, kK, bytes(dense));
      pack_int8_blocks(weight.data(), scale.data(), kN, kK, steps, quads, bytes(blocks));
      if (count_ones(mask.data(), kN, kK) != nonzeros) fail("sparse: the mask's ones are miscounted");
      std::vector<float> want(size_t(rows * kN)), got(want.size(), NAN);
      GemmArgs args{x.data(),
                    Dtype::f32,
                    kK,
                    rows,
                    packed_weight(bytes(dense), kN, kK, 8, kK, true),
                    bias.data(),
                    Activation::relu,
                    want.data(),
                    Dtype::f32,
                    true,
                    2};
      gemm(args);
      const auto compare = [&](const char* what) {
        if (std::memcmp(got.data(), want.data(), want.size() * sizeof(float)) != 0)
          fail("sparse: %s differ from the dense kernel, %d rows, %d of 16 blocks", what, rows, kept_of_16);
        std::fill(got.begin(), got.end(), NAN);
      };
      args.weight = packed_blocks(bytes(blocks), kN, kK, steps, quads);
      args.y = got.data();
      gemm(args);
      compare("blocks");
      const auto check_stream = [&](SparseForm form, int slice) {
        const int64_t items = count_items(mask.data(), kN, kK, form, slice);
        std::vector<uint64_t> stream(size_t(SparseRowsLayout(kN, kK, form, slice, items).bytes / 8 + 8));
        pack_sparse_rows(values.data(), mask.data(), kN, kK, form, slice, items, bytes(stream));
        sparse_rows({x.data(), Dtype::f32, kK, rows, sparse_rows_view(bytes(stream), kN, kK, form, slice, items),
                     bias.data(), Activation::relu, got.data(), 2, scale.data()});
        compare(form == SparseForm::pairs ? "pairs" : "groups");
      };
      check_stream(SparseForm::pairs, kSparseSlice);
      check_stream(SparseForm::groups, kSparseSlice);
      if (rows == 1) check_stream(SparseForm::pairs, kLongSlice);
      digest.add(want.data(), want.size() * sizeof(float));
    }
  }
}

// Sparse float weights, of whose rows some share their columns: near the sums in double.
void check_sparse_floats(Random& rng) {
  constexpr int kN = 275, kK = 300;
  const auto make_stream = [&](const std::vector<float>& values, const std::vector<uint8_t>& mask, SparseForm form,
                               int slice, std::vector<uint64_t>& stream) {
    const int64_t items = count_items(mask.data(), kN, kK, form, slice);
    stream.resize(size_t(SparseRowsLayout(kN, kK, form, slice, items).bytes / 8 + 8));
    auto* const packed = reinterpret_cast<uint8_t*>(stream.data());
    pack_sparse_rows(values.data(), mask.data(), kN, kK, form, slice, items, packed);
    return sparse_rows_view(packed, kN, kK, form, slice, items);
  };
  for (const int rows : {1, 16, 33, 65}) {
    std::vector<float> weight(size_t(kN * kK)), values, x(size_t(rows * kK)), got(size_t(rows * kN));
    std::vector<uint8_t> mask(size_t(kN * divide_up(kK, 8)));
    for (int c = 0; c < kN; ++c) {
      for (int i = 0; i < kK; ++i) {
        if ((uint32_t(c / 2 * kK + i) * 2654435761u >> 20) % 4 != 0 || rng.below(30) == 0) continue;
        values.push_back(weight[size_t(c * kK + i)] = rng.bell());
        mask[size_t(c * divide_up(kK, 8) + i / 8)] |= uint8_t(1 << i % 8);
      }
    }
    for (float& value : x) value = rng.bell();
    const auto check_stream = [&](SparseForm form, int slice) {
      std::vector<uint64_t> stream;
      std::fill(got.begin(), got.end(), NAN);
      sparse_rows({x.data(), Dtype::f32, kK, rows, make_stream(values, mask, form, slice, stream), nullptr,
                   Activation::none, got.data(), 2});
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < kN; ++c) {
          double want = 0;
          for (int i = 0; i < kK; ++i) want += double(x[size_t(r * kK + i)]) * weight[size_t(c * kK + i)];
          if (!(std::abs(got[size_t(r * kN + c)] - want) < 1e-4))
            return fail("sparse floats: form %d, row %d of %d, column %d: %g, not %g", int(form), r, rows, c,
                        double(got[size_t(r * kN + c)]), want);
        }
      }
    };
    for (const int slice : {kSparseSlice, kShortSlice}) {
      check_stream(SparseForm::floats, slice);
      check_stream(SparseForm::twins, slice);
    }
    if (rows == 1) check_stream(SparseForm::floats, kLongSlice);
  }
}

int main() {
  if (isa_unknown_name() != nullptr) {
    std::fprintf(stderr, "LEPTON_MAX_ISA is '%s', no level of this architecture\n", isa_unknown_name());
    return 2;
  }
  Random rng{1};
  Digest exact, of_16_bits, codec;
  int products = 0;
  for (const auto& [m, n, k] : kShapes) {
    for (const int group_size : kGroups) {
      for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
        const int group = group_size < 0 ? k : group_size;
        const Problem problem = make_problem(rng, m, n, k, group, dtype);
        for (const bool quantize_activations : {true, false}) {
          check_product(problem, quantize_activations, exact, of_16_bits);
          ++products;
        }
      }
    }
  }
  for (const auto& [m, n, k] : kExtremes) {
    for (const int group : {0, 32, k}) {
      const Problem problem = make_problem(rng, m, n, k, group, Dtype::f32, true);
      for (const bool quantize_activations : {true, false}) {
        check_product(problem, quantize_activations, exact, of_16_bits);
        ++products;
      }
    }
  }
  check_activations(rng, exact);
  check_add_norm(rng, exact);
  check_recurrent(rng, exact);
  check_sparse(rng, exact);
  check_blockwise(rng, exact);
  check_codec(rng, codec);
  check_sparse_floats(rng);
  const char* const kind = splits_activations(isa_in_use()) ? "split" : "int16";
  std::printf("%s %d products exact=%016llx %s=%016llx codec=%016llx\n", isa_name(isa_in_use()), products,
              static_cast<unsigned long long>(exact.value), kind, static_cast<unsigned long long>(of_16_bits.value),
              static_cast<unsigned long long>(codec.value));
  return failures != 0;
}
