// pages.cpp - madvise, on whole pages of 2 MiB, which are whole pages of every smaller size too.
#include "cpu/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lepton {
namespace {

constexpr int64_t kLeastBytes = 4 << 20;
constexpr uintptr_t kHugePage = 2 << 20;

}  // namespace

void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  if (bytes < kLeastBytes) return;
  const auto address = reinterpret_cast<uintptr_t>(p);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + uintptr_t(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: it may be refused
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace lepton
