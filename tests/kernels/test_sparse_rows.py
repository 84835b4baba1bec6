"""sparse_linear on the CPU against reference.py: odd shapes, every share of zeros, dtypes, threads, levels, poison."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from lepton_kernels import reference
from lepton_kernels._backends import cpu_sparse
from lepton_kernels._ops_sparse import sparse_linear

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import ISAS
from operands import DTYPES

ROWS = [0, 1, 2, 15, 16, 17, 33, 48, 49, 64, 65, 130]  # vectors of 16 rows, panels of 32 and 64, one past each
SIZES = [  # (n, k)
    (1, 1),  # the smallest
    (17, 3),  # one past 16 columns; k below a byte of the mask
    (128, 256),  # a block, a slice
    (129, 257),  # one past each
    (300, 1000),  # several of both
]
SPARSITIES = [0.0, 0.5, 0.9, 1.0]


def make(n: int, k: int, sparsity: float, dtype: torch.dtype, rng: torch.Generator, shared: bool = False):
    weight = torch.randn(n, k, generator=rng).to(dtype)
    mask = torch.rand(n, k, generator=rng) >= sparsity
    if shared:  # by rows 2 i and 2 i + 1, but for some
        mask = mask[torch.arange(n) // 2] & (torch.rand(n, k, generator=rng) >= 0.03)
    weight[~mask] = 0
    mask = weight != 0
    return weight, weight[mask], reference.pack_bitmask(mask)


def check(
    m: int, n: int, k: int, sparsity: float, dtype: torch.dtype, activation: str, rng: torch.Generator,
    shared: bool = False,
) -> None:  # fmt: skip
    weight, values, bitmask = make(n, k, sparsity, dtype, rng, shared)
    x, bias = torch.randn(m, k, generator=rng).to(dtype), torch.randn(n, generator=rng)
    got = sparse_linear(x, values, bitmask, None, bias, activation)
    want = reference.sparse_linear(x, values, bitmask, None, bias, activation)
    assert got.dtype == dtype
    assert got.shape == (m, n)
    magnitude = x.float().abs() @ weight.float().abs().T + bias.abs()
    bound = magnitude * (2.0**-23 * (k + 4)) + torch.finfo(dtype).eps * (1 + want.float().abs()) + 2e-6 * magnitude
    assert ((got.float() - want.float()).abs() <= bound).all(), (m, n, k, sparsity, dtype, activation)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, threads, rng):
    cases = itertools.product(ROWS, SPARSITIES)
    for (m, sparsity), dtype, activation in zip(
        cases, itertools.cycle(DTYPES), itertools.cycle(("none", "relu", "gelu", "silu")), strict=False
    ):
        check(m, *size, sparsity, dtype, activation, rng)
        check(m, *size, sparsity, dtype, activation, rng, shared=True)


def test_rows_that_share_columns_are_twins(rng):
    for sparsity, shared, kernel in [(0.8, True, "twins"), (0.8, False, "rows"), (0.0, False, "twins")]:
        _, values, bitmask = make(129, 300, sparsity, torch.float32, rng, shared)
        weight = cpu_sparse.pack((values, bitmask, None), 300)
        assert weight.kernel(16) == kernel
        assert weight.kernel(1) == "row"
        x = torch.randn(40, 300, generator=rng)
        products = [cpu_sparse.product(x, weight, (values, bitmask, None), None, "none", k) for k in ("rows", "twins")]
        torch.testing.assert_close(*products, rtol=1e-5, atol=1e-4)


def test_panels_hold_the_rows():
    for m, form in itertools.product((0, 1, 16, 17, 33, 64, 96, 97, 128, 513), range(4)):
        held = sum(16 * vectors * cpu_sparse.C.count_panels(m, form, vectors) for vectors in (1, 2, 4, 8))
        assert m <= held <= max(2 * m, 32 if m else 0), (m, form, held)


def test_many_rows_are_cut(threads, rng):
    check(1100, 140, 300, 0.8, torch.float32, "none", rng)


@pytest.mark.parametrize("isa", ISAS)
def test_levels(isa, run_at_level):
    run_at_level(
        isa,
        """
for size in SIZES:
    for m in (1, 16, 31, 65):
        check(m, *size, 0.8, torch.float32, "none", rng)
        check(m, *size, 0.5, torch.bfloat16, "gelu", rng, True)
""",
    )


def test_threads_and_rows_do_not_change_a_result(rng):
    _, values, bitmask = make(300, 700, 0.8, torch.float32, rng)
    x = torch.randn(64, 700, generator=rng)
    packed = cpu_sparse.pack_rows(values, bitmask, 700)
    before, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(cpu_sparse.sparse_rows(x, packed, None))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])


def test_strided_rows_and_leading_dimensions(rng):
    _, values, bitmask = make(40, 50, 0.6, torch.float32, rng)
    x = torch.randn(24, 50, generator=rng)
    want = sparse_linear(x, values, bitmask, None, None)
    wide = torch.full((24, 120), torch.nan)
    wide[:, 30:80] = x
    assert torch.equal(sparse_linear(wide[:, 30:80], values, bitmask, None, None), want)
    assert torch.equal(sparse_linear(x.view(2, 3, 4, 50), values, bitmask, None, None), want.view(2, 3, 4, 40))
    one = torch.full((1, 120), torch.nan)
    one[:, 30:80] = x[0]
    torch.testing.assert_close(sparse_linear(one[:, 30:80], values, bitmask, None, None), want[:1])


def test_nan_stays_in_its_row_and_zeros_hide_it(rng):
    weight, values, bitmask = make(20, 30, 0.5, torch.float32, rng)
    x = torch.randn(70, 30, generator=rng)
    x[3, 4] = torch.nan
    y = sparse_linear(x, values, bitmask, None, None)
    assert torch.equal(y.isnan()[3], weight[:, 4] != 0)
    assert not y[[i for i in range(70) if i != 3]].isnan().any()


def test_masks_that_lie_are_refused(rng):
    _, values, bitmask = make(20, 30, 0.5, torch.float32, rng)
    x = torch.randn(2, 30)
    with pytest.raises(ValueError, match=rf"the bitmask has {len(values)} ones; allowed: {len(values) - 1}"):
        sparse_linear(x, values[1:].clone(), bitmask, None, None)
    bad = bitmask.clone()
    bad[0, 3] |= 0x80  # column 31 of 30
    with pytest.raises(ValueError, match="ones past column 29"):
        sparse_linear(x, torch.cat([values, values[:1]]), bad, None, None)
