"""Writes what the fuzz targets start from to tests/fuzz/corpus: python tests/fuzz/make_corpus.py

A small input of each kind that the decoders treat differently, for libFuzzer to vary; the targets say what their first
bytes mean. The same encoder writes the same files every time. To be run again when the format changes.
"""

import shutil
import struct
import sys
from pathlib import Path

import numpy as np

from lepton_kernels.codec import huffman, lzw
from lepton_kernels.codec.frame import ELEMENT_BYTES, HEADER_BYTES, LAYOUTS

sys.path.append(str(Path(__file__).parents[1] / "codec"))
import decoder

CORPUS = Path(__file__).parent / "corpus"
MAX_CHUNK_SIZE = 1 << 24
RNG = np.random.RandomState(0)  # the generator whose numbers no version of numpy changes


def floats(n: int) -> np.ndarray:
    return RNG.normal(0, 0.05, n).astype("<f4")


def bf16(n: int) -> bytes:
    return (floats(n).view("<u4") >> 16).astype("<u2").tobytes()


def int8(n: int) -> np.ndarray:
    return np.clip(np.round(RNG.normal(0, 25, n)), -127, 127).astype(np.int8)


def sparse(n: int) -> bytes:
    """Four of five are 0, anywhere."""
    return (int8(n) * (RNG.random_sample(n) < 0.2)).tobytes()


def two_of_four(n: int) -> bytes:
    """Two of every four in a row are 0."""
    order = np.argsort(RNG.random_sample((n // 4, 4)), axis=1)
    return (int8(n) * (order < 2).reshape(-1)).tobytes()


def int4(n: int) -> bytes:
    codes = np.clip(np.round(RNG.normal(8, 2, (2, n))), 0, 15).astype(np.uint8)
    return (codes[0] | codes[1] << 4).tobytes()


def fibonacci(n: int) -> bytes:
    """n symbols, each as frequent as the two before it together: the deepest tree."""
    counts = [1, 1]
    while len(counts) < n:
        counts.append(counts[-2] + counts[-1])
    return RNG.permutation(np.repeat(np.arange(n, dtype=np.uint8), counts)).tobytes()


def text(n: int) -> bytes:
    words = np.array(["weight", "of", "the", "layer", "is", "scale", "and", "a", "row", "zero"])
    return " ".join(words[RNG.randint(0, len(words), n // 2)]).encode()[:n]


def payload(frame: bytes) -> bytes:
    """Of a frame of one chunk."""
    return frame[HEADER_BYTES + 12 :]


def blocks(block: bytes, times: int) -> bytes:
    """The payload of a block of 2^12 bytes, `times` times over; the encoder writes blocks of 2^16."""
    body = payload(huffman.encode(block, layout="bytes"))[6:]
    table = decoder.read_table(body)[2]
    body = body[:table] + body[table:] * times
    return struct.pack("<BBI", 12, 1, len(body)) + body


def huffman_inputs() -> dict[str, bytes]:
    datas = {
        "bytes_sparse": sparse(5000),
        "bytes_two_of_four": two_of_four(3000),
        "bytes_groups": RNG.randint(0, 100, 1500).astype(np.uint8).tobytes(),
        "bytes_fibonacci": fibonacci(15),
        "bytes_one_symbol": bytes(65536),
        "bytes_random": RNG.bytes(200),
        "nibbles_int4": int4(1000),
        "nibbles_sparse": (np.frombuffer(int4(4000), np.uint8) * (RNG.random_sample(4000) < 0.2)).tobytes(),
        "nibbles_one_symbol": b"\x33" * 3000,
        "bf16_weights": bf16(1000),
        "bf16_sparse": (np.frombuffer(bf16(3000), "<u2") * (RNG.random_sample(3000) < 0.2)).astype("<u2").tobytes(),
        "fp16_weights": floats(1000).astype("<f2").tobytes(),
        "fp32_weights": floats(700).tobytes(),
        "fp32_of_bf16": (floats(1000).view("<u4") & 0xFFFF0000).tobytes(),
    }
    inputs = {}
    for name, data in datas.items():
        layout = name.partition("_")[0]
        number = LAYOUTS.index(layout)
        head = struct.pack("<BH", number, len(data) // ELEMENT_BYTES[number] - 1)
        inputs[name] = head + payload(huffman.encode(data, layout=layout, chunk_size=MAX_CHUNK_SIZE))
    ones = (RNG.random_sample(4096) < 0.1).astype(np.uint8).tobytes()
    inputs["bytes_blocks"] = struct.pack("<BH", 0, 5 * 4096 - 1) + blocks(ones, 5)
    return inputs


def lzw_inputs() -> dict[str, bytes]:
    datas = {"text": text(1500), "run": bytes(60_000), "sparse": sparse(1500)}
    inputs = {}
    for number, variant in enumerate(lzw.VARIANTS):
        for name, data in datas.items():
            coded = lzw.encode(data, variant=variant, chunk_size=MAX_CHUNK_SIZE)
            inputs[f"{variant}_{name}"] = struct.pack("<BH", number, len(data) - 1) + (
                payload(coded) if variant == "lepton" else coded
            )
    data = RNG.bytes(200)
    inputs["lepton_random"] = struct.pack("<BH", 0, len(data) - 1) + payload(lzw.encode(data))
    data = RNG.bytes(4000)  # more codes than the dictionary takes: a second clear code
    inputs["tiff_clear"] = struct.pack("<BH", 3, 0) + lzw.encode(data, variant="tiff")
    # Dictionaries that are full after 2^10 and 2^9 entries; the encoder's are larger.
    inputs["compress_10_bits"] = inputs["compress_text"][:5] + b"\x8a" + inputs["compress_text"][6:]
    inputs["lepton_9_bits"] = inputs["lepton_run"][:3] + b"\x09" + inputs["lepton_run"][4:]
    return inputs


def round_trip_inputs() -> dict[str, bytes]:
    datas = {  # how often it is repeated, and what
        "one": (0, b"a"),
        "text": (3, text(1500)),
        "run": (255, bytes(1024)),
        "two": (255, b"ab"),
        "all": (20, bytes(range(256))),
        "random": (0, RNG.bytes(500)),
        "random_twice": (1, RNG.bytes(500)),
        "sparse": (10, sparse(1500)),
        "two_of_four": (100, two_of_four(700)),
        "groups": (10, RNG.randint(0, 100, 700).astype(np.uint8).tobytes()),
        "fibonacci": (0, fibonacci(15)),
        "int4": (0, int4(700)),
        "bf16": (20, bf16(700)),
        "fp32": (200, floats(350).tobytes()),
    }
    return {name: bytes([repeats]) + data for name, (repeats, data) in datas.items()}


def main() -> None:
    shutil.rmtree(CORPUS, ignore_errors=True)
    for target, inputs in (("huffman", huffman_inputs()), ("lzw", lzw_inputs()), ("round_trip", round_trip_inputs())):
        (CORPUS / target).mkdir(parents=True)
        for name, data in inputs.items():
            (CORPUS / target / name).write_bytes(data)
        print(f"{target}: {len(inputs)} inputs, {sum(map(len, inputs.values()))} bytes")


if __name__ == "__main__":
    main()
