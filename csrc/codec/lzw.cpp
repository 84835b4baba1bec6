// lzw.cpp - see lzw.h. One encoder and one decoder; a dialect is a row of constants.
#include "codec/lzw.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <vector>

namespace lepton {
namespace {

constexpr int kMaxBits = 16;
constexpr int kLeptonBits = 14;  // 16 K entries: positions and lengths stay in the second-level cache

struct Dialect {
  int clear = -1, end = -1;  // codes, or -1
  int first_free = 256;      // the first code of the dictionary
  int early = 0;             // 1: the width grows one code early
  int max_bits = kLeptonBits;
  int limit = 0;  // the encoder clears, or stops growing, before it makes this entry
  bool high_first = false;
  bool groups = false;  // codes of one width fill whole groups of 8
};

Dialect dialect_of(LzwVariant variant, int bits = 0) {
  switch (variant) {
    case LzwVariant::lepton:
      return {.max_bits = bits, .limit = 1 << bits};
    case LzwVariant::compress:
      return {.clear = 256, .first_free = 257, .max_bits = bits, .limit = 1 << bits, .groups = true};
    case LzwVariant::gif:
      return {.clear = 1 << bits, .end = (1 << bits) + 1, .first_free = (1 << bits) + 2, .max_bits = 12, .limit = 4094};
    case LzwVariant::tiff:
      return {
          .clear = 256, .end = 257, .first_free = 258, .early = 1, .max_bits = 12, .limit = 4094, .high_first = true};
  }
  return {};
}

int width_of(const Dialect& d, int64_t k) {
  return std::min<int>(d.max_bits, std::bit_width(static_cast<uint64_t>(d.first_free - 1 + k + d.early)));
}

uint64_t reverse_bytes(uint64_t word) { return __builtin_bswap64(word); }

class BitWriter {
 public:
  BitWriter(uint8_t* out, bool high_first) : out_(out), high_first_(high_first) {}

  void put(uint32_t code, int width) {
    if (high_first_) {
      word_ |= static_cast<uint64_t>(code) << (64 - used_ - width);
    } else {
      word_ |= static_cast<uint64_t>(code) << used_;
    }
    used_ += width;
    while (used_ >= 8) emit();
  }
  uint8_t* finish() {
    if (used_ > 0) emit();
    used_ = 0;
    return out_;
  }
  void skip_bytes(int64_t bytes) {
    finish();
    std::memset(out_, 0, static_cast<size_t>(bytes));
    out_ += bytes;
  }
  const uint8_t* position() const { return out_; }

 private:
  void emit() {
    *out_++ = static_cast<uint8_t>(high_first_ ? word_ >> 56 : word_);
    word_ = high_first_ ? word_ << 8 : word_ >> 8;
    used_ -= 8;
  }
  uint8_t* out_;
  uint64_t word_ = 0;
  int used_ = 0;
  bool high_first_;
};

// Reads `width` bits from bit `position` of in[size]; the caller knows that they are there.
template <bool high_first>
uint32_t read_bits(const uint8_t* in, int64_t size, int64_t position, int width) {
  const int64_t byte = position >> 3;
  uint64_t word = 0;
  if (size - byte >= 8) {
    std::memcpy(&word, in + byte, 8);
  } else {
    std::memcpy(&word, in + byte, static_cast<size_t>(size - byte));
  }
  const int skip = static_cast<int>(position & 7);
  if constexpr (high_first) return static_cast<uint32_t>(reverse_bytes(word) << skip >> (64 - width));
  return static_cast<uint32_t>(word >> skip) & ((1u << width) - 1);
}

// (prefix code, byte) -> code, open addressing. An entry of an older generation is empty: a clear costs nothing.
class Dictionary {
 public:
  explicit Dictionary(int max_bits) : shift_(32 - (max_bits + 2)), slots_(size_t{1} << (max_bits + 2)) {}

