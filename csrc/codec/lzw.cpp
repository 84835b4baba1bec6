// lzw.cpp - see lzw.h. One encoder and one decoder; a dialect is a row of constants.
#include "codec/lzw.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace lepton {
namespace {

constexpr int kMaxBits = 16;
constexpr int kImageBits = 12;   // GIF's and TIFF's
constexpr int kLeptonBits = 14;  // 16 K entries: positions and lengths stay in the second-level cache

struct Dialect {
  int clear = -1, end = -1;  // codes, or -1
  int first_free = 256;      // the first code of the dictionary
  int early = 0;             // 1: the width grows one code early
  int min_bits = 0;          // of the first codes, where that is more than they need
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
      return {.clear = 1 << bits,
              .end = (1 << bits) + 1,
              .first_free = (1 << bits) + 2,
              .max_bits = kImageBits,
              .limit = 4094};
    case LzwVariant::tiff:
      return {.clear = 256,
              .end = 257,
              .first_free = 258,
              .early = 1,
              .max_bits = kImageBits,
              .limit = 4094,
              .high_first = true};
  }
  return {};
}

int width_of(const Dialect& d, int64_t k) {
  return std::clamp<int>(std::bit_width(static_cast<uint64_t>(d.first_free - 1 + k + d.early)), d.min_bits, d.max_bits);
}

// How many codes from code k on are as wide as it.
int64_t codes_as_wide(const Dialect& d, int64_t k) {
  const int width = width_of(d, k);
  if (width == d.max_bits) return std::numeric_limits<int64_t>::max();
  return (int64_t{1} << width) - (d.first_free - 1 + k + d.early);
}

void store64(uint8_t* p, uint64_t word) { std::memcpy(p, &word, 8); }

// Writes codes at their widths. Up to kWordSlack bytes behind what was written may change.
constexpr int kWordSlack = 8;

class CodeWriter {
 public:
  CodeWriter(const Dialect& dialect, uint8_t* out) : d_(dialect), out_(out) {}

  void put(const uint16_t* codes, int64_t n) {
    while (n > 0) {
      const int width = width_of(d_, k_);
      if (width != width_) end_width();
      width_ = width;
      const int64_t now = std::min(n, codes_as_wide(d_, k_));
      d_.high_first ? put_same<true>(codes, now) : put_same<false>(codes, now);
      k_ += now;
      in_width_ += now;
      codes += now;
      n -= now;
    }
  }
  void put(int code) {
    const auto one = static_cast<uint16_t>(code);
    put(&one, 1);
  }
  // After the clear code.
  void restart() {
    end_width();
    k_ = 0;
    width_ = width_of(d_, 0);
  }
  uint8_t* finish() {
    store64(out_, word_in_order());
    out_ += (used_ + 7) / 8;
    used_ = 0;
    word_ = 0;
    return out_;
  }
  const uint8_t* position() const { return out_; }

 private:
  template <bool high_first>
  void put_same(const uint16_t* codes, int64_t n) {
    uint64_t word = word_;
    int used = used_;
    uint8_t* out = out_;
    for (int64_t i = 0; i < n; ++i) {
      used += width_;  // at most 7 + 16
      word = high_first ? word | static_cast<uint64_t>(codes[i]) << (64 - used)
                        : word | static_cast<uint64_t>(codes[i]) << (used - width_);
      store64(out, high_first ? __builtin_bswap64(word) : word);
      out += used >> 3;
      word = high_first ? word << (used & ~7) : word >> (used & ~7);
      used &= 7;
    }
    word_ = word;
    used_ = used;
    out_ = out;
  }
  uint64_t word_in_order() const { return d_.high_first ? __builtin_bswap64(word_) : word_; }

  // compress(1) writes codes of one width in groups of 8, the last one padded.
  void end_width() {
    if (d_.groups && in_width_ % 8 != 0) {
      finish();
      const int64_t padding = (8 - in_width_ % 8) * width_ / 8;
      std::memset(out_, 0, static_cast<size_t>(padding));
      out_ += padding;
    }
    in_width_ = 0;
  }

  const Dialect& d_;
  uint8_t* out_;
  uint64_t word_ = 0;
  int used_ = 0, width_ = 0;
  int64_t k_ = 0, in_width_ = 0;  // codes since the last clear, and of this width
};

