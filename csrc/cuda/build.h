// build.h - which GPU architectures csrc/cuda was compiled for.
#pragma once

#include <vector>

namespace lepton::cuda {

// Compute capabilities times ten, 80 and 90 say, in rising order.
std::vector<int> architectures();

}  // namespace lepton::cuda
