// bindings.h - what each part of csrc/ adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace lepton {

void bind_cpu(pybind11::module_& module);
void bind_codec(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);

}  // namespace lepton
