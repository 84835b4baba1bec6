"""Quantized GEMM on CUDA tensors: native kernels (csrc/cuda) for few rows of X and for Hopper, Triton for the rest.

The native kernels read the saved weight as it is. They take bf16, fp16 and, for w8a8, any float type; up to
C.cuda_most_rows() rows, and on compute capability 9.0 any number with w8a16, and with w4a16 and bf16; rows of X and W
that start at multiples of 16 bytes; int4 groups of a multiple of 128, with bf16 scales. w4a8 is Triton's alone. int4:
up to C.cuda_most_rows() rows a row of X that holds an infinity is NaN altogether; with more, scaled weights are rounded
to bf16, by 2e-3 of them.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lepton_kernels._backends import triton
from lepton_kernels._backends.codes import ACTIVATION_CODES, DTYPE_CODES
from lepton_kernels._backends.derived import Derived
from lepton_kernels._runtime import C

_BLOCK_K = 128  # k that share a scale in the kernel, W4A16::kBlock of csrc/cuda/gemm_few_rows.cuh
_TILE = 16  # outputs of a tile, kOutputs there
_GROUP_OUTPUTS = 64  # kGroupOutputs of csrc/cuda/gemm.h
_ALIGNMENT = 16  # bytes

_groups: Derived[Tensor] = Derived()


class _Rows(NamedTuple):
    """X [m, k] as a kernel reads it; of quantized rows (w8a8) also what they were quantized with."""

    x: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None


@functools.cache
def _native(device: int) -> bool:
    """Whether csrc/cuda was compiled for this GPU: code of 8.0 runs on all of 8.x, that of 9.0 on 9.0 alone."""
    major, minor = torch.cuda.get_device_capability(device)
    return any(arch // 10 == major and (major == 8 or arch == 10 * major + minor) for arch in C.cuda_architectures())


@functools.cache
def _hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _aligned(tensor: Tensor, row_bytes: int) -> bool:
    return tensor.data_ptr() % _ALIGNMENT == 0 and row_bytes % _ALIGNMENT == 0


def _takes(x: Tensor, rows: Tensor, weight: Tensor, many: bool) -> bool:
    """Whether the native kernels take these operands, the types of X and the groups aside.

    many: whether there is a kernel for any number of rows, on Hopper.
    """
    return (
        _native(x.device.index)
        and (rows.shape[0] <= C.cuda_most_rows() or (many and _hopper(x.device.index)))
        and weight.is_contiguous()
        and _aligned(weight, weight.shape[1] * weight.element_size())
    )


def _launch(
    bits: int, rows: _Rows, weight: Tensor, scales: Tensor, column_sum: Tensor | None, bias: Tensor | None, y: Tensor,
    activation: str,
) -> None:  # fmt: skip
    (m, k), n = rows.x.shape, y.shape[-1]
    bias = triton.float_bias(bias)
    pointers = (0 if t is None else t.data_ptr() for t in (scales, rows.scale, rows.zero, column_sum, bias, y))
    with torch.cuda.device(y.device):
        C.cuda_gemm(
            bits, rows.x.data_ptr(), rows.x.stride(0), weight.data_ptr(), *pointers, m, n, k, DTYPE_CODES[y.dtype],
            ACTIVATION_CODES[activation], torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip


def gemm_int8(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    quantize_activations: bool,
    activation: str = "none",
) -> Tensor:
    """The operator lepton::gemm_int8 on CUDA tensors."""
    rows = triton.rows_of(x)
    floats = x.dtype is not torch.float32 and _aligned(rows, rows.stride(0) * rows.element_size())
    if (quantize_activations or floats) and _takes(x, rows, weight_packed, not quantize_activations):
        y = x.new_empty(*x.shape[:-1], weight_packed.shape[0])
        if y.numel():
            operand = _Rows(*triton.quantize_rows(rows)) if quantize_activations else _Rows(rows)
            column_sum = triton.column_sums_int8(weight_packed) if quantize_activations else None
            scale = weight_scale.to(torch.float32).contiguous()
            _launch(8, operand, weight_packed, scale, column_sum, bias, y, activation)
        return y
    return triton.gemm_int8(x, weight_packed, weight_scale, bias, quantize_activations, activation)


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
    """The operator lepton::gemm_int4 on CUDA tensors."""
    rows, k = triton.rows_of(x), x.shape[-1]
    size = k if group_size == -1 else group_size
    if (
        not quantize_activations
        and x.dtype is not torch.float32
        and weight_scale.dtype is torch.bfloat16
        and k % (2 * _ALIGNMENT) == 0
        and (size % _BLOCK_K == 0 or size >= k)
        and _takes(x, rows, weight_packed, x.dtype is torch.bfloat16)
        and _aligned(rows, rows.stride(0) * rows.element_size())
    ):
        y = x.new_empty(*x.shape[:-1], weight_packed.shape[0])
        if y.numel():
            sources = (weight_scale,) + (() if weight_zero_point is None else (weight_zero_point,))
            groups = _groups.get(sources, (k, size), lambda: pack_groups(weight_scale, weight_zero_point, k, size))
            _launch(4, _Rows(rows), weight_packed, groups, None, bias, y, activation)
        return y
    return triton.gemm_int4(
        x, weight_packed, weight_scale, weight_zero_point, bias, group_size, quantize_activations, activation
    )


def pack_groups(weight_scale: Tensor, weight_zero_point: Tensor | None, k: int, group_size: int) -> Tensor:
    """int32 [ceil(k / 128), 4 * ceil(n / 64), 8, 2] of scales bf16 and zero points int8, [n, groups].

    A word has the bits of the scale above and the zero point in its lowest byte; outputs o and o + 8 of sixteen are
    neighbours, as the lane that multiplies both needs them.
    """
    n = weight_scale.shape[0]
    group = torch.arange(0, k, _BLOCK_K, device=weight_scale.device) // group_size
    words = weight_scale[:, group].contiguous().view(torch.int16).to(torch.int32) << 16
    if weight_zero_point is not None:
        words |= weight_zero_point[:, group].to(torch.int32) & 0xFF
    words = torch.nn.functional.pad(words.T, (0, -n % _GROUP_OUTPUTS))
    return words.view(len(group), -1, 2, _TILE // 2).transpose(2, 3).contiguous()
