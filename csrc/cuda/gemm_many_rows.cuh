// gemm_many_rows.cuh - Y[m, n] = X[m, k] @ W[n, k]^T on Hopper for more rows than gemm_few_rows.cuh takes: w8a16,
// w4a16.
//
//   W    int8 or int4, as the model file has it: row-major, no packed copy; widened to X's type in registers, which the
//        tensor core reads (wgmma.cuh); int4 with its group's scale, rounded to that type, int8 scaled in the end
//   X    bf16 (or fp16, int8 alone), which the tensor core reads from shared memory
//
// One warp of a thread block copies blocks of k of both to shared memory, some ahead (tma.cuh). Two groups or four, of
// four warps, multiply: each its own 64 outputs by the same kRows rows. They keep pace only through the copies, so that
// one widens weights while the others' products run.
//
// Where that leaves multiprocessors idle, up to eight thread blocks, a cluster, share out k; their sums are added in
// order through each other's shared memory, so that results do not vary from run to run.
//
// A lane must hold k 2t, 2t + 1 of every eight for the tensor core, and loads 16 bytes that lie next to each other: the
// four lanes of a row exchange parts of what they loaded (arrange).
#pragma once

#include <cooperative_groups.h>

#include "cuda/epilogue.cuh"
#include "cuda/fragments.cuh"
#include "cuda/gemm.h"
#include "cuda/tma.cuh"
#include "cuda/wgmma.cuh"

