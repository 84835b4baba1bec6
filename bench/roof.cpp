// roof.cpp - this machine's limits, as JSON: what no kernel can exceed. Compiled for the machine it runs on by roof.py.
//
// Reads: vector loads over a buffer of doubles of a level's size, the best of several passes, GB/s = 1e9 bytes/s.
// Peaks: independent chains of one instruction in registers, long enough to hide its latency; 2 operations a
// multiply-add. Every figure for one thread and for all threads together, each pinned to a core of its own.
#include <immintrin.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int kPasses = 7;         // the best of so many
constexpr int kChains = 12;        // independent sums: latency 4-5 cycles x 2 units, in 16 registers with operands
constexpr int kPrefetch = 4096;    // bytes ahead
constexpr double kSeconds = 0.05;  // of one pass

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::vector<int> allowed_cores() {
  cpu_set_t set;
  sched_getaffinity(0, sizeof set, &set);
  std::vector<int> cores;
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  return cores;
}

void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  sched_setaffinity(0, sizeof set, &set);
}

// The sum over threads of work(thread) [units] a second. All start together; the slowest sets the time.
double rate(const std::vector<int>& cores, const std::function<double(int)>& work) {
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    std::atomic<int> ready{0};
    std::vector<double> units(cores.size()), took(cores.size());
    std::vector<std::thread> threads;
    for (int t = 0; t < int(cores.size()); ++t)
      threads.emplace_back([&, t] {
        pin(cores[t]);
        ++ready;
        while (ready < int(cores.size())) {
        }
        const auto start = Clock::now();
        units[t] = work(t);
        took[t] = seconds_since(start);
      });
    for (auto& thread : threads) thread.join();
    double sum = 0;
    for (double u : units) sum += u;
    best = std::max(best, sum / *std::max_element(took.begin(), took.end()));
  }
  return best;
}

#if defined(__AVX512F__)
using Vector = __m512i;
Vector load(const char* p) { return _mm512_load_si512(p); }
Vector either(Vector a, Vector b) { return _mm512_or_si512(a, b); }
#else
using Vector = __m256i;
Vector load(const char* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
Vector either(Vector a, Vector b) { return _mm256_or_si256(a, b); }
#endif

// The compiler must believe that x is needed.
template <typename Register>
void asm_use(const Register& x) {
  asm volatile("" ::"x"(x));
}

// Reads the buffer as `streams` parts side by side, 256 bytes of each in turn.
template <int streams, bool prefetch>
void read(const char* buffer, size_t bytes) {
  Vector sum[4] = {};
  const size_t part = bytes / streams / 256 * 256;
  for (size_t i = 0; i < part; i += 256)
    for (const char* p = buffer + i; p < buffer + streams * part; p += part) {
      if (prefetch)
        for (int line = 0; line < 4; ++line) _mm_prefetch(p + kPrefetch + 64 * line, _MM_HINT_T0);
      for (size_t j = 0; j < 256; j += sizeof(Vector)) {
        Vector& s = sum[j / sizeof(Vector) % 4];
        s = either(s, load(p + j));
      }
    }
  for (const Vector& s : sum) asm_use(s);
}

template <int streams, bool prefetch>
double read_gb_per_s(const std::vector<int>& cores, size_t bytes) {
  std::vector<char*> buffers(cores.size());
  for (char*& buffer : buffers) {
    buffer = static_cast<char*>(std::aligned_alloc(4096, bytes + kPrefetch + 4096));
    std::memset(buffer, 1, bytes + kPrefetch + 4096);
  }
  const int repeat = std::max(1, int(kSeconds * 2e10 / double(bytes)));
  const double best = rate(cores, [&](int thread) {
    for (int i = 0; i < repeat; ++i) read<streams, prefetch>(buffers[thread], bytes);
    return double(bytes) * repeat;
  });
  for (char* buffer : buffers) std::free(buffer);
  return best / 1e9;
}

// Billions of operations a second of step(acc), which does ops operations on one chain.
template <typename Acc, typename Step>
double giga_ops(const std::vector<int>& cores, double ops, Step step) {
  constexpr int kRounds = 2'000'000;
  const auto chains = [&]<int... c>(std::integer_sequence<int, c...>) {
    return rate(cores, [&](int) {
      const Step local = step;  // operands in registers
      Acc acc[kChains] = {};
      for (int i = 0; i < kRounds; ++i) (local(acc[c]), ...);
      (asm_use(acc[c]), ...);
      return ops * kRounds * kChains;
    });
  };
  return chains(std::make_integer_sequence<int, kChains>()) / 1e9;
}

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
// Tile registers are the system's to grant, once a process.
bool have_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Billions of operations a second of multiply() on four tiles of sums, each 16 rows of 64 bytes; `ops` a call.
template <typename Multiply>
double amx_giga_ops(const std::vector<int>& cores, double ops, Multiply multiply) {
  constexpr int kRounds = 2'000'000;
  return rate(cores,
              [&](int) {
                alignas(64) uint8_t config[64] = {1};  // palette 1, then bytes a row and rows of each tile
                for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
                _tile_loadconfig(config);
                for (int i = 0; i < kRounds; ++i) multiply();
                _tile_release();
                return ops * kRounds;
              }) /
         1e9;
}
#endif

void print(const char* name, const std::vector<int>& cores,
           const std::function<double(const std::vector<int>&)>& measure, const char* end = ",") {
  std::printf("  \"%s\": [%.1f, %.1f]%s\n", name, measure({cores[0]}), measure(cores), end);
}

size_t kib(const char* text) { return size_t(std::atol(text)) * 1024; }

}  // namespace

