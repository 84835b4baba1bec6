// scratch.h - memory that a thread keeps between calls.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <new>

#include "cpu/pages.h"

namespace lepton {

// A buffer that grows as it must, 64-byte aligned. What it held before get() is lost when it grows.
class Scratch {
 public:
  void* get(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;  // also where there is no memory
      memory_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
      size_ = bytes;
      advise_huge_pages(memory_.get(), int64_t(bytes));
    }
    return memory_.get();
  }
  float* floats(int64_t count) { return static_cast<float*>(get(size_t(count) * sizeof(float))); }
  void trim() {
    if (size_ > kKeepBytes) {
      memory_.reset();
      size_ = 0;
    }
  }

 private:
  static constexpr size_t kKeepBytes = 32u << 20;
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

}  // namespace lepton