namespace lepton::cuda {

constexpr int kGroupThreads = 128;
constexpr int kTileOutputs = 64;    // of a group's tile
constexpr int kRowBlockBytes = 64;  // of a row of W in a block of k
constexpr int kPartBytes = 16;      // of them a lane's
constexpr int kMostSplits = 8;      // thread blocks in a cluster

__device__ inline void exchange(uint32_t& kept, uint32_t& given, int lanes, bool upper) {
  const uint32_t received = __shfl_xor_sync(0xffffffff, upper ? kept : given, lanes);
  (upper ? kept : given) = received;
}

// The word x[j] of lane t goes to lane j's x[t], of each four lanes.
__device__ inline void transpose_words(uint32_t (&x)[4], int t) {
  exchange(x[0], x[1], 1, t & 1);
  exchange(x[2], x[3], 1, t & 1);
  exchange(x[0], x[2], 2, t & 2);
  exchange(x[1], x[3], 2, t & 2);
}

template <class T>
struct WideInt8 {
  using Type = T;
  static constexpr int kBlock = 64;
  static constexpr bool kScaled = false;
  // From 16 k of one row, k 16t on, to words x[i] of k 16i + 2t, + 1, + 8, + 9.
  __device__ static void arrange(const uint4& w, int t, uint32_t (&x)[4]) {
    x[0] = __byte_perm(w.x, w.z, 0x5410), x[1] = __byte_perm(w.x, w.z, 0x7632);
    x[2] = __byte_perm(w.y, w.w, 0x5410), x[3] = __byte_perm(w.y, w.w, 0x7632);
    transpose_words(x, t);
  }
  // Two k of a step of 16: the first or the second eight.
  template <int step, int eight>
  __device__ static uint32_t widened(const uint32_t (&x)[4], uint32_t, uint32_t) {
    return Pair<T>::template bytes<0>(__byte_perm(x[step], 0, eight ? 0x4342 : 0x4140));
  }
};

struct WideInt4 {
  using Type = __nv_bfloat16;
  static constexpr int kBlock = 128;
  static constexpr bool kScaled = true;
  // From 32 k of one row, k 32t on, to words x[i] whose byte j holds k 32i + 8j + 2t and + 1.
  __device__ static void arrange(const uint4& w, int t, uint32_t (&x)[4]) {
    const uint32_t low01 = __byte_perm(w.x, w.y, 0x5140), high01 = __byte_perm(w.x, w.y, 0x7362);
    const uint32_t low23 = __byte_perm(w.z, w.w, 0x5140), high23 = __byte_perm(w.z, w.w, 0x7362);
    x[0] = __byte_perm(low01, low23, 0x5410), x[1] = __byte_perm(low01, low23, 0x7632);
    x[2] = __byte_perm(high01, high23, 0x5410), x[3] = __byte_perm(high01, high23, 0x7632);
    transpose_words(x, t);
  }
  // (128 + nibble) - (128 + 8 + zero point) is exact; its product with the scale is rounded.
  template <int step, int eight>
  __device__ static uint32_t widened(const uint32_t (&x)[4], uint32_t scale, uint32_t offset) {
    constexpr int j = step % 2 * 2 + eight;
    const uint32_t word = x[step / 2], nibbles = __byte_perm(word, word >> 4, 0x4400 + 0x1111 * j);
    const uint32_t biased = masked_or<0x000f000f, 0x43004300>(nibbles);
    uint32_t out;
    asm("{.reg .b32 v; sub.rn.bf16x2 v, %1, %2; mul.rn.bf16x2 %0, v, %3;}"
        : "=r"(out)
        : "r"(biased), "r"(offset), "r"(scale));
    return out;
  }
};

// Where a thread block's part of Y and of k lies.
struct Place {
  int row0, output0, begin, end;  // blocks of k
};

template <class Format, int kRows, int kGroups>
__device__ inline Place place_of(const GemmArgs& args, int splits) {
  constexpr int kColumns = kGroups * kTileOutputs;
  // Some tiles of rows with all outputs, then the next: what runs at the same time shares X and W in the second-level
  // cache.
  constexpr int kTogether = 2048 / kRows;
  const int row_tiles = (args.m + kRows - 1) / kRows, column_tiles = (args.n + kColumns - 1) / kColumns;
  const int first = blockIdx.x / (kTogether * column_tiles) * kTogether,
            in_group = blockIdx.x % (kTogether * column_tiles);
  const int together = min(kTogether, row_tiles - first);
  const int blocks = (args.k + Format::kBlock - 1) / Format::kBlock, each = (blocks + splits - 1) / splits;
  Place place;
  place.row0 = (first + in_group % together) * kRows;
  place.output0 = in_group / together * kColumns;
  place.begin = min(blocks, int(blockIdx.z) * each);
  place.end = min(blocks, place.begin + each);
  return place;
}

// Shared memory of a thread block: kStages blocks of k, each X in pieces of 64 k, then W; in the end the sums;
// barriers.
template <class Format, int kRows, int kGroups>
struct Shared {
  static constexpr int kColumns = kGroups * kTileOutputs;
  static constexpr int kPieces = Format::kBlock / 64, kPieceBytes = kRows * 128;
  static constexpr int kXBytes = kPieces * kPieceBytes, kStageBytes = kXBytes + kColumns * kRowBlockBytes;
  static constexpr int kMost =
      kColumns * kRows > 128 * 64 ? 200 * 1024 : 72 * 1024;  // small tiles: three thread blocks at once
  static constexpr int kStages = kMost / kStageBytes < 8 ? kMost / kStageBytes : 8;
  static_assert(kStages >= 3 && kStageBytes % 1024 == 0);
  static constexpr int kSumStride = kColumns + 4;  // lanes of a warp then write to different banks
  static constexpr int kSumBytes = kRows * kSumStride * 4;
  static constexpr int kBarriers = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static constexpr int kMultiplyThreads = kGroups * kGroupThreads;
  // A large tile needs more than an equal share of the registers, which change hands between groups of four warps.
  static constexpr bool kLarge = kColumns * kRows > 128 * 128;
  static constexpr int kThreads = kMultiplyThreads + (kLarge ? kGroupThreads : 32);
  static constexpr int kBytes = kBarriers + 2 * kStages * 8 + 1024;  // to begin at a multiple of 1024

