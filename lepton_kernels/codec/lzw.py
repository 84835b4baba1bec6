"""LZW (Welch 1984). It loses to Huffman on weights; it is here for data with repeated strings and for old files."""

from typing import Any

import numpy as np

from lepton_kernels._runtime import C
from lepton_kernels.codec import frame

VARIANTS = ("lepton", "compress", "gif", "tiff")


def _variant(function: str, variant: str) -> int:
    if variant not in VARIANTS:
        raise ValueError(f"{function}: variant is {variant!r}; allowed: {', '.join(VARIANTS)}")
    return VARIANTS.index(variant)


def encode(
    data: Any,
    *,
    variant: str = "lepton",
    threads: int | None = None,
    chunk_size: int = frame.DEFAULT_CHUNK_SIZE,
) -> bytes:
    """`data`, read as bytes, as LZW.

    variant: "lepton", a frame as codec.huffman.encode writes it (threads and chunk_size are for it alone); "compress",
    a .Z file; "gif", the data of a GIF image (symbol width, then sub-blocks); "tiff", a strip of a TIFF image.
    Raises ValueError or TypeError for arguments that fit nothing.
    """
    number = _variant("codec.lzw.encode", variant)
    if variant == "lepton":
        return frame.encode("lzw", data, "bytes", threads, chunk_size)
    source, _ = frame.as_bytes("codec.lzw.encode", "data", data)
    coded = np.empty(C.lzw_stream_bound(number, source.size), dtype=np.uint8)
    return coded[: C.lzw_stream_encode(number, source.ctypes.data, source.size, coded.ctypes.data)].tobytes()


def decode(
    blob: Any,
    *,
    variant: str = "lepton",
    start: int = 0,
    stop: int | None = None,
    out: Any = None,
    threads: int | None = None,
    max_size: int = frame.DEFAULT_MAX_SIZE,
) -> Any:
    """What `blob` holds, as codec.huffman.decode says; start, stop, out and threads are for variant "lepton" alone.

    Raises CorruptDataError for a blob that is no such stream or holds more than max_size bytes. A .Z file says neither
    its length nor a checksum, so a truncated one may decode to less.
    """
    number = _variant("codec.lzw.decode", variant)
    if variant == "lepton":
        return frame.decode("lzw", blob, start, stop, out, threads, max_size)
    if start != 0 or stop is not None or out is not None:
        raise ValueError(
            f"codec.lzw.decode: start, stop or out was given; allowed for variant 'lepton', not {variant!r}"
        )
    source, _ = frame.as_bytes("codec.lzw.decode", "blob", blob)
    text, problem = C.lzw_stream_decode(number, source.ctypes.data, source.size, max_size)
    if problem is not None:
        raise frame.CorruptDataError(f"codec.lzw.decode: {problem}")
    return text
