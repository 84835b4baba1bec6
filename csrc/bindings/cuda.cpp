// cuda.cpp - bindings of csrc/cuda; without it, a module that says so.
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#ifdef LEPTON_CUDA
#include "cuda/build.h"
#endif

namespace lepton {

void bind_cuda(pybind11::module_& module) {
#ifdef LEPTON_CUDA
  const std::vector<int> compiled_for = cuda::architectures();
#else
  const std::vector<int> compiled_for;
#endif
  module.def(
      "cuda_architectures", [=] { return compiled_for; }, "Compute capabilities, times ten, of the native GPU code.");
}

}  // namespace lepton