  uint32_t address;
  __device__ uint32_t stage(int block) const { return address + block % kStages * kStageBytes; }
  __device__ uint32_t full(int block) const { return address + kBarriers + block % kStages * 16; }
  __device__ uint32_t empty(int block) const { return full(block) + 8; }
  __device__ static int parity(int block) { return block / kStages & 1; }
};

#ifdef LEPTON_WGMMA
// The warp that copies: all blocks of k, each as soon as its place is free.
template <class Format, int kRows, int kGroups>
__device__ inline void copy_blocks(const Shared<Format, kRows, kGroups>& shared, const Place& place,
                                   const CUtensorMap& x, const CUtensorMap& w) {
  using S = Shared<Format, kRows, kGroups>;
  if (threadIdx.x != S::kMultiplyThreads) return;
  prefetch_map(x);
  prefetch_map(w);
  for (int block = 0; block < place.end - place.begin; ++block) {
    const int at = place.begin + block;
    const uint32_t stage = shared.stage(block), full = shared.full(block);
    if (block >= S::kStages) wait(shared.empty(block), S::parity(block) ^ 1);
    arrive_for_bytes(full, S::kStageBytes);
    for (int piece = 0; piece < S::kPieces; ++piece)
      copy_box(stage + piece * S::kPieceBytes, x, at * Format::kBlock + piece * 64, place.row0, full);
    copy_box(stage + S::kXBytes, w, at * kRowBlockBytes, place.output0, full);
  }
}

// A lane's part of W in a block of k: outputs g and g + 8 of its warp's 16.
template <class Format>
struct Weights {
  uint32_t x[2][4], scale[2], offset[2];
  uint2 of_group;  // of the block after this
  const uint2* group;
  int group_step;
  bool inside;  // groups exist for whole tiles of outputs alone

  __device__ Weights(const GemmArgs& args, const Place& place) {
    if constexpr (Format::kScaled) {
      const int tile = place.output0 / kTileOutputs + threadIdx.x / kGroupThreads;
      const int warp = threadIdx.x % kGroupThreads / 32, g = threadIdx.x % 32 / 4;
      inside = tile < (args.n + kTileOutputs - 1) / kTileOutputs;
      group_step = (args.n + kGroupOutputs - 1) / kGroupOutputs * (kGroupOutputs / 16) * 8;
      group = reinterpret_cast<const uint2*>(args.groups) + int64_t(place.begin) * group_step +
              (tile * (kTileOutputs / 16) + warp) * 8 + g;
      load_group();
    }
  }
  __device__ void load_group() {
    of_group = inside ? __ldg(group) : make_uint2(0, 0);
    group += group_step;
  }
  // The block of k whose rows of W, 64 bytes each, are in shared memory.
  __device__ void load(uint32_t rows, bool last) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = threadIdx.x / 32 * 16 + g;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 w;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                   : "r"(rows + (row + 8 * half) * kRowBlockBytes + t * kPartBytes)
                   : "memory");
      Format::arrange(w, t, x[half]);
      if constexpr (Format::kScaled) {
        const uint32_t word = half ? of_group.y : of_group.x;
        scale[half] = __byte_perm(word, 0, 0x3232);
        offset[half] = 0x43004300 + uint32_t(8 + int8_t(word)) * 0x10001;
      }
    }
    if constexpr (Format::kScaled)
      if (!last) load_group();
  }
};

// The weights of a step of 16 k, as the tensor core takes them.
template <class Format>
struct Fragments {
  uint32_t a[4];

  template <int step>
  __device__ void widen(const Weights<Format>& of) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[half] = Format::template widened<step, 0>(of.x[half], of.scale[half], of.offset[half]);
      a[2 + half] = Format::template widened<step, 1>(of.x[half], of.scale[half], of.offset[half]);
    }
  }
};

// The steps of a block of k: while the tensor core multiplies one, the next one's weights are widened. Once the
// products of the block before are done, its place is free: `before`, its barrier, or 0.
template <class Format, int kPieceBytes, int kSums, int step = 0>
__device__ inline void multiply_steps(float (&sums)[kSums], const Weights<Format>& weights,
                                      const Fragments<Format>& fragments, uint32_t stage, uint32_t before) {
  const uint64_t b = advanced(tile_descriptor(stage + step / 4 * kPieceBytes), step % 4);
  begin_products();
  Wgmma<typename Format::Type>::multiply(sums, fragments.a, b);
  end_products();
  Fragments<Format> next;
  constexpr bool more = step + 1 < Format::kBlock / 16;
  if constexpr (more) next.template widen<step + 1>(weights);
  wait_products<1>();
  if (step == 0) {
    if (before != 0 && threadIdx.x % 32 == 0) arrive(before);
    __syncwarp();
  }
  if constexpr (more) multiply_steps<Format, kPieceBytes, kSums, step + 1>(sums, weights, next, stage, before);
}

