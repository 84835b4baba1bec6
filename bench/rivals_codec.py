"""What the codec is measured against: each rival as (encode, decode), bytes to bytes, one thread."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import zstandard
from PIL import Image, TiffImagePlugin

BUILD = Path(__file__).parents[1] / "build" / "bench"
Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


@functools.cache
def _huff0() -> ctypes.CDLL:
    """zstd's Huffman coder by itself (huff0.c), built from the sources of the installed `zstandard`."""
    version = importlib.metadata.version("zstandard")
    library = BUILD / f"huff0-{version}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:",
                       f"zstandard=={version}", "-d", folder]  # fmt: skip
            subprocess.run(command, check=True)
            with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
            sources = next(Path(folder).glob("*/zstd"))
            built = Path(folder) / library.name
            subprocess.run(["cc", "-O3", "-DNDEBUG", "-w", "-fPIC", "-shared", f"-I{sources}",
                            Path(__file__).with_name("huff0.c"), "-o", built], check=True)  # fmt: skip
            shutil.move(built, library)
    loaded = ctypes.CDLL(str(library))
    loaded.huff0_encode.restype = ctypes.c_size_t
    return loaded


def huff0(symbols: int) -> Codec:
    """symbols: 1 or 2 a look-up, huff0's X1 and X2. The output's size is written in front."""

    def encode(raw: bytes) -> bytes:
        out = ctypes.create_string_buffer(len(raw) + 4 * (len(raw) // 65536 + 2))
        n = _huff0().huff0_encode(raw, ctypes.c_size_t(len(raw)), out)
        return len(raw).to_bytes(8, "little") + ctypes.string_at(out, n)

    memory: dict[int, ctypes.Array] = {}  # as ours, it decodes to memory that is there

    def decode(blob: bytes) -> bytes:
        size = int.from_bytes(blob[:8], "little")
        out = memory.setdefault(size, ctypes.create_string_buffer(size))
        source = ctypes.cast(ctypes.c_char_p(blob), ctypes.c_void_p).value + 8
        if _huff0().huff0_decode(
            ctypes.c_void_p(source), ctypes.c_size_t(len(blob) - 8), out, ctypes.c_size_t(size), symbols
        ):
            raise ValueError("huff0: damaged")
        return memoryview(out)

    return encode, decode


def zstd(level: int) -> Codec:
    return zstandard.ZstdCompressor(level=level).compress, zstandard.ZstdDecompressor().decompress


def zipnn(dtype: str) -> Codec:
    from zipnn import ZipNN

    coder = ZipNN(bytearray_dtype=dtype, threads=1)
    return lambda raw: coder.compress(bytearray(raw)), coder.decompress


def _image(raw: bytes) -> tuple[np.ndarray, int]:
    """The bytes as an image of 4096 columns, the last row filled up."""
    rows = -(-len(raw) // 4096)
    return np.frombuffer(raw.ljust(4096 * rows, b"\0"), np.uint8).reshape(rows, 4096), len(raw)


def libtiff() -> Codec:
    """libtiff's LZW, through Pillow, in strips of 256 KiB, as large as our chunks."""
    TiffImagePlugin.WRITE_LIBTIFF = True
    TiffImagePlugin.READ_LIBTIFF = True
    TiffImagePlugin.STRIP_SIZE = 1 << 18

    def encode(raw: bytes) -> bytes:
        file = io.BytesIO()
        Image.fromarray(_image(raw)[0]).save(file, "tiff", compression="tiff_lzw")
        return len(raw).to_bytes(8, "little") + file.getvalue()

    def decode(blob: bytes) -> bytes:
        size = int.from_bytes(blob[:8], "little")
        return Image.open(io.BytesIO(blob[8:])).tobytes()[:size]

    return encode, decode


def giflib() -> Codec:
    """giflib's LZW, through imagecodecs."""

    def encode(raw: bytes) -> bytes:
        return len(raw).to_bytes(8, "little") + imagecodecs.gif_encode(_image(raw)[0])

    def decode(blob: bytes) -> bytes:
        image = imagecodecs.gif_decode(blob[8:], asrgb=False)
        return memoryview(image.reshape(-1))[: int.from_bytes(blob[:8], "little")]

    return encode, decode


def ncompress() -> Codec:
    """compress(1), a process for each call."""
    run = functools.partial(subprocess.run, capture_output=True)
    return (lambda raw: run(["compress", "-c"], input=raw).stdout), (
        lambda blob: run(["compress", "-dc"], input=blob).stdout
    )


def igzip() -> Codec:
    from isal import isal_zlib

    return functools.partial(isal_zlib.compress, level=1), isal_zlib.decompress


def is_there(module: str) -> bool:
    """zipnn and isal come with the optional dependencies `bench`."""
    return importlib.util.find_spec(module) is not None


QUICK = os.environ.get("LEPTON_BENCH_CASES") == "quick"  # leaves out what has to be built first
HUFFMAN: dict[str, Codec] = {
    **({} if QUICK else {"huff0 X2": huff0(2), "huff0 X1": huff0(1)}),
    "zstd -1": zstd(1),
    "zstd -3": zstd(3),
    "zstd -19": zstd(19),
    **({"igzip -1": igzip()} if is_there("isal") else {}),
}
LZW: dict[str, Codec] = {
    "libtiff": libtiff(),
    "giflib": giflib(),
    "imagecodecs (TIFF)": (imagecodecs.lzw_encode, imagecodecs.lzw_decode),
    **({"ncompress": ncompress()} if shutil.which("compress") else {}),
}
