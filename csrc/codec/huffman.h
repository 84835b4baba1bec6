// huffman.h - one chunk of bytes, order-0 Huffman coded in tree order. docs/codec-format.md is the format's
// specification; chunks know nothing of each other.
//
// A chunk is either stored as it is, or split into planes (planes.h), each of which is raw or coded with one code for
// the whole chunk, in blocks (huffman_block.h).
#pragma once

#include <stdint.h>

#include "codec/planes.h"
#include "codec/status.h"

namespace lepton {

constexpr int64_t kMaxChunkBytes = int64_t{1} << 24;

// The most bytes that encoding a chunk can take: stored, behind its mode byte.
constexpr int64_t huffman_bound(int64_t size) { return size + 1; }

// What the same thread is going to read next, another chunk: it is fetched meanwhile.
struct NextChunk {
  const uint8_t* data = nullptr;
  int64_t size = 0;
};

// Encodes src[size] into dst[huffman_bound(size)], size in [1, kMaxChunkBytes] and a multiple of element_bytes(layout).
// Returns the bytes written.
int64_t huffman_encode_chunk(const uint8_t* src, int64_t size, Layout layout, uint8_t* dst, NextChunk next = {});

// Decodes payload[payload_size] into exactly dst[size]. dst holds anything after an error. `streams`: what planes are
// joined to is written past the caches.
Status huffman_decode_chunk(const uint8_t* payload, int64_t payload_size, Layout layout, uint8_t* dst, int64_t size,
                            NextChunk next = {}, bool streams = false);

// Adds to counts[plane_count(layout)][256] how often each symbol occurs in each plane of src[size].
void count_planes(const uint8_t* src, int64_t size, Layout layout, int64_t* counts);

}  // namespace lepton