// Outlined, so that a call which needs neither does not fetch their instructions.
__device__ __noinline__ float4 activated(float4 v, Activation activation) {
  return make_float4(activate(v.x, activation), activate(v.y, activation), activate(v.z, activation),
                     activate(v.w, activation));
}
__device__ __noinline__ void store_some(uint16_t* y, uint2 four, int count) {
  for (int i = 0; i < count; ++i) y[i] = uint16_t((i < 2 ? four.x : four.y) >> (16 * (i % 2)));
}

template <class T>
__device__ inline uint32_t rounded_pair(float low, float high) {
  const T pair[2] = {Pair<T>::from(low), Pair<T>::from(high)};
  return *reinterpret_cast<const uint32_t*>(pair);
}

// Four neighbouring outputs of a row, from output on, a multiple of four.
template <class T, bool kScaled>
__device__ inline void finish_four(const GemmArgs& args, int row, int output, float4 v) {
  const int count = min(4, args.n - output);
  const auto of_outputs = [&](const float* values) {
    const int last = args.n - 1;
    return make_float4(values[output], values[min(output + 1, last)], values[min(output + 2, last)],
                       values[min(output + 3, last)]);
  };
  if constexpr (!kScaled) {  // in its weights
    const float4 scale = of_outputs(args.scale);
    v.x *= scale.x, v.y *= scale.y, v.z *= scale.z, v.w *= scale.w;
  }
  if (args.bias) {
    const float4 bias = of_outputs(args.bias);
    v = make_float4(__fadd_rn(v.x, bias.x), __fadd_rn(v.y, bias.y), __fadd_rn(v.z, bias.z), __fadd_rn(v.w, bias.w));
  }
  if (args.activation != Activation::none) v = activated(v, args.activation);
  const uint2 four = make_uint2(rounded_pair<T>(v.x, v.y), rounded_pair<T>(v.z, v.w));
  uint16_t* const y = static_cast<uint16_t*>(args.y) + int64_t(row) * args.n + output;
  if (args.n % 4 == 0)
    *reinterpret_cast<uint2*>(y) = four;
  else
    store_some(y, four, count);
}
#endif

template <class Format, int kRows, int kGroups>
__global__ __launch_bounds__(Shared<Format, kRows, kGroups>::kThreads) void gemm_many_rows(
    const GemmArgs args, int splits, const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w) {
#ifdef LEPTON_WGMMA
  namespace cg = cooperative_groups;
  using S = Shared<Format, kRows, kGroups>;
  constexpr int kSums = kRows / 2;
  extern __shared__ uint8_t memory[];
  const uint32_t unaligned = uint32_t(__cvta_generic_to_shared(memory));
  const S shared{(unaligned + 1023) & ~1023u};
  const Place place = place_of<Format, kRows, kGroups>(args, splits);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      init_barrier(shared.full(stage), 1);
      init_barrier(shared.empty(stage), S::kMultiplyThreads / 32);
    }
    publish_barriers();
  }
  __syncthreads();

  if (threadIdx.x >= S::kMultiplyThreads) {
    if constexpr (S::kLarge) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    return copy_blocks(shared, place, x, w);
  }
  if constexpr (S::kLarge) asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");  // what the others leave
  float sums[kSums] = {};
  if (const int blocks = place.end - place.begin; blocks > 0) {
    Weights<Format> weights(args, place);
    wait(shared.full(0), 0);
    weights.load(shared.stage(0) + S::kXBytes, blocks == 1);
    for (int block = 0; block < blocks; ++block) {
      Fragments<Format> first;
      first.template widen<0>(weights);
      multiply_steps<Format, S::kPieceBytes>(sums, weights, first, shared.stage(block),
                                             block > 0 ? shared.empty(block - 1) : 0);
      if (block + 1 == blocks) break;
      wait(shared.full(block + 1), S::parity(block + 1));
      weights.load(shared.stage(block + 1) + S::kXBytes, block + 2 == blocks);
    }
    wait_products<0>();
  }
  const auto synchronize = [] { asm volatile("bar.sync 1, %0;" ::"n"(S::kMultiplyThreads) : "memory"); };
  synchronize();

  float* const shared_sums = reinterpret_cast<float*>(memory + (shared.address - unaligned));
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kSums; ++i)
    shared_sums[(i / 4 * 8 + 2 * t + i % 2) * S::kSumStride + warp * 16 + g + i / 2 % 2 * 8] = sums[i];
  auto cluster = cg::this_cluster();
  splits == 1 ? synchronize() : cluster.sync();
  constexpr int kFours = kRows * S::kColumns / 4;
  const int each = kFours / splits;  // all are powers of two
  for (int i = int(blockIdx.z) * each + threadIdx.x; i < int(blockIdx.z + 1) * each; i += S::kMultiplyThreads) {
    const int row = i / (S::kColumns / 4), output = i % (S::kColumns / 4) * 4, at = row * S::kSumStride + output;
    if (place.row0 + row >= args.m || place.output0 + output >= args.n) continue;
    float4 sum = {};
#pragma unroll 1
    for (int part = 0; part < splits; ++part) {
      const float* const of = splits == 1 ? shared_sums : cluster.map_shared_rank(shared_sums, part);
      const float4 v = *reinterpret_cast<const float4*>(of + at);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    finish_four<typename Format::Type, Format::kScaled>(args, place.row0 + row, place.output0 + output, sum);
  }
  if (splits > 1) cluster.sync();  // its shared memory must outlive the others' reads
#endif
}

