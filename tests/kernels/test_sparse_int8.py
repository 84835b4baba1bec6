"""Sparse int8 weights: blocks, streams and all of them give the bits of reference.py, on every level and thread."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from lepton_kernels import reference
from lepton_kernels._backends import cpu_sparse
from lepton_kernels._ops_sparse import sparse_linear
from lepton_kernels.pattern import Pattern

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import ISAS
from operands import DTYPES, NARROW

ROWS = [0, 1, 2, 5, 6, 7, 13, 16, 17, 25, 33, 49, 130]  # one, below, at and past the blocks of rows of every level
SIZES = [  # (n, k)
    (1, 1),  # the smallest
    (17, 3),  # one past a panel; k below a quad
    (16, 8),  # a panel; a step of every level
    (129, 257),  # one past a block of streams and a slice
    (70, 1000),  # an odd number of quads in the last step of neoni8mm
]
PATTERNS = ["unstructured", "16x4", "1x4"]
KERNELS = ["blocks", "groups", "pairs", "dense"]


def make(n: int, k: int, sparsity: float, pattern: str, rng: torch.Generator, largest: int = 127):
    mask = Pattern.of(pattern).keep(torch.rand(n, k, generator=rng) + 0.01, sparsity)
    values = torch.randint(-largest, largest + 1, (n, k), dtype=torch.int8, generator=rng)[mask]
    scale = torch.rand(n, 1, generator=rng) * 0.01 + 1e-3
    return values, reference.pack_bitmask(mask), scale


def check(m, n, k, sparsity: float, pattern: str, dtype: torch.dtype, act: str, rng, largest: int = 127) -> None:
    values, bitmask, scale = make(n, k, sparsity, pattern, rng, largest)
    x, bias = torch.randn(m, k, generator=rng).to(dtype), torch.randn(n, generator=rng)
    want = reference.sparse_linear(x, values, bitmask, scale, bias)
    sources = values, bitmask, scale
    weight = cpu_sparse.pack(sources, k)
    for kernel in [*KERNELS, "row"] if m == 1 else KERNELS:
        got = cpu_sparse.product(x, weight, sources, bias, "none", kernel)
        assert got.dtype == dtype
        assert torch.equal(got, want), (kernel, m, n, k, sparsity, pattern, dtype)
    with_activation = [cpu_sparse.product(x, weight, sources, bias, act, kernel) for kernel in KERNELS]
    assert all(torch.equal(with_activation[0], other) for other in with_activation[1:])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, threads, rng):
    cases = itertools.product(ROWS, (0.0, 0.6, 1.0), PATTERNS)
    activations = "relu", "gelu", "silu", "gelu_tanh"
    others = zip(*map(itertools.cycle, (DTYPES, activations, (127, 127, 127, NARROW, NARROW))), strict=False)
    for (m, sparsity, pattern), (dtype, activation, largest) in zip(cases, others, strict=False):
        check(m, *size, sparsity, pattern, dtype, activation, rng, largest)


def test_the_largest_sums_are_exact(rng):
    """All activations at the ends of their range, all weights the largest: 255 * 127 * 3000."""
    k = 3000
    x = torch.ones(3, k)
    x[1] = -1
    x[2, ::2] = -1
    values, bitmask = torch.full((2 * k,), 127, dtype=torch.int8), reference.pack_bitmask(torch.ones(2, k).bool())
    values[k:] = -127
    scale = torch.ones(2, 1)
    want = reference.sparse_linear(x, values, bitmask, scale, None)
    sources = values, bitmask, scale
    weight = cpu_sparse.pack(sources, k)
    for kernel in KERNELS:
        assert torch.equal(cpu_sparse.product(x, weight, sources, None, "none", kernel), want), kernel


def test_many_rows_are_cut(threads, rng):
    check(1100, 140, 300, 0.8, "16x4", torch.float32, "none", rng)


@pytest.mark.parametrize("isa", ISAS)
def test_levels(isa, run_at_level):
    run_at_level(
        isa,
        """
for size in SIZES:
    for m in (1, 7, 31, 65):
        check(m, *size, 0.8, "16x4", torch.float32, "none", rng)
        check(m, *size, 0.5, "unstructured", torch.bfloat16, "gelu", rng)
        check(m, *size, 0.6, "1x4", torch.float32, "relu", rng, NARROW)
