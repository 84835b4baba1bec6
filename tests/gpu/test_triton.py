"""The Triton kernels against reference.py: on a GPU where there is one, else on CPU tensors in Triton's interpreter."""

import sys
from pathlib import Path

import pytest
import torch

from lepton_kernels import reference
from lepton_kernels._backends import triton

sys.path.insert(0, str(Path(__file__).parents[1]))
from operands import DTYPES, float_bound, make_int4, make_int8

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates float32 to bfloat16 and multiplies bfloat16 as integers: those run on a GPU alone.
OPERANDS = DTYPES if DEVICE == "cuda" else [torch.float32, torch.float16]
SHAPES = [
    (1, 16, 16),  # one row; k below the least block of a tensor core
    (3, 33, 31),  # odd everything, two column tiles
    (17, 70, 130),  # one past a row tile; k past a block and no multiple of a group
    (70, 20, 257),  # a larger tile, one past a block of k
]
if DEVICE == "cuda":
    SHAPES += [(0, 16, 32), (129, 1000, 4096), (300, 129, 768), (2048, 2048, 1024)]


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What torch.empty gives is NaN, or 85 in integers: an output that no kernel wrote shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 31), (3, 1030)])
def test_quantize_rows_gives_the_bits_of_the_reference(m, k, dtype, rng):
    x = (torch.randn(m, k, generator=rng) * 10 ** torch.randn(m, 1, generator=rng)).to(dtype)
    if m > 1:
        x[0], x[1, -1], x[2, 0] = 0, torch.inf, torch.nan
    q, scale, zero = (t.cpu() for t in triton.quantize_rows(x.to(DEVICE)))
    want_q, want_scale, want_zero = reference.quantize_rows(x)
    assert torch.equal(q.to(torch.int32) + 128, want_q)
    assert torch.equal(zero + 128, want_zero)
    assert torch.equal(scale.nan_to_num(-1), want_scale.nan_to_num(-1))


@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_gemm_int8(m, n, k, dtype, rng):
    x, weight, scale, bias = make_int8(m, n, k, dtype, rng)
    got = triton.gemm_int8(*on_device(x, weight, scale, bias), True).cpu()
    assert got.shape == (m, n)
    assert got.dtype == dtype
    assert torch.equal(got, reference.gemm_int8(x, weight, scale, bias, True))
    got = triton.gemm_int8(*on_device(x, weight, scale, None), False).cpu().float()
    want = reference.gemm_int8(x, weight, scale, None, False).float()
    assert ((got - want).abs() <= float_bound(x, reference.dequantize_int8(weight, scale), dtype)).all()


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activation_functions(activation, rng):
    x, weight, scale, bias = make_int8(17, 33, 40, torch.float32, rng)
    got = triton.gemm_int8(*on_device(x, weight, scale, bias), True, activation).cpu()
    want = reference.gemm_int8(x, weight, scale, bias, True, activation)
    assert ((got - want).abs() <= 2e-6 * (1 + want.abs())).all()


@pytest.mark.parametrize(("group_size", "symmetric"), [(16, True), (32, False), (48, False), (128, True), (-1, False)])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_gemm_int4(m, n, k, symmetric, group_size, rng):
    dtype = OPERANDS[(m + group_size // 16) % len(OPERANDS)]
    x, weight, scale, zero, bias = make_int4(m, n, k, group_size, symmetric, dtype, rng)
    operands = on_device(x, weight, scale, zero, bias)
    got = triton.gemm_int4(*operands, group_size, True).cpu()
    assert torch.equal(got, reference.gemm_int4(x, weight, scale, zero, bias, group_size, True))
    got = triton.gemm_int4(*operands, group_size, False).cpu().float()
    want = reference.gemm_int4(x, weight, scale, zero, bias, group_size, False).float()
    dense = reference.dequantize_int4(weight, scale, zero, k, group_size)
    assert ((got - want).abs() <= float_bound(x, dense, dtype)).all()


def test_rows_apart_leading_dimensions_and_empty_batches(rng):
    x, weight, scale, bias = on_device(*make_int8(6, 20, 50, torch.float32, rng))
    want = triton.gemm_int8(x, weight, scale, bias, True)
    wide = torch.randn(6, 120, generator=rng).to(DEVICE)
    wide[:, 30:80] = x
    for same in (wide[:, 30:80], x.T.contiguous().T):
        assert torch.equal(triton.gemm_int8(same, weight, scale, bias, True), want)
    assert torch.equal(triton.gemm_int8(x.reshape(2, 3, 50), weight, scale, bias, True), want.reshape(2, 3, 20))
    assert triton.gemm_int8(x[:0], weight, scale, bias, True).shape == (0, 20)


def test_sums_follow_the_weight(rng):
    x, weight, scale, _ = on_device(*make_int8(4, 20, 50, torch.float32, rng))
    first = triton.gemm_int8(x, weight, scale, None, True)
    weight.neg_()
    assert torch.equal(triton.gemm_int8(x, weight, scale, None, True), -first)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a8", "w4a16"])
def test_a_layer_on_the_gpu_agrees_with_itself_on_the_cpu(scheme):
    import lepton_kernels as lk

    layer = lk.nn.QuantLinear.from_linear(torch.nn.Linear(300, 70), scheme)
    x = torch.randn(2, 3, 300)
    want = layer(x)
    layer.to("cuda")
    got = layer(x.to("cuda"))
    compiled = torch.compile(layer, fullgraph=True)(x.to("cuda"))
    assert torch.equal(got, compiled)
    if scheme.endswith("a8"):
        assert torch.equal(got.cpu(), want)
    else:
        dense = layer.to("cpu").dequantize().double()(x.double())  # the CPU's own activations have 16 bits: 3e-5
        assert (got.cpu() - dense).norm() / dense.norm() < 1e-5
        layer.to("cuda")
    with pytest.raises(ValueError, match="one device for all"):
        layer(x)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
def test_offsets_past_two_to_the_31(rng):
    x, weight, scale, _ = make_int8(1, 70_000, 32, torch.bfloat16, rng)
    many = x.expand(40_000, 32).contiguous().to("cuda")
    y = triton.gemm_int8(many, *on_device(weight, scale, None), True)
    assert y.numel() > 2**31
    want = reference.gemm_int8(x, weight, scale, None, True)[0].to("cuda")
    assert all(torch.equal(y[row], want) for row in (0, 31_000, 39_999))