template <class Format, int kRows, int kGroups>
cudaError_t launch_many(const GemmArgs& args, int splits, cudaStream_t stream) {
  using S = Shared<Format, kRows, kGroups>;
  const auto kernel = gemm_many_rows<Format, kRows, kGroups>;
  const int64_t row_bytes = int64_t(args.k) * kRowBlockBytes / Format::kBlock;
  CUtensorMap x, w;
  cudaError_t error = make_map(&x, CU_TENSOR_MAP_DATA_TYPE_UINT16, CU_TENSOR_MAP_SWIZZLE_128B, args.x, args.k, args.m,
                               args.x_stride * 2, 64, kRows);
  if (error == cudaSuccess)
    error = make_map(&w, CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_SWIZZLE_NONE, args.weight, row_bytes, args.n,
                     row_bytes, kRowBlockBytes, S::kColumns);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {1, 1, unsigned(splits)};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((args.m + kRows - 1) / kRows * ((args.n + S::kColumns - 1) / S::kColumns), 1, unsigned(splits));
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = S::kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args, splits, x, w);
}

// The largest tile with which four fifths of the multiprocessors have work, k in one part or two; for few rows, and if
// there is none, a small one and k in as many parts as that takes (bench/RESULTS.md has the times).
template <class Format>
cudaError_t launch_many_rows(const GemmArgs& args, cudaStream_t stream) {
  int device, major, processors;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  if (major != 9) return cudaErrorNotSupported;
  const auto tiles = [&](int rows, int columns) {
    return int64_t((args.m + rows - 1) / rows) * ((args.n + columns - 1) / columns);
  };
  const auto splits = [&](int rows, int columns, int most) {  // 0: too few even so
    for (int parts = 1; parts <= most && (parts == 1 || args.k >= 4 * parts * Format::kBlock); parts *= 2)
      if (5 * tiles(rows, columns) * parts >= 4 * processors) return parts;
    return 0;
  };
  if (args.m > 64) {
    if (const int parts = splits(128, 256, 2)) return launch_many<Format, 128, 4>(args, parts, stream);
    if (const int parts = splits(128, 128, 2)) return launch_many<Format, 128, 2>(args, parts, stream);
  } else if (args.m > 32 && splits(64, 256, 1)) {
    return launch_many<Format, 64, 4>(args, 1, stream);
  }
  const int rows = args.m <= 32 ? 32 : 64;
  int parts = splits(rows, 128, kMostSplits);
  if (parts == 0)
    for (parts = kMostSplits; parts > 1 && args.k < 4 * parts * Format::kBlock;) parts /= 2;
  return rows == 32 ? launch_many<Format, 32, 2>(args, parts, stream) : launch_many<Format, 64, 2>(args, parts, stream);
}

}  // namespace lepton::cuda
