// cache.h - sizes of this machine's caches, for cutting work into tiles.
#pragma once

#include <stdint.h>

namespace lepton {

// Bytes of a core's second-level cache; 1 MiB where the system does not say.
int64_t l2_bytes();

}  // namespace lepton
