// codec.cpp - bindings of csrc/codec. lepton_kernels/codec has checked sizes and buffers; what a decoder finds in its
// input comes back as a text, which Python raises as CorruptDataError.
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "codec/checksum.h"
#include "codec/huffman.h"
#include "codec/lzw.h"
#include "cpu/cache.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace lepton {
namespace {

enum class Codec : int { huffman = 1, lzw = 2 };  // the frame's codec ids

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(bool ok, const std::string& message) {
  if (!ok) throw py::value_error(message);
}

void check_codec(int codec, int layout) {
  check(codec == 1 || codec == 2, "codec: id is " + std::to_string(codec) + "; allowed: 1, 2");
  check(layout >= 0 && layout < kLayoutCount,
        "codec: layout is " + std::to_string(layout) + "; allowed: 0 to " + std::to_string(kLayoutCount - 1));
}

// parallel_for of tasks that may run out of memory: MemoryError in Python, after all of them have ended.
template <typename Task>
void run(int tasks, int threads, const Task& task) {
  std::atomic<bool> out_of_memory = false;
  parallel_for(tasks, threads, [&](int i) {
    try {
      task(i);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

// A bytes object of any content, in huge pages where it is large, and the address at which the caller fills it before
// anybody else sees it.
std::pair<py::bytes, uintptr_t> new_bytes(int64_t size) {
  PyObject* const object = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size));
  if (object == nullptr) throw py::error_already_set();
  char* const memory = PyBytes_AS_STRING(object);
  advise_huge_pages(memory, size);
  return {py::reinterpret_steal<py::bytes>(object), reinterpret_cast<uintptr_t>(memory)};
}

// Encodes src[size] in chunks into new bytes, one payload after the other behind `head` bytes that the caller fills in
// before anybody else sees them, at the address returned. lengths[i] and sums[i] receive a payload's length and XXH3.
std::pair<py::bytes, uintptr_t> encode_chunks(int codec, int layout, uintptr_t src, int64_t size, int64_t chunk_size,
                                              int64_t head, uintptr_t lengths, uintptr_t sums, int threads) {
  check_codec(codec, layout);
  check(chunk_size >= 1 && chunk_size <= kMaxChunkBytes && head >= 0, "codec: chunk_size or head");
  const int64_t chunks = (size + chunk_size - 1) / chunk_size, bound = head + size + chunks;
  auto [object, address] = new_bytes(bound);
  uint8_t* out = at<uint8_t>(address) + head;
  {
    py::gil_scoped_release release;
    Xxh3Fn* const xxh3 = select_xxh3(isa_in_use());
    const auto encode = [&](int64_t i, uint8_t* to) {
      const uint8_t* const from = at<const uint8_t>(src) + i * chunk_size;
      const int64_t n = std::min(chunk_size, size - i * chunk_size);
      NextChunk next;
      if (i + threads < chunks) {
        next = {from + threads * chunk_size, std::min(chunk_size, size - (i + threads) * chunk_size)};
      }
      const int64_t length = static_cast<Codec>(codec) == Codec::huffman
                                 ? huffman_encode_chunk(from, n, static_cast<Layout>(layout), to, next)
                                 : lzw_encode_chunk(from, n, to);
      at<int64_t>(lengths)[i] = length;
      at<uint64_t>(sums)[i] = xxh3(to, length);
    };
    // A payload's place depends on the lengths before it: threads write to memory of their own, which is then moved.
    const int64_t wave = threads == 1 ? 1 : std::min(int64_t{4} * threads, chunks), slot = huffman_bound(chunk_size);
    std::vector<uint8_t> slots(static_cast<size_t>(wave == 1 ? 0 : wave * slot));
    for (int64_t first = 0; first < chunks; first += wave) {
      const int64_t count = std::min(wave, chunks - first);
      if (wave == 1) {
        encode(first, out);
      } else {
        run(static_cast<int>(count), threads, [&](int i) { encode(first + i, slots.data() + i * slot); });
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t length = at<const int64_t>(lengths)[first + i];
        if (wave > 1) std::memcpy(out, slots.data() + i * slot, static_cast<size_t>(length));
        out += length;
      }
    }
  }
  PyObject* bytes = object.release().ptr();
  if (_PyBytes_Resize(&bytes, out - at<uint8_t>(address)) != 0) throw py::error_already_set();
  return {py::reinterpret_steal<py::bytes>(bytes), reinterpret_cast<uintptr_t>(PyBytes_AS_STRING(bytes))};
}

// Output as large as so many second-level caches is streamed. bf16 that was read again at once gained from 16 MiB on
// where those are 2 MiB, and lost a quarter at 8.
constexpr int64_t kStreamedCaches = 8;

// Checks and decodes `chunks` chunks, chunk i from frame + offsets[i], lengths[i] bytes whose XXH3 is sums[i], to
// dst + i * chunk_size; size bytes in all. Returns the first bad chunk and what is wrong with it, or None.
std::optional<std::pair<int, std::string>> decode_chunks(int codec, int layout, uintptr_t frame, uintptr_t offsets,
                                                         uintptr_t lengths, uintptr_t sums, int chunks,
                                                         int64_t chunk_size, uintptr_t dst, int64_t size, int threads) {
  check_codec(codec, layout);
  check(chunk_size >= 1 && chunk_size <= kMaxChunkBytes && chunks == (size + chunk_size - 1) / chunk_size,
        "codec: chunks");
  std::vector<Status> status(static_cast<size_t>(chunks));
  const bool streams = size >= kStreamedCaches * l2_bytes();
  {
    py::gil_scoped_release release;
    run(chunks, threads, [&](int i) {
      const uint8_t* const payload = at<const uint8_t>(frame) + at<const int64_t>(offsets)[i];
      const int64_t length = at<const int64_t>(lengths)[i], n = std::min(chunk_size, size - i * chunk_size);
      uint8_t* const to = at<uint8_t>(dst) + i * chunk_size;
      status[i] = Status::bad_sum;
      if (select_xxh3(isa_in_use())(payload, length) != at<const uint64_t>(sums)[i]) return;
      NextChunk next;
      if (i + threads < chunks) {
        next = {at<const uint8_t>(frame) + at<const int64_t>(offsets)[i + threads],
                at<const int64_t>(lengths)[i + threads]};
      }
      status[i] = static_cast<Codec>(codec) == Codec::huffman
                      ? huffman_decode_chunk(payload, length, static_cast<Layout>(layout), to, n, next, streams)
                      : lzw_decode_chunk(payload, length, to, n);
    });
  }
  for (int i = 0; i < chunks; ++i)
    if (status[i] != Status::ok) return std::pair(i, std::string(status_text(status[i])));
  return std::nullopt;
}

// How often each symbol occurs, int64 [planes, 256], added to counts.
void count_symbols(int layout, uintptr_t src, int64_t size, uintptr_t counts) {
  check_codec(1, layout);
  py::gil_scoped_release release;
  count_planes(at<const uint8_t>(src), size, static_cast<Layout>(layout), at<int64_t>(counts));
}

LzwVariant variant_of(int variant) {
  check(variant >= 1 && variant < kLzwVariantCount, "lzw: variant is " + std::to_string(variant));
  return static_cast<LzwVariant>(variant);
}

int64_t lzw_stream_bound(int variant, int64_t size) { return lzw_bound(size, variant_of(variant)); }

int64_t lzw_stream_encode(int variant, uintptr_t src, int64_t size, uintptr_t dst) {
  const LzwVariant which = variant_of(variant);
  py::gil_scoped_release release;
  return lzw_encode(at<const uint8_t>(src), size, which, at<uint8_t>(dst));
}

// The text of a stream, at most `limit` bytes of it, or what is wrong with the stream.
std::pair<py::bytes, std::optional<std::string>> lzw_stream_decode(int variant, uintptr_t src, int64_t size,
                                                                   int64_t limit) {
  const LzwVariant which = variant_of(variant);
  PyObject* text = nullptr;
  const auto resize = [&](int64_t bytes) {
    if (text == nullptr)
      text = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(bytes));
    else
      _PyBytes_Resize(&text, static_cast<Py_ssize_t>(bytes));
    if (text == nullptr) throw py::error_already_set();
    return reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(text));
  };
  constexpr int64_t kFirstGuess = 4;  // times the stream
  const LzwGrow grow = [&](int64_t wanted, int64_t* room) -> uint8_t* {
    if (wanted > limit) return nullptr;
    py::gil_scoped_acquire acquire;
    *room = std::min(std::max({wanted, 2 * *room, kFirstGuess * size}), limit);
    uint8_t* const memory = resize(*room);
    advise_huge_pages(memory, *room);
    return memory;
  };
  int64_t decoded = 0;
  Status status;
  {
    py::gil_scoped_release release;
    status = lzw_decode(at<const uint8_t>(src), size, which, grow, &decoded);
  }
  resize(status == Status::ok ? decoded : 0);
  auto bytes = py::reinterpret_steal<py::bytes>(text);
  if (status != Status::ok) return {std::move(bytes), status_text(status)};
  return {std::move(bytes), std::nullopt};
}

}  // namespace

void bind_codec(py::module_& module) {
  module.attr("MAX_CHUNK_BYTES") = kMaxChunkBytes;
  module.def("encode_chunks", &encode_chunks);
  module.def("xxh3",
             [](uintptr_t data, int64_t size) { return select_xxh3(isa_in_use())(at<const uint8_t>(data), size); });
  module.def("new_bytes", &new_bytes);
  module.def("decode_chunks", &decode_chunks);
  module.def("count_symbols", &count_symbols);
  module.def("lzw_stream_bound", &lzw_stream_bound);
  module.def("lzw_stream_encode", &lzw_stream_encode);
  module.def("lzw_stream_decode", &lzw_stream_decode);
}

}  // namespace lepton
