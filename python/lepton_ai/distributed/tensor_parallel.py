"""Linear layers whose weight several processes share, by outputs (column-parallel) or by inputs (row-parallel).

With X [..., k] and W [n, k]: column-parallel, process i has rows of W and gives Y_i = X @ W_i^T, gathered along n.
Row-parallel, process i has columns of W and of X and gives a part of the sum Y = sum_i X_i @ W_i^T. The collectives are
autograd functions and not DTensor's operators: so one set of them serves float, quantized and sparse layers.
"""

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from lepton_ai.distributed import exchange
from lepton_ai.distributed.slicing import State, columns_of, join_columns, join_rows, rows_of, shares
from lepton_ai.training import MaskedLinear, TrainLinear
from lepton_kernels import reference
from lepton_kernels.nn import QuantLinear, SparseLinear

MAX_INT8_INPUTS = 65536  # 255 * 127 * 65536 < 2^31: int32 sums are exact


def _all_reduced(tensor: Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """`tensor`, reduced in place."""
    if tensor.numel():
        dist.all_reduce(tensor, op, group=group)
    return tensor


def _float_sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over all processes, in float32 at least."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return _all_reduced(tensor.to(wide, copy=True, memory_format=torch.contiguous_format), group)


class _SumGradients(torch.autograd.Function):
    """X as it is; its gradient is the sum over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _float_sum(grad, ctx.group).to(grad.dtype), None


class _GatherOutputs(torch.autograd.Function):
    """Y [..., n] from Y_i [..., n_i] of all processes; the gradient is this one's slice."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, ranges: list[tuple[int, int]], group: dist.ProcessGroup) -> Tensor:
        ctx.begin, ctx.end = ranges[group.rank()]
        shapes = [(*y.shape[:-1], end - begin) for begin, end in ranges]
        return torch.cat(exchange.gather(y, shapes, group), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad[..., ctx.begin : ctx.end], None, None


class _SumOutputs(torch.autograd.Function):
    """The sum of Y_i [..., n] over all processes, in float32 at least; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.dtype = y.dtype
        return _float_sum(y, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None


class _SumInt8Products(torch.autograd.Function):
    """reference.gemm_int8 of quantized activations without bias, f32 [..., n], from X_i [..., k_i] and W_i [n, k_i].

    Equal to the product of one process in every bit: rows are quantized by the extremes of all their columns, and sums
    are of integers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_packed: Tensor, weight_scale: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(weight_packed, weight_scale)
        ctx.dtype = x.dtype
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
        q, scale, zero = _quantize_rows(rows, group)
        sums = _all_reduced(_int8_products(q, zero, weight_packed), group)
        y = sums.to(torch.float32) * (scale[:, None] * weight_scale[:, 0])
        return y.reshape(*x.shape[:-1], weight_packed.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        weight = reference.dequantize_int8(*ctx.saved_tensors)
        return (grad @ weight).to(ctx.dtype), None, None, None


def _quantize_rows(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """reference.quantize_rows of rows f32 [m, k_i] whose other columns are in the other processes."""
    finite = torch.isfinite(x).all(1)
    infinite = torch.full_like(x[:, 0], torch.inf)  # marks the row for all: NaN has no place in a maximum
    extremes = torch.stack([torch.where(finite, -x.amin(1), infinite), torch.where(finite, x.amax(1), infinite)], 1)
    _all_reduced(extremes, group, dist.ReduceOp.MAX)
    columns = torch.cat([x, -extremes[:, :1], extremes[:, 1:]], 1)  # the extremes of all columns are two more of them
    q, scale, zero = reference.quantize_rows(columns)
    return q[:, :-2], scale, zero


def _int8_products(q: Tensor, zero: Tensor, weight: Tensor) -> Tensor:
    """(q - zero) @ W^T int32 [m, n], exact, from q int32 [m, k] in 0 to 255, zero int32 [m] and W int8 [n, k]."""
    ones = torch.ones(1, q.shape[1], dtype=torch.int8)  # one row more: the sums of the weights
    rows = torch.cat([(q - 128).to(torch.int8), ones])
    if q.shape[1] == 1:  # torch 2.13's oneDNN product takes a transposed single column for one row after another
        rows, weight = functional.pad(rows, (0, 1)), functional.pad(weight, (0, 1))
    products = torch._int_mm(rows, weight.T)
    return products[:-1] + (128 - zero)[:, None] * products[-1]


class ParallelLayer(nn.Module, ABC):
    """This process's `shard` of a layer; the state dict of the whole one goes in and out."""

    def __init__(self, layer: Any, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = layer.in_features, layer.out_features, group
        # What the whole layer is, without its memory; in a tuple, so that it is no part of the model.
        self._whole = (rows_of(layer, 0, layer.out_features).to("meta"),)
        self.shard = self._cut(layer)

    @abstractmethod
    def _cut(self, layer: nn.Module) -> nn.Module:
        """This process's slice of the whole layer."""

    @abstractmethod
    def whole_state(self) -> State:
        """The whole layer's state dict, on every process; all of the group call it together."""

    def _shard_state(self) -> State:
        return {name: exchange.whole(tensor) for name, tensor in self.shard.state_dict().items()}

    def load_whole_state(self, state: State) -> None:
        """Takes this process's share of the whole layer's state dict; parameters are written in place."""
        whole = copy.deepcopy(self._whole[0])
        whole.load_state_dict(state, assign=True)
        self._take(whole)

    @torch.no_grad()
    def _take(self, whole: nn.Module) -> None:
        part = self._cut(whole)
        for name, parameter in self.shard.named_parameters():
            parameter.copy_(part.get_parameter(name))
        for name, buffer in part.named_buffers():
            setattr(self.shard, name, buffer)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, process {self.group.rank()} of {self.group.size()}"


class ColumnParallel(ParallelLayer):
    """Holds some outputs of a layer. X is the same on every process; Y is gathered, or left split."""

    def __init__(self, layer: nn.Module, group: dist.ProcessGroup, gathered: bool) -> None:
        super().__init__(layer, group)
        self.gathered = gathered

    @property
    def _ranges(self) -> list[tuple[int, int]]:
        return shares(self.out_features, self.group.size())

    def _cut(self, layer: nn.Module) -> nn.Module:
        return rows_of(layer, *self._ranges[self.group.rank()])

    def forward(self, x: Tensor) -> Tensor:
        y = self.shard(_SumGradients.apply(x, self.group))
        return _GatherOutputs.apply(y, self._ranges, self.group) if self.gathered else y

    def whole_state(self) -> State:
        return join_rows(self._whole[0], exchange.gather_states(self._shard_state(), self.group))


class RowParallel(ParallelLayer):
    """Holds some inputs of a layer. X is split, as a column-split layer leaves it; Y is the same on every process."""

    bias: nn.Parameter | None

    def __init__(self, layer: Any, group: dist.ProcessGroup) -> None:
        super().__init__(layer, group)
        self.activation: str = getattr(layer, "activation", "none")
        bias = layer.bias
        copied = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", copied)

    def _cut(self, layer: nn.Module) -> nn.Module:
        return columns_of(layer, *shares(self.in_features, self.group.size())[self.group.rank()])

    def forward(self, x: Tensor) -> Tensor:
        shard: Any = self.shard
        if x.shape[-1] != shard.in_features:
            raise ValueError(
                f"RowParallel: x has shape {tuple(x.shape)}; allowed: [..., {shard.in_features}], this process's share "
                f"of {self.in_features} as a 'column-split' layer leaves it"
            )
        if isinstance(shard, QuantLinear):
            if torch.is_autocast_enabled(x.device.type):  # as QuantLinear has it
                x = x.to(torch.get_autocast_dtype(x.device.type))
            y, dtype = _SumInt8Products.apply(x, shard.weight_packed, shard.weight_scale, self.group), x.dtype
        else:
            part = shard(x)
            y, dtype = _SumOutputs.apply(part, self.group), part.dtype
        if self.bias is not None:
            y = y + self.bias
        return reference.ACTIVATIONS[self.activation](y).to(dtype)

    def whole_state(self) -> State:
        state = join_columns(self._whole[0], exchange.gather_states(self._shard_state(), self.group))
        return state if self.bias is None else state | {"bias": exchange.whole(self.bias)}

    @torch.no_grad()
    def _take(self, whole: nn.Module) -> None:
        super()._take(whole)
        if self.bias is not None:
            self.bias.copy_(whole.get_parameter("bias"))


def why_not_row(layer: nn.Module) -> str | None:
    """What keeps a layer from being row-parallel, or None."""
    if isinstance(layer, (MaskedLinear, TrainLinear)):
        return "its training form is split by outputs alone; allowed: 'column', 'column-split'"
    if isinstance(layer, SparseLinear) and layer.scheme is not None:
        return "its sparse quantized product has no partial sums; allowed: float SparseLinear"
    if not isinstance(layer, QuantLinear):
        return None
    if layer.scheme.stored_bits != 8 or layer.scheme.activation != "int8":
        return f"its scheme is {layer.scheme.name}, whose sums depend on their order; allowed: w8a8"
    if layer.activation not in ("none", "relu"):
        return f"its activation is {layer.activation!r}, which torch rounds otherwise; allowed: 'none', 'relu'"
    if layer.in_features > MAX_INT8_INPUTS:
        return f"in_features is {layer.in_features}; allowed: {MAX_INT8_INPUTS} at most"
    return None
