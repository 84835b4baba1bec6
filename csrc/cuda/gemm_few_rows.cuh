// gemm_few_rows.cuh - Y[m, n] = X[m, k] @ W[n, k]^T where m is small and reading W once is what costs.
//
//   W    int8 or int4, as the model file has it: row-major, no packed copy
//   X    bf16 or fp16, or int8 with exact int32 sums
//   sums f32 or int32
//
// The tensor core multiplies 16 outputs (rows of W) by 8 rows of X. Which k a lane holds is free as long as both
// operands agree, so a lane takes 16 bytes of W that lie next to each other: four lanes 64 bytes of a row, a warp that
// block of k for 16 kTiles outputs. The warps of a thread block have the same outputs and share out the blocks of k; at
// the end their sums are added in order, so that results do not vary from run to run.
//
// Two blocks take turns: one is on its way, straight into the registers that will multiply it, while the other is
// multiplied.
//
// int4: nibbles become bf16 bias + u by one instruction a pair. The bias and the zero point leave by the sum of X,
// which a product with ones gives in the same layout: sum (u - 8 - z) x = sum (bias + u) x - (bias + 8 + z) sum x, once
// a block.
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/fragments.cuh"

namespace lepton::cuda {

constexpr int kWarp = 32;
constexpr int kOutputs = 16;     // of a tile: the rows of mma's A
constexpr int kSliceRows = 8;    // rows of X in a slice: the columns of mma's B
constexpr int kBlockBytes = 64;  // of a row of W in a block of k
constexpr int kLaneBytes = 16;   // of them a lane's

// 16 bytes past the first-level cache: W is read once.
__device__ inline uint4 load_once(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// int8 X: the integers of both operands as they are.
struct W8A8 {
  using Sum = int;
  static constexpr int kBlock = kBlockBytes;
  static constexpr int kXBytes = kLaneBytes;  // of a row of X that belong to a lane's k
  static constexpr bool kGroups = false;
  template <int kTiles, int kSlices>
  __device__ static void multiply(int (&sums)[kTiles][kSlices][4], const uint4 (&w)[kTiles][2],
                                  const uint32_t (&x)[kSlices][4], const uint2 (&)[kTiles]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t first[4] = {w[tile][0].x, w[tile][1].x, w[tile][0].y, w[tile][1].y};
      const uint32_t second[4] = {w[tile][0].z, w[tile][1].z, w[tile][0].w, w[tile][1].w};
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        mma_int8(sums[tile][s], first, x[s][0], x[s][1]);
        mma_int8(sums[tile][s], second, x[s][2], x[s][3]);
      }
    }
  }
};

template <class T>
struct W8A16 {
  using Sum = float;
  static constexpr int kBlock = kBlockBytes;
  static constexpr int kXBytes = 2 * kLaneBytes;
  static constexpr bool kGroups = false;
  template <int kTiles, int kSlices>
  __device__ static void multiply(float (&sums)[kTiles][kSlices][4], const uint4 (&w)[kTiles][2],
                                  const uint32_t (&x)[kSlices][8], const uint2 (&)[kTiles]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t low = (&w[tile][0].x)[i], high = (&w[tile][1].x)[i];
        const uint32_t a[4] = {Pair<T>::template bytes<0>(low), Pair<T>::template bytes<0>(high),
                               Pair<T>::template bytes<1>(low), Pair<T>::template bytes<1>(high)};
#pragma unroll
        for (int s = 0; s < kSlices; ++s)
          Pair<T>::mma(sums[tile][s], a, __byte_perm(x[s][2 * i], x[s][2 * i + 1], 0x5410),
                       __byte_perm(x[s][2 * i], x[s][2 * i + 1], 0x7632));
      }
    }
  }
};

template <class T>
struct W4A16 {
  using Sum = float;
  static constexpr int kBlock = 2 * kBlockBytes;
  static constexpr int kXBytes = 4 * kLaneBytes;
  static constexpr bool kGroups = true;
  template <int kTiles, int kSlices>
  __device__ static void multiply(float (&sums)[kTiles][kSlices][4], const uint4 (&w)[kTiles][2],
                                  const uint32_t (&x)[kSlices][16], const uint2 (&of_group)[kTiles]) {
    float group[kTiles][kSlices][4] = {}, of_x[kSlices][4] = {};
    const uint32_t ones[4] = {Pair<T>::kOnes, Pair<T>::kOnes, Pair<T>::kOnes, Pair<T>::kOnes};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t b[kSlices][4];
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        const uint32_t* v = x[s] + 4 * i;  // k and k + 4 of eight, as nibbles() gives them
        b[s][0] = __byte_perm(v[0], v[2], 0x5410), b[s][1] = __byte_perm(v[0], v[2], 0x7632);
        b[s][2] = __byte_perm(v[1], v[3], 0x5410), b[s][3] = __byte_perm(v[1], v[3], 0x7632);
        Pair<T>::mma(of_x[s], ones, b[s][0], b[s][1]);
        Pair<T>::mma(of_x[s], ones, b[s][2], b[s][3]);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t low = (&w[tile][0].x)[i], high = (&w[tile][1].x)[i];
        const uint32_t first[4] = {Pair<T>::template nibbles<0>(low), Pair<T>::template nibbles<0>(high),
                                   Pair<T>::template nibbles<1>(low), Pair<T>::template nibbles<1>(high)};
        const uint32_t second[4] = {Pair<T>::template nibbles<2>(low), Pair<T>::template nibbles<2>(high),
                                    Pair<T>::template nibbles<3>(low), Pair<T>::template nibbles<3>(high)};
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          Pair<T>::mma(group[tile][s], first, b[s][0], b[s][1]);
          Pair<T>::mma(group[tile][s], second, b[s][2], b[s][3]);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t word = half ? of_group[tile].y : of_group[tile].x;
        const float scale = __uint_as_float(word & 0xffff0000);
        const float offset = -float(Pair<T>::kNibbleBias + 8 + int8_t(word));
#pragma unroll
        for (int s = 0; s < kSlices; ++s)
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; ++c)
            sums[tile][s][c] += scale * (group[tile][s][c] + offset * of_x[s][c]);
      }
    }
  }
};

