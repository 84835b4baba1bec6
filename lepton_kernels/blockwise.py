"""Gradients for the wire: int8 or int4 with one scale a block of 128 values, error feedback, the mean of many senders.

A reduction among r ranks is quantize with a residual, an all-to-all of slices, requantize_mean, an all-gather and
dequantize. docs/formats.md has the layout of what is packed. All tensors are contiguous on the CPU; large ones are
worked on by as many threads as torch uses, and every result is the same bits on every level and number of threads.
"""

import torch
from torch import Tensor

from lepton_kernels._runtime import C

# Values that share a scale.
BLOCK: int = C.SCALE_BLOCK


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of n values packed with 8 or 4 bits, scales included; a multiple of 4.

    Raises ValueError for a negative n and other bits, as all functions here do.
    """
    return int(C.blockwise_bytes(n, bits))


def quantize(x: Tensor, bits: int, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x f32 [n], plus residual f32 [n], as codes of 8 or 4 bits and scales: uint8 [packed_bytes(n, bits)].

    residual becomes what the codes leave of x + residual, to be given again with the next x. A block that holds NaN or
    infinity decodes to NaN and leaves no residual.
    out: where to write, else a tensor is made. Raises ValueError for another dtype, shape or device, and for what is
    not contiguous.
    """
    n = x.numel()
    source = _address("quantize", "x", x, torch.float32, n)
    feedback = 0 if residual is None else _address("quantize", "residual", residual, torch.float32, n)
    packed = _output("quantize", out, torch.uint8, packed_bytes(n, bits))
    C.quantize_blockwise(source, feedback, n, bits, packed.data_ptr(), torch.get_num_threads())
    return packed


def dequantize(packed: Tensor, n: int, bits: int, out: Tensor | None = None) -> Tensor:
    """The values f32 [n] of packed uint8 [packed_bytes(n, bits)]. out, errors: as quantize has them."""
    source = _address("dequantize", "packed", packed, torch.uint8, packed_bytes(n, bits))
    values = _output("dequantize", out, torch.float32, n)
    C.mean_blockwise(source, 1, n, bits, values.data_ptr(), 0, torch.get_num_threads())
    return values


def mean(packed: Tensor, n: int, bits: int, out: Tensor | None = None) -> Tensor:
    """The mean f32 [n] of the rows of packed uint8 [r, packed_bytes(n, bits)], r of 1 or more, added in their order.

    out, errors: as quantize has them.
    """
    source = _rows("mean", packed, n, bits)
    values = _output("mean", out, torch.float32, n)
    C.mean_blockwise(source, len(packed), n, bits, values.data_ptr(), 0, torch.get_num_threads())
    return values


def requantize_mean(packed: Tensor, n: int, bits: int, out: Tensor | None = None) -> Tensor:
    """quantize(mean(packed, n, bits), bits) in one pass: uint8 [packed_bytes(n, bits)]. out may be a row of packed."""
    source = _rows("requantize_mean", packed, n, bits)
    repacked = _output("requantize_mean", out, torch.uint8, packed_bytes(n, bits))
    C.mean_blockwise(source, len(packed), n, bits, 0, repacked.data_ptr(), torch.get_num_threads())
    return repacked


def _address(function: str, name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """Where a tensor's values are. Raises ValueError unless it is what the kernels take."""
    contiguous = tensor.is_contiguous()
    if tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu and contiguous:
        return tensor.data_ptr()
    raise ValueError(
        f"blockwise.{function}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        f"{'' if contiguous else ', not contiguous'}; allowed: {dtype} {shape} on cpu, contiguous"
    )


def _rows(function: str, packed: Tensor, n: int, bits: int) -> int:
    rows = packed.shape[0] if packed.dim() == 2 else 1
    return _address(function, "packed", packed, torch.uint8, max(rows, 1), packed_bytes(n, bits))


def _output(function: str, out: Tensor | None, dtype: torch.dtype, size: int) -> Tensor:
    if out is None:
        return torch.empty(size, dtype=dtype)
    _address(function, "out", out, dtype, size)
    return out
