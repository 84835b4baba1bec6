// checksum.h - XXH3 of 64 bits with seed 0, which guards a frame's chunks (Y. Collet; github.com/Cyan4973/xxHash, whose
// doc/xxhash_spec.md specifies it). Here because a chunk is to be checked by the thread that decodes it, while its
// bytes are in that thread's cache, and no header of a package that every build has brings it.
#pragma once

#include <stdint.h>

#include "cpu/kernel_table.h"

namespace lepton {

using Xxh3Fn = uint64_t(const uint8_t* data, int64_t size);
LEPTON_KERNEL(xxh3, Xxh3Fn)

}  // namespace lepton
