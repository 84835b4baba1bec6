"""Hostile frames and streams for the container's Python part: python tests/fuzz/fuzz_frame.py SECONDS [SEED]

Frames are damaged behind their checksums, which are made right again, as an attacker would. Whatever comes in, a reader
returns as many bytes as were promised or raises CorruptDataError, and allocates no more than it was allowed to. What
it does otherwise with is left in build/fuzz.
"""

import io
import os
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from lepton_kernels import codec
from lepton_kernels.codec import CorruptDataError, huffman, lzw

FOUND = Path(__file__).parents[2] / "build" / "fuzz"
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


def is_refused(frame: bytes) -> bool:
    try:
        info = codec.info(frame)
        coder = huffman if info.codec == "huffman" else lzw
        assert len(coder.decode(frame, max_size=MOST, threads=1)) == info.size
    except CorruptDataError:
        return True
    return False


def read_all(source: BinaryIO) -> bytes | None:
    """The text of a stream, or None where it is refused."""
    text = bytearray()
    try:
        reader = codec.Reader(source, threads=1, max_frame_size=MOST)
        while part := reader.read(1 << 16):
            text += part
            assert len(text) < 100 * MOST, "more text than the frames may hold"
    except CorruptDataError:
        return None
    return bytes(text)


def main() -> None:
    seconds = float(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else int.from_bytes(os.urandom(4), "little")
    rng = np.random.default_rng(seed)
    frames, end = seeds(rng), huffman.encode(b"")
    resource.setrlimit(resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MEMORY,) * 2)
    stop, rounds, refused = time.monotonic() + seconds, 0, 0
    with tempfile.TemporaryFile() as file:
        while time.monotonic() < stop:
            hostile = damaged(rng, frames[rng.integers(len(frames))])
            stream = frames[rng.integers(len(frames))] + hostile + end * int(rng.integers(0, 3))
            rounds += 1
            try:
                refused += is_refused(hostile)
                file.seek(0)
                file.truncate()
                file.write(stream)
                file.seek(0)
                assert read_all(io.BytesIO(stream)) == read_all(file), "a pipe and a file hold different text"
            except Exception:
                FOUND.mkdir(parents=True, exist_ok=True)
                (FOUND / "found_frame").write_bytes(hostile)
                (FOUND / "found_stream").write_bytes(stream)
                print(f"seed {seed}, round {rounds}: see found_frame and found_stream in {FOUND}", file=sys.stderr)
                raise
    print(f"frames and streams: {rounds} rounds, {refused} frames refused, seed {seed}")


if __name__ == "__main__":
    main()
