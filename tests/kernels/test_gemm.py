"""gemm_int8 and gemm_int4 on the CPU against reference.py: equal where sums are integers, else bounded."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_kernels import reference
from lepton_kernels._backends import cpu

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import INT16_ISAS, ISAS
from operands import BF16_LEAST_ROWS, DTYPES, NARROW, float_bound, make_int4, make_int8
from shapes import GEMM


@pytest.mark.parametrize("largest", [127, NARROW])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), GEMM)
def test_gemm_int8_w8a8_is_exact(m, n, k, dtype, largest, rng):
    x, weight, scale, bias = make_int8(m, n, k, dtype, rng, largest)
    got = cpu.gemm_int8(x, weight, scale, bias, True)
    assert got.shape == (m, n)
    assert got.dtype == dtype
    if m:
        assert torch.equal(got, reference.gemm_int8(x, weight, scale, bias, True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), GEMM[:3] + GEMM[4:])
def test_gemm_int8_w8a16_is_close(m, n, k, dtype, rng):
    x, weight, scale, bias = make_int8(m, n, k, dtype, rng)
    got = cpu.gemm_int8(x, weight, scale, bias, False).float()
    want = reference.gemm_int8(x, weight, scale, bias, False).float()
    assert ((got - want).abs() <= float_bound(x, reference.dequantize_int8(weight, scale), dtype)).all()


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("m", "n", "k"), GEMM[:3] + GEMM[4:])
def test_gemm_int4_w4a8_is_exact_and_w4a16_close(m, n, k, symmetric, group_size, rng):
    for dtype in DTYPES:
        x, weight, scale, zero, bias = make_int4(m, n, k, group_size, symmetric, dtype, rng)
        got = cpu.gemm_int4(x, weight, scale, zero, bias, group_size, True)
        assert torch.equal(got, reference.gemm_int4(x, weight, scale, zero, bias, group_size, True))
        got = cpu.gemm_int4(x, weight, scale, zero, bias, group_size, False).float()
        want = reference.gemm_int4(x, weight, scale, zero, bias, group_size, False).float()
        dense = reference.dequantize_int4(weight, scale, zero, k, group_size)
        assert ((got - want).abs() <= float_bound(x, dense, dtype, 4)).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(1, 300), st.sampled_from(DTYPES), st.integers(1, 3),
    st.sampled_from([1e-4, 1.0, 6e4]), st.sampled_from([127, NARROW, NARROW + 1]), st.integers(0, 2**31),
)  # fmt: skip
def test_gemm_int8_is_exact_over_drawn_shapes(m, n, k, dtype, threads, magnitude, largest, seed):
    rng = torch.Generator().manual_seed(seed)
    x, weight, scale, bias = make_int8(m, n, k, dtype, rng, largest)
    x = (x.float() * magnitude).clamp(-6e4, 6e4).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = cpu.gemm_int8(x, weight, scale, bias, True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, reference.gemm_int8(x, weight, scale, bias, True))


@pytest.mark.parametrize("largest", [127, NARROW, NARROW + 1])
def test_extremes_do_not_saturate(largest):
    x = torch.full((3, 4096), 5.0)
    x[:, ::2] = 4.9
    weight = torch.full((20, 4096), largest, dtype=torch.int8)
    weight[::2] = -largest
    scale = torch.ones(20, 1)
    assert torch.equal(cpu.gemm_int8(x, weight, scale, None, True), reference.gemm_int8(x, weight, scale, None, True))


def test_rows_with_nan_or_infinity_give_nan_and_no_other_row_does(rng):
    x, weight, scale, bias = make_int8(9, 20, 50, torch.float32, rng)
    x[2, 49] = torch.nan
    x[5, 0] = torch.inf
    x[6, 17] = -torch.inf
    got = cpu.gemm_int8(x, weight, scale, bias, True)
    assert got.isnan().all(1).tolist() == [row in (2, 5, 6) for row in range(9)]
    assert got.isnan().any(1).tolist() == [row in (2, 5, 6) for row in range(9)]


def test_zero_rows_give_the_bias(rng):
    _, weight, scale, bias = make_int8(2, 20, 50, torch.float32, rng)
    assert torch.equal(cpu.gemm_int8(torch.zeros(2, 50), weight, scale, bias, True), bias.expand(2, 20))


def test_strided_rows_and_leading_dimensions(rng):
    x, weight, scale, bias = make_int8(24, 20, 50, torch.float32, rng)
    want = cpu.gemm_int8(x, weight, scale, bias, True)
    assert torch.equal(cpu.gemm_int8(x.reshape(2, 3, 4, 50), weight, scale, bias, True), want.reshape(2, 3, 4, 20))
    wide = torch.randn(24, 120, generator=rng)
    wide[:, 30:80] = x
    assert torch.equal(cpu.gemm_int8(wide[:, 30:80], weight, scale, bias, True), want)
    assert torch.equal(cpu.gemm_int8(x.T.contiguous().T, weight, scale, bias, True), want)
    assert cpu.gemm_int8(torch.empty(2, 0, 50), weight, scale, bias, True).shape == (2, 0, 20)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 700), st.sampled_from([16, 32, 48, 64, 128, 192, -1]),
    st.booleans(), st.integers(1, 3), st.integers(0, 2**31),
)  # fmt: skip
def test_gemm_int4_is_exact_over_drawn_shapes(m, n, k, group_size, symmetric, threads, seed):
    rng = torch.Generator().manual_seed(seed)
    x, weight, scale, zero, bias = make_int4(m, n, k, group_size, symmetric, torch.float32, rng)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = cpu.gemm_int4(x, weight, scale, zero, bias, group_size, True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, reference.gemm_int4(x, weight, scale, zero, bias, group_size, True))


@pytest.mark.parametrize("quantize_activations", [True, False])
def test_an_output_larger_than_the_caches_has_the_bits_of_its_parts(quantize_activations, rng):
    # With 2 MiB of second-level cache Y overflows it, and so do the weights, as int4 too: Y is streamed on AMX.
    x, weight, scale, bias = make_int8(4096, 2048, 1040, torch.float32, rng)
    values = reference.pack_int4(weight.clamp(-8, 7))
    group_scale = torch.rand(2048, 9, generator=rng).bfloat16()
    for product in (
        lambda x: cpu.gemm_int8(x, weight, scale, bias, quantize_activations),
        lambda x: cpu.gemm_int4(x, values, group_scale, None, bias, 128, quantize_activations),
    ):
        assert torch.equal(product(x), torch.cat([product(part) for part in x.split(128)]))


def test_packed_tiles_follow_the_weight(rng):
    x, weight, scale, bias = make_int8(4, 20, 50, torch.float32, rng)
    cpu.gemm_int8(x, weight, scale, bias, True)
    weight.neg_()
    assert torch.equal(cpu.gemm_int8(x, weight, scale, bias, True), reference.gemm_int8(x, weight, scale, bias, True))


def test_views_of_one_weight_have_tiles_of_their_own(rng):
    x, weight, scale, bias = make_int8(4, 20, 50, torch.float32, rng)
    for n, k in ((20, 50), (7, 50), (20, 30)):
        part = x[:, :k], weight[:n, :k], scale[:n], bias[:n]
        assert torch.equal(cpu.gemm_int8(*part, True), reference.gemm_int8(*part, True))
    values = reference.pack_int4(weight.clamp(-8, 7))
    for n in (20, 7):
        part = x, values[:n], scale[:n].bfloat16(), None, bias[:n], -1, True
        assert torch.equal(cpu.gemm_int4(*part), reference.gemm_int4(*part))


LEVELS_PROGRAM = """
import hashlib, torch
from lepton_kernels import reference
from lepton_kernels._runtime import C
from lepton_kernels._backends import cpu
rng = torch.Generator().manual_seed(7)
digest = hashlib.sha256()
for threads in (1, 2):
    torch.set_num_threads(threads)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for m, n, k in ((1, 130, 300), (5, 33, 31), (13, 33, 99), (70, 100, 768)):
            x = torch.randn(m, k, generator=rng.manual_seed(m)).to(dtype)
            w = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=rng)
            s = torch.rand(n, 1, generator=rng)
            for w in (w, w // 5):  # the second is narrow
                digest.update(cpu.gemm_int8(x, w, s, s[:, 0], True).float().numpy().tobytes())
            v = reference.pack_int4(torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=rng))
            for group in (128, 320, k, 32):
                s = torch.rand(n, -(-k // group), generator=rng).bfloat16()
                z = torch.randint(-8, 8, s.shape, dtype=torch.int8, generator=rng)
                digest.update(cpu.gemm_int4(x, v, s, z, s[:, 0].float(), group, True).float().numpy().tobytes())
                digest.update(cpu.gemm_int4(x, v, s, None, None, group, True).float().numpy().tobytes())
            for activation in ("relu", "silu", "gelu", "gelu_tanh"):
                digest.update(cpu.gemm_int4(x, v, s, None, None, 32, True, activation).float().numpy().tobytes())
    print(C.isa(), digest.hexdigest())
    digest = hashlib.sha256()
"""


def test_levels_and_threads_agree_to_the_bit(run_python):
    lines = [line for isa in ISAS for line in run_python(LEVELS_PROGRAM, LEPTON_MAX_ISA=isa).splitlines()]
    assert len(lines) == 2 * len(ISAS)
    assert len({line.split()[1] for line in lines}) == 1, lines
    assert len(lines[0].split()[1]) == 2 * hashlib.sha256().digest_size


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_activation_functions(activation, rng):
    function = reference.ACTIVATIONS[activation]
    x, weight, scale, bias = make_int8(20, 50, 40, torch.float32, rng)
    scale *= 10 ** (torch.rand(50, 1, generator=rng) * 6 - 3)  # from nearly linear to saturated
    before = cpu.gemm_int8(x, weight, scale, bias, True)
    got = cpu.gemm_int8(x, weight, scale, bias, True, activation)
    assert before.abs().max() > 100
    assert ((got - function(before)).abs() <= 1e-6 * before.abs() + 1e-9).all()
    for dtype in DTYPES[1:]:
        got = cpu.gemm_int8(x.to(dtype), weight, scale, bias, True, activation).float()
        want = function(cpu.gemm_int8(x.to(dtype).float(), weight, scale, bias, True))
        assert ((got - want).abs() <= torch.finfo(dtype).eps * (want.abs() + 1e-3)).all()
    values = reference.pack_int4(torch.randint(-8, 8, (50, 40), dtype=torch.int8, generator=rng))
    scale = torch.rand(50, 3, generator=rng).to(torch.bfloat16)
    for quantize_activations in (True, False):
        before = cpu.gemm_int4(x, values, scale, None, bias, 16, quantize_activations)
        got = cpu.gemm_int4(x, values, scale, None, bias, 16, quantize_activations, activation)
        assert ((got - function(before)).abs() <= 1e-6 * before.abs() + 1e-9).all()


def test_activation_functions_keep_nan_and_infinity():
    weight, scale = torch.ones(16, 4, dtype=torch.int8), torch.full((16, 1), 1e38)
    x = torch.tensor([[torch.nan] * 4, [9.0] * 4, [-9.0] * 4])
    for activation in reference.ACTIVATIONS:
        y = cpu.gemm_int8(x, weight, scale, None, True, activation)
        assert y[0].isnan().all(), activation
        assert (y[1] == torch.inf).all(), activation
        assert (y[2] == -torch.inf).all() if activation == "none" else (y[2].abs() < 1e-30).all(), activation


def test_16_bit_activations_are_the_same_bits_on_every_level_of_a_kind(run_python):
    program = LEVELS_PROGRAM.replace(", True)", ", False)").replace(", True, activation", ", False, activation")
    program = program.replace("(70, 100", f"({BF16_LEAST_ROWS - 1}, 100")  # from there on level amx multiplies bf16
    lines = [line.split() for isa in ISAS for line in run_python(program, LEPTON_MAX_ISA=isa).splitlines()]
    assert len(lines) == 2 * len(ISAS)
    for int16 in (True, False):
        assert len({digest for isa, digest in lines if (isa in INT16_ISAS) == int16}) <= 1, lines


@pytest.mark.parametrize("rows", [BF16_LEAST_ROWS, 200, 5000])
def test_bf16_products_of_weights_that_bf16_holds(rows, rng):
    """Powers of two as scales: then only what x loses is lost, and a row is the same beside any other rows."""
    n, k, group_size = 300, 530, 48
    x, weight, scale, zero, bias = make_int4(rows, n, k, group_size, False, torch.bfloat16, rng)
    scale = 2.0 ** torch.randint(-9, 3, scale.shape, generator=rng).float()
    got = cpu.gemm_int4(x.float(), weight, scale, zero, bias, group_size, False)
    want = reference.gemm_int4(x.float(), weight, scale, zero, bias, group_size, False)
    dense = reference.dequantize_int4(weight, scale, zero, k, group_size)
    assert ((got - want).abs() <= float_bound(x.float(), dense, torch.float32)).all()
    part = cpu.gemm_int4(x[-BF16_LEAST_ROWS:].float(), weight, scale, zero, bias, group_size, False)
    assert torch.equal(part, got[-BF16_LEAST_ROWS:])


@pytest.mark.parametrize("group_size", [48, 80, 112])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 100), (9, 17, 200), (40, 70, 1000), (90, 70, 1000)])
def test_groups_that_do_not_divide_a_step_of_64(m, n, k, group_size, rng):
    for symmetric in (True, False):
        x, weight, scale, zero, bias = make_int4(m, n, k, group_size, symmetric, torch.float32, rng)
        got = cpu.gemm_int4(x, weight, scale, zero, bias, group_size, True)
        assert torch.equal(got, reference.gemm_int4(x, weight, scale, zero, bias, group_size, True))
        got = cpu.gemm_int4(x, weight, scale, zero, bias, group_size, False)
        want = reference.gemm_int4(x, weight, scale, zero, bias, group_size, False)
        dense = reference.dequantize_int4(weight, scale, zero, k, group_size)
        assert ((got - want).abs() <= float_bound(x, dense, torch.float32, 4)).all()


@pytest.mark.parametrize("quantize_activations", [True, False])
@pytest.mark.parametrize("m", [1, 3, 40])
def test_the_largest_k_does_not_overflow(m, quantize_activations):
    k = 65536
    x = torch.full((m, k), 5.0)
    x[:, -1] = -1e-3  # the zero point is 0: every other value is the largest integer
    weight = torch.full((20, k), 127, dtype=torch.int8)
    weight[::2] = -127
    scale = torch.full((20, 1), 1e-3)
    got = cpu.gemm_int8(x, weight, scale, None, quantize_activations)
    want = reference.gemm_int8(x, weight, scale, None, quantize_activations)
    assert torch.equal(got, want) if quantize_activations else torch.allclose(got, want, rtol=1e-4)
    values = reference.pack_int4(weight.clamp(-8, 7))
    scale = torch.ones(20, 1, dtype=torch.bfloat16)
    for zero in (None, torch.where(weight[:, :1] > 0, -8, 7).to(torch.int8)):
        got = cpu.gemm_int4(x, values, scale, zero, None, -1, quantize_activations)
        want = reference.gemm_int4(x, values, scale, zero, None, -1, quantize_activations)
        assert torch.equal(got, want) if quantize_activations else torch.allclose(got, want, rtol=1e-4)


def test_nan_and_infinity_with_16_bit_activations(rng):
    for m in (3, 20, BF16_LEAST_ROWS):
        x, weight, scale, bias = make_int8(m, 20, 50, torch.float32, rng)
        x[0, 49], x[2, 17] = torch.nan, -torch.inf
        got = cpu.gemm_int8(x, weight, scale, bias, False)
        assert (~got.isfinite()).any(1).tolist() == [row in (0, 2) for row in range(m)]
        values = reference.pack_int4(weight.clamp(-8, 7))
        got = cpu.gemm_int4(x, values, scale.to(torch.bfloat16), None, bias, -1, False)
        assert (~got.isfinite()).any(1).tolist() == [row in (0, 2) for row in range(m)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("quantize_activations", [True, False])
def test_long_k_with_many_rows(threads, quantize_activations, rng):
    """Parts of k with all panels, in tile registers."""
    m, n, k = 700, 83, 16384
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight, scale, bias = make_int8(m, n, k, torch.float32, rng)
        got = cpu.gemm_int8(x, weight, scale, bias, quantize_activations)
        want = reference.gemm_int8(x, weight, scale, bias, quantize_activations)
        bound = float_bound(x, reference.dequantize_int8(weight, scale), torch.float32)
        assert torch.equal(got, want) if quantize_activations else ((got - want).abs() <= bound).all()
        x, weight, scale, zero, bias = make_int4(m, n, k, 128, False, torch.float32, rng)
        got = cpu.gemm_int4(x, weight, scale, zero, bias, 128, quantize_activations)
        want = reference.gemm_int4(x, weight, scale, zero, bias, 128, quantize_activations)
        bound = float_bound(x, reference.dequantize_int4(weight, scale, zero, k, 128), torch.float32, 4)
        assert torch.equal(got, want) if quantize_activations else ((got - want).abs() <= bound).all()
    finally:
        torch.set_num_threads(before)


def test_a_call_without_enough_memory_raises_and_the_next_one_works(run_python):
    # 2^30 rows that are one: x takes 128 KiB, its integers 2^47 bytes, which is all that a process can address.
    program = """
import torch
from lepton_kernels._backends import cpu
weight, scale = torch.ones(1, 65536, dtype=torch.int8), torch.ones(1, 1)
x = torch.ones(1, 65536, dtype=torch.float16)
try:
    cpu.gemm_int8(x.expand(2**30, 65536), weight, scale, None, False)
except MemoryError:
    print(float(cpu.gemm_int8(x.float()[:, :1], weight[:, :1].contiguous(), scale, None, False)))
"""
    assert run_python(program) == "1.0\n"


def mapping_flags(address):
    """The flags of this process's mapping that holds `address`, as /proc/self/smaps names them."""
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            name, *rest = line.split()
            if "-" in name and not name.endswith(":"):
                begin, end = (int(part, 16) for part in name.split("-"))
                inside = begin <= address < end
            elif inside and name == "VmFlags:":
                return rest
    raise AssertionError("no such mapping")


def test_a_large_output_asks_for_huge_pages(rng):
    known_here = Path("/sys/kernel/mm/transparent_hugepage").exists()  # else the system refuses the wish
    x, weight, scale, bias = make_int8(2560, 4096, 40, torch.float32, rng)
    y = cpu.gemm_int8(x, weight, scale, bias, True)
    assert ("hg" in mapping_flags(y.data_ptr() + y.nbytes // 2)) == known_here
    assert torch.equal(y, reference.gemm_int8(x, weight, scale, bias, True))
