// build.cu - which GPU architectures csrc/cuda was compiled for, from nvcc's own list.
#include "cuda/build.h"

namespace lepton::cuda {

std::vector<int> architectures() {
  std::vector<int> out;
  for (int arch : {__CUDA_ARCH_LIST__}) out.push_back(arch / 10);
  return out;
}

}  // namespace lepton::cuda
