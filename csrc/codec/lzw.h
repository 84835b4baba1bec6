// lzw.h - LZW (Welch 1984) with growing code width, in the dialects of the world's files.
//
// Entries of the dictionary are substrings of the text already seen, so a decoder keeps a position, a length and the
// first byte of each and copies. In every dialect code k (counted from 0 after a clear) is as wide as the largest code
// that could stand there, first_free - 1 + k, needs (TIFF: the one after that), up to max_bits:
//
//   lepton    lowest bit first, no clear and no end code, full dictionary kept; one chunk of a frame
//   compress  ".Z" files of compress(1): lowest bit first, header 1f 9d, clear code 256; codes of one width come in
//             groups of 8, the last padded
//   gif       an image's data: a byte with the symbols' width, then codes lowest bit first in sub-blocks
//   tiff      a strip: highest bit first, width grows one code early
#pragma once

#include <stdint.h>

#include <functional>

#include "codec/status.h"

namespace lepton {

enum class LzwVariant : int { lepton, compress, gif, tiff };
constexpr int kLzwVariantCount = 4;

// The most bytes that encoding size bytes can take.
int64_t lzw_bound(int64_t size, LzwVariant variant);
// Encodes src[size] into dst[lzw_bound(size)]; returns the bytes written.
int64_t lzw_encode(const uint8_t* src, int64_t size, LzwVariant variant, uint8_t* dst);

// Called when the text needs `size` bytes: returns memory for it, with what it already holds, and how much there is
// now. Less than `size`, or nullptr: the text is too long.
using LzwGrow = std::function<uint8_t*(int64_t size, int64_t* room)>;
// Decodes a gif, tiff or compress stream, which does not say how long the text is; *size: how long it was.
Status lzw_decode(const uint8_t* stream, int64_t stream_size, LzwVariant variant, const LzwGrow& grow, int64_t* size);

// A frame's chunk: a byte 0 and the chunk as it is, or a byte max_bits (9 to 16) and its codes.
int64_t lzw_encode_chunk(const uint8_t* src, int64_t size, uint8_t* dst);
Status lzw_decode_chunk(const uint8_t* payload, int64_t payload_size, uint8_t* dst, int64_t size);

}  // namespace lepton
