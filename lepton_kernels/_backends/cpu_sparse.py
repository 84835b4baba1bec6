"""Products with sparse weights on CPU tensors: the native kernels behind sparse_linear.

int8 weights are stored for one of three kernels, whichever the shape, the zeros and the level make the fastest: blocks
of 16 x 4 (gemm_int8_blocks), streams of nonzeros (sparse_rows) or, where too few of the weights are zeros, all of them
(gemm_int8). They give the same bits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lepton_kernels import reference
from lepton_kernels._backends import cpu
from lepton_kernels._backends.codes import ACTIVATION_CODES, DTYPE_CODES
from lepton_kernels._backends.cpu import _address, _as_f32, _rows
from lepton_kernels._backends.derived import Derived
from lepton_kernels._runtime import C

# Time of a stream's nonzero over that of a weight of the dense int8 kernel. Measured: 4096 x 4096, 16 and 128 rows, on
# the AVX2 machine of bench/RESULTS.md. The others: half of the level's peak of float multiply-adds over its int8 peak,
# by what bench/roof.py gave (avx512*, amx) or by instructions (generic, ssse3, avxvnni, neon*).
_STREAM_COST = {
    "generic": 2.0, "ssse3": 2.0, "avx2": 2.9, "avxvnni": 5.0, "avx512vnni": 8.0, "avx512vbmi2": 8.0, "amx": 30.0,
    "neondot": 8.0, "neoni8mm": 16.0,
}  # fmt: skip
_STREAM_START = 0.15  # of the dense kernel's time: activations are turned, sums come and go
_BLOCK_COST = 1.15  # of a stored block over the dense kernel's: its index, and no panels side by side
_STREAM_ROWS = 16  # rows of X that a stream multiplies at once; with fewer it takes as long


class PackedRows(NamedTuple):
    """Streams of nonzeros (csrc/cpu/sparse_rows.h): their memory, and what a call needs."""

    data: Tensor  # uint8 [bytes], 64-byte aligned
    address: int
    n: int
    k: int
    nonzeros: int
    scale: Tensor | None  # f32 [n] of int8 weights


class PackedBlocks(NamedTuple):
    """int8 blocks (csrc/cpu/packed_weight.h)."""

    data: Tensor  # uint8 [bytes], 64-byte aligned
    address: int
    n: int
    k: int
    steps: int


Sources = tuple[Tensor, Tensor, Tensor]  # values int8 [nonzeros], bitmask uint8 [n, ceil(k / 8)], scale f32 [n, 1]


class Int8Weight:
    """A sparse int8 weight as the kernels read it: which one is the fastest, and the form of each that was asked for.

    It holds none of the saved tensors, so that it goes when they go.
    """

    def __init__(self, n: int, k: int, nonzeros: int, steps: int) -> None:
        self.n, self.k, self.nonzeros, self.steps = n, k, nonzeros, steps
        self.density, self.blocks = nonzeros / max(n * k, 1), steps * C.step_bytes() / max(n * k, 1)
        self._forms: dict[str, Any] = {}
        self._kernels: dict[int, str] = {}  # by rows, up to what streams take at once; beyond it nothing changes

    def kernel(self, m: int) -> str:
        """Which kernel is the fastest for m rows: "dense", "blocks" or "streams"."""
        m = min(m, _STREAM_ROWS)
        known = self._kernels.get(m)
        if known is not None:
            return known
        streams = _STREAM_START + self.density * _STREAM_COST[C.isa()] * max(1.0, _STREAM_ROWS / max(m, 1))
        costs = {"dense": 1.0, "blocks": _BLOCK_COST * self.blocks, "streams": streams}
        self._kernels[m] = min(costs, key=costs.__getitem__)
        return self._kernels[m]

    def form(self, kernel: str, sources: Sources) -> Any:
        """What a kernel reads, made of the saved tensors on first use."""
        if kernel not in self._forms:
            values, bitmask, scale = sources
            if kernel == "streams":
                self._forms[kernel] = pack_rows(values, bitmask, self.k, scale)
            else:
                dense = reference.expand_sparse(values, bitmask, self.k)
                self._forms[kernel] = (
                    cpu.make_int8(dense, scale) if kernel == "dense" else self._as_blocks(dense, scale)
                )
        return self._forms[kernel]

    def _as_blocks(self, dense: Tensor, scale: Tensor) -> PackedBlocks:
        data = torch.empty(C.int8_blocks_bytes(self.n, self.k, self.steps), dtype=torch.uint8)
        scale = scale.float().contiguous()
        C.pack_int8_blocks(dense.data_ptr(), scale.data_ptr(), self.n, self.k, self.steps, data.data_ptr())
        return PackedBlocks(data, data.data_ptr(), self.n, self.k, self.steps)


_streams: Derived[PackedRows] = Derived()
_int8: Derived[Int8Weight] = Derived()


def pack_rows(values: Tensor, bitmask: Tensor, k: int, scale: Tensor | None = None) -> PackedRows:
    """The streams of values [nonzeros] and bitmask uint8 [n, ceil(k / 8)]; made once.

    scale: f32 [n, 1] of int8 values. Raises ValueError where the bitmask does not have as many ones as there are
    values, or has some past k.
    """

    def make() -> PackedRows:
        n, nonzeros = bitmask.shape[0], values.numel()
        data = torch.empty(C.sparse_rows_bytes(n, k, nonzeros), dtype=torch.uint8)
        floats, mask = values.to(torch.float32).contiguous(), bitmask.contiguous()
        C.pack_sparse_rows(floats.data_ptr(), mask.data_ptr(), n, k, nonzeros, data.data_ptr())
        scales = None if scale is None else scale.to(torch.float32).flatten().clone()  # not to keep `scale` alive
        return PackedRows(data, data.data_ptr(), n, k, nonzeros, scales)

    return _streams.get((values, bitmask, *(() if scale is None else (scale,))), (k,), make)


def pack_int8(sources: Sources, k: int) -> Int8Weight:
    """A sparse int8 weight of its saved tensors; looked at once. Raises ValueError as pack_rows."""

    def make() -> Int8Weight:
        values, bitmask, _ = sources
        n = bitmask.shape[0]
        mask = bitmask.contiguous()
        C.check_bitmask(mask.data_ptr(), n, k, values.numel())
        dense = reference.expand_sparse(values, bitmask, k)
        return Int8Weight(n, k, values.numel(), C.count_steps(dense.data_ptr(), n, k))

    return _int8.get(sources, (k,), make)


def sparse_rows(x: Tensor, packed: PackedRows, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Y[..., n] = activation(X[..., k] @ W^T + bias), in x's dtype, on torch's number of threads."""
    rows, m, stride = _rows(x, packed.k)
    y = x.new_empty(*x.shape[:-1], packed.n)
    bias = _as_f32(bias)
    C.sparse_rows(
        rows.data_ptr(), DTYPE_CODES[x.dtype], stride, m, packed.address, packed.n, packed.k, packed.nonzeros,
        _address(packed.scale), _address(bias), ACTIVATION_CODES[activation], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def gemm_int8_blocks(x: Tensor, packed: PackedBlocks, bias: Tensor | None, activation: str = "none") -> Tensor:
    """The same with int8 blocks, activations quantized."""
    rows, m, stride = _rows(x, packed.k)
    y = x.new_empty(*x.shape[:-1], packed.n)
    bias = _as_f32(bias)
    C.gemm_int8_blocks(
        rows.data_ptr(), DTYPE_CODES[x.dtype], stride, m, packed.address, packed.n, packed.k, packed.steps,
        _address(bias), ACTIVATION_CODES[activation], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def int8_product(
    x: Tensor, weight: Int8Weight, sources: Sources, bias: Tensor | None, activation: str = "none", kernel: str = ""
) -> Tensor:
    """Y[..., n] = activation(w8a8(X[..., k], W) + bias) by the kernel that is named, or the fastest one."""
    kernel = kernel or weight.kernel(x.numel() // weight.k)
    form = weight.form(kernel, sources)
    if kernel == "blocks":
        return gemm_int8_blocks(x, form, bias, activation)
    if kernel == "streams":
        return sparse_rows(x, form, bias, activation)
    return cpu.gemm(x, form, bias, True, activation)


def sparse_linear(
    x: Tensor,
    weight_compressed: Tensor,
    weight_bitmask: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: str = "none",
) -> Tensor:
    """The operator lepton::sparse_linear on the CPU."""
    k = x.shape[-1]
    if weight_scale is None:
        return sparse_rows(x, pack_rows(weight_compressed, weight_bitmask, k), bias, activation)
    sources = weight_compressed, weight_bitmask, weight_scale
    return int8_product(x, pack_int8(sources, k), sources, bias, activation)
