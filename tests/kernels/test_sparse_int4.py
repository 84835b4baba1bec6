"""Sparse 4-bit weights: all of them and the streams of their nonzeros against reference.py, and which one is chosen."""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from lepton_kernels import reference
from lepton_kernels._backends import cpu_sparse
from lepton_kernels._ops_sparse import sparse_linear
from lepton_kernels._runtime import C
from lepton_kernels.pattern import Pattern

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import ISAS
from operands import DTYPES, float_bound

ROWS = [0, 1, 2, 16, 33]  # one row, below, at and past the vectors of rows
SIZES = [  # (n, k, group_size)
    (1, 1, -1),  # the smallest
    (17, 3, 128),  # one past a panel; k below a block of nibbles
    (16, 48, 32),  # a last group of half a size
    (129, 257, 64),  # one past a block of streams, a slice and a group
    (33, 300, -1),  # one group, not a multiple of 16
]
ZEROS = [(0.0, "unstructured"), (0.6, "unstructured"), (1.0, "unstructured"), (0.5, "2:4"), (0.6, "1x4"), (0.6, "16x1")]


def make(n: int, k: int, group_size: int, symmetric: bool, sparsity: float, pattern: str, rng: torch.Generator):
    """(values, bitmask, scale, zero_point), and how many values there are; the first row holds none."""
    mask = Pattern.of(pattern).keep(torch.rand(n, k, generator=rng) + 0.01, sparsity)
    if n > 1 and sparsity:
        mask[0] = False
    values = torch.randint(-8, 8, (int(mask.sum()),), dtype=torch.int8, generator=rng)
    groups = 1 if group_size == -1 else -(-k // group_size)
    scale = (torch.rand(n, groups, generator=rng) * 0.1 + 1e-3).to(torch.bfloat16)
    zero = None if symmetric else torch.randint(-8, 8, (n, groups), dtype=torch.int8, generator=rng)
    return (reference.pack_nibbles(values), reference.pack_bitmask(mask), scale, zero), len(values)


def kernels(m: int) -> list[str]:
    return ["dense", "rows", "twins", *(["row"] if m == 1 else [])]


def check(
    m: int, n: int, k: int, group_size: int, symmetric: bool, sparsity: float, pattern: str, dtype: torch.dtype,
    activation: str, rng: torch.Generator,
) -> None:  # fmt: skip
    sources, nonzeros = make(n, k, group_size, symmetric, sparsity, pattern, rng)
    assert sources[0].shape == (-(-nonzeros // 2),)
    x, bias = torch.randn(m, k, generator=rng).to(dtype), torch.randn(n, generator=rng).clamp(-1, 1)
    want = reference.sparse_linear(x, *sources[:3], bias, activation, sources[3], group_size)
    dense = reference.dequantize_sparse(*sources, k, group_size)
    bound = float_bound(x, dense, dtype, bits=4) + torch.finfo(dtype).eps * want.float().abs()
    weight = cpu_sparse.pack(sources, k, group_size)
    results = [cpu_sparse.product(x, weight, sources, bias, activation, kernel) for kernel in kernels(m)]
    results.append(sparse_linear(x, *sources[:3], bias, activation, sources[3], group_size))
    for kernel, got in zip([*kernels(m), "chosen"], results, strict=True):
        assert got.dtype == dtype
        assert got.shape == (m, n)
        assert ((got.float() - want.float()).abs() <= bound).all(), (kernel, m, n, k, group_size, sparsity, pattern)


def test_nibbles_come_back_in_order(rng):
    for count in (0, 1, 2, 7):
        values = torch.randint(-8, 8, (count,), dtype=torch.int8, generator=rng)
        packed = reference.pack_nibbles(values)
        assert packed.dtype is torch.uint8
        assert torch.equal(reference.unpack_nibbles(packed)[:count], values)
    assert reference.pack_nibbles(torch.tensor([-8, 7, 1], dtype=torch.int8)).tolist() == [0xF0, 0x09]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, threads, rng):
    kinds = itertools.product((False, True), ("none", "relu"), DTYPES)
    others = itertools.cycle([*kinds, (False, "none", torch.float32)])  # one more, to meet other rows in every round
    for (m, zeros), (symmetric, activation, dtype) in zip(itertools.product(ROWS, ZEROS), others, strict=False):
        check(m, *size, symmetric, *zeros, dtype, activation, rng)


@pytest.mark.parametrize("isa", ISAS)
def test_levels(isa, run_at_level):
    run_at_level(
        isa,
        """
for size in SIZES:
    for m in (1, 65):  # so many are bf16 where tile registers multiply
        check(m, *size, False, 0.8, "unstructured", torch.float32, "none", rng)
        check(m, *size, True, 0.5, "16x1", torch.bfloat16, "relu", rng)
""",
    )


def test_the_choice_follows_the_zeros(rng):
    def kernel(sparsity: float, m: int, pattern: str = "unstructured") -> str:
        return cpu_sparse.pack(make(512, 512, 128, False, sparsity, pattern, rng)[0], 512, 128).kernel(m)

    for m in (0, 1, 2, 16, 17, 128):
        assert kernel(0.0, m) == "dense"
    assert kernel(0.995, 128) == "rows"
    assert kernel(0.995, 1) == "row"
    assert kernel(0.995, 128, "16x1") == "twins"


def test_every_level_has_its_costs():
    for costs in (cpu_sparse._INT4_STREAM_COST, cpu_sparse._INT4_ROW_COST):
        assert costs.keys() == cpu_sparse._PAIR_COST.keys()
        assert C.isa() in costs


def test_masks_that_lie_are_refused(rng):
    (values, bitmask, scale, zero), count = make(20, 30, 16, False, 0.5, "unstructured", rng)
    x, size = torch.randn(2, 30), -(-count // 2)
    for wrong in (values[:-1].clone(), torch.cat([values, values[:1]])):
        text = f"weight_compressed has {len(wrong)} bytes; allowed: {size}, two values each for the {count} ones"
        with pytest.raises(ValueError, match=text):
            sparse_linear(x, wrong, bitmask, scale, None, "none", zero, 16)
    bad = bitmask.clone()
    bad[0, 3] |= 0x80  # column 31 of 30
    with pytest.raises(ValueError, match="the bitmask has ones past column 29; allowed: none"):
        sparse_linear(x, values, bad, scale, None, "none", zero, 16)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight_scale": None}, r"weight_compressed is torch\.uint8"),
        ({"weight_scale": torch.ones(20, 1)}, r"weight_scale has shape \(20, 1\); allowed: \(20, 2\)"),
        ({"weight_zero_point": torch.ones(20, 3).char()}, r"weight_zero_point has shape \(20, 3\); allowed: \(20, 2\)"),
        ({"weight_zero_point": torch.ones(20, 2)}, r"weight_zero_point is torch\.float32; allowed: int8"),
        ({"group_size": 24}, "group_size is 24; allowed: a positive multiple of 16, or -1"),
        ({"group_size": 0}, "group_size is 0; allowed"),
        ({"weight_compressed": torch.ones(300).char()}, "group_size 16; allowed: None and -1, as weight_compressed is"),
        ({"x": torch.randn(2, 33)}, "allowed: a last dimension of 25 to 32"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
    ],
)
def test_operands_that_do_not_fit(change, text, rng):
    (values, bitmask, scale, zero), _ = make(20, 30, 16, False, 0.5, "unstructured", rng)
    operands = {
        "x": torch.randn(2, 30), "weight_compressed": values, "weight_bitmask": bitmask, "weight_scale": scale,
        "bias": None, "activation": "none", "weight_zero_point": zero, "group_size": 16,
    }  # fmt: skip
    with pytest.raises(ValueError, match=text):
        sparse_linear(*{**operands, **change}.values())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_operator_is_sound(symmetric, rng):
    (values, bitmask, scale, zero), _ = make(20, 30, 16, symmetric, 0.5, "unstructured", rng)
    x, bias = torch.randn(3, 30, generator=rng, requires_grad=True), torch.randn(20, requires_grad=True)
    torch.library.opcheck(sparse_linear, (x, values, bitmask, scale, bias, "gelu", zero, 16))


def test_gradients_are_those_of_the_dequantized_weight(rng):
    sources, _ = make(20, 30, 16, False, 0.5, "unstructured", rng)
    x, bias = torch.randn(3, 30, generator=rng, requires_grad=True), torch.randn(20, requires_grad=True)
    got = torch.autograd.grad(sparse_linear(x, *sources[:3], bias, "none", sources[3], 16).square().sum(), (x, bias))
    y = torch.nn.functional.linear(x, reference.dequantize_sparse(*sources, 30, 16), bias)
    want = torch.autograd.grad(y.square().sum(), (x, bias))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
