"""cpu.linear_block against the composition of its parts: layers in float32, residual, layer normalization by torch."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from lepton_kernels import reference
from lepton_kernels._backends import cpu

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import INT16_ISAS, ISAS
from operands import BF16_LEAST_ROWS, DTYPES, make_int4, make_int8, multiplies_bf16

SCHEMES = ["w8a8", "w8a16", "w4a8", "w4a16"]
ROWS = [1, 5, 33, 130, 300]  # below and above what gives every thread 16 rows; blocks of 16, of 32, and rests of them
SIZES = [(37,), (300, 131), (64, 150, 37)]  # (k, n[, n of the second layer]); the last n is that of the residual


class Linear:
    """One layer: its operands, its part of a block, its product by the kernel and by reference.py."""

    def __init__(self, scheme: str, n: int, k: int, activation: str, bias: bool, rng: torch.Generator) -> None:
        self.quantize, self.activation = scheme.endswith("a8"), activation
        if scheme.startswith("w8"):
            _, weight, scale, shift = make_int8(0, n, k, torch.float32, rng)
            self.operands: tuple = (weight, scale)
            self.packed = cpu.pack_int8(weight, scale)
            self.functions, self.group = (cpu.gemm_int8, reference.gemm_int8), ()
        else:
            _, weight, scale, zero, shift = make_int4(0, n, k, 48, False, torch.float32, rng)
            self.operands = (weight, scale, zero)
            self.packed = cpu.pack_int4(weight, scale, zero, k, 48)
            self.functions, self.group = (cpu.gemm_int4, reference.gemm_int4), (48,)
        self.bias = shift if bias else None

    def part(self) -> cpu.Layer:
        return cpu.Layer(self.packed, self.bias, self.activation, self.quantize)

    def product(self, x: torch.Tensor, *, by_reference: bool) -> torch.Tensor:
        function = self.functions[by_reference]
        return function(x, *self.operands, self.bias, *self.group, self.quantize, self.activation)


def composed(x, layers, residual, norm, *, by_reference: bool) -> torch.Tensor:
    h = x.float()
    for layer in layers:
        h = layer.product(h, by_reference=by_reference)
    if residual is not None:
        h = h + residual.float()
    if norm is not None:
        h = torch.nn.functional.layer_norm(h, h.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
    return h.to(x.dtype)


def check(m: int, sizes: tuple[int, ...], scheme: str, dtype: torch.dtype, rng: torch.Generator, case: int) -> None:
    """Every choice of residual, norm, bias and activation appears with some m and dtype."""
    with_residual, with_norm, bias, activation = list(
        itertools.product((True, False), (True, False), (True, False), ("none", "relu", "gelu"))
    )[case % 24]
    x = torch.randn(m, sizes[0], generator=rng).to(dtype)
    layers = [Linear(scheme, sizes[0] if len(sizes) == 1 else sizes[1], sizes[0], activation, bias, rng)]
    if len(sizes) == 3:
        layers.append(Linear(scheme, sizes[2], sizes[1], "none", bias, rng))
    n = layers[-1].packed.n
    residual = torch.randn(m, n, generator=rng).to(dtype) if with_residual else None
    norm = None
    if with_norm:
        norm = cpu.Norm(torch.randn(n, generator=rng).to(dtype), torch.randn(n, generator=rng).to(dtype), 1e-12)
    got = cpu.linear_block(x, [layer.part() for layer in layers], residual, norm)
    assert got.dtype == dtype
    assert got.shape == (m, n)
    what = f"m={m} {sizes} {scheme} {dtype} residual={with_residual} norm={with_norm} bias={bias} {activation}"
    want = composed(x, layers, residual, norm, by_reference=False)
    if scheme.endswith("a8") and norm is None:
        assert torch.equal(got, want), what
    # Half types may fall to the next value; sums of floats (up to level avx2) and of the norm run in another order.
    scale = want.float().abs().amax(1, keepdim=True)
    bound = torch.finfo(dtype).eps * want.float().abs() + 2e-5 * scale
    assert ((got.float() - want.float()).abs() <= bound).all(), what
    # Behind an activation of torch's own some values of the second layer fall to the other side of a boundary.
    want = composed(x, layers, residual, norm, by_reference=True).float()
    bf16 = 1e-2 if scheme == "w4a16" and multiplies_bf16(m, 4) else 0
    assert (got.float() - want).norm() <= (2e-3 + torch.finfo(dtype).eps + bf16) * want.norm(), what


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_blocks_equal_their_parts(sizes, scheme, threads, rng):
    for case, (m, dtype) in enumerate(itertools.product(ROWS, DTYPES)):
        for more in (0, 15):
            check(m, sizes, scheme, dtype, rng, case + more)


def test_weights_too_large_for_the_caches(threads, rng):
    """Layer by layer, also for many rows: 16 MB of weights are more than two second-level caches."""
    layers = [Linear("w8a8", 4097, 2049, "relu", True, rng), Linear("w8a8", 2049, 4097, "none", True, rng)]
    x, residual = torch.randn(70, 2049, generator=rng), torch.randn(70, 2049, generator=rng)
    got = cpu.linear_block(x, [layer.part() for layer in layers], residual, None)
    assert torch.equal(got, composed(x, layers, residual, None, by_reference=False))


def test_strided_rows_and_leading_dimensions(threads, rng):
    layers = [Linear("w8a8", 33, 50, "gelu", True, rng)]
    norm = cpu.Norm(torch.randn(33, generator=rng), torch.randn(33, generator=rng), 1e-5)
    x, residual = torch.randn(48, 50, generator=rng), torch.randn(48, 33, generator=rng)
    want = cpu.linear_block(x, [layers[0].part()], residual, norm)
    wide, wide_residual = torch.randn(48, 120, generator=rng), torch.randn(48, 77, generator=rng)
    wide[:, 30:80], wide_residual[:, 4:37] = x, residual
    got = cpu.linear_block(wide[:, 30:80], [layers[0].part()], wide_residual[:, 4:37], norm)
    assert torch.equal(got, want)
    got = cpu.linear_block(x.view(2, 3, 8, 50), [layers[0].part()], residual.view(2, 3, 8, 33), norm)
    assert torch.equal(got, want.view(2, 3, 8, 33))
    assert cpu.linear_block(x[:0], [layers[0].part()], residual[:0], norm).shape == (0, 33)


def test_nan_stays_in_its_row(threads, rng):
    layers = [Linear("w8a8", 40, 50, "relu", True, rng), Linear("w8a8", 33, 40, "none", True, rng)]
    norm = cpu.Norm(torch.ones(33), torch.zeros(33), 1e-5)
    x, residual = torch.randn(70, 50, generator=rng), torch.randn(70, 33, generator=rng)
    x[3, 49], x[40, 0], residual[69, 32] = torch.nan, torch.inf, torch.nan
    y = cpu.linear_block(x, [layer.part() for layer in layers], residual, norm)
    assert y.isnan().all(1).nonzero().flatten().tolist() == [3, 40, 69]
    assert y.isnan().any(1).nonzero().flatten().tolist() == [3, 40, 69]


def test_layers_that_do_not_fit_each_other(rng):
    layers = [Linear("w8a8", 40, 50, "relu", True, rng), Linear("w8a8", 33, 41, "none", True, rng)]
    with pytest.raises(ValueError, match="k of layer 1 is 41; allowed: the n before it"):
        cpu.linear_block(torch.randn(3, 50), [layer.part() for layer in layers], None, None)
    with pytest.raises(ValueError, match="3 layers; allowed: 1, 2"):
        cpu.linear_block(torch.randn(3, 50), [layers[0].part()] * 3, None, None)


LEVELS_PROGRAM = """
import hashlib, torch
from lepton_kernels import reference
from lepton_kernels._runtime import C
from lepton_kernels._backends import cpu
rng = torch.Generator().manual_seed(7)
for threads in (1, 2):
    torch.set_num_threads(threads)
    digests = []
    for quantize in (True, False):
        digest = hashlib.sha256()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            many = 70 if quantize else BEFORE_BF16
            for m, k, n, n2 in ((1, 64, 130, 33), (5, 31, 75, 31), (many, 300, 131, 77)):
                x = torch.randn(m, k, generator=rng.manual_seed(m)).to(dtype)
                residual = torch.randn(m, n2, generator=rng).to(dtype)
                norm = cpu.Norm(torch.randn(n2, generator=rng), torch.randn(n2, generator=rng), 1e-12)
                w = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=rng)
                first = cpu.pack_int8(w, torch.rand(n, 1, generator=rng) * 0.01)
                v = reference.pack_int4(torch.randint(-8, 8, (n2, n), dtype=torch.int8, generator=rng))
                second = cpu.pack_int4(v, torch.rand(n2, -(-n // 48), generator=rng).bfloat16(), None, n, 48)
                for activation in ("none", "relu", "silu", "gelu", "gelu_tanh"):
                    layers = [cpu.Layer(first, None, activation, quantize), cpu.Layer(second, None, "none", quantize)]
                    for last in (norm, None):
                        y = cpu.linear_block(x, layers, residual, last)
                        digest.update(y.float().numpy().tobytes())
        digests.append(digest.hexdigest())
    print(C.isa(), *digests)
"""


def test_levels_and_threads_agree_to_the_bit(run_python):
    program = LEVELS_PROGRAM.replace("BEFORE_BF16", str(BF16_LEAST_ROWS - 1))
    lines = [line.split() for isa in ISAS for line in run_python(program, LEPTON_MAX_ISA=isa).splitlines()]
    assert len(lines) == 2 * len(ISAS)
    assert len({quantized for _, quantized, _ in lines}) == 1, lines
    for int16 in (True, False):
        assert len({kept for isa, _, kept in lines if (isa in INT16_ISAS) == int16}) <= 1, lines
