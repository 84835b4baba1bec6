// guarded.h - memory whose end is the end of a page that can be touched: what reads or writes one byte too many dies,
// in vector code too, which the sanitizers do not see everywhere.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <thread>

class Guarded {
 public:
  explicit Guarded(size_t capacity) : capacity_((capacity + kPage - 1) / kPage * kPage) {
    base_ = static_cast<uint8_t*>(
        mmap(nullptr, capacity_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + capacity_, kPage, PROT_NONE) != 0) abort();
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(base_, capacity_ + kPage); }

  // The last `size` bytes, at most `capacity`.
  uint8_t* ending(size_t size) { return base_ + capacity_ - size; }

 private:
  static constexpr size_t kPage = 4096;
  size_t capacity_;
  uint8_t* base_;
};

// Calls run(). The codec's own buffers live as long as the thread and never shrink; for one input of eight, told by its
// size, they are those of a new thread, and a byte past what the input needs is past their end.
template <typename Run>
void with_buffers(size_t input_size, const Run& run) {
  if (input_size % 8 == 0) {
    std::thread([&] { run(); }).join();
  } else {
    run();
  }
}
