// cuda.cpp - bindings of csrc/cuda; without it, a module that says so. Addresses are device memory, streams as torch
// has them; _backends/cuda.py has checked shapes, dtypes and alignment.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/bindings.h"
#ifdef LEPTON_CUDA
#include "cuda/build.h"
#include "cuda/gemm.h"
#endif

namespace py = pybind11;

namespace lepton {

#ifdef LEPTON_CUDA
namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_gemm(int bits, uintptr_t x, int64_t x_stride, uintptr_t weight, uintptr_t scales, uintptr_t row_scale,
               uintptr_t row_zero, uintptr_t column_sum, uintptr_t bias, uintptr_t y, int m, int n, int k, int dtype,
               int activation, uintptr_t stream) {
  if (m < 1) throw py::value_error("cuda_gemm: m is " + std::to_string(m) + "; allowed: 1 and more");
  cuda::GemmArgs args{};
  args.x = at<void>(x), args.x_stride = x_stride;
  args.weight = at<uint8_t>(weight);
  if (bits == 8)
    args.scale = at<float>(scales);
  else
    args.groups = at<uint32_t>(scales);
  args.row_scale = at<float>(row_scale), args.row_zero = at<int32_t>(row_zero);
  args.column_sum = at<int32_t>(column_sum);
  args.bias = at<float>(bias), args.y = at<void>(y);
  args.m = m, args.n = n, args.k = k;
  args.dtype = static_cast<Dtype>(dtype), args.activation = static_cast<Activation>(activation);
  const auto launch = bits == 8 ? cuda::gemm_int8 : cuda::gemm_int4;
  const cudaError_t error = launch(args, at<CUstream_st>(stream));
  if (error != cudaSuccess)
    throw std::runtime_error("cuda_gemm: the launch failed: " + std::string(cudaGetErrorString(error)));
}

}  // namespace
#endif

void bind_cuda(py::module_& module) {
#ifdef LEPTON_CUDA
  const std::vector<int> compiled_for = cuda::architectures();
  const int few_rows = cuda::kMostFewRows;
  module.def("cuda_gemm", bind_gemm, py::arg("bits"), py::arg("x"), py::arg("x_stride"), py::arg("weight"),
             py::arg("scales"), py::arg("row_scale"), py::arg("row_zero"), py::arg("column_sum"), py::arg("bias"),
             py::arg("y"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"), py::arg("activation"),
             py::arg("stream"));
#else
  const std::vector<int> compiled_for;
  const int few_rows = 0;
#endif
  module.def(
      "cuda_architectures", [=] { return compiled_for; }, "Compute capabilities, times ten, of the native GPU code.");
  module.def(
      "cuda_most_rows", [=] { return few_rows; },
      "The most rows of X that cuda_gemm takes on every GPU; 0 where there is none.");
}

}  // namespace lepton