// The encoder's dictionary, as far as it is remembered: a string is kept where its hash says, and pushes out what was
// there before. The decoder knows the lost string still, we then write a shorter one in its place; but there is no
// chain to follow. Strings of up to kShort bytes are found by their bytes, so that several lengths are looked up at
// once and not one after the other; longer ones by the code of all but their last byte.
template <int max_bits>
class Strings {
 public:
  Strings() {
    thread_local std::vector<uint64_t> slots[2];  // threads keep them: they are as large as a chunk
    for (auto& table : slots) table.resize(kSlots);
    short_ = slots[0].data();
    long_ = slots[1].data();
    clear();
  }

  void clear() {
    std::fill_n(short_, kSlots, uint64_t{0});
    std::fill_n(long_, kSlots, uint64_t{0});
  }

  // Cuts text[size] from *at on into known strings, at most `most` of them, and writes their codes. If `learns`, each
  // string and the byte behind it become the string `next`, `next` + 1, ... Returns how many codes it wrote.
  template <bool learns>
  int64_t parse(const uint8_t* text, int64_t size, int64_t* at, int64_t most, int next, uint16_t* codes) {
    int64_t count = 0;
    for (; count < most && *at + 8 <= size; ++count) {
      uint64_t word;
      std::memcpy(&word, text + *at, 8);
      codes[count] = cut<learns>(word, text, size, at, static_cast<uint64_t>(next + count));
    }
    for (; count < most && *at < size; ++count) {
      uint64_t word = 0;  // the bytes past the end are no part of a string, as cut() sees
      std::memcpy(&word, text + *at, static_cast<size_t>(std::min<int64_t>(size - *at, 8)));
      codes[count] = cut<learns>(word, text, size, at, static_cast<uint64_t>(next + count));
    }
    return count;
  }

 private:
  static constexpr int kShort = 7;
  static constexpr int kIndexBits = max_bits + 1;
  static constexpr size_t kSlots = size_t{1} << kIndexBits;
  // An odd factor maps 64 bits one to one: the place of a slot and the rest of the hash in it are the key. The code
  // fills the bits that this leaves; it is not 0.
  static constexpr uint64_t kFactor = 0x9E3779B97F4A7C15;

  struct Match {
    uint64_t code, length;
  };

  template <bool learns>
  uint16_t cut(uint64_t word, const uint8_t* text, int64_t size, int64_t* at, uint64_t made) {
    const uint64_t left = static_cast<uint64_t>(size - *at);
    Match match{word & 0xff, 1};
    try_short(word, 2, &match);
    try_short(word, 3, &match);
    try_short(word, 4, &match);
    if (match.length == 4) {
      try_short(word, 5, &match);
      try_short(word, 6, &match);
      try_short(word, 7, &match);
      if (match.length == kShort) {
        for (const uint8_t* from = text + *at; match.length < left; ++match.length) {
          const uint64_t found = code_in(long_, long_hash(match.code, from[match.length]));
          if (!is_code(found)) break;
          match.code = found;
        }
      }
    }
    if (match.length > left) [[unlikely]]
      match = without_end(word, left);
    if (learns && match.length < left) {
      const bool is_short = match.length < kShort;
      const uint64_t hash =
          is_short ? short_hash(word, match.length + 1) : long_hash(match.code, text[*at + match.length]);
      (is_short ? short_ : long_)[hash >> (64 - kIndexBits)] = hash << kIndexBits | made;
    }
    *at += static_cast<int64_t>(match.length);
    return static_cast<uint16_t>(match.code);
  }

  // The longest string of at most `left` bytes.
  Match without_end(uint64_t word, uint64_t left) const {
    Match match{word & 0xff, 1};
    for (uint64_t length = 2; length <= left; ++length) try_short(word, length, &match);
    return match;
  }

  static uint64_t short_hash(uint64_t word, uint64_t length) {
    return ((word & ((uint64_t{1} << 8 * length) - 1)) | length << 56) * kFactor;
  }
  static uint64_t long_hash(uint64_t code, uint8_t byte) { return (code << 8 | byte) * kFactor; }

