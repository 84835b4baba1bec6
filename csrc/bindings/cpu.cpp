// cpu.cpp - bindings of csrc/cpu.
#include "bindings/bindings.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace lepton {

void bind_cpu(py::module_& module) {
  if (isa_unknown_name() != nullptr) {
    std::string names;
    for (int i = 0; i < kIsaCount; ++i) names += std::string(i ? ", " : "") + isa_name(static_cast<Isa>(i));
    throw py::value_error("LEPTON_MAX_ISA is '" + std::string(isa_unknown_name()) + "'; allowed: " + names);
  }
  module.def("isa", [] { return isa_name(isa_in_use()); }, "The instruction-set level in use.");
  module.def("isa_of_machine", [] { return isa_name(isa_of_machine()); }, "The best level of this machine.");
  module.def("default_threads", &default_threads, "Threads that OpenMP would use.");
}

}  // namespace lepton
