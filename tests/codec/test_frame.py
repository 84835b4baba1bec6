"""The codec frame: round trips of both codecs against a plain-Python decoder, random access, and hostile bytes."""

import contextlib
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import decoder
from conftest import ISAS

from lepton_kernels import codec
from lepton_kernels.codec import CorruptDataError, huffman, lzw
from lepton_kernels.codec.frame import LAYOUTS

GOLDEN = Path(__file__).parent / "golden"


def samples(size: int, seed: int = 0) -> dict[str, bytes]:
    """Data of every character a codec can meet; sizes are rounded down to whole fp32 words."""
    rng = np.random.default_rng(seed)
    size -= size % 4
    fibonacci = [1, 1]
    while sum(fibonacci) < size:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    deep = np.repeat(np.arange(len(fibonacci)), fibonacci)[:size].astype(np.uint8)
    weights = rng.normal(0, 0.02, size // 2 + 1).astype(np.float32)
    return {
        "random": rng.integers(0, 256, size, dtype=np.uint8).tobytes(),
        "int8 weights": np.clip(rng.normal(0, 25, size), -127, 127).astype(np.int8).tobytes(),
        "pruned": (rng.integers(-9, 9, size) * (rng.random(size) < 0.2)).astype(np.int8).tobytes(),
        "one symbol": b"\x07" * size,
        "two symbols": rng.integers(0, 2, size, dtype=np.uint8).tobytes(),
        "all equally often": np.arange(size, dtype=np.uint8).tobytes(),
        "deepest tree": rng.permutation(deep).tobytes(),
        "fp32": weights.tobytes()[:size],
        "fp32 born bf16": torch.from_numpy(weights).bfloat16().float().numpy().tobytes()[:size],
        "bf16": torch.from_numpy(weights).bfloat16().view(torch.uint8).numpy().tobytes()[:size],
        "ff": b"\xff" * size,
    }


SIZES = [0, 4, 8, 60, 64, 68, 4092, 4096, 4100, 65536, 70000, 300_000]


@pytest.mark.parametrize("size", SIZES)
def test_round_trip_of_every_layout_and_codec(size):
    for name, data in samples(size).items():
        for layout in LAYOUTS:
            for chunk_size in (4096, 262144):
                blob = huffman.encode(data, layout=layout, chunk_size=chunk_size)
                assert huffman.decode(blob) == data, (name, layout)
                assert len(blob) <= 1.01 * size + 64
        blob = lzw.encode(data)
        assert lzw.decode(blob) == data, name
        assert len(blob) <= 1.01 * size + 64


@pytest.mark.parametrize("size", [0, 4, 68, 5000, 9000])
def test_the_python_decoder_written_from_the_specification_agrees(size):
    for name, data in samples(size, seed=1).items():
        for layout in LAYOUTS:
            assert decoder.decode(huffman.encode(data, layout=layout, chunk_size=8192)) == data, (name, layout)
        assert decoder.decode(lzw.encode(data)) == data, name


@settings(deadline=None, max_examples=200)
@given(
    data=st.one_of(st.binary(max_size=20_000), st.text("ab", max_size=9000).map(str.encode)),
    layout=st.sampled_from(LAYOUTS),
    threads=st.integers(1, 3),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_round_trip_property(data, layout, threads, cut):
    data = data[: len(data) // 4 * 4]
    blob = huffman.encode(data, layout=layout, chunk_size=4096, threads=threads)
    assert huffman.decode(blob, threads=threads) == data
    start, stop = sorted(int(share * len(data)) for share in cut)
    assert huffman.decode(blob, start=start, stop=stop) == data[start:stop]


def test_every_level_and_thread_count_writes_and_reads_the_same_bytes(run_python):
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import hashlib, test_frame
from lepton_kernels.codec import huffman
digest = hashlib.sha256()
for data in test_frame.samples(150_000).values():
    for layout in test_frame.LAYOUTS:
        for threads in (1, 2):
            blob = huffman.encode(data, layout=layout, threads=threads, chunk_size=65536)
            digest.update(blob)
            assert huffman.decode(blob, threads=threads) == data
print(digest.hexdigest())
"""
    assert len({run_python(program, LEPTON_MAX_ISA=isa) for isa in ISAS}) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_that_a_sample_misrepresents(layout):
    # Of 256 pieces of 1 KiB the encoder counts one in eight: these (huffman.cpp).
    rng = np.random.default_rng(2)
    pieces = np.arange(256)
    counted = np.repeat(pieces % 8 == (pieces // 8 * 8 * 0x9E3779B1 & 0xFFFFFFFF) >> 29, 1024)
    assert counted.sum() == counted.size // 8
    narrow = np.clip(rng.normal(110, 5, counted.size).round(), 90, 130).astype(np.uint8)
    lone = narrow.copy()
    lone[np.flatnonzero(~counted)[0]] = 3  # the only one of its kind, where nobody counts
    for name, data in {
        "a symbol that no sample has": lone,
        "random where nobody counts": np.where(counted, narrow, rng.integers(0, 256, counted.size, dtype=np.uint8)),
        "rare symbols are frequent": np.where(counted, narrow, np.uint8(95)),
        "nobody expects anything": np.where(counted, rng.integers(0, 256, counted.size, dtype=np.uint8), np.uint8(1)),
    }.items():
        raw = data.astype(np.uint8).tobytes()
        blob = huffman.encode(raw, layout=layout, threads=1)
        assert huffman.decode(blob) == raw, name
        assert len(blob) <= len(raw) + 100, name
        if layout == "bytes" and name in ("a symbol that no sample has", "rare symbols are frequent"):
            # Seven of eight symbols are one symbol in the second: its code is a whole bit, where 0.19 would do.
            assert len(blob) <= (codec.entropy(raw) + 0.5) / 8 * len(raw), name


def test_size_is_within_one_percent_of_the_entropy_of_weights():
    data = samples(2_000_000)["int8 weights"]
    assert len(huffman.encode(data)) <= 1.01 * codec.entropy(data) / 8 * len(data)


def test_entropy_is_that_of_the_planes():
    assert codec.entropy(bytes(1000)) == 0
    assert codec.entropy(bytes(range(256)) * 4) == pytest.approx(8)
    assert codec.entropy(b"\x10" * 64 + b"\x01" * 64, "nibbles") == pytest.approx(2)
    assert codec.entropy(b"") == 0


def test_float_tensors_are_split_by_dtype():
    weight = torch.randn(300, 40) * 0.02
    for tensor, layout in ((weight, "fp32"), (weight.bfloat16(), "bf16"), (weight.half(), "fp16")):
        blob = huffman.encode(tensor)
        assert codec.info(blob).layout == layout
        assert huffman.decode(blob) == tensor.view(torch.uint8).numpy().tobytes()
    assert codec.info(huffman.encode(weight.bfloat16())).ratio < 0.72
    assert codec.info(huffman.encode(weight.numpy())).layout == "fp32"


def test_decode_into_a_tensor():
    data = samples(100_000)["int8 weights"]
    target = torch.empty(len(data), dtype=torch.int8)
    assert huffman.decode(huffman.encode(data), out=target) is target
    assert target.numpy().tobytes() == data


@pytest.mark.parametrize("layout", ["nibbles", "bf16", "fp32"])
def test_large_output_at_any_address(layout):
    """Large planes are joined to memory past the caches, in whole lines, wherever in a line the output begins."""
    rng = np.random.default_rng(5)
    size = 24 << 20
    data = (rng.standard_normal(size // 4, np.float32) if layout == "fp32" else rng.integers(0, 9, size, np.uint8)).data
    blob = huffman.encode(data, layout=layout, threads=2)
    memory = np.empty(size + 64, np.uint8)
    for start in (0, 1, 2, 16, 62):
        out = memory[start : start + size]
        huffman.decode(blob, out=out, threads=2)
        assert out.data == data.cast("B"), start


def test_info():
    info = codec.info(lzw.encode(b"abc" * 5000, chunk_size=4096))
    assert (info.codec, info.layout, info.size, info.chunk_size, info.chunks) == ("lzw", "bytes", 15000, 4096, 4)
    assert info.compressed_size == len(lzw.encode(b"abc" * 5000, chunk_size=4096))


@pytest.mark.parametrize("coder", [huffman, lzw])
def test_every_truncation_and_every_flipped_bit_is_refused(coder):
    data = samples(9000)["int8 weights" if coder is huffman else "pruned"]
    blob = coder.encode(data, chunk_size=4096)
    for length in [*range(64), *range(64, len(blob), 61), len(blob) - 1]:
        with pytest.raises(CorruptDataError):
            coder.decode(blob[:length])
    with pytest.raises(CorruptDataError):
        coder.decode(blob + b"\0")
    for position in [*range(80), *range(80, len(blob), 37)]:
        for bit in range(8):
            damaged = bytearray(blob)
            damaged[position] ^= 1 << bit
            with pytest.raises(CorruptDataError):
                coder.decode(damaged)


def resealed(blob: bytes, payloads: list[bytes]) -> bytes:
    """The frame with other payloads and matching checksums: what an attacker would send."""
    sums = b"".join(struct.pack("<Q", xxhash.xxh3_64_intdigest(payload)) for payload in payloads)
    tables = struct.pack(f"<{len(payloads)}I", *map(len, payloads)) + sums
    check = struct.pack("<Q", xxhash.xxh3_64_intdigest(blob[:24] + tables))
    return blob[:24] + check + tables + b"".join(payloads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("coder", [huffman, lzw])
def test_hostile_payloads_with_right_checksums_are_decoded_or_refused(coder, layout):
    rng = np.random.default_rng(5)
    for name, data in samples(3000).items():
        blob = huffman.encode(data, layout=layout) if coder is huffman else lzw.encode(data)
        payload = blob[44:]
        assert resealed(blob, [payload]) == blob
        for _ in range(60):
            hostile = bytearray(payload)
            for _ in range(rng.integers(1, 4)):
                hostile[rng.integers(0, min(len(hostile), rng.choice([24, 300, 10000])))] = rng.integers(0, 256)
            if rng.random() < 0.3:
                hostile = hostile[: rng.integers(0, len(hostile))]
            with contextlib.suppress(CorruptDataError):
                assert len(coder.decode(resealed(blob, [bytes(hostile)]))) == len(data), name


def test_a_header_that_promises_too_much_is_refused_before_anything_is_allocated():
    blob = huffman.encode(bytes(10_000_000))
    assert len(blob) < 2000
    with pytest.raises(CorruptDataError, match=r"holds 10000000 bytes; max_size is 9999999"):
        huffman.decode(blob, max_size=9_999_999)
    huge = struct.pack("<4sBBBBQII", b"LPTN", 2, 1, 0, 0, 1 << 50, 1 << 24, 1 << 26)
    with pytest.raises(CorruptDataError, match="tables need"):
        huffman.decode(huge + bytes(8))


def test_errors_name_the_argument_the_value_and_what_is_allowed():
    blob = huffman.encode(b"abcd")
    for call, error, text in [
        (lambda: huffman.encode(3), TypeError, "data is int; allowed: a contiguous bytes-like"),
        (lambda: huffman.encode(b"abc", layout="fp32"), ValueError, "data has 3 bytes; allowed: a multiple of 4"),
        (lambda: huffman.encode(b"abc", layout="x"), ValueError, "layout is 'x'; allowed: auto, bytes, nibbles"),
        (
            lambda: huffman.encode(b"abc", chunk_size=5000),
            ValueError,
            "chunk_size is 5000; allowed: a multiple of 4096",
        ),
        (lambda: huffman.encode(b"abc", threads=0), ValueError, "threads is 0; allowed: 1 or more"),
        (
            lambda: huffman.decode(blob, start=3, stop=2),
            ValueError,
            "start, stop are 3, 2; allowed: 0 <= start <= stop",
        ),
        (lambda: huffman.decode(blob, out=bytearray(3)), ValueError, "out has 3 bytes, writeable: True; allowed: 4"),
        (lambda: huffman.decode(blob, out=bytes(4)), ValueError, "writeable: False; allowed: 4, writeable"),
        (lambda: lzw.decode(blob), CorruptDataError, "written by codec id 1; wanted: 2"),
        (lambda: huffman.decode(b"LPTN"), CorruptDataError, "blob has 4 bytes; a frame has 32 or more"),
        (lambda: huffman.decode(b"\0" * 99), CorruptDataError, "a frame starts with b'LPTN'"),
        (lambda: lzw.encode(b"", variant="zip"), ValueError, "variant is 'zip'; allowed: lepton, compress, gif, tiff"),
    ]:
        with pytest.raises(error, match=text.replace("[", r"\[")):
            call()


def test_the_codec_imports_and_works_without_torch(run_python):
    program = """
import sys; sys.modules["torch"] = None
from lepton_kernels import codec
assert codec.huffman.decode(codec.huffman.encode(b"weights" * 999)) == b"weights" * 999
print("ok")
"""
    assert run_python(program) == "ok\n"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.lptn")), ids=lambda path: path.name)
def test_files_of_past_versions_still_open(path):
    """golden/NAME.lptn decodes to golden/NAME.bin. The format does not change silently."""
    blob, data = path.read_bytes(), path.with_suffix(".bin").read_bytes()
    coder = huffman if codec.info(blob).codec == "huffman" else lzw
    assert coder.decode(blob) == data
    assert decoder.decode(blob) == data


def test_our_xxh3_is_that_of_the_package(run_python):
    program = """
import numpy as np, xxhash
from lepton_kernels._runtime import C
data = np.random.default_rng(0).integers(0, 256, 70_000, dtype=np.uint8)
for size in [*range(2200), 4096, 16384 + 17, 70_000]:
    part = data[7 : 7 + size] if size < 70_000 else data
    assert C.xxh3(part.ctypes.data, part.size) == xxhash.xxh3_64_intdigest(part.data), size
print("same")
"""
    for isa in ISAS:
        assert run_python(program, LEPTON_MAX_ISA=isa) == "same\n"


def test_out_must_be_where_bytes_are_written_to():
    blob = huffman.encode(bytes(1000))
    with pytest.raises(ValueError, match="out is not contiguous"):
        huffman.decode(blob, out=np.zeros((1000, 2), np.uint8)[:, 0])
    with pytest.raises(ValueError, match="out is not contiguous"):
        huffman.decode(blob, out=torch.zeros(1000, 2, dtype=torch.uint8)[:, 0])


def test_any_number_of_threads():
    assert huffman.decode(huffman.encode(bytes(1 << 20), threads=2**30)) == bytes(1 << 20)