""",
    )


def test_nan_stays_in_its_row(rng):
    values, bitmask, scale = make(20, 30, 0.5, "unstructured", rng)
    x = torch.randn(70, 30, generator=rng)
    x[3, 4] = torch.nan
    sources = values, bitmask, scale
    weight = cpu_sparse.pack(sources, 30)
    for kernel in KERNELS:
        y = cpu_sparse.product(x, weight, sources, None, "none", kernel)
        assert y.isnan().all(1).nonzero().flatten().tolist() == [3]
        assert y.isnan().any(1).nonzero().flatten().tolist() == [3]


def test_the_choice_follows_the_zeros(rng):
    few = cpu_sparse.pack(make(256, 256, 0.05, "unstructured", rng), 256)
    assert few.kernel(64) == few.kernel(1) == "dense"
    blocks = cpu_sparse.pack(make(256, 256, 0.8, "16x4", rng), 256)
    assert blocks.kernel(64) == blocks.kernel(1) == "blocks"
    assert blocks.blocks == pytest.approx(0.2, abs=0.01)
    # Against tile registers, only the emptiest weights are worth a stream.
    sparsity = 0.98 if cpu_sparse.C.isa() == "amx" else 0.95
    scattered = cpu_sparse.pack(make(256, 256, sparsity, "unstructured", rng), 256)
    assert scattered.kernel(32) == "pairs"
    grouped = cpu_sparse.pack(make(256, 256, 0.95, "1x4", rng), 256)
    assert grouped.kernel(64) == "groups"
    assert grouped.groups == pytest.approx(0.05, abs=0.01)


def test_the_choice_knows_that_level_avx2_is_faster_with_narrow_weights(run_at_level):
    run_at_level(
        "avx2",
        """
wide, narrow = (cpu_sparse.pack(make(256, 256, 0.65, "unstructured", rng, most), 256) for most in (127, NARROW))
assert cpu_sparse.C.isa() != "avx2" or (wide.kernel(64), narrow.kernel(64)) == ("pairs", "dense")
assert wide.kernel(1) == narrow.kernel(1)
""",
    )


def test_masks_that_lie_are_refused(rng):
    values, bitmask, scale = make(20, 30, 0.5, "unstructured", rng)
    x = torch.randn(2, 30)
    with pytest.raises(ValueError, match=rf"the bitmask has {len(values)} ones; allowed: {len(values) - 1}"):
        sparse_linear(x, values[1:].clone(), bitmask, scale, None)
    bad = bitmask.clone()
    bad[0, 3] |= 0x80  # column 31 of 30
    with pytest.raises(ValueError, match="the bitmask has ones past column 29; allowed: none"):
        sparse_linear(x, torch.cat([values, values[:1]]), bad, scale, None)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight_scale": None}, "weight_compressed is torch.int8"),
        ({"weight_scale": torch.ones(20)}, r"weight_scale has shape \(20,\); allowed: \(20, 1\)"),
        ({"weight_bitmask": torch.zeros(20, 4)}, "weight_bitmask is torch.float32"),
        ({"x": torch.randn(2, 33)}, "allowed: a last dimension of 25 to 32"),
        ({"bias": torch.zeros(19)}, r"bias has shape \(19,\); allowed: \(20,\)"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
    ],
)
def test_operands_that_do_not_fit(change, text, rng):
    values, bitmask, scale = make(20, 30, 0.5, "unstructured", rng)
    operands = {
        "x": torch.randn(2, 30), "weight_compressed": values, "weight_bitmask": bitmask, "weight_scale": scale,
        "bias": None, "activation": "none",
    }  # fmt: skip
    with pytest.raises(ValueError, match=text):
        sparse_linear(*{**operands, **change}.values())


def test_what_was_packed_goes_with_the_weight(rng):
    def alive() -> int:
        return sum(not e.sources[0][0].expired() for e in cpu_sparse._weights._entries.values())

    before = alive()
    for _ in range(3):
        sources = make(64, 64, 0.5, "unstructured", rng)
        weight = cpu_sparse.pack(sources, 64)
        for kernel in KERNELS:
            weight.form(kernel, sources)
        assert alive() >= 1
        del sources, weight
    assert alive() <= before
