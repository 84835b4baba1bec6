"""Slices of linear layers, and whole layers from slices: Y[..., n] = X[..., k] @ W[n, k]^T + bias.

Rows are outputs: the outputs of row slices side by side are the layer's. Columns are inputs: the products of column
slices add up to the layer's, before its bias and activation. A slice is a layer of the same kind with tensors of its
own. A kind of layer joins by registering with the four functions.
"""

from collections.abc import Sequence
from functools import singledispatch
from typing import Any, cast

import torch
from torch import Tensor, nn

from lepton_ai.training import MaskedLinear, TrainLinear
from lepton_ai.training.masked import mask_
from lepton_kernels import reference
from lepton_kernels.nn import QuantLinear, SparseLinear

State = dict[str, Tensor]


def shares(size: int, parts: int) -> list[tuple[int, int]]:
    """(begin, end) of `parts` contiguous ranges that cover `size`, their lengths at most one apart."""
    return [(size * part // parts, size * (part + 1) // parts) for part in range(parts)]


def can_slice(module: nn.Module) -> bool:
    """Whether this very type is registered: a subclass may compute something else."""
    return type(module) in rows_of.registry


@singledispatch
def rows_of(module: nn.Module, begin: int, end: int) -> nn.Module:
    """The layer of outputs begin to end. Raises ValueError for a kind that is not registered and for a bad range."""
    raise ValueError(f"rows_of: module is {type(module).__name__}; allowed: {_kinds()}")


@singledispatch
def columns_of(module: nn.Module, begin: int, end: int) -> nn.Module:
    """The layer of inputs begin to end, without bias and activation: they belong after the sum of all slices.

    Raises ValueError as rows_of does, and for a range of 4-bit weights that cuts a group.
    """
    raise ValueError(f"columns_of: module is {type(module).__name__}; allowed: {_kinds()}")


@singledispatch
def join_rows(module: nn.Module, parts: Sequence[State]) -> State:
    """The state dict of `module` (its tensors are not read) from those of its row slices, in order."""
    raise ValueError(f"join_rows: module is {type(module).__name__}; allowed: {_kinds()}")


@singledispatch
def join_columns(module: nn.Module, parts: Sequence[State]) -> State:
    """The state dict of `module` without its bias, from those of its column slices, in order."""
    raise ValueError(f"join_columns: module is {type(module).__name__}; allowed: {_kinds()}")


def _kinds() -> str:
    return ", ".join(kind.__name__ for kind in rows_of.registry if kind is not object)


def _check_range(function: str, begin: int, end: int, size: int) -> None:
    if not 0 <= begin < end <= size:
        raise ValueError(f"{function}: the range is {begin} to {end}; allowed: at least one of 0 to {size}")


def _bias_rows(module: Any, begin: int, end: int) -> nn.Parameter | None:
    bias = module.bias
    return None if bias is None else nn.Parameter(bias.detach()[begin:end].clone(), requires_grad=bias.requires_grad)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


# nn.Linear


def _linear(module: nn.Linear, weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(_copy(weight), requires_grad=module.weight.requires_grad)
    layer.bias = bias  # type: ignore[assignment]  # torch's annotation forgets None
    return layer.train(module.training)


@rows_of.register
def _linear_rows(module: nn.Linear, begin: int, end: int) -> nn.Linear:
    _check_range("rows_of", begin, end, module.out_features)
    return _linear(module, module.weight[begin:end], _bias_rows(module, begin, end))


@columns_of.register
def _linear_columns(module: nn.Linear, begin: int, end: int) -> nn.Linear:
    _check_range("columns_of", begin, end, module.in_features)
    return _linear(module, module.weight[:, begin:end], None)


@join_columns.register
def _linear_from_columns(module: nn.Linear, parts: Sequence[State]) -> State:
    return {"weight": torch.cat([part["weight"] for part in parts], 1)}


# QuantLinear


def _quant_linear(
    module: QuantLinear,
    in_features: int,
    activation: str,
    weight: tuple[Tensor, Tensor, Tensor | None],  # weight_packed, weight_scale, weight_zero_point
    bias: nn.Parameter | None,
) -> QuantLinear:
    packed, scale, zero = weight
    n = packed.shape[0]
    layer = QuantLinear(in_features, n, bias is not None, module.scheme, "meta", activation)
    layer.weight_packed, layer.weight_scale = _copy(packed), _copy(scale)
    layer.weight_zero_point = None if zero is None else _copy(zero)
    layer.weight_shape, layer.bias = torch.tensor([n, in_features]), bias
    return layer.train(module.training)


@rows_of.register
def _quant_rows(module: QuantLinear, begin: int, end: int) -> QuantLinear:
    _check_range("rows_of", begin, end, module.out_features)
    zero = module.weight_zero_point
    weight = (
        module.weight_packed[begin:end],
        module.weight_scale[begin:end],
        None if zero is None else zero[begin:end],
    )
    bias = _bias_rows(module, begin, end)
    layer = _quant_linear(module, module.in_features, module.activation, weight, bias)
    layer.activation_is_fused = module.activation_is_fused
    return layer


@columns_of.register
def _quant_columns(module: QuantLinear, begin: int, end: int) -> QuantLinear:
    k = module.in_features
    _check_range("columns_of", begin, end, k)
    if module.scheme.stored_bits == 8:
        weight = (module.weight_packed[:, begin:end], module.weight_scale, None)
        return _quant_linear(module, end - begin, "none", weight, None)
    size = k if module.scheme.group_size == -1 else module.scheme.group_size
    if begin % size or (end % size and end != k):
        raise ValueError(
            f"columns_of: the range is {begin} to {end} of {k} inputs in groups of {size}; allowed: whole groups"
        )
    words = slice(begin // 8, -(-end // 8))  # exact: a group is a multiple of 16, or the row
    groups = slice(begin // size, -(-end // size))
    zero = module.weight_zero_point
    part = (
        module.weight_packed[:, words],
        module.weight_scale[:, groups],
        None if zero is None else zero[:, groups],
    )
    return _quant_linear(module, end - begin, "none", part, None)


@join_columns.register
def _quant_from_columns(module: QuantLinear, parts: Sequence[State]) -> State:
    state = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0] if name != "weight_shape"}
    if module.scheme.stored_bits == 8:
        state["weight_scale"] = parts[0]["weight_scale"]  # of whole rows: every slice has it
    return state | {"weight_shape": torch.tensor([module.out_features, module.in_features])}


# SparseLinear


def _has_nibbles(module: SparseLinear) -> bool:
    return module.scheme is not None and module.scheme.weight_bits == 4


def _sparse_values(module: SparseLinear, stored: Tensor, nonzeros: int) -> Tensor:
    """A value for each nonzero, from weight_compressed."""
    return reference.unpack_nibbles(stored)[:nonzeros] if _has_nibbles(module) else stored


def _sparse_linear(
    module: SparseLinear, mask: Tensor, values: Tensor, grid: slice, activation: str, bias: nn.Parameter | None
) -> SparseLinear:
    """mask bool [n, k] and values [nonzeros] of a slice; grid: the rows of scale and zero point that it has."""
    n, k = mask.shape
    dtype = values.dtype if module.scheme is None else torch.float32
    layer = SparseLinear(k, n, values.numel(), bias is not None, dtype, "meta", activation, module.scheme)
    layer.weight_compressed = reference.pack_nibbles(values) if _has_nibbles(module) else _copy(values)
    layer.weight_bitmask = reference.pack_bitmask(mask)
    scale, zero = module.weight_scale, module.weight_zero_point
    layer.weight_scale = None if scale is None else _copy(scale[grid])
    layer.weight_zero_point = None if zero is None else _copy(zero[grid])
    layer.weight_shape, layer.bias = torch.tensor([n, k]), bias
    return layer.train(module.training)


@rows_of.register
def _sparse_rows(module: SparseLinear, begin: int, end: int) -> SparseLinear:
    _check_range("rows_of", begin, end, module.out_features)
    mask = reference.unpack_bitmask(module.weight_bitmask[:end], module.in_features)
    skipped, last = int(mask[:begin].sum()), int(mask.sum())
    values = _sparse_values(module, module.weight_compressed, last)[skipped:last]
    bias = _bias_rows(module, begin, end)
    return _sparse_linear(module, mask[begin:], values, slice(begin, end), module.activation, bias)


@columns_of.register
def _sparse_columns(module: SparseLinear, begin: int, end: int) -> SparseLinear:
    _check_range("columns_of", begin, end, module.in_features)
    if _has_nibbles(module):
        raise ValueError("columns_of: module is a SparseLinear of 4-bit weights; allowed: float or int8 ones")
    mask = reference.unpack_bitmask(module.weight_bitmask, module.in_features)
    column = mask.nonzero()[:, 1]  # of every stored value
    values = module.weight_compressed[(column >= begin) & (column < end)]
    return _sparse_linear(module, mask[:, begin:end], values, slice(None), "none", None)


@join_columns.register
def _sparse_from_columns(module: SparseLinear, parts: Sequence[State]) -> State:
    widths = [int(part["weight_shape"][1]) for part in parts]
    masks = [reference.unpack_bitmask(part["weight_bitmask"], k) for part, k in zip(parts, widths, strict=True)]
    dense = [
        reference.expand_sparse(part["weight_compressed"], part["weight_bitmask"], k)
        for part, k in zip(parts, widths, strict=True)
    ]
    mask = torch.cat(masks, 1)
    state = {"weight_compressed": torch.cat(dense, 1)[mask], "weight_bitmask": reference.pack_bitmask(mask)}
    if module.scheme is not None:
        state["weight_scale"] = parts[0]["weight_scale"]
    return state | {"weight_shape": torch.tensor([module.out_features, module.in_features])}


# Training forms, by rows alone


@rows_of.register
def _train_rows(module: TrainLinear, begin: int, end: int) -> TrainLinear:
    _check_range("rows_of", begin, end, module.out_features)
    tensors = module.weight, module.bias, module.mask, module.weight_scale, module.weight_zero_point
    weight, bias, mask, scale, zero = (None if t is None else _copy(t[begin:end]) for t in tensors)
    assert weight is not None
    layer = TrainLinear(weight, bias, module.stored, mask, scale, zero)
    for mine, theirs in zip(layer.parameters(), module.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return layer.train(module.training)


@rows_of.register
def _masked_rows(module: MaskedLinear, begin: int, end: int) -> nn.Module:
    _check_range("rows_of", begin, end, module.out_features)
    weight = cast(Tensor, module._parameters["weight"])  # the attribute is the masked one
    layer = _linear(module, weight[begin:end], _bias_rows(module, begin, end))
    layer.weight.requires_grad_(weight.requires_grad)
    return mask_(layer, _copy(module.mask[begin:end]))


@join_rows.register(nn.Linear)
@join_rows.register(MaskedLinear)
@join_rows.register(QuantLinear)
@join_rows.register(TrainLinear)
def _from_rows(module: Any, parts: Sequence[State]) -> State:
    state = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if "weight_shape" in state:
        state["weight_shape"] = torch.tensor([module.out_features, module.in_features])
    return state


@join_rows.register
def _sparse_from_rows(module: SparseLinear, parts: Sequence[State]) -> State:
    state = _from_rows(module, parts)
    if _has_nibbles(module):  # a part with an odd number of them ends in half a byte
        counts = [reference.count_ones(part["weight_bitmask"], module.in_features) for part in parts]
        values = [
            _sparse_values(module, part["weight_compressed"], count) for part, count in zip(parts, counts, strict=True)
        ]
        state["weight_compressed"] = reference.pack_nibbles(torch.cat(values))
    return state
