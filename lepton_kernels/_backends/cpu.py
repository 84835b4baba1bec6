"""Quantized GEMM on CPU tensors: the native kernels behind gemm_int8 and gemm_int4.

The tiled layout that a kernel reads is made from the saved layout on first use and kept while the saved weight lives.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lepton_kernels._backends.codes import ACTIVATION_CODES, DTYPE_CODES
from lepton_kernels._backends.derived import Derived
from lepton_kernels._runtime import C


class Packed(NamedTuple):
    """A weight in the kernels' tiles: its memory, its shape, and the addresses a call needs."""

    data: Tensor  # uint8 [bytes], 64-byte aligned
    address: int
    n: int
    k: int
    bits: int
    group: int
    symmetric: bool  # 4 bit: no zero points


_packed: Derived[Packed] = Derived()


def _allocate(n: int, k: int, bits: int, group: int, symmetric: bool) -> Packed:
    data = torch.empty(C.packed_bytes(n, k, bits, group, symmetric), dtype=torch.uint8)
    return Packed(data, data.data_ptr(), n, k, bits, group, symmetric)


def pack_int8(weight_packed: Tensor, weight_scale: Tensor) -> Packed:
    """The tiles of weight_packed int8 [n, k] and weight_scale f32 [n, 1]; made once, then found again."""

    return _packed.get((weight_packed, weight_scale), (), lambda: make_int8(weight_packed, weight_scale))


def make_int8(weight_packed: Tensor, weight_scale: Tensor) -> Packed:
    """pack_int8, made anew."""
    n, k = weight_packed.shape
    packed = _allocate(n, k, 8, k, True)
    weight, scale = weight_packed.contiguous(), weight_scale.to(torch.float32).contiguous()
    C.pack_int8(weight.data_ptr(), scale.data_ptr(), n, k, packed.address)
    return packed


def pack_int4(
    weight_packed: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, k: int, group_size: int
) -> Packed:
    """The tiles of weight_packed int32 [n, ceil(k / 8)], one scale and zero point a group of group_size (-1: a row)."""

    sources = (weight_packed, weight_scale) + (() if weight_zero_point is None else (weight_zero_point,))
    return _packed.get(
        sources, (k, group_size), lambda: make_int4(weight_packed, weight_scale, weight_zero_point, k, group_size)
    )


def make_int4(
    weight_packed: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, k: int, group_size: int
) -> Packed:
    """pack_int4, made anew."""
    n, words = weight_packed.shape
    group = k if group_size == -1 else min(group_size, -(-k // 16) * 16)
    packed = _allocate(n, k, 4, group, weight_zero_point is None)
    weight, scale = weight_packed.contiguous(), weight_scale.to(torch.float32).contiguous()
    zero = None if weight_zero_point is None else weight_zero_point.contiguous()
    C.pack_int4(
        weight.data_ptr(), 4 * words, scale.data_ptr(), 0 if zero is None else zero.data_ptr(),
        n, k, packed.group, packed.address,
    )  # fmt: skip
    return packed


def _rows(x: Tensor, k: int) -> tuple[Tensor, int, int]:
    """x as rows with unit column stride, how many, and the elements between them."""
    if x.is_contiguous():
        return x, x.numel() // k, k
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.shape[0], rows.stride(0)


def _as_f32(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def gemm(
    x: Tensor, packed: Packed, bias: Tensor | None, quantize_activations: bool, activation: str = "none"
) -> Tensor:
    """Y[..., n] = activation(X[..., k] @ W^T + bias), in x's dtype, on torch's number of threads."""
    rows, m, stride = _rows(x, packed.k)
    y = x.new_empty(*x.shape[:-1], packed.n)
    bias = _as_f32(bias)
    C.gemm(
        rows.data_ptr(), DTYPE_CODES[x.dtype], stride, m, packed.address, packed.n, packed.k, packed.bits,
        packed.group, packed.symmetric, _address(bias), ACTIVATION_CODES[activation], y.data_ptr(),
        quantize_activations, torch.get_num_threads(),
    )  # fmt: skip
    return y


class Layer(NamedTuple):
    """A linear layer of a block."""

    packed: Packed
    bias: Tensor | None
    activation: str
    quantize_activations: bool


class Norm(NamedTuple):
    """A layer normalization over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float


def linear_block(x: Tensor, layers: list[Layer], residual: Tensor | None, norm: Norm | None) -> Tensor:
    """norm(layers(x) + residual) in x's dtype, [..., n of the last layer]; float32 in between."""
    rows, m, stride = _rows(x, layers[0].packed.k)
    y = x.new_empty(*x.shape[:-1], layers[-1].packed.n)
    added, _, added_stride = (None, 0, 0) if residual is None else _rows(residual, layers[-1].packed.n)
    biases = [_as_f32(layer.bias) for layer in layers]
    scale, shift = (None, None) if norm is None else (_as_f32(norm.weight), _as_f32(norm.bias))
    C.linear_block(
        rows.data_ptr(), DTYPE_CODES[x.dtype], stride, m,
        [(*layer.packed[1:], _address(bias), ACTIVATION_CODES[layer.activation], layer.quantize_activations)
         for layer, bias in zip(layers, biases, strict=True)],
        _address(added), added_stride, _address(scale), _address(shift), 0.0 if norm is None else norm.eps,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def gemm_int8(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    quantize_activations: bool,
    activation: str = "none",
) -> Tensor:
    """The operator lepton::gemm_int8 on CPU tensors."""
    return gemm(x, pack_int8(weight_packed, weight_scale), bias, quantize_activations, activation)


def gemm_int4(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    quantize_activations: bool,
    activation: str = "none",
) -> Tensor:
    """The operator lepton::gemm_int4 on CPU tensors."""
    packed = pack_int4(weight_packed, weight_scale, weight_zero_point, x.shape[-1], group_size)
    return gemm(x, packed, bias, quantize_activations, activation)