// A lane's part of a block of k.
template <class Format, int kTiles, int kSlices>
struct Block {
  uint4 w[kTiles][2];
  uint32_t x[kSlices][Format::kXBytes / 4];
  uint2 of_group[kTiles];
};

// Where a lane's part of its warp's next block lies.
template <class Format, int kTiles, int kSlices, int kWarps>
struct Source {
  static constexpr int kLaneK = Format::kBlock / 4, kXSize = Format::kXBytes / kLaneK;
  const uint8_t* w;
  uint32_t w_row[kTiles][2];  // bytes from there to a row of W; fewer registers than addresses
  const char* x[kSlices];
  const uint2* group;
  int k, lane_end;  // the block's first k, and where it ends for the lane
  int group_step;   // of the warp's blocks, in `group`

  __device__ Source(const GemmArgs& args, int row0, int tile0) {
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    k = warp * Format::kBlock;
    lane_end = args.k - t * kLaneK;
    const int row_bytes =
        args.k / Format::kBlock * kBlockBytes + args.k % Format::kBlock * kBlockBytes / Format::kBlock;
    const int first = tile0 * kOutputs;
    w = args.weight + int64_t(first) * row_bytes + warp * kBlockBytes + t * kLaneBytes;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)  // past the last output: a row that is there, not stored in the end
        w_row[tile][half] = (min(first + tile * kOutputs + 8 * half + g, args.n - 1) - first) * row_bytes;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const int row = row0 + s * kSliceRows + g;
      x[s] =
          row < args.m ? static_cast<const char*>(args.x) + (row * args.x_stride + k + t * kLaneK) * kXSize : nullptr;
    }
    const int tiles = (args.n + kGroupOutputs - 1) / kGroupOutputs * (kGroupOutputs / kOutputs);
    group_step = kWarps * tiles * kSliceRows;
    group = reinterpret_cast<const uint2*>(args.groups) + (int64_t(warp) * tiles + tile0) * kSliceRows + g;
  }

  __device__ void next(const GemmArgs& args, Block<Format, kTiles, kSlices>& block) {
    const bool inside = k < lane_end;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        block.w[tile][half] = inside ? load_once(w + w_row[tile][half]) : make_uint4(0, 0, 0, 0);
    w += kWarps * kBlockBytes;
    if constexpr (Format::kGroups) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        block.of_group[tile] = k < args.k ? __ldg(group + tile * kSliceRows) : make_uint2(0, 0);
      group += group_step;
    }
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int i = 0; i < Format::kXBytes / 16; ++i) {
        const uint4 v = inside && x[s] ? __ldg(reinterpret_cast<const uint4*>(x[s]) + i) : make_uint4(0, 0, 0, 0);
        block.x[s][4 * i] = v.x, block.x[s][4 * i + 1] = v.y, block.x[s][4 * i + 2] = v.z, block.x[s][4 * i + 3] = v.w;
      }
      if (x[s]) x[s] += kWarps * Format::kBlock * kXSize;
    }
    k += kWarps * Format::kBlock;
  }
};

template <class Format, int kTiles, int kSlices, int kWarps, int kThreadBlocks>
__global__ __launch_bounds__(kWarps* kWarp, kThreadBlocks) void gemm_few_rows(const GemmArgs args) {
  using Sum = typename Format::Sum;
  constexpr int kThreads = kWarps * kWarp, kColumns = kTiles * kOutputs, kRows = kSlices * kSliceRows;
  __shared__ Sum of_warps[kWarps][kRows][kColumns];
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int tile0 = blockIdx.y * kTiles, row0 = blockIdx.x * kRows;

  Sum sums[kTiles][kSlices][4] = {};
  Source<Format, kTiles, kSlices, kWarps> source(args, row0, tile0);
  Block<Format, kTiles, kSlices> even, odd;
  source.next(args, even);
  constexpr int kStep = kWarps * Format::kBlock;
  while (source.k - kStep < args.k) {
    source.next(args, odd);
    Format::multiply(sums, even.w, even.x, even.of_group);
    const bool more = source.k - kStep < args.k;
    source.next(args, even);
    if (more) Format::multiply(sums, odd.w, odd.x, odd.of_group);
  }

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int s = 0; s < kSlices; ++s)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        of_warps[warp][s * kSliceRows + 2 * t + c % 2][tile * kOutputs + 8 * (c / 2) + g] = sums[tile][s][c];
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
    const int row = row0 + i / kColumns, output = tile0 * kOutputs + i % kColumns;
    if (row >= args.m || output >= args.n) continue;
    Sum sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += of_warps[w][i / kColumns][i % kColumns];
    finish(args, row, output, scaled(args, row, output, sum));
  }
}

// kThreadBlocks: how many of them a multiprocessor must have registers for.
template <class Format, int kTiles, int kSlices, int kWarps, int kThreadBlocks>
cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
  constexpr int kRows = kSlices * kSliceRows, kColumns = kTiles * kOutputs;
  const dim3 grid((args.m + kRows - 1) / kRows, (args.n + kColumns - 1) / kColumns);
  gemm_few_rows<Format, kTiles, kSlices, kWarps, kThreadBlocks><<<grid, kWarps * kWarp, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace lepton::cuda