  // The code that a slot holds for a hash; if it holds another, something that is none.
  uint64_t code_in(const uint64_t* slots, uint64_t hash) const {
    return slots[hash >> (64 - kIndexBits)] ^ hash << kIndexBits;
  }
  bool is_code(uint64_t found) const { return found - 1 < kSlots - 1; }

  void try_short(uint64_t word, uint64_t length, Match* match) const {
    const uint64_t found = code_in(short_, short_hash(word, length));
    if (is_code(found)) *match = {found, length};
  }

  uint64_t *short_, *long_;  // the rest of a hash, then a code
};

// compress(1) looks at its ratio this often once the dictionary is full, and starts anew when it fell.
constexpr int64_t kCheckInterval = 10000;
constexpr int64_t kCodesAtOnce = 1 << 14, kCodesToCheck = 1 << 9;

// max_bits: the dialect's.
template <int max_bits>
uint8_t* encode_codes(const uint8_t* src, int64_t size, const Dialect& d, uint8_t* dst) {
  CodeWriter writer(d, dst);
  Strings<max_bits> strings;
  std::array<uint16_t, kCodesAtOnce> codes;
  const auto clear = [&] {
    writer.put(d.clear);
    writer.restart();
    strings.clear();
    return d.first_free;
  };
  int next = d.end >= 0 ? clear() : d.first_free;  // GIF and TIFF streams begin with a clear code
  int64_t check_at = kCheckInterval;
  double best_ratio = 0;
  for (int64_t at = 0; at < size;) {
    if (next < d.limit) {
      const int64_t most = std::min<int64_t>(kCodesAtOnce, d.limit - next);
      const int64_t n = strings.template parse<true>(src, size, &at, most, next, codes.data());
      writer.put(codes.data(), n);
      next += static_cast<int>(n);
      if (next == d.limit && d.end >= 0) next = clear();
      continue;
    }
    const bool checks = d.clear >= 0;
    const int64_t n =
        strings.template parse<false>(src, size, &at, checks ? kCodesToCheck : kCodesAtOnce, next, codes.data());
    writer.put(codes.data(), n);
    if (!checks || at < check_at) continue;
    check_at = at + kCheckInterval;
    const double ratio = static_cast<double>(at) / static_cast<double>(writer.position() - dst + 1);
    if (ratio < best_ratio) next = clear();
    best_ratio = ratio < best_ratio ? 0 : ratio;
  }
  if (d.end >= 0) writer.put(d.end);
  return writer.finish();
}

// A string of the dictionary: where in the text it stands, how long it is, and its first byte, by which those of one
// byte are known: they stand nowhere. 8 bytes, so that 12 bits of codes take 32 KiB.
class Entry {
 public:
  static constexpr int64_t kMostText = int64_t{1} << 40;
  Entry() = default;
  static Entry literal(int byte) { return Entry(uint64_t{1} << 8 | static_cast<uint64_t>(byte)); }
  // This string, as it stands at `at`, and a byte more. At most 2^16 - 256 strings are each a byte longer than another.
  Entry longer(int64_t at) const { return Entry(((word_ & 0xffffff) + (1 << 8)) | static_cast<uint64_t>(at) << 24); }
  int64_t at() const { return static_cast<int64_t>(word_ >> 24); }
  int64_t length() const { return static_cast<int64_t>(word_ >> 8 & 0xffff); }
  uint8_t first() const { return static_cast<uint8_t>(word_); }

 private:
  explicit Entry(uint64_t word) : word_(word) {}
  uint64_t word_;
};

// 16 bytes, all of which are read before one is written: the two places may overlap.
constexpr int kCopySlack = 16;
void copy16(uint8_t* to, const uint8_t* from) {
  uint8_t bytes[kCopySlack];
  std::memcpy(bytes, from, kCopySlack);
  std::memcpy(to, bytes, kCopySlack);
}

// The text, which grows where its owner lets it.
struct Text {
  uint8_t* data;
  int64_t room;
  const LzwGrow* grow;

  bool make_room(int64_t size) {
    if (size > room && grow != nullptr) {
      data = (*grow)(size, &room);
      room = std::min(room, Entry::kMostText);
    }
    return size <= room && data != nullptr;
  }
};

