// cpu.cpp - bindings of csrc/cpu. Addresses come as integers from tensor.data_ptr(); _backends/cpu.py has checked
// shapes and dtypes, and what can be checked from sizes alone is checked again here.
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/blockwise.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/linear_block.h"
#include "cpu/parallel.h"
#include "cpu/quantize_rows.h"
#include "cpu/recurrent.h"
#include "cpu/sparse_rows.h"

namespace py = pybind11;

namespace lepton {
namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(bool ok, const std::string& message) {
  if (!ok) throw py::value_error(message);
}

PackedWeight packed_view(uintptr_t packed, int n, int k, int bits, int group, bool symmetric) {
  check(n >= 0, "gemm: n is " + std::to_string(n) + "; allowed: 0 or more");
  check(k >= 1 && k <= kMaxK,
        "gemm: k (in_features) is " + std::to_string(k) + "; allowed: 1 to " + std::to_string(kMaxK));
  check(bits == 8 || bits == 4, "gemm: bits is " + std::to_string(bits) + "; allowed: 4, 8");
  check(bits == 8 || (group >= 1 && (group % kNibbleBlock == 0 || group >= k)),
        "gemm: group_size is " + std::to_string(group) + "; allowed: a multiple of " + std::to_string(kNibbleBlock) +
            ", or -1 for the whole row");
  return packed_weight(at<const uint8_t>(packed), n, k, bits, bits == 8 ? k : group, symmetric);
}

int64_t packed_bytes(int n, int k, int bits, int group, bool symmetric) {
  return PackedLayout(packed_view(0, n, k, bits, group, symmetric)).bytes;
}

void check_activation(int activation) {
  check(activation >= 0 && activation < kActivationCount,
        "activation is " + std::to_string(activation) + "; allowed: 0 to " + std::to_string(kActivationCount - 1));
}

void bind_gemm(uintptr_t x, int dtype, int64_t x_stride, int m, uintptr_t packed, int n, int k, int bits, int group,
               bool symmetric, uintptr_t bias, int activation, uintptr_t y, bool quantize_activations, int threads) {
  check_activation(activation);
  const GemmArgs args{at<const void>(x),
                      static_cast<Dtype>(dtype),
                      x_stride,
                      m,
                      packed_view(packed, n, k, bits, group, symmetric),
                      at<const float>(bias),
                      static_cast<Activation>(activation),
                      at<void>(y),
                      static_cast<Dtype>(dtype),
                      quantize_activations,
                      threads};
  py::gil_scoped_release release;
  gemm(args);
}

// packed, n, k, bits, group, symmetric, bias, activation, quantize_activations: as bind_gemm takes them.
using LayerTuple = std::tuple<uintptr_t, int, int, int, int, bool, uintptr_t, int, bool>;

void bind_linear_block(uintptr_t x, int dtype, int64_t x_stride, int m, const std::vector<LayerTuple>& layers,
                       uintptr_t residual, int64_t residual_stride, uintptr_t norm_weight, uintptr_t norm_bias,
                       float norm_eps, uintptr_t y, int threads) {
  check(layers.size() == 1 || layers.size() == 2,
        "linear_block: " + std::to_string(layers.size()) + " layers; allowed: 1, 2");
  LinearBlockArgs args{at<const void>(x),
                       static_cast<Dtype>(dtype),
                       x_stride,
                       m,
                       {},
                       int(layers.size()),
                       at<const void>(residual),
                       residual_stride,
                       at<const float>(norm_weight),
                       at<const float>(norm_bias),
                       norm_eps,
                       at<void>(y),
                       threads};
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& [packed, n, k, bits, group, symmetric, bias, activation, quantize_activations] = layers[i];
    check_activation(activation);
    check(i == 0 || k == args.layers[i - 1].weight.n,
          "linear_block: k of layer " + std::to_string(i) + " is " + std::to_string(k) + "; allowed: the n before it");
    args.layers[i] = {packed_view(packed, n, k, bits, group, symmetric), at<const float>(bias),
                      static_cast<Activation>(activation), quantize_activations};
  }
  py::gil_scoped_release release;
  linear_block(args);
}

