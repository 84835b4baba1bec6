// wgmma.cuh - Hopper's asynchronous product of four warps: 64 outputs x kRows rows of X x 16 k, the weights from
// registers, X from shared memory.
//
// A (registers): of the 16 outputs of each warp, lane 4g + t holds outputs g and g + 8: a[0], a[1] their k 2t, 2t + 1,
// and a[2], a[3] their k 2t + 8, 2t + 9. B (shared memory): X as [row][64 k] of 128 bytes, 1024-byte aligned, the 16
// bytes c of row r at place c ^ (r % 8): what the hardware calls K-major with a swizzle of 128 bytes. D: d[4j + 2h + e]
// is the sum of output g + 8h and row 8j + 2t + e.
//
// A product may touch its registers until wait_products; the next one must not be given other values before.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace lepton::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LEPTON_WGMMA
#endif

#ifdef LEPTON_WGMMA
constexpr int kSwizzleBytes = 128;

// What the tensor core needs to know of 8-row blocks of 1024 bytes from a shared address on.
__device__ inline uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kRowBlock = uint64_t(8 * kSwizzleBytes / 16) << 32, kUnused = 1ull << 16;
  return kSwizzle128 | kRowBlock | kUnused | (address & 0x3ffff) >> 4;
}
// The descriptor of the 16 k that are `step` further.
__device__ inline uint64_t advanced(uint64_t descriptor, int step) { return descriptor + 2 * step; }

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int in_flight>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(in_flight) : "memory");
}

#define LEPTON_D16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LEPTON_D32 LEPTON_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LEPTON_D64                                                                                                   \
  LEPTON_D32                                                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LEPTON_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LEPTON_F16(i) LEPTON_F4(i), LEPTON_F4(i + 4), LEPTON_F4(i + 8), LEPTON_F4(i + 12)
#define LEPTON_PRODUCT(rows, type, sums, a0, a1, a2, a3, b, ...)                                                     \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" rows "k16.f32." type "." type " {" sums "}, {" a0 ", " a1 ", " a2 \
               ", " a3 "}, " b ", 1, 1, 1, 0;"                                                                       \
               : __VA_ARGS__                                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile))

// d += A B^T.
template <class T>
struct Wgmma;

#define LEPTON_WGMMA_OF(T, type)                                                                                \
  template <>                                                                                                   \
  struct Wgmma<T> {                                                                                             \
    __device__ static void multiply(float (&d)[16], const uint32_t (&a)[4], uint64_t b_tile) {                  \
      LEPTON_PRODUCT("32", type, LEPTON_D16, "%16", "%17", "%18", "%19", "%20", LEPTON_F16(0));                 \
    }                                                                                                           \
    __device__ static void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b_tile) {                  \
      LEPTON_PRODUCT("64", type, LEPTON_D32, "%32", "%33", "%34", "%35", "%36", LEPTON_F16(0), LEPTON_F16(16)); \
    }                                                                                                           \
    __device__ static void multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t b_tile) {                  \
      LEPTON_PRODUCT("128", type, LEPTON_D64, "%64", "%65", "%66", "%67", "%68", LEPTON_F16(0), LEPTON_F16(16), \
                     LEPTON_F16(32), LEPTON_F16(48));                                                           \
    }                                                                                                           \
  };
LEPTON_WGMMA_OF(__nv_bfloat16, "bf16")
LEPTON_WGMMA_OF(__half, "f16")
#endif

}  // namespace lepton::cuda
