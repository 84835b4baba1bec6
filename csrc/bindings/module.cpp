// module.cpp - the extension module lepton_kernels._C: pointers and sizes in, exceptions out. No torch.
#include "bindings/bindings.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Lepton's native kernels. Internal: use lepton_kernels' public names.";
  lepton::bind_cpu(module);
  lepton::bind_codec(module);
  lepton::bind_cuda(module);
}