// Addresses of one direction: packed input weight, packed hidden weight, their biases, h0, c0, h_last, c_last.
using DirectionAddresses = std::array<uintptr_t, 8>;

void bind_recurrent(int cell, uintptr_t x, int steps, int batch, bool batch_first, uintptr_t batch_sizes, int k,
                    int hidden, const std::vector<DirectionAddresses>& directions, uintptr_t y, int threads) {
  check(cell >= 0 && cell <= static_cast<int>(Cell::rnn_relu),
        "recurrent: cell is " + std::to_string(cell) + "; allowed: 0 to 3");
  check(directions.size() == 1 || directions.size() == 2,
        "recurrent: there are " + std::to_string(directions.size()) + " directions; allowed: 1, 2");
  check(hidden >= 1 && hidden <= kMaxK,
        "recurrent: hidden is " + std::to_string(hidden) + "; allowed: 1 to " + std::to_string(kMaxK));
  RecurrentArgs args{};
  args.cell = static_cast<Cell>(cell);
  args.x = at<const float>(x);
  args.steps = steps;
  args.batch = batch;
  args.batch_first = batch_first;
  args.batch_sizes = at<const int64_t>(batch_sizes);
  args.hidden = hidden;
  args.directions = int(directions.size());
  const int n = cell_gates(args.cell) * round_up(hidden, kUnitBlock);
  for (int d = 0; d < args.directions; ++d) {
    const auto& [input, recurrent, bias_input, bias_hidden, h0, c0, h_last, c_last] = directions[d];
    args.direction[d] = {packed_view(input, n, k, 8, k, true),
                         packed_view(recurrent, n, hidden, 8, hidden, true),
                         at<const float>(bias_input),
                         at<const float>(bias_hidden),
                         at<const float>(h0),
                         at<const float>(c0),
                         at<float>(h_last),
                         at<float>(c_last)};
  }
  args.y = at<float>(y);
  args.threads = threads;
  py::gil_scoped_release release;
  lepton::recurrent(args);
}

void bind_pack_int8(uintptr_t weight, uintptr_t scale, int n, int k, uintptr_t packed) {
  packed_view(packed, n, k, 8, k, true);
  py::gil_scoped_release release;
  pack_int8(at<const int8_t>(weight), at<const float>(scale), n, k, at<uint8_t>(packed));
}

void bind_pack_int4(uintptr_t weight, int64_t row_bytes, uintptr_t scale, uintptr_t zero, int n, int k, int group,
                    uintptr_t packed) {
  packed_view(packed, n, k, 4, group, zero == 0);
  py::gil_scoped_release release;
  pack_int4(at<const uint8_t>(weight), row_bytes, at<const float>(scale), at<const int8_t>(zero), n, k, group,
            at<uint8_t>(packed));
}

// Quads in a step of int8 blocks, at the level in use.
int step_quads() { return rows_together(isa_in_use()); }

PackedWeight blocks_view(uintptr_t packed, int n, int k, int64_t steps) {
  check(n >= 0, "gemm: n is " + std::to_string(n) + "; allowed: 0 or more");
  check(k >= 1 && k <= kMaxK,
        "gemm: k (in_features) is " + std::to_string(k) + "; allowed: 1 to " + std::to_string(kMaxK));
  return packed_blocks(at<const uint8_t>(packed), n, k, steps, step_quads());
}

int64_t bind_count_steps(uintptr_t weight, int n, int k) {
  py::gil_scoped_release release;
  return count_steps(at<const int8_t>(weight), n, k, step_quads());
}

int64_t int8_blocks_bytes(int n, int k, int64_t steps) {
  blocks_view(0, n, k, steps);
  return PackedBlocksLayout(n, steps, step_quads()).bytes;
}

void bind_pack_int8_blocks(uintptr_t weight, uintptr_t scale, int n, int k, int64_t steps, uintptr_t packed) {
  py::gil_scoped_release release;
  pack_int8_blocks(at<const int8_t>(weight), at<const float>(scale), n, k, steps, step_quads(), at<uint8_t>(packed));
}

