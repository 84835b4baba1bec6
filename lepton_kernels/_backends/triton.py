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


# By rows of X, the first that holds them all: tiles of gemm_int8 on int8 and on 16-bit operands, of gemm_int4, and of
# either on float32 operands. gemm_int8's two are the fastest of 8 to 32 with 8192 x 8192 on an H200.
_FLOAT32 = Config(64, 64, 64, 4, 3)
_CONFIGS = (
    (16, Config(16, 32, 256, 4, 5), Config(16, 32, 256, 4, 5), Config(16, 32, 128, 4, 5), Config(16, 32, 64, 4, 4)),
    (64, Config(64, 64, 128, 4, 4), Config(64, 64, 128, 4, 4), Config(64, 32, 128, 8, 4), _FLOAT32),
    (256, Config(64, 128, 128, 4, 4), Config(128, 128, 128, 8, 3), Config(128, 64, 128, 8, 3), _FLOAT32),
    (2**62, Config(128, 128, 64, 4, 4), Config(128, 128, 64, 4, 3), Config(128, 64, 128, 8, 3), _FLOAT32),
)
_QUANTIZE_BLOCK = 1024

_column_sums: Derived[Tensor] = Derived()


def choose(m: int, operand: torch.dtype, group: int | None = None, capability: int = 9) -> Config:
    """The tile for m rows of an operand type; gemm_int4's blocks of k do not cross groups and have 64 at least."""
    _, int8, half, int4, float32 = next(line for line in _CONFIGS if m <= line[0])
    of_operand = int8 if operand is torch.int8 else half
    config = float32 if operand is torch.float32 else of_operand if group is None else int4
    if capability < 9 and config.block_m * config.block_n >= 128 * 128:
        config = config._replace(
            num_warps=8
        )  # operands take registers, too, where Hopper's products read shared memory
    if group is None:
        return config
    return config._replace(block_k=min(config.block_k, max(64, 1 << (group - 1).bit_length())))


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


def rows_of(x: Tensor) -> Tensor:
    """x as [m, k] with neighbours in a row next to each other."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def float_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32).contiguous()


def column_sums_int8(weight_packed: Tensor) -> Tensor:
    """int32 [n]: the sums of the rows of weight_packed int8 [n, k]; made once, then found again."""
    return _column_sums.get((weight_packed,), (), lambda: weight_packed.sum(1, dtype=torch.int32))


def quantize_rows(x: Tensor, pairs: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q - 128 int8 [m, k], scale f32 [m], zero - 128 int32 [m] of x float [m, k] with unit column stride.

    With `pairs` q is [m, 2, pairs]: even columns, then odd ones, then zeros.
    """
    m, k = x.shape
    make = torch.zeros if 2 * pairs > k else torch.empty
    q = make((m, 2, pairs) if pairs else (m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty(m, device=x.device)
    zero = torch.empty(m, dtype=torch.int32, device=x.device)
    with _on(x):
        _kernels().quantize_rows[(m,)](
            x, q, scale, zero, k, x.stride(0), pairs, _QUANTIZE_BLOCK, enable_fp_fusion=False
        )
    return q, scale, zero


def _even_and_odd(x: Tensor, pairs: int) -> Tensor:
    """[m, 2, pairs] of x [m, k]: even columns, then odd ones, then zeros."""
    padded = torch.nn.functional.pad(x, (0, 2 * pairs - x.shape[1]))
    return padded.view(x.shape[0], pairs, 2).transpose(1, 2).contiguous()


@functools.cache
def _capability(device: torch.device) -> int:
    """The major one of a GPU; of the interpreter the newest."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


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
    rows, y = rows_of(x), x.new_empty(*x.shape[:-1], n)
    m = rows.shape[0]
    if y.numel() == 0:
        return y
    row_scale = row_zero = sums = None
    if quantize_activations:
        rows, row_scale, row_zero = quantize_rows(rows)
        sums = column_sums_int8(weight_packed)
    scale = weight_scale.to(torch.float32).contiguous()
    with _on(x):
        _launch(
            _kernels().gemm_int8, choose(m, rows.dtype, None, _capability(x.device)), m, n,
            rows, weight, scale, row_scale, row_zero, sums, float_bias(bias), y, m, n, k, rows.stride(0),
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
    rows, y = rows_of(x), x.new_empty(*x.shape[:-1], n)
    m = rows.shape[0]
    if y.numel() == 0:
        return y
    size = k if group_size == -1 else group_size
    pairs = 4 * words
    row_scale = row_zero = sums = None
    if quantize_activations:
        rows, row_scale, row_zero = quantize_rows(rows, pairs)
        sources = (weight_packed, weight_scale) + (() if weight_zero_point is None else (weight_zero_point,))
        sums = _column_sums.get(sources, (k, size), lambda: _column_sums_int4(weight, scale, zero, k, group_size))
    else:
        rows = _even_and_odd(rows, pairs)
    group = size if size < k else 2 * pairs
    with _on(x):
        _launch(
            _kernels().gemm_int4, choose(m, rows.dtype, size, _capability(x.device)), m, n,
            rows, weight.view(torch.uint8), scale, zero, row_scale, row_zero, sums, float_bias(bias), y,
            m, n, pairs, groups, INTEGER=quantize_activations, GROUP=group, ACTIVATION=activation,
        )  # fmt: skip
    return y


def _column_sums_int4(weight: Tensor, scale: Tensor, zero: Tensor | None, k: int, group_size: int) -> Tensor:
    """f32 [n]: the sum of each output's dequantized weights."""
    values = reference.unpack_int4(weight, k).to(torch.int32)
    if zero is not None:
        values -= reference.expand_groups(zero, k, group_size)
    return reference.column_sums_int4(values, scale, group_size)
