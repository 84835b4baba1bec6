"""The codec beside its peers on real weights: all 2-D weights of MiniLM; speeds in GB/s of original bytes, one thread.

Every rival's bytes are decoded and compared before it is timed.
"""

import functools
from collections.abc import Callable

import imagecodecs
import numpy as np
import pytest
import torch
import zstandard
from minilm import weights

import lepton_kernels as lk
from lepton_kernels.prune import magnitude_mask
from lepton_kernels.quantizers import quantize_weight

LIMIT = 24 << 20  # bytes of each kind of data: slow encoders take seconds


@functools.cache
def data(kind: str) -> tuple[bytes, str]:
    """The bytes, and our layout for them."""
    if kind in ("bf16", "fp32"):
        parts = [w.to(torch.bfloat16).view(torch.int16) if kind == "bf16" else w for w in weights()]
        return b"".join(part.numpy().tobytes() for part in parts)[:LIMIT], kind
    scheme = lk.QuantScheme.of("w4a16" if kind == "int4 g128, packed" else "w8a8")
    parts = []
    for weight in weights():
        if kind == "int8, 80 % pruned":
            weight = weight * magnitude_mask(weight, 0.8)
        parts.append(quantize_weight(weight, scheme)[0].numpy().tobytes())
    return b"".join(parts)[:LIMIT], "bytes"


def zstd(level: int) -> tuple[Callable, Callable]:
    return zstandard.ZstdCompressor(level=level).compress, zstandard.ZstdDecompressor().decompress


RIVALS: dict[str, tuple[Callable, Callable]] = {
    "zstd -1": zstd(1),
    "zstd -19": zstd(19),
    "zlib -6": (lambda raw: imagecodecs.deflate_encode(raw, 6), imagecodecs.deflate_decode),
    "LZW (TIFF, imagecodecs)": (imagecodecs.lzw_encode, imagecodecs.lzw_decode),
}
SLOW_ENCODERS = ("zstd -19",)
KINDS = ["bf16", "fp32", "int8 per channel", "int4 g128, packed", "int8, 80 % pruned"]


@functools.cache
def blobs(kind: str) -> dict[str, bytes]:
    """The data as every contender codes it, each one decoded and compared."""
    raw, _ = data(kind)
    out = {}
    for name, (encode, decode) in contenders(kind).items():
        out[name] = encode(raw)
        assert bytes(decode(out[name])) == raw, name
    return out


def contenders(kind: str) -> dict[str, tuple[Callable, Callable]]:
    huffman, lzw = lk.codec.huffman, lk.codec.lzw
    raw, layout = data(kind)
    out = np.empty(len(raw), np.uint8)
    return {
        "lepton huffman": (
            functools.partial(huffman.encode, layout=layout, threads=1),
            functools.partial(huffman.decode, out=out, threads=1),
        ),
        "lepton lzw": (functools.partial(lzw.encode, threads=1), functools.partial(lzw.decode, out=out, threads=1)),
        **RIVALS,
    }


def entropy(raw: bytes) -> float:
    """Order-0 entropy, bits a byte."""
    share = np.bincount(np.frombuffer(raw, np.uint8), minlength=256) / len(raw)
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_codec(race, direction: str, kind: str) -> None:
    raw, _ = data(kind)
    if direction == "decode":
        calls = {who: functools.partial(decode, blobs(kind)[who]) for who, (_, decode) in contenders(kind).items()}
    else:
        calls = {
            who: functools.partial(encode, raw)
            for who, (encode, _) in contenders(kind).items()
            if who not in SLOW_ENCODERS
        }
    infos = {who: {"ratio": len(blob) / len(raw)} for who, blob in blobs(kind).items()}
    race(f"codec {direction} {kind}", calls, infos, table=f"codec {direction}", row=kind, bytes=len(raw),
         entropy=entropy(raw))  # fmt: skip