void bind_gemm_int8_blocks(uintptr_t x, int dtype, int64_t x_stride, int m, uintptr_t packed, int n, int k,
                           int64_t steps, uintptr_t bias, int activation, uintptr_t y, int threads) {
  check_activation(activation);
  const GemmArgs args{at<const void>(x),
                      static_cast<Dtype>(dtype),
                      x_stride,
                      m,
                      blocks_view(packed, n, k, steps),
                      at<const float>(bias),
                      static_cast<Activation>(activation),
                      at<void>(y),
                      static_cast<Dtype>(dtype),
                      true,
                      threads};
  py::gil_scoped_release release;
  gemm(args);
}

SparseForm sparse_form(int form) {
  check(form >= 0 && form <= int(SparseForm::twins),
        "sparse_rows: form is " + std::to_string(form) + "; allowed: 0 to 3");
  return static_cast<SparseForm>(form);
}

int64_t sparse_rows_bytes(int n, int k, int form, int slice, int64_t items) {
  check(n >= 0, "sparse_rows: n is " + std::to_string(n) + "; allowed: 0 or more");
  check(k >= 1 && k <= kMaxK,
        "sparse_rows: k (in_features) is " + std::to_string(k) + "; allowed: 1 to " + std::to_string(kMaxK));
  check(items >= 0 && items <= int64_t(n) * k,
        "sparse_rows: items is " + std::to_string(items) + "; allowed: 0 to n * k");
  check(slice == kSparseSlice || slice == kShortSlice || slice == kLongSlice,
        "sparse_rows: slice is " + std::to_string(slice) + "; allowed: SPARSE_SLICE, SHORT_SLICE, LONG_SLICE");
  return SparseRowsLayout(n, k, sparse_form(form), slice, items).bytes;
}

// The bitmask comes from a file: what it says is checked against the number of values.
void check_bitmask(uintptr_t bitmask, int n, int k, int64_t nonzeros) {
  const int64_t ones = count_ones(at<const uint8_t>(bitmask), n, k);
  check(ones >= 0, "sparse weight: the bitmask has ones past column " + std::to_string(k - 1) + "; allowed: none");
  check(ones == nonzeros, "sparse weight: the bitmask has " + std::to_string(ones) +
                              " ones; allowed: " + std::to_string(nonzeros) + ", as many as there are values");
}

int64_t bind_count_items(uintptr_t bitmask, int n, int k, int form, int slice) {
  sparse_rows_bytes(n, k, form, slice, 0);
  py::gil_scoped_release release;
  return count_items(at<const uint8_t>(bitmask), n, k, sparse_form(form), slice);
}

void bind_pack_sparse_rows(uintptr_t values, uintptr_t bitmask, int n, int k, int form, int slice, int64_t items,
                           uintptr_t packed) {
  sparse_rows_bytes(n, k, form, slice, items);
  py::gil_scoped_release release;
  pack_sparse_rows(at<const void>(values), at<const uint8_t>(bitmask), n, k, sparse_form(form), slice, items,
                   at<uint8_t>(packed));
}

void bind_sparse_rows(uintptr_t x, int dtype, int64_t x_stride, int m, uintptr_t packed, int n, int k, int form,
                      int slice, int64_t items, uintptr_t scale, uintptr_t bias, int activation, uintptr_t y,
                      int threads) {
  check_activation(activation);
  sparse_rows_bytes(n, k, form, slice, items);
  const bool for_one = sparse_form(form) == SparseForm::floats || sparse_form(form) == SparseForm::pairs;
  check(slice != kLongSlice || (m == 1 && for_one),
        "sparse_rows: m is " + std::to_string(m) + "; allowed with long slices: 1, and floats or pairs");
  const SparseRowsArgs args{at<const void>(x),
                            static_cast<Dtype>(dtype),
                            x_stride,
                            m,
                            sparse_rows_view(at<const uint8_t>(packed), n, k, sparse_form(form), slice, items),
                            at<const float>(bias),
                            static_cast<Activation>(activation),
                            at<void>(y),
                            threads,
                            at<const float>(scale)};
  py::gil_scoped_release release;
  sparse_rows(args);
}

BlockwiseLayout blockwise_layout(int64_t n, int bits) {
  check(n >= 0, "blockwise: n is " + std::to_string(n) + "; allowed: 0 or more");
  check(bits == 8 || bits == 4, "blockwise: bits is " + std::to_string(bits) + "; allowed: 4, 8");
  return BlockwiseLayout(n, bits);
}

