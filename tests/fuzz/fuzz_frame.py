"""Hostile frames and streams for the container's Python part: python tests/fuzz/fuzz_frame.py SECONDS [SEED]

Frames are damaged behind their checksums, which are made right again, as an attacker would. Whatever comes in, a reader
returns as many bytes as were promised or raises CorruptDataError, and allocates no more than it was allowed to.
"""

import io
import os
import resource
import struct
import sys
import tempfile
import time

import numpy as np
import xxhash

from lepton_kernels import codec
from lepton_kernels.codec import CorruptDataError, huffman, lzw

MOST = 1 << 20  # bytes that a frame may hold here
MEMORY = 4 << 30  # of the process; a thousand times what is needed


def seeds(rng: np.random.Generator) -> list[bytes]:
    weights = np.clip(rng.normal(0, 25, 20_000), -127, 127).astype(np.int8)
    datas = [b"", bytes(9000), weights.tobytes(), (weights * (rng.random(weights.size) < 0.2)).tobytes()]
    frames = [coder.encode(data, chunk_size=4096) for data in datas for coder in (huffman, lzw)]
    for layout in ("bf16", "fp32", "nibbles"):
        frames.append(huffman.encode(weights.tobytes(), layout=layout, chunk_size=8192))
    return frames


def sealed(frame: bytearray) -> bytes:
    """The frame with the checksums that its header, tables and payloads ask for, as far as they are there."""
    if len(frame) < 32:
        return bytes(frame)
    (chunks,) = struct.unpack_from("<I", frame, 20)
    end = 32 + 12 * chunks
    if end <= len(frame):
        at = end
        for i in range(chunks):
            (length,) = struct.unpack_from("<I", frame, 32 + 4 * i)
            digest = xxhash.xxh3_64_intdigest(bytes(frame[at : at + length]))
            struct.pack_into("<Q", frame, 32 + 4 * chunks + 8 * i, digest)
            at += length
        struct.pack_into("<Q", frame, 24, xxhash.xxh3_64_intdigest(bytes(frame[:24] + frame[32:end])))
    return bytes(frame)


def damaged(rng: np.random.Generator, frame: bytes) -> bytes:
    out = bytearray(frame)
    for _ in range(int(rng.integers(1, 5))):
        reach = int(rng.choice([24, 32 + 16, len(out)]))
        at = int(rng.integers(0, min(reach, len(out))))
        out[at] = int(rng.choice([0, 1, 255, rng.integers(0, 256)]))
    if rng.random() < 0.3:
        out = out[: int(rng.integers(0, len(out) + 1))]
    if rng.random() < 0.1:
        out += rng.bytes(int(rng.integers(1, 20)))
    return sealed(out) if rng.random() < 0.9 else bytes(out)


def read_all(reader: codec.Reader) -> int:
    size = 0
    while part := reader.read(1 << 16):
        size += len(part)
        if size > 100 * MOST:
            raise AssertionError("more text than the frames may hold")
    return size


def main() -> None:
    seconds = float(sys.argv[1])
    rng = np.random.default_rng(int(sys.argv[2]) if len(sys.argv) > 2 else None)
    frames, end = seeds(rng), huffman.encode(b"")
    resource.setrlimit(resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MEMORY,) * 2)
    stop, rounds, refused = time.monotonic() + seconds, 0, 0
    with tempfile.TemporaryFile() as file:
        while time.monotonic() < stop:
            hostile = damaged(rng, frames[rng.integers(len(frames))])
            rounds += 1
            try:
                info = codec.info(hostile)
                coder = huffman if info.codec == "huffman" else lzw
                assert len(coder.decode(hostile, max_size=MOST, threads=1)) == info.size
            except CorruptDataError:
                refused += 1
            stream = frames[rng.integers(len(frames))] + hostile + end * int(rng.integers(0, 3))
            file.seek(0)
            file.truncate()
            file.write(stream)
            file.seek(0)
            sizes = []
            for source in (io.BytesIO(stream), file):
                try:
                    sizes.append(read_all(codec.Reader(source, threads=1, max_frame_size=MOST)))
                except CorruptDataError:
                    sizes.append(-1)
            assert sizes[0] == sizes[1], (sizes, stream)
    print(f"frames and streams, {os.environ.get('LEPTON_MAX_ISA', 'all levels')}: {rounds} rounds, {refused} frames refused")


if __name__ == "__main__":
    main()
