"""The codec beside its peers on real weights: all 2-D weights of MiniLM; speeds in GB/s of original bytes, one thread.

Every rival's bytes are decoded and compared before it is timed. Where LEPTON_MAX_ISA caps the level (run.py does), only
Huffman decoding is measured, beside huff0.
"""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import rivals_codec
import torch
from minilm import weights
from rivals_codec import Codec

import lepton_kernels as lk
from lepton_kernels.quantizers import quantize_weight
from lepton_kernels.sparse import Pattern

LIMIT = 16 << 20  # bytes of each kind of data: slow encoders take seconds
CAPPED = os.environ.get("LEPTON_MAX_ISA")
SMALL_CHUNK = 65536


@functools.cache
def data(kind: str) -> tuple[bytes, str]:
    """The bytes, and our layout for them."""
    if kind == "text":  # sources of torch: words that come again
        files = sorted(Path(torch.__file__).parent.glob("nn/**/*.py")) + sorted(
            Path(torch.__file__).parent.glob("*.py")
        )
        return b"".join(file.read_bytes() for file in files)[:LIMIT], "bytes"
    if kind == "bf16 exponents":
        words = np.frombuffer(data("bf16")[0], np.uint16)
        return (words << 1 >> 8).astype(np.uint8).tobytes(), "bytes"
    if kind in ("bf16", "fp32"):
        parts = [w.to(torch.bfloat16).view(torch.int16) if kind == "bf16" else w for w in weights()]
        return b"".join(part.numpy().tobytes() for part in parts)[:LIMIT], kind
    if kind == "int4, a byte each":
        packed = np.frombuffer(data("int4 g128, packed")[0], np.uint8)
        return np.stack([packed & 15, packed >> 4], 1).tobytes()[:LIMIT], "bytes"
    scheme = lk.QuantScheme.of("w4a16" if kind == "int4 g128, packed" else "w8a8")
    parts = []
    for weight in weights():
        if kind == "int8, 80 % pruned":
            weight = weight * Pattern.of("unstructured").keep(weight.square(), 0.8)
        parts.append(quantize_weight(weight, scheme)[0].numpy().tobytes())
    return b"".join(parts)[:LIMIT], "bytes"


SLOW_ENCODERS = ("zstd -19",)
HUFFMAN_KINDS = [
    "bf16", "bf16 exponents", "fp32", "int8 per channel", "int4 g128, packed", "int4, a byte each", "int8, 80 % pruned",
]  # fmt: skip
LZW_KINDS = ["text", "bf16 exponents", "int8, 80 % pruned"]


def copy(raw: bytes) -> Codec:
    out = np.empty(len(raw), np.uint8)
    source = np.frombuffer(raw, np.uint8)
    return (lambda _: raw), (lambda _: np.copyto(out, source) or out)


def huffman_contenders(kind: str) -> dict[str, Codec]:
    raw, layout = data(kind)
    out = np.empty(len(raw), np.uint8)
    ours = {
        "lepton huffman": (
            functools.partial(lk.codec.huffman.encode, layout=layout, threads=1),
            functools.partial(lk.codec.huffman.decode, out=out, threads=1),
        )
    }
    if CAPPED:
        return {**ours, "huff0 X2": rivals_codec.HUFFMAN["huff0 X2"], "huff0 X1": rivals_codec.HUFFMAN["huff0 X1"]}
    zipnn = {}
    if kind in ("bf16", "fp32") and rivals_codec.is_there("zipnn"):
        zipnn = {"zipnn": rivals_codec.zipnn("bfloat16" if kind == "bf16" else "float32")}
    return {**ours, "copy": copy(raw), **rivals_codec.HUFFMAN, **zipnn}


def lzw_contenders(kind: str) -> dict[str, Codec]:
    raw, _ = data(kind)
    out = np.empty(len(raw), np.uint8)
    lzw = lk.codec.lzw
    variants = {
        f"lepton {variant}": (
            functools.partial(lzw.encode, variant=variant),
            functools.partial(lzw.decode, variant=variant),
        )
        for variant in ("tiff", "gif", "compress")
    }
    chunks = (functools.partial(lzw.encode, threads=1), functools.partial(lzw.decode, out=out, threads=1))
    return {"lepton lzw": chunks, **variants, **rivals_codec.LZW}


@functools.cache
def blobs(kind: str, contenders) -> dict[str, bytes]:
    """The data as every contender codes it, each one decoded and compared."""
    raw, _ = data(kind)
    out = {}
    for name, (encode, decode) in contenders(kind).items():
        out[name] = encode(raw)
        assert bytes(decode(out[name])) == raw, name
    return out


def run(race, what: str, direction: str, kind: str, contenders) -> None:
    raw, layout = data(kind)
    coded = blobs(kind, contenders)
    if direction == "decode":
        calls = {who: functools.partial(decode, coded[who]) for who, (_, decode) in contenders(kind).items()}
    else:
        leave_out = (*SLOW_ENCODERS, "copy", "huff0 X1")
        calls = {
            who: functools.partial(encode, raw) for who, (encode, _) in contenders(kind).items() if who not in leave_out
        }
    infos: dict[str, dict] = {who: {"ratio": len(blob) / len(raw)} for who, blob in coded.items()}
    if what == "huffman":
        small = lk.codec.huffman.encode(raw, layout=layout, chunk_size=SMALL_CHUNK)
        infos["lepton huffman"] |= {"ratio64": len(small) / len(raw), "ideal": lk.codec.entropy(raw, layout) / 8}
    level = f", level {CAPPED}" if CAPPED else ""
    race(
        f"{what} {direction} {kind}{level}", calls, infos, table=f"{what} {direction}{level}", row=kind, bytes=len(raw)
    )


@pytest.mark.parametrize("kind", HUFFMAN_KINDS)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_huffman(race, direction: str, kind: str) -> None:
    run(race, "huffman", direction, kind, huffman_contenders)


@pytest.mark.parametrize("kind", LZW_KINDS)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_lzw(race, direction: str, kind: str) -> None:
    run(race, "lzw", direction, kind, lzw_contenders)
