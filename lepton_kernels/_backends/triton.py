"""Quantized GEMM on CUDA tensors: the Triton kernels behind gemm_int8 and gemm_int4.

They read the saved layout as it is. w8a8 and w4a8 give the same bits as reference.py and as the CPU: sums are integers
and the float steps are not fused (enable_fp_fusion=False).
"""

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lepton_kernels import reference
from lepton_kernels._backends.derived import Derived


class Config(NamedTuple):
    """A tile of Y and how a GPU computes it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By rows of X, the first that holds them all: tiles of gemm_int8, of gemm_int4 (which keeps two sums), and of either
# on float32 operands. Chosen for registers and shared memory; not yet tuned on a GPU.
_CONFIGS = (
    (16, Config(16, 32, 128, 4, 4), Config(16, 32, 128, 4, 4), Config(16, 32, 32, 4, 4)),
    (64, Config(64, 64, 64, 4, 4), Config(64, 64, 64, 4, 4), Config(64, 64, 32, 4, 3)),
    (2**62, Config(128, 128, 64, 8, 3), Config(128, 64, 64, 8, 3), Config(64, 64, 32, 4, 3)),
)
_QUANTIZE_BLOCK = 1024

_column_sums: Derived[Tensor] = Derived()


def choose(m: int, operand: torch.dtype, group: int | None = None) -> Config:
    """The tile for m rows of an operand type; gemm_int4's blocks of k do not cross groups and have 32 at least."""
    _, int8, int4, float32 = next(line for line in _CONFIGS if m <= line[0])
    config = float32 if operand is torch.float32 else int8 if group is None else int4
    if group is None:
        return config
    return config._replace(block_k=min(config.block_k, max(32, 1 << (group - 1).bit_length())))


@functools.cache
def _kernels() -> Any:
    """The compiled-on-first-use kernels, as a namespace. Raises ImportError without triton."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ImportError("CUDA tensors need triton: pip install 'lepton-kernels[gpu]'") from error
    from types import SimpleNamespace

    from lepton_kernels.triton_kernels.gemm_int4 import gemm_int4
    from lepton_kernels.triton_kernels.gemm_int8 import gemm_int8
    from lepton_kernels.triton_kernels.quantize_rows import quantize_rows

    return SimpleNamespace(gemm_int4=gemm_int4, gemm_int8=gemm_int8, quantize_rows=quantize_rows)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to x's GPU, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _rows(x: Tensor) -> Tensor:
    """X as [m, k] with neighbours in a row next to each other."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32).contiguous()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q - 128 int8 [m, k], scale f32 [m], zero - 128 int32 [m] of x float [m, k] with unit column stride."""
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, device=x.device)
    zero = torch.empty(m, dtype=torch.int32, device=x.device)
    with _on(x):
        _kernels().quantize_rows[(m,)](x, q, scale, zero, k, x.stride(0), _QUANTIZE_BLOCK, enable_fp_fusion=False)
    return q, scale, zero


def _launch(kernel: Any, config: Config, m: int, n: int, *args: Any, **constants: Any) -> None:
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    kernel[(tiles,)](
        *args, **constants, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False,
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
    weight = weight_packed.contiguous()
    n, k = weight.shape
    rows, y = _rows(x), x.new_empty(*x.shape[:-1], n)
    m = rows.shape[0]
    if y.numel() == 0:
        return y
    row_scale = row_zero = sums = None
    if quantize_activations:
        rows, row_scale, row_zero = quantize_rows(rows)
        sums = _column_sums.get((weight_packed,), (), lambda: weight.sum(1, dtype=torch.int32))
    scale = weight_scale.to(torch.float32).contiguous()
    with _on(x):
        _launch(
            _kernels().gemm_int8, choose(m, rows.dtype), m, n,
            rows, weight, scale, row_scale, row_zero, sums, _bias(bias), y, m, n, k, rows.stride(0),
            INTEGER=quantize_activations, ACTIVATION=activation,
        )  # fmt: skip
    return y


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
    weight, scale = weight_packed.contiguous(), weight_scale.contiguous()
    zero = None if weight_zero_point is None else weight_zero_point.contiguous()
    (n, words), k, groups = weight.shape, x.shape[-1], scale.shape[1]
    rows, y = _rows(x), x.new_empty(*x.shape[:-1], n)
    m = rows.shape[0]
    if y.numel() == 0:
        return y
    size = k if group_size == -1 else group_size
    row_scale = row_zero = sums = None
    if quantize_activations:
        rows, row_scale, row_zero = quantize_rows(rows)
        sources = (weight_packed, weight_scale) + (() if weight_zero_point is None else (weight_zero_point,))
        sums = _column_sums.get(sources, (k, size), lambda: _column_sums_int4(weight, scale, zero, k, group_size))
    with _on(x):
        _launch(
            _kernels().gemm_int4, choose(m, rows.dtype, size), m, n,
            rows, weight.view(torch.uint8), scale, zero, row_scale, row_zero, sums, _bias(bias), y,
            m, n, k, rows.stride(0), 4 * words, groups, INTEGER=quantize_activations, GROUP=size,
            ACTIVATION=activation,
        )  # fmt: skip
    return y


def _column_sums_int4(weight: Tensor, scale: Tensor, zero: Tensor | None, k: int, group_size: int) -> Tensor:
    """f32 [n]: the sum of each output's dequantized weights."""
    values = reference.unpack_int4(weight, k).to(torch.int32)
    if zero is not None:
        values -= reference.expand_groups(zero, k, group_size)
    return reference.column_sums_int4(values, scale, group_size)
