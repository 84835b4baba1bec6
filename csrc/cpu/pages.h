// pages.h - huge pages for large memory that is about to be written for the first time.
#pragma once

#include <stdint.h>

namespace lepton {

// Asks for huge pages for what of [p, p + bytes) makes whole ones (Linux, where they are left to madvise); memory that
// has pages keeps them. From 4 MiB on, as NumPy does. The first write to each page of 4 KiB traps: for a large output,
// fresh from the system every time, that can take longer than the product.
void advise_huge_pages(void* p, int64_t bytes);

}  // namespace lepton
