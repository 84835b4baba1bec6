// cache.cpp - cache sizes from the C library, read once.
#include "cpu/cache.h"

#include <unistd.h>

namespace lepton {

int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr int64_t bytes = 0;
#endif
  return bytes > 0 ? bytes : 1024 * 1024;
}

}  // namespace lepton
