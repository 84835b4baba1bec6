"""Blockwise int8 and int4: the bits of reference.py on every level and number of threads, error feedback, errors."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lepton_kernels as lk
from lepton_kernels import reference

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import ISAS

BITS = [8, 4]
# None, one, below, at and past a block; odd; several tasks of the threads and an odd rest.
SIZES = [0, 1, 2, 127, 128, 129, 255, 4096 + 17, 100003]
NAN = 0x7FC00000  # its bits, as scales have it


def make(n: int, rng: torch.Generator) -> Tensor:
    """Values whose blocks are of all magnitudes."""
    exponent = torch.randint(-30, 30, (-(-n // lk.blockwise.BLOCK),), generator=rng)
    return torch.ldexp(torch.randn(n, generator=rng), exponent.repeat_interleave(lk.blockwise.BLOCK)[:n])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_quantize(x: Tensor, bits: int, residual: Tensor | None) -> Tensor:
    want, left = reference.quantize_blockwise(x, bits, residual)
    got = lk.blockwise.quantize(x, bits, residual)
    assert same_bits(got, want), (x.numel(), bits)
    assert residual is None or same_bits(residual, left), (x.numel(), bits)
    return got


def check_means(packed: Tensor, n: int, bits: int) -> None:
    want = reference.mean_blockwise(packed, n, bits)
    assert same_bits(lk.blockwise.mean(packed, n, bits), want), (packed.shape, n, bits)
    repacked = reference.quantize_blockwise(want, bits)[0]
    assert same_bits(lk.blockwise.requantize_mean(packed, n, bits), repacked), (packed.shape, n, bits)
    for row in packed:
        assert same_bits(lk.blockwise.dequantize(row, n, bits), reference.dequantize_blockwise(row, n, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", SIZES)
def test_codes_and_residuals(n, bits, threads, rng):
    x = make(n, rng)
    packed = check_quantize(x, bits, None)
    assert packed.numel() == lk.blockwise.packed_bytes(n, bits)
    check_quantize(x, bits, make(n, rng))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "ranks"), [(0, 1), (1, 2), (129, 1), (255, 3), (4113, 2), (4113, 8), (100003, 5)])
def test_means(n, ranks, bits, threads, rng):
    check_means(torch.stack([lk.blockwise.quantize(make(n, rng), bits) for _ in range(ranks)]), n, bits)


def extremes(bits: int, rng: torch.Generator) -> Tensor:
    """Blocks with NaN or infinity (0 to 2); zeros, denormal numbers, nearly a scale (3 to 5); the least scale, one
    large value, the largest ones (6 to 8). The last block is not whole."""
    most, least = 127 if bits == 8 else 7, 2.0**-126
    x = torch.randn(9, lk.blockwise.BLOCK, generator=rng)
    x[0, 5], x[1, 0], x[2, 127] = torch.nan, torch.inf, -torch.inf
    x[3], x[4] = 0, x[4] * 2.0**-140
    x[5] *= 0.999 * least * most / x[5].abs().max()
    x[6] *= 1.001 * least * most / x[6].abs().max()
    x[7, 1] = 1e30
    x[8, 2], x[8, 3] = torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max
    return x.flatten()[:-3].clone()


@pytest.mark.parametrize("bits", BITS)
def test_extremes(bits, rng):
    x, block = extremes(bits, rng), lk.blockwise.BLOCK
    n, left = x.numel(), torch.zeros(x.numel())
    packed = check_quantize(x, bits, left)
    decoded, scale = lk.blockwise.dequantize(packed, n, bits), packed[-4 * 9 :].clone().view(torch.float32)
    assert (scale[:3].view(torch.int32) == NAN).all()
    assert decoded[: 3 * block].isnan().all()
    assert not left[: 3 * block].any()
    assert not scale[3:6].any()
    assert same_bits(left[3 * block : 6 * block], x[3 * block : 6 * block])
    assert (scale[6:] > 0).all()
    assert decoded[3 * block :].isfinite().all()
    # Half a code, and the rounding of a product near the largest code.
    assert (left[6 * block :].abs() <= 0.5001 * scale[6:].repeat_interleave(block)[:-3]).all()
    check_quantize(x, bits, x.flip(0))
    check_means(torch.stack([packed, lk.blockwise.quantize(x.flip(0), bits)]), n, bits)
    # The sum overflows: the mean is infinite and, packed again, no number.
    check_means(lk.blockwise.quantize(torch.full((130,), 3e38), bits).expand(2, -1).contiguous(), 130, bits)


@pytest.mark.parametrize("bits", BITS)
def test_padding_counts_for_nothing(bits, rng):
    """Whatever a sender left behind the last code."""
    n = 129
    packed = torch.stack([lk.blockwise.quantize(make(n, rng), bits) for _ in range(2)])
    want = lk.blockwise.requantize_mean(packed, n, bits)
    codes = packed.shape[1] - 8
    packed[:, codes - 3 : codes] = 0x7F
    check_means(packed, n, bits)
    assert same_bits(lk.blockwise.requantize_mean(packed, n, bits), want)


@pytest.mark.parametrize("isa", ISAS)
def test_levels(isa, run_at_level):
    run_at_level(
        isa,
        """
for bits in BITS:
    for n in SIZES:
        check_quantize(make(n, rng), bits, make(n, rng))
        check_means(torch.stack([check_quantize(make(n, rng), bits, None) for _ in range(3)]), n, bits)
    check_quantize(extremes(bits, rng), bits, extremes(bits, rng).flip(0))
    x = extremes(bits, rng)
    check_means(torch.stack([check_quantize(x, bits, None), check_quantize(x.flip(0), bits, None)]), x.numel(), bits)
