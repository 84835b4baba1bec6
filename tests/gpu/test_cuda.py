"""The native GPU kernels against reference.py, and the order in which they read scales, which needs no GPU."""

import sys
from pathlib import Path

import pytest
import torch

from lepton_kernels import reference
from lepton_kernels._backends import cuda
from lepton_kernels._runtime import C

sys.path.insert(0, str(Path(__file__).parents[1]))
from operands import float_bound, make_int4, make_int8

SHAPES = [
    (1, 16, 32),  # the smallest that they take
    (1, 33, 64),  # outputs past a tile
    (7, 250, 1056),  # rows below a slice; k past a block for one lane of four
    (8, 64, 8224),  # all of a slice; every warp has several blocks
    (9, 130, 2048),  # one past a slice
    (16, 4096, 4096),
]
MANY = [  # every tile of gemm_many_rows.cuh, k split and not, edges of all
    (17, 16, 32),
    (33, 70, 96),
    (31, 250, 1056),
    (64, 4096, 4096),
    (65, 130, 2080),
    (200, 3000, 1024),
    (257, 8200, 512),
    (1100, 4104, 416),
    (2500, 1030, 160),
]
HAS_NATIVE = torch.cuda.is_available() and C.cuda_most_rows() > 0
needs_gpu = pytest.mark.skipif(not HAS_NATIVE, reason="needs a CUDA GPU and a build with LEPTON_CUDA")
needs_hopper = pytest.mark.skipif(
    not HAS_NATIVE or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0 and a build with LEPTON_CUDA",
)


@pytest.fixture
def native(monkeypatch):
    """Fails where Triton's product serves instead."""
    for name in ("gemm_int8", "gemm_int4"):
        monkeypatch.setattr(cuda.triton, name, lambda *_, name=name: pytest.fail(f"triton.{name} was called"))


def on_gpu(*tensors):
    return [None if t is None else t.to("cuda") for t in tensors]


@pytest.mark.parametrize(("n", "k", "group_size", "symmetric"), [(33, 300, 128, False), (16, 640, 256, True)])
def test_groups_in_the_order_of_the_lanes(n, k, group_size, symmetric, rng):
    _, _, scale, zero, _ = make_int4(1, n, k, group_size, symmetric, torch.bfloat16, rng)
    groups = cuda.pack_groups(scale, zero, k, group_size)
    assert groups.shape == (-(-k // 128), 4 * -(-n // 64), 8, 2)
    for block in range(groups.shape[0]):
        for o in range(n):
            word = int(groups[block, o // 16, o % 8, o % 16 // 8])
            group = block * 128 // group_size
            bits = int(scale[o, group].view(torch.int16))
            assert (word >> 16, word & 0xFF) == (bits, 0 if zero is None else int(zero[o, group]) & 0xFF)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_gemm_int8(m, n, k, dtype, rng, native):
    x, weight, scale, bias = make_int8(m, n, k, dtype, rng)
    x[0, 0] = 300  # the zero point is not the middle
    got = cuda.gemm_int8(*on_gpu(x, weight, scale, bias), True, "relu").cpu()
    assert torch.equal(got, reference.gemm_int8(x, weight, scale, bias, True, "relu"))
    if dtype is torch.float32:
        return
    got = cuda.gemm_int8(*on_gpu(x, weight, scale, None), False).cpu().float()
    want = reference.gemm_int8(x, weight, scale, None, False).float()
    assert ((got - want).abs() <= float_bound(x, reference.dequantize_int8(weight, scale), dtype)).all()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("group_size", "symmetric"), [(128, False), (256, True), (-1, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_gemm_int4(m, n, k, dtype, group_size, symmetric, rng, native):
    x, weight, scale, zero, bias = make_int4(m, n, k, group_size, symmetric, dtype, rng)
    got = cuda.gemm_int4(*on_gpu(x, weight, scale, zero, bias), group_size, False).cpu().float()
    want = reference.gemm_int4(x, weight, scale, zero, bias, group_size, False).float()
    dense = reference.dequantize_int4(weight, scale, zero, k, group_size)
    assert ((got - want).abs() <= float_bound(x, dense, dtype)).all()


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), MANY)
def test_gemm_int8_many_rows(m, n, k, dtype, rng, native):
    x, weight, scale, bias = make_int8(m, n, k, dtype, rng)
    got = cuda.gemm_int8(*on_gpu(x, weight, scale, bias), False).cpu().float()
    want = reference.gemm_int8(x, weight, scale, bias, False).float()
    bound = float_bound(x, reference.dequantize_int8(weight, scale), dtype) + torch.finfo(dtype).eps * bias.abs()
    assert ((got - want).abs() <= bound).all()


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(("group_size", "symmetric"), [(128, False), (256, True), (-1, False)])
@pytest.mark.parametrize(("m", "n", "k"), MANY)
def test_gemm_int4_many_rows(m, n, k, group_size, symmetric, rng, native):
    x, weight, scale, zero, bias = make_int4(m, n, k, group_size, symmetric, torch.bfloat16, rng)
    got = cuda.gemm_int4(*on_gpu(x, weight, scale, zero, bias), group_size, False).cpu().double()
    dense = reference.dequantize_int4(weight, scale, zero, k, group_size)
    want = reference.gemm_int4(x, weight, scale, zero, bias, group_size, False).double()
    assert ((got - want).abs() <= float_bound(x, dense, torch.bfloat16) + 2.0**-7 * bias.abs()).all()
    assert (got - want).norm() <= 4e-3 * want.norm()  # rounded weights and results; a wrong weight is far off


@needs_gpu
@pytest.mark.gpu
def test_what_they_do_not_take_goes_to_triton(rng):
    x, weight, scale, bias = make_int8(5, 40, 100, torch.bfloat16, rng)  # k is no multiple of 16
    got = cuda.gemm_int8(*on_gpu(x, weight, scale, bias), True).cpu()
    assert torch.equal(got, reference.gemm_int8(x, weight, scale, bias, True))
    assert cuda.gemm_int8(*on_gpu(x[:0], weight, scale, bias), True).shape == (0, 40)
    x, weight, scale, bias = make_int8(3, 32, 64, torch.bfloat16, rng)
    wide = torch.zeros(3, 200, dtype=torch.bfloat16, device="cuda")
    wide[:, 1:65] = x.to("cuda")  # rows that start at odd multiples of two bytes
    want = cuda.gemm_int8(*on_gpu(x, weight, scale, bias), False)
    torch.testing.assert_close(cuda.gemm_int8(wide[:, 1:65], *on_gpu(weight, scale, bias), False), want)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("m", [16, pytest.param(50, marks=needs_hopper)])
def test_results_do_not_vary_and_graphs_capture_them(m, rng, native):
    x, weight, scale, zero, bias = on_gpu(*make_int4(m, 1000, 4096, 128, False, torch.bfloat16, rng))
    want = cuda.gemm_int4(x, weight, scale, zero, bias, 128, False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda.gemm_int4(x, weight, scale, zero, bias, 128, False)
    for _ in range(20):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, want)