// roof L2_KIB LLC_KIB
int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: roof L2_KIB LLC_KIB\n");
    return 2;
  }
  const std::vector<int> cores = allowed_cores();
  const size_t threads = cores.size();
  const size_t l2 = kib(argv[1]) / 2 / 256 * 256;
  const size_t llc = std::min<size_t>(kib(argv[2]) / 2, size_t(16) << 20) / threads / 256 * 256;
  const size_t dram = std::max(size_t(512) << 20, 2 * kib(argv[2])) / threads / 256 * 256 * threads;
  std::printf("{\n  \"threads\": [1, %zu],\n", threads);
  print("dram_read_gb_s", cores, [&](auto& c) { return read_gb_per_s<1, false>(c, dram / c.size()); });
  print("dram_read_prefetch_gb_s", cores, [&](auto& c) { return read_gb_per_s<1, true>(c, dram / c.size()); });
  print("dram_read_streams_gb_s", cores, [&](auto& c) { return read_gb_per_s<4, false>(c, dram / c.size()); });
  print("dram_read_streams_prefetch_gb_s", cores, [&](auto& c) { return read_gb_per_s<4, true>(c, dram / c.size()); });
  print("llc_read_gb_s", cores, [&](auto& c) { return read_gb_per_s<1, true>(c, llc * threads / c.size()); });
  print("l2_read_gb_s", cores, [&](auto& c) { return read_gb_per_s<1, false>(c, l2); });

#if defined(__AVX512VNNI__)
  print("int8_gops", cores, [](auto& c) {
    __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
    asm volatile("" : "+x"(a), "+x"(b));
    return giga_ops<__m512i>(c, 128, [=](__m512i& s) {
      asm volatile("vpdpbusd %2, %1, %0" : "+x"(s) : "x"(a), "x"(b));
    });
  });
  std::printf("  \"int8_instruction\": \"vpdpbusd zmm\",\n");
#else
  print("int8_gops", cores, [](auto& c) {  // exact for all u8 and s8: even and odd bytes apart, as 16 bit
    __m256i a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
    asm volatile("" : "+x"(a), "+x"(b));
    return giga_ops<__m256i>(c, 32, [=](__m256i& s) {
      __m256i product;
      asm volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(s), "=&x"(product) : "x"(a), "x"(b));
    });
  });
  std::printf("  \"int8_instruction\": \"vpmaddwd + vpaddd ymm (exact)\",\n");
#endif
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
  const bool amx = have_amx();
  if (amx) {
    print("amx_int8_gops", cores, [](auto& c) {
      return amx_giga_ops(c, 4 * 2 * 16 * 16 * 64, [] {
        _tile_dpbusd(0, 6, 7);
        _tile_dpbusd(1, 6, 7);
        _tile_dpbusd(2, 6, 7);
        _tile_dpbusd(3, 6, 7);
      });
    });
    print("amx_bf16_gflops", cores, [](auto& c) {
      return amx_giga_ops(c, 4 * 2 * 16 * 16 * 32, [] {
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
      });
    });
  }
#else
  const bool amx = false;
#endif
  if (!amx) std::printf("  \"amx_int8_gops\": null,\n  \"amx_bf16_gflops\": null,\n");
#if defined(__AVX512BF16__)
  print("bf16_gflops", cores, [](auto& c) {
    __m512i a = _mm512_set1_epi16(0x3f80), b = _mm512_set1_epi16(0x3f00);
    asm volatile("" : "+x"(a), "+x"(b));
    return giga_ops<__m512>(c, 64, [=](__m512& s) { asm volatile("vdpbf16ps %2, %1, %0" : "+x"(s) : "x"(a), "x"(b)); });
  });
#else
  std::printf("  \"bf16_gflops\": null,\n");
#endif
#if defined(__AVX512FP16__)
  print("fp16_gflops", cores, [](auto& c) {
    __m512i a = _mm512_set1_epi16(0x3c00), b = _mm512_set1_epi16(0x3800);
    asm volatile("" : "+x"(a), "+x"(b));
    return giga_ops<__m512i>(c, 64, [=](__m512i& s) {
      asm volatile("vfmadd231ph %2, %1, %0" : "+x"(s) : "x"(a), "x"(b));
    });
  });
#else
  std::printf("  \"fp16_gflops\": null,\n");
#endif
#if defined(__AVX512F__)
  print(
      "fp32_gflops", cores,
      [](auto& c) {
        __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
        asm volatile("" : "+x"(a), "+x"(b));
        return giga_ops<__m512>(c, 32, [=](__m512& s) {
          asm volatile("vfmadd231ps %2, %1, %0" : "+x"(s) : "x"(a), "x"(b));
        });
      },
      "");
#else
  print(
      "fp32_gflops", cores,
      [](auto& c) {
        __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
        asm volatile("" : "+x"(a), "+x"(b));
        return giga_ops<__m256>(c, 16, [=](__m256& s) {
          asm volatile("vfmadd231ps %2, %1, %0" : "+x"(s) : "x"(a), "x"(b));
        });
      },
      "");
#endif
  std::printf("}\n");
}
