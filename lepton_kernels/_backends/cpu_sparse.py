"""Products with sparse weights on CPU tensors: the native kernels behind sparse_linear."""

from typing import NamedTuple

import torch
from torch import Tensor

from lepton_kernels._backends.codes import ACTIVATION_CODES, DTYPE_CODES
from lepton_kernels._backends.cpu import _address, _as_f32, _rows
from lepton_kernels._backends.derived import Derived
from lepton_kernels._runtime import C


class PackedRows(NamedTuple):
    """Streams of nonzeros (csrc/cpu/sparse_rows.h): their memory, and what a call needs."""

    data: Tensor  # uint8 [bytes], 64-byte aligned
    address: int
    n: int
    k: int
    nonzeros: int


_packed: Derived[PackedRows] = Derived()


def pack_rows(weight_compressed: Tensor, weight_bitmask: Tensor, k: int) -> PackedRows:
    """The streams of weight_compressed [nonzeros] and weight_bitmask uint8 [n, ceil(k / 8)]; made once.

    Raises ValueError where the bitmask does not have as many ones as there are values, or has some past k.
    """

    def make() -> PackedRows:
        n, nonzeros = weight_bitmask.shape[0], weight_compressed.numel()
        data = torch.empty(C.sparse_rows_bytes(n, k, nonzeros), dtype=torch.uint8)
        values, mask = weight_compressed.to(torch.float32).contiguous(), weight_bitmask.contiguous()
        C.pack_sparse_rows(values.data_ptr(), mask.data_ptr(), n, k, nonzeros, data.data_ptr())
        return PackedRows(data, data.data_ptr(), n, k, nonzeros)

    return _packed.get((weight_compressed, weight_bitmask), (k,), make)


def sparse_rows(x: Tensor, packed: PackedRows, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Y[..., n] = activation(X[..., k] @ W^T + bias), in x's dtype, on torch's number of threads."""
    rows, m, stride = _rows(x, packed.k)
    y = x.new_empty(*x.shape[:-1], packed.n)
    bias = _as_f32(bias)
    C.sparse_rows(
        rows.data_ptr(), DTYPE_CODES[x.dtype], stride, m, packed.address, packed.n, packed.k, packed.nonzeros,
        _address(bias), ACTIVATION_CODES[activation], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def sparse_linear(
    x: Tensor, weight_compressed: Tensor, weight_bitmask: Tensor, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """The operator lepton::sparse_linear on the CPU."""
    return sparse_rows(x, pack_rows(weight_compressed, weight_bitmask, x.shape[-1]), bias, activation)
