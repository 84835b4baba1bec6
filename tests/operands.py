"""Random operands of the quantized products, and how far a float product may be off."""

import torch

import lepton_kernels as lk
from lepton_kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16_LEAST_ROWS = 64  # kBf16LeastRows in csrc/cpu/quantize_rows.h


def multiplies_bf16(m: int, bits: int) -> bool:
    """Whether the CPU multiplies float activations and weights as bf16."""
    return lk.backends()["isa"] == "amx" and bits == 4 and m >= BF16_LEAST_ROWS


def float_bound(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, bits: int = 8) -> torch.Tensor:
    """How far a product of float activations may be off.

    k roundings of the sum of magnitudes, one of the output's type, half a step of 16-bit activations (quantize_rows.h),
    or half a unit of bf16 activations and 0.72 units of bf16 weights (bf16_tiles.h).
    """
    bf16 = 1.22 * 2.0**-7 if multiplies_bf16(x.shape[0], bits) else 0
    x = x.float()
    magnitude = x.abs() @ weight.abs().T + 1
    step = x.abs().amax(1) / 32767  # of int16 around zero; two planes of bytes have a finer one
    rounding = 0.501 * step[:, None] * weight.abs().sum(1)
    return magnitude * (weight.shape[1] * 2.0**-23 + torch.finfo(dtype).eps + bf16) + rounding


NARROW = 31  # kNarrow in csrc/cpu/packed_weight.h: up to this magnitude level avx2 has a kernel of its own


def make_int8(m: int, n: int, k: int, dtype: torch.dtype, rng: torch.Generator, largest: int = 127):
    x = torch.randn(m, k, generator=rng).to(dtype)
    weight = torch.randint(-largest, largest + 1, (n, k), dtype=torch.int8, generator=rng)
    scale = torch.rand(n, 1, generator=rng) * 0.01 + 1e-3
    return x, weight, scale, torch.randn(n, generator=rng)


def make_int4(m: int, n: int, k: int, group_size: int, symmetric: bool, dtype: torch.dtype, rng: torch.Generator):
    groups = 1 if group_size == -1 else -(-k // group_size)
    x = torch.randn(m, k, generator=rng).to(dtype)
    values = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=rng)
    scale = (torch.rand(n, groups, generator=rng) * 0.1 + 1e-3).to(torch.bfloat16)
    zero = None if symmetric else torch.randint(-8, 8, (n, groups), dtype=torch.int8, generator=rng)
    return x, reference.pack_int4(values), scale, zero, torch.randn(n, generator=rng)
