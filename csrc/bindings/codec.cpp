// codec.cpp - bindings of csrc/codec.
#include "bindings/bindings.h"

namespace lepton {

void bind_codec(pybind11::module_&) {}

}  // namespace lepton