// Decodes codes until the end code, until the text is full (lepton), or the end of the stream (compress).
template <bool high_first>
class Decoder {
 public:
  Decoder(const Dialect& dialect, const uint8_t* in, int64_t in_size) : d_(dialect), in_(in), in_size_(in_size) {
    thread_local const std::unique_ptr<Entry[]> entries(new Entry[size_t{1} << kMaxBits]);
    entries_ = entries.get();
    for (int code = 0; code < literals(); ++code) entries_[code] = Entry::literal(code);
    width_ = width_of(d_, 0);
  }

  Status decode(Text* text, int64_t* size) {
    const bool fills = d_.clear < 0;
    bool done = false;
    while (!done && (!fills || size_ < text->room)) {
      if (k_ > 0 && width_ == width_of(d_, k_))
        next() < last() ? ordinary_codes<true>(*text) : ordinary_codes<false>(*text);
      if (fills && size_ == text->room) break;
      const Status status = one_code(text, &done);
      if (status != Status::ok) return status;
    }
    if (fills) {
      if (in_size_ != (position_ + 7) / 8) return Status::trailing;
      if (position_ % 8 != 0 && in_[in_size_ - 1] >> position_ % 8 != 0) return Status::bad_padding;
    }
    *size = size_;
    return Status::ok;
  }

 private:
  int literals() const { return d_.clear >= 0 ? std::min(d_.clear, 256) : 256; }
  // The entry that the next code's first byte completes, and the number that is none any more.
  int64_t next() const { return d_.first_free + k_ - 1; }
  int64_t last() const { return int64_t{1} << d_.max_bits; }

  void end_group() {
    const int64_t bits = 8 * width_, used = position_ - group_begin_;
    if (d_.groups) position_ = group_begin_ + (used + bits - 1) / bits * bits;
    group_begin_ = position_;
  }

  // The code that begins at bit `skip` of a stream's next 8 bytes.
  static uint32_t code_of(uint64_t word, int skip, int width) {
    if constexpr (high_first) return static_cast<uint32_t>(__builtin_bswap64(word) << skip >> (64 - width));
    return static_cast<uint32_t>(word >> skip) & ((1u << width) - 1);
  }

  // As many codes as have the current width, lie well inside the stream and the text, and are strings of before.
  template <bool grows>
  void ordinary_codes(const Text& text) {
    int64_t count = std::min(codes_as_wide(d_, k_), (8 * (in_size_ - 7) - position_) / width_);
    if (grows) count = std::min(count, last() - next());
    // Members are read once: what is stored to the text could be one of them, as far as a compiler knows.
    Entry* const entries = entries_;
    const uint8_t* const in = in_;
    const int width = width_;
    uint8_t* const out = text.data;
    const int64_t room = text.room - kCopySlack;
    const uint32_t special = static_cast<uint32_t>(d_.clear), specials = (d_.clear >= 0) + (d_.end >= 0);
    uint32_t next_code = static_cast<uint32_t>(std::min(next(), last()));
    int64_t at = size_, position = position_, left = count;
    Entry made = made_;
    for (; left > 0; --left) {
      uint64_t word;
      std::memcpy(&word, in + (position >> 3), 8);
      const uint32_t code = code_of(word, static_cast<int>(position & 7), width);
      if (code > next_code || code - special < specials) break;
      if constexpr (grows) entries[next_code++] = made;
      const Entry string = entries[code];
      const int64_t n = string.length();
      if (at + n > room) break;
      out[at] = string.first();  // the last byte too of the string just made
      copy16(out + at, out + string.at());
      for (int64_t i = kCopySlack; i < n; i += kCopySlack) copy16(out + at + i, out + string.at() + i);
      out[at] = string.first();
      made = string.longer(at);
      at += n;
      position += width;
    }
    k_ += std::max<int64_t>(count, 0) - std::max<int64_t>(left, 0);
    size_ = at;
    position_ = position;
    made_ = made;
  }