""",
    )


@pytest.mark.parametrize("bits", BITS)
def test_error_feedback_keeps_the_running_sum(bits, rng):
    """What was sent in 50 steps, and what is left, is what was given; without feedback it is far off."""
    n, steps = 1000, 50
    residual, total, sent, plain = torch.zeros(n), *torch.zeros(3, n, dtype=torch.float64)
    bias = torch.randn(n, generator=rng) * 0.01
    for _ in range(steps):
        x = torch.randn(n, generator=rng) + bias
        total += x
        sent += lk.blockwise.dequantize(lk.blockwise.quantize(x, bits, residual), n, bits)
        plain += lk.blockwise.dequantize(lk.blockwise.quantize(x, bits), n, bits)
    # Each step rounds x + residual, code * scale and their difference, none of which is above 8.
    assert (sent + residual - total).abs().max() <= steps * 3 * 8 * 2.0**-24
    assert (plain - total).abs().max() > 10 * (sent + residual - total).abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_results_go_where_out_says(bits, rng):
    """To memory that is not aligned, too, and back to a row of what is averaged."""
    n = 300
    x, size = make(n, rng), lk.blockwise.packed_bytes(n, bits)
    memory, floats = torch.zeros(size + 3, dtype=torch.uint8), torch.zeros(n)
    assert lk.blockwise.quantize(x, bits, out=memory[1 : size + 1]).data_ptr() == memory.data_ptr() + 1
    assert same_bits(memory[1 : size + 1], reference.quantize_blockwise(x, bits)[0])
    assert not memory[size + 1 :].any()
    assert lk.blockwise.dequantize(memory[1 : size + 1], n, bits, out=floats) is floats
    assert same_bits(floats, reference.dequantize_blockwise(memory[1 : size + 1], n, bits))
    packed = torch.stack([lk.blockwise.quantize(make(n, rng), bits) for _ in range(3)])
    mean = reference.mean_blockwise(packed, n, bits)
    assert lk.blockwise.mean(packed, n, bits, out=floats) is floats
    assert same_bits(floats, mean)
    lk.blockwise.requantize_mean(packed, n, bits, out=packed[1])
    assert same_bits(packed[1], reference.quantize_blockwise(mean, bits)[0])


def test_padding_holds_codes_of_zero():
    assert lk.blockwise.quantize(torch.ones(5), 8)[:8].tolist() == [127] * 5 + [0] * 3
    assert lk.blockwise.quantize(torch.ones(5), 4)[:4].tolist() == [0xFF, 0xFF, 0x8F, 0x88]
    assert [lk.blockwise.packed_bytes(n, 8) for n in (0, 1, 4, 5, 128, 129)] == [0, 8, 8, 12, 132, 140]
    assert [lk.blockwise.packed_bytes(n, 4) for n in (0, 1, 8, 9, 128, 129)] == [0, 8, 8, 12, 68, 76]


X, PACKED = torch.zeros(256), torch.zeros(256 + 8, dtype=torch.uint8)


def given(name: str, dtype: str, shape: tuple[int, ...], what: str = "on cpu") -> str:
    return f"{name} is torch.{dtype} {shape} {what}; allowed: torch."


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda b: b.packed_bytes(-1, 8), "blockwise: n is -1; allowed: 0 or more"),
        (lambda b: b.packed_bytes(1, 3), "blockwise: bits is 3; allowed: 4, 8"),
        (lambda b: b.quantize(X, 16), "blockwise: bits is 16; allowed: 4, 8"),
        (lambda b: b.requantize_mean(PACKED[None], 256, 5), "blockwise: bits is 5; allowed: 4, 8"),
        (
            lambda b: b.quantize(X.double(), 8),
            given("blockwise.quantize: x", "float64", (256,)) + "float32 (256,) on cpu",
        ),
        (lambda b: b.quantize(X.view(2, 128), 8), given("quantize: x", "float32", (2, 128)) + "float32 (256,)"),
        (lambda b: b.quantize(X[::2], 8), given("quantize: x", "float32", (128,), "on cpu, not contiguous")),
        (lambda b: b.quantize(X.to("meta"), 8), given("quantize: x", "float32", (256,), "on meta")),
        (lambda b: b.quantize(X, 8, X[:9]), given("quantize: residual", "float32", (9,)) + "float32 (256,)"),
        (lambda b: b.quantize(X, 4, None, PACKED), given("quantize: out", "uint8", (264,)) + "uint8 (136,)"),
        (lambda b: b.dequantize(PACKED, 255, 4), given("dequantize: packed", "uint8", (264,)) + "uint8 (136,)"),
        (lambda b: b.dequantize(PACKED.char(), 256, 8), given("dequantize: packed", "int8", (264,)) + "uint8 (264,)"),
        (lambda b: b.dequantize(PACKED, 256, 8, PACKED), given("dequantize: out", "uint8", (264,)) + "float32 (256,)"),
        (lambda b: b.mean(PACKED, 256, 8), given("mean: packed", "uint8", (264,)) + "uint8 (1, 264)"),
        (lambda b: b.mean(PACKED.view(2, 132), 256, 8), given("mean: packed", "uint8", (2, 132)) + "uint8 (2, 264)"),
        (lambda b: b.mean(PACKED[None][:0], 256, 8), given("mean: packed", "uint8", (0, 264)) + "uint8 (1, 264)"),
        (lambda b: b.mean(PACKED[None], 256, 8, X[1:]), given("mean: out", "float32", (255,)) + "float32 (256,)"),
        (lambda b: b.requantize_mean(PACKED, 256, 8), given("requantize_mean: packed", "uint8", (264,))),
        (lambda b: b.requantize_mean(PACKED[None], 256, 8, X), given("requantize_mean: out", "float32", (256,))),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call(lk.blockwise)