  void clear() { ++generation_; }
  // The code of (prefix, byte), or -1 and the slot to hand to insert.
  int find(uint32_t prefix, uint8_t byte, uint32_t* slot) const {
    const uint32_t key = prefix << 8 | byte;
    uint32_t i = key * 0x9E3779B1u >> shift_;  // Knuth's multiplicative hash, 2^32 / golden ratio
    for (;; i = (i + 1) & static_cast<uint32_t>(slots_.size() - 1)) {
      const Slot& s = slots_[i];
      if (s.generation != generation_) {
        *slot = i;
        return -1;
      }
      if (s.key == key) return s.code;
    }
  }
  void insert(uint32_t slot, uint32_t prefix, uint8_t byte, int code) {
    slots_[slot] = {prefix << 8 | byte, static_cast<uint16_t>(code), generation_};
  }

 private:
  struct Slot {
    uint32_t key;
    uint16_t code;
    uint32_t generation;
  };
  int shift_;
  std::vector<Slot> slots_;
  uint32_t generation_ = 1;
};

// compress(1) looks at its ratio this often once the dictionary is full, and starts anew when it fell.
constexpr int64_t kCheckInterval = 10000;

uint8_t* encode_codes(const uint8_t* src, int64_t size, const Dialect& d, uint8_t* dst) {
  BitWriter writer(dst, d.high_first);
  Dictionary dictionary(d.max_bits);
  int64_t k = 0;  // codes since the last clear
  int width = width_of(d, 0);
  int64_t in_width = 0;  // codes of this width
  const auto pad_group = [&] {
    if (d.groups && in_width % 8 != 0) writer.skip_bytes((8 - in_width % 8) * width / 8);
    in_width = 0;
  };
  const auto emit = [&](int code) {
    const int now = width_of(d, k);
    if (now != width) pad_group();
    width = now;
    writer.put(static_cast<uint32_t>(code), width);
    ++k;
    ++in_width;
  };
  const auto clear = [&] {
    emit(d.clear);
    pad_group();
    dictionary.clear();
    k = 0;
    width = width_of(d, 0);
  };
  // GIF and TIFF streams begin with a clear code; it counts for nothing.
  if (d.end >= 0) clear();

  int next = d.first_free, prefix = -1;
  int64_t check_at = kCheckInterval;
  double best_ratio = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (prefix < 0) {
      prefix = src[i];
      continue;
    }
    uint32_t slot;
    const int longer = dictionary.find(static_cast<uint32_t>(prefix), src[i], &slot);
    if (longer >= 0) {
      prefix = longer;
      continue;
    }
    emit(prefix);
    if (next < d.limit) {
      dictionary.insert(slot, static_cast<uint32_t>(prefix), src[i], next++);
    } else if (d.end >= 0) {
      clear();
      next = d.first_free;
    } else if (d.clear >= 0 && i >= check_at) {
      check_at = i + kCheckInterval;
      const double ratio = static_cast<double>(i) / static_cast<double>(writer.position() - dst + 1);
      if (ratio < best_ratio) {
        clear();
        next = d.first_free;
        best_ratio = 0;
      } else {
        best_ratio = ratio;
      }
    }
    prefix = src[i];
  }
  if (prefix >= 0) emit(prefix);
  if (d.end >= 0) emit(d.end);
  return writer.finish();
}

// The dictionary of a decoder: entry code is text[start[code] .. start[code] + length[code]].
struct Entries {
  std::unique_ptr<int64_t[]> start{new int64_t[1 << kMaxBits]};
  std::unique_ptr<int64_t[]> length{new int64_t[1 << kMaxBits]};
};

// Copies n bytes from `from` to `to`, from < to; the ranges may overlap as in text[to + i] = text[from + i], i rising.
inline void copy_string(uint8_t* to, const uint8_t* from, int64_t n, int64_t room) {
  constexpr int kStep = 16;
  if (to - from >= kStep && room >= n + kStep) {
    for (int64_t i = 0; i < n; i += kStep) std::memcpy(to + i, from + i, kStep);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

// Decodes codes until the end code, `size` bytes of text (lepton), or the end of the stream (compress). Without `write`
// only the length of the text is found, at most `size`.
template <bool write, bool high_first>
Status decode_codes(const uint8_t* in, int64_t in_size, const Dialect& d, uint8_t* out, int64_t size,
                    int64_t* text_size) {
  thread_local Entries entries;
  int64_t* const start = entries.start.get();
  int64_t* const length = entries.length.get();
  const int64_t in_bits = 8 * in_size;
  int64_t position = 0, text = 0, k = 0, group_begin = 0;
  int64_t previous = 0, previous_length = 0;
  int width = width_of(d, 0);
  const bool ends_by_size = d.clear < 0;
  const auto pad_group = [&] {
    const int64_t group_bits = 8 * width, used = position - group_begin;
    if (d.groups) position = group_begin + (used + group_bits - 1) / group_bits * group_bits;
    group_begin = position;
  };
  while (!ends_by_size || text < size) {
    const int now = width_of(d, k);
    if (now != width) {
      pad_group();
      width = now;
    }
    if (in_bits - position < width) {
      // A .Z file has no end code: it ends where no further code fits.
      if (d.clear >= 0 && d.end < 0) break;
      return Status::truncated;
    }
    const int code = static_cast<int>(read_bits<high_first>(in, in_size, position, width));
    position += width;
    if (code == d.clear) {
      pad_group();
      k = 0;
      width = width_of(d, 0);
      continue;
    }
    if (code == d.end) break;  // what writers pad a strip or an image with is not ours to judge
    // The entry that this code's first byte completes: the previous string and one byte more.
    const int64_t next = d.first_free + k - 1;
    const bool grows = k > 0 && next < (int64_t{1} << d.max_bits);
    if (grows) {
      start[next] = previous;
      length[next] = previous_length + 1;
    }
    const bool literal = code < (d.clear >= 0 ? std::min(d.clear, 256) : 256);
    if (!literal && (code < d.first_free || code > std::min<int64_t>(next, (int64_t{1} << d.max_bits) - 1) || k == 0))
      return Status::bad_code;
    const int64_t n = literal ? 1 : length[code];
    if (n > size - text) return Status::too_long;
    if constexpr (write) {
      if (literal) {
        out[text] = static_cast<uint8_t>(code);
      } else {
        copy_string(out + text, out + start[code], n, size - text);
      }
    }
    previous = text;
    previous_length = n;
    text += n;
    ++k;
  }
  if (ends_by_size) {
    if (in_size != (position + 7) / 8) return Status::trailing;
    if (position % 8 != 0 && in[in_size - 1] >> position % 8 != 0) return Status::bad_padding;
  }
  *text_size = text;
  return Status::ok;
}

constexpr uint8_t kCompressMagic[2] = {0x1f, 0x9d};
constexpr uint8_t kCompressBlockMode = 0x80;
constexpr int kSubBlock = 255;

// Strips a variant's wrapping: the codes, and the dialect they are in. `storage` holds what had to be put together.
Status unwrap(const uint8_t* in, int64_t size, LzwVariant variant, std::vector<uint8_t>* storage, Dialect* d,
              const uint8_t** codes, int64_t* codes_size) {
  *codes = in;
  *codes_size = size;
  if (variant == LzwVariant::tiff) {
    *d = dialect_of(variant);
  } else if (variant == LzwVariant::compress) {
    if (size < 3) return Status::truncated;
    const int bits = in[2] & 0x1f;
    // compress(1) itself disagrees with its manual on 9 bits; nobody writes it.
    if (in[0] != kCompressMagic[0] || in[1] != kCompressMagic[1] || bits < 10 || bits > 16 || (in[2] & 0x60) != 0)
      return Status::bad_header;
    *d = dialect_of(variant, bits);
    if (!(in[2] & kCompressBlockMode)) {
      d->clear = 1 << 20;  // no code is the clear code
      d->first_free = 256;
    }
    *codes = in + 3;
    *codes_size = size - 3;
  } else {
    if (size < 1) return Status::truncated;
    if (in[0] < 2 || in[0] > 8) return Status::bad_header;
    *d = dialect_of(variant, in[0]);
    int64_t at = 1;
    for (;;) {
      if (at >= size) return Status::truncated;
      const int64_t n = in[at++];
      if (n == 0) break;
      if (size - at < n) return Status::truncated;
      storage->insert(storage->end(), in + at, in + at + n);
      at += n;
    }
    if (at != size) return Status::trailing;
    *codes = storage->data();
    *codes_size = static_cast<int64_t>(storage->size());
  }
  return Status::ok;
}

template <bool write>
Status decode_stream(const uint8_t* in, int64_t in_size, LzwVariant variant, uint8_t* out, int64_t size,
                     int64_t* text) {
  std::vector<uint8_t> storage;
  Dialect d;
  const uint8_t* codes;
  int64_t codes_size;
  const Status status = unwrap(in, in_size, variant, &storage, &d, &codes, &codes_size);
  if (status != Status::ok) return status;
  return d.high_first ? decode_codes<write, true>(codes, codes_size, d, out, size, text)
                      : decode_codes<write, false>(codes, codes_size, d, out, size, text);
}

}  // namespace

int64_t lzw_bound(int64_t size, LzwVariant variant) {
  // At worst every byte is a code of its own, of at most 2 bytes (12 bits where a clear and an end code come on top,
  // at most one clear for 1024 codes); groups pad 8 codes for each of 8 widths and at each clear.
  const int64_t codes = 2 * size + size / 256 + 512;
  return variant == LzwVariant::gif ? codes + codes / kSubBlock + 3 : codes;
}

int64_t lzw_encode(const uint8_t* src, int64_t size, LzwVariant variant, uint8_t* dst) {
  if (variant == LzwVariant::compress) {
    dst[0] = kCompressMagic[0];
    dst[1] = kCompressMagic[1];
    dst[2] = kCompressBlockMode | kMaxBits;
    return encode_codes(src, size, dialect_of(variant, kMaxBits), dst + 3) - dst;
  }
  if (variant == LzwVariant::gif) {
    std::vector<uint8_t> codes(static_cast<size_t>(lzw_bound(size, variant)));
    const Dialect d = dialect_of(variant, 8);
    const int64_t n = encode_codes(src, size, d, codes.data()) - codes.data();
    uint8_t* out = dst;
    *out++ = 8;
    for (int64_t at = 0; at < n; at += kSubBlock) {
      const int64_t part = std::min<int64_t>(kSubBlock, n - at);
      *out++ = static_cast<uint8_t>(part);
      std::memcpy(out, codes.data() + at, static_cast<size_t>(part));
      out += part;
    }
    *out++ = 0;
    return out - dst;
  }
  return encode_codes(src, size, dialect_of(variant, kLeptonBits), dst) - dst;
}

Status lzw_decoded_size(const uint8_t* stream, int64_t stream_size, LzwVariant variant, int64_t limit, int64_t* size) {
  return decode_stream<false>(stream, stream_size, variant, nullptr, limit, size);
}

Status lzw_decode(const uint8_t* stream, int64_t stream_size, LzwVariant variant, uint8_t* dst, int64_t size) {
  int64_t text = 0;
  const Status status = decode_stream<true>(stream, stream_size, variant, dst, size, &text);
  if (status != Status::ok) return status;
  return text == size ? Status::ok : Status::truncated;
}

int64_t lzw_encode_chunk(const uint8_t* src, int64_t size, uint8_t* dst) {
  std::vector<uint8_t> codes(static_cast<size_t>(lzw_bound(size, LzwVariant::lepton)));
  const int64_t n = lzw_encode(src, size, LzwVariant::lepton, codes.data());
  const bool stored = n > size - size / 32;  // as in huffman.cpp: coding must save one byte in 32
  dst[0] = stored ? 0 : kLeptonBits;
  std::memcpy(dst + 1, stored ? src : codes.data(), static_cast<size_t>(stored ? size : n));
  return 1 + (stored ? size : n);
}

Status lzw_decode_chunk(const uint8_t* payload, int64_t payload_size, uint8_t* dst, int64_t size) {
  if (payload_size < 1) return Status::truncated;
  const int bits = *payload++;
  --payload_size;
  if (bits == 0) {
    if (payload_size != size) return payload_size < size ? Status::truncated : Status::trailing;
    std::memcpy(dst, payload, static_cast<size_t>(size));
    return Status::ok;
  }
  if (bits < 9 || bits > kMaxBits) return Status::bad_mode;
  int64_t text = 0;
  return decode_codes<true, false>(payload, payload_size, dialect_of(LzwVariant::lepton, bits), dst, size, &text);
}

}  // namespace lepton