  Status one_code(Text* text, bool* done) {
    const int width = width_of(d_, k_);
    if (width != width_) end_group();
    width_ = width;
    if (8 * in_size_ - position_ < width) {
      // A .Z file has no end code: it ends where no further code fits.
      *done = d_.clear >= 0 && d_.end < 0;
      return *done ? Status::ok : Status::truncated;
    }
    const uint8_t* const from = in_ + (position_ >> 3);
    uint64_t word = 0;  // what there is of 8 bytes
    std::memcpy(&word, from, static_cast<size_t>(std::min<int64_t>(in_ + in_size_ - from, 8)));
    const auto code = static_cast<int>(code_of(word, static_cast<int>(position_ & 7), width));
    position_ += width;
    if (code == d_.clear) {
      end_group();
      k_ = 0;
      width_ = width_of(d_, 0);
      return Status::ok;
    }
    *done = code == d_.end;  // what writers pad a strip or an image with is not ours to judge
    if (*done) return Status::ok;
    if (code >= literals() && (k_ == 0 || code < d_.first_free || code > std::min(next(), last() - 1)))
      return Status::bad_code;
    if (k_ > 0 && next() < last()) entries_[next()] = made_;
    const Entry string = entries_[code];
    const int64_t n = string.length();
    if (!text->make_room(size_ + n)) return Status::too_long;
    uint8_t* const to = text->data + size_;
    to[0] = string.first();
    for (int64_t i = 1; i < n; ++i) to[i] = text->data[string.at() + i];
    made_ = string.longer(size_);
    size_ += n;
    ++k_;
    return Status::ok;
  }

  const Dialect& d_;
  const uint8_t* in_;
  int64_t in_size_, position_ = 0, group_begin_ = 0;  // positions in bits
  int64_t size_ = 0, k_ = 0;
  int width_;
  Entry made_{};  // the string that the next code makes: that of the code before and the next one's first byte
  Entry* entries_;
};

Status decode_codes(const uint8_t* in, int64_t in_size, const Dialect& d, Text* text, int64_t* size) {
  return d.high_first ? Decoder<true>(d, in, in_size).decode(text, size)
                      : Decoder<false>(d, in, in_size).decode(text, size);
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
      d->min_bits = 9;
    }
    *codes = in + 3;
    *codes_size = size - 3;
  } else {
    if (size < 1) return Status::truncated;
    if (in[0] < 2 || in[0] > 8) return Status::bad_header;
    *d = dialect_of(variant, in[0]);
    int64_t at = 1;
    storage->reserve(static_cast<size_t>(size));
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

}  // namespace

int64_t lzw_bound(int64_t size, LzwVariant variant) {
  // At worst every byte is a code of its own, of at most 2 bytes (12 bits where a clear and an end code come on top,
  // at most one clear for 1024 codes); groups pad 8 codes for each of 8 widths and at each clear.
  const int64_t codes = 2 * size + size / 256 + 512 + kWordSlack;
  return variant == LzwVariant::gif ? codes + codes / kSubBlock + 3 : codes;
}

int64_t lzw_encode(const uint8_t* src, int64_t size, LzwVariant variant, uint8_t* dst) {
  if (variant == LzwVariant::compress) {
    dst[0] = kCompressMagic[0];
    dst[1] = kCompressMagic[1];
    dst[2] = kCompressBlockMode | kMaxBits;
    return encode_codes<kMaxBits>(src, size, dialect_of(variant, kMaxBits), dst + 3) - dst;
  }
  if (variant == LzwVariant::gif) {
    std::vector<uint8_t> codes(static_cast<size_t>(lzw_bound(size, variant)));
    const Dialect d = dialect_of(variant, 8);
    const int64_t n = encode_codes<kImageBits>(src, size, d, codes.data()) - codes.data();
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
  if (variant == LzwVariant::tiff) return encode_codes<kImageBits>(src, size, dialect_of(variant), dst) - dst;
  return encode_codes<kLeptonBits>(src, size, dialect_of(variant, kLeptonBits), dst) - dst;
}

Status lzw_decode(const uint8_t* stream, int64_t stream_size, LzwVariant variant, const LzwGrow& grow, int64_t* size) {
  std::vector<uint8_t> storage;
  Dialect d;
  const uint8_t* codes;
  int64_t codes_size;
  const Status status = unwrap(stream, stream_size, variant, &storage, &d, &codes, &codes_size);
  if (status != Status::ok) return status;
  Text text{nullptr, 0, &grow};
  return decode_codes(codes, codes_size, d, &text, size);
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
  Text text{dst, size, nullptr};
  int64_t decoded = 0;
  return decode_codes(payload, payload_size, dialect_of(LzwVariant::lepton, bits), &text, &decoded);
}

}  // namespace lepton
