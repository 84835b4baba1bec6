"""LZW's other dialects against the programs that own them: compress(1), gzip, Pillow (GIF), libtiff's (imagecodecs)."""

import contextlib
import io
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lepton_kernels.codec import CorruptDataError, lzw

GOLDEN = Path(__file__).parent / "golden"
FOREIGN = ["compress", "gif", "tiff"]


def samples() -> list[bytes]:
    rng = np.random.default_rng(3)
    out = []
    for size in (1, 2, 7, 300, 3000, 70_000, 600_000):
        out += [
            rng.integers(0, 256, size, dtype=np.uint8).tobytes(),
            np.clip(rng.normal(0, 5, size), -127, 127).astype(np.int8).tobytes(),
            bytes(size),
            (b"the quick brown fox " * (size // 20 + 1))[:size],
            # Incompressible, then very regular: compress(1) clears its dictionary here.
            rng.integers(0, 256, size // 2, dtype=np.uint8).tobytes() + b"ab" * (size // 4),
        ]
    return [data for data in out if data]


@pytest.mark.parametrize("variant", FOREIGN)
def test_round_trip(variant):
    for data in [b"", *samples()]:
        assert lzw.decode(lzw.encode(data, variant=variant), variant=variant) == data


@pytest.mark.parametrize("command", [["gzip", "-dc"], ["uncompress", "-c"]])
def test_compress_files_open_in_the_system_tools(command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    for data in samples():
        blob = lzw.encode(data, variant="compress")
        assert subprocess.run(command, input=blob, capture_output=True, check=True).stdout == data


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_files_of_compress_are_read(bits):
    if shutil.which("compress") is None:
        pytest.skip("compress (package ncompress) is not installed; the golden file stands in")
    for data in samples():
        blob = subprocess.run(["compress", "-cf", f"-b{bits}"], input=data, capture_output=True).stdout
        assert lzw.decode(blob, variant="compress") == data


def test_a_golden_file_of_compress_is_read():
    assert lzw.decode((GOLDEN / "ncompress.Z").read_bytes(), variant="compress") == (GOLDEN / "lzw.bin").read_bytes()


def test_tiff_both_ways():
    imagecodecs = pytest.importorskip("imagecodecs")
    for data in samples():
        assert imagecodecs.lzw_decode(lzw.encode(data, variant="tiff"), out=len(data)) == data
        assert lzw.decode(imagecodecs.lzw_encode(data), variant="tiff") == data


def gif_of(data: bytes, width: int, height: int) -> bytes:
    screen = struct.pack("<HHBBB", width, height, 0xF7, 0, 0) + bytes(range(256)) * 3
    image = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + lzw.encode(data, variant="gif")
    return b"GIF89a" + screen + image + b";"


def gif_image_data(gif: bytes) -> bytes:
    """The LZW stream of a GIF's first image."""
    at = 13 + (3 * (2 << (gif[10] & 7)) if gif[10] & 0x80 else 0)
    while gif[at : at + 1] == b"!":
        at += 2
        while gif[at]:
            at += gif[at] + 1
        at += 1
    at += 10 + (3 * (2 << (gif[at + 9] & 7)) if gif[at + 9] & 0x80 else 0)
    end = at + 1
    while gif[end]:
        end += gif[end] + 1
    return gif[at : end + 1]


def test_gif_both_ways():
    image_module = pytest.importorskip("PIL.Image")
    for data in samples():
        width = min(len(data), 600)
        height = len(data) // width
        pixels = data[: width * height]
        with image_module.open(io.BytesIO(gif_of(pixels, width, height))) as image:
            assert image.tobytes() == pixels
        buffer = io.BytesIO()
        image = image_module.frombytes("P", (width, height), pixels)
        image.putpalette(list(range(256)) * 3)
        image.save(buffer, "GIF", optimize=False, interlace=0)
        assert lzw.decode(gif_image_data(buffer.getvalue()), variant="gif") == pixels


@pytest.mark.parametrize("variant", FOREIGN)
def test_hostile_streams_are_decoded_or_refused_within_the_limit(variant):
    rng = np.random.default_rng(9)
    for data in samples()[5:25]:
        blob = lzw.encode(data, variant=variant)
        for _ in range(50):
            hostile = bytearray(blob)
            hostile[rng.integers(0, len(blob))] = rng.integers(0, 256)
            hostile = hostile[: rng.integers(1, len(blob) + 1)]
            with contextlib.suppress(CorruptDataError):
                assert len(lzw.decode(hostile, variant=variant, max_size=1 << 20)) <= 1 << 20


def test_what_is_no_stream_is_an_error():
    with pytest.raises(CorruptDataError, match="not a stream of this kind"):
        lzw.decode(b"PK\x03\x04abc", variant="compress")
    with pytest.raises(CorruptDataError, match="the data ends too early"):
        lzw.decode(lzw.encode(bytes(5000), variant="gif")[:-3], variant="gif")
    with pytest.raises(CorruptDataError, match="more output than announced"):
        lzw.decode(lzw.encode(bytes(5000), variant="tiff"), variant="tiff", max_size=4999)
    with pytest.raises(ValueError, match="allowed for variant 'lepton', not 'gif'"):
        lzw.decode(b"", variant="gif", start=1)


def test_files_of_compress_without_block_mode_are_read():
    """No clear code, 256 is a string; the first code has 9 bits all the same."""
    assert lzw.decode(bytes.fromhex("1f9d106100061403"), variant="compress") == b"aaaaaab"
    if shutil.which("gzip"):
        blob = bytes.fromhex("1f9d106100061403")
        assert subprocess.run(["gzip", "-dc"], input=blob, capture_output=True, check=True).stdout == b"aaaaaab"