void bind_quantize_blockwise(uintptr_t x, uintptr_t residual, int64_t n, int bits, uintptr_t packed, int threads) {
  blockwise_layout(n, bits);
  py::gil_scoped_release release;
  quantize_blockwise(at<const float>(x), at<float>(residual), n, bits, at<uint8_t>(packed), threads);
}

void bind_mean_blockwise(uintptr_t packed, int rows, int64_t n, int bits, uintptr_t mean, uintptr_t mean_packed,
                         int threads) {
  blockwise_layout(n, bits);
  check(rows >= 1, "blockwise: rows is " + std::to_string(rows) + "; allowed: 1 or more");
  check(n == 0 || (mean == 0) != (mean_packed == 0), "blockwise: mean, mean_packed; allowed: one of them");
  py::gil_scoped_release release;
  mean_blockwise(at<const uint8_t>(packed), rows, n, bits, at<float>(mean), at<uint8_t>(mean_packed), threads);
}

}  // namespace

void bind_cpu(py::module_& module) {
  if (isa_unknown_name() != nullptr) {
    std::string names;
    for (const Isa isa : kIsas) names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
    throw py::value_error("LEPTON_MAX_ISA is '" + std::string(isa_unknown_name()) + "'; allowed: " + names);
  }
  module.attr("MAX_K") = kMaxK;
  module.attr("SPARSE_SLICE") = kSparseSlice;
  module.attr("SHORT_SLICE") = kShortSlice;
  module.attr("LONG_SLICE") = kLongSlice;
  module.attr("GROUP_MULTIPLE") = kNibbleBlock;
  module.attr("SCALE_BLOCK") = kScaleBlock;
  module.def("isa", [] { return isa_name(isa_in_use()); }, "The instruction-set level in use.");
  module.def("isa_of_machine", [] { return isa_name(isa_of_machine()); }, "The best level of this machine.");
  module.def(
      "splits_activations", [] { return splits_activations(isa_in_use()); },
      "Whether w8a16 and w4a16 multiply 16-bit integers, not floats.");
  module.def("default_threads", &default_threads, "Threads that OpenMP would use.");
  module.def("packed_bytes", &packed_bytes, "Bytes of a packed weight.");
  module.def("pack_int8", &bind_pack_int8);
  module.def("pack_int4", &bind_pack_int4);
  module.def("gemm", &bind_gemm);
  module.def("linear_block", &bind_linear_block);
  module.def("recurrent", &bind_recurrent);
  module.def("check_bitmask", &check_bitmask, "Raises ValueError unless a bitmask has so many ones, none past k.");
  module.def("step_bytes", [] { return step_quads() * kPanel * kQuad; }, "Bytes of a step of int8 blocks.");
  module.def("count_steps", &bind_count_steps, "Steps of k with a weight other than 0, of all panels.");
  module.def("int8_blocks_bytes", &int8_blocks_bytes, "Bytes of packed int8 blocks.");
  module.def("pack_int8_blocks", &bind_pack_int8_blocks);
  module.def("gemm_int8_blocks", &bind_gemm_int8_blocks);
  module.def("count_items", &bind_count_items, "Items of the stream of a bitmask.");
  module.def("group_columns", [] { return group_columns(isa_in_use()); }, "Columns of a group.");
  module.def(
      "count_panels", [](int m, int form, int vectors) { return count_panels(m, sparse_form(form), vectors); },
      "Panels of 16 * vectors rows that a stream cuts m rows into.");
  module.def("sparse_rows_bytes", &sparse_rows_bytes, "Bytes of packed nonzeros.");
  module.def("pack_sparse_rows", &bind_pack_sparse_rows);
  module.def("sparse_rows", &bind_sparse_rows);
  module.def(
      "blockwise_bytes", [](int64_t n, int bits) { return blockwise_layout(n, bits).bytes; },
      "Bytes of a vector packed block by block.");
  module.def("quantize_blockwise", &bind_quantize_blockwise);
  module.def("mean_blockwise", &bind_mean_blockwise);
}

}  // namespace lepton
