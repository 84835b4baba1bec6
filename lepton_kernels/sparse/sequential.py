"""Calibration of one layer after the other: each sees what the pruned layers before it give, and learns to undo it.

For a layer with weight W, inputs X in the dense model and X' in the one pruned so far, the weight that is pruned is

    W' = W + W (X - X')^T X' (X'^T X' + a diag(X'^T X'))^-1

the ridge regression towards W of what the dense layer gave: the least |X' W'^T - X W^T|^2 + a |(W' - W) D|^2, where D^2
is the diagonal of X'^T X'.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lepton_kernels.sparse.calibration import InputStatistics, Layer, call, evaluating, input_rows

_RIDGE = 0.1


class _Reached(Exception):
    """Ends a forward pass at the layer whose input is wanted."""


@dataclass
class _Moments:
    """Sums over all samples [groups, columns, columns]: x'^T x', x^T x' and x^T x; x of the dense model."""

    samples: int
    pruned: Tensor
    cross: Tensor
    dense: Tensor

    def statistics(self) -> InputStatistics:
        return InputStatistics(self.samples, self.pruned.diagonal(dim1=1, dim2=2).clone(), self.pruned)

    def fitted(self, weight: Tensor) -> Tensor:
        """The weight [rows, columns] that gives from x' what `weight` gives from x."""
        parts = []
        for part, pruned, cross in zip(weight.chunk(len(self.pruned)), self.pruned, self.cross, strict=True):
            diagonal = pruned.diagonal()
            damped = pruned + torch.diag(_RIDGE * diagonal + 1e-12 * diagonal.max() + 1e-30)
            change = torch.linalg.solve(damped, (part @ (cross - pruned)).T).T
            parts.append(part + change)
        return torch.cat(parts)

    def output_error(self, before: Tensor, after: Tensor) -> float:
        """|x' after^T - x before^T| / |x before^T|."""
        lost = whole = 0.0
        groups = len(self.pruned)
        for old, new, pruned, cross, dense in zip(
            before.chunk(groups), after.chunk(groups), self.pruned, self.cross, self.dense, strict=True
        ):
            kept = float(((old @ dense) * old).sum())
            lost += float(((new @ pruned) * new).sum()) - 2 * float(((old @ cross) * new).sum()) + kept
            whole += kept
        return (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def _input_of(model: nn.Module, layer: Layer, item: Any) -> Tensor:
    """The layer's input rows when the model is given a calibration input."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(hook)
    try:
        call(model, item)
    except _Reached:
        pass
    finally:
        handle.remove()
    return input_rows(layer, seen[0]).float()


def _in_order(model: nn.Module, layers: Mapping[str, Layer], item: Any) -> list[list[str]]:
    """The layers' names as the model runs them; those that are given the same tensor together."""
    calls: list[tuple[str, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, arguments, name=name: calls.append((name, arguments[0])))
        for name, layer in layers.items()
    ]
    try:
        call(model, item)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[Tensor, list[str]]] = []
    known: set[str] = set()
    for name, x in calls:
        if name in known:
            continue
        known.add(name)
        if groups and groups[-1][0] is x:
            groups[-1][1].append(name)
        else:
            groups.append((x, [name]))
    return [names for _, names in groups]


def one_after_the_other(
    model: nn.Module, layers: Mapping[str, Layer], calibration: Sequence[Any]
) -> Iterator[tuple[list[str], _Moments]]:
    """Yields layers of one input and its moments, in the order in which the model runs them; they are pruned by the
    caller before the next ones are yielded. Two passes of the model, up to the layer, for each; a copy of it is kept.
    """
    with evaluating(model):
        dense = copy.deepcopy(model)
        for names in _in_order(model, layers, calibration[0]):
            first = names[0]
            twin: Any = dense.get_submodule(first)
            moments: _Moments | None = None
            for item in calibration:
                x, given = _input_of(dense, twin, item), _input_of(model, layers[first], item)
                parts = given.transpose(1, 2) @ given, x.transpose(1, 2) @ given, x.transpose(1, 2) @ x
                if moments is None:
                    moments = _Moments(x.shape[1], *parts)
                    continue
                moments.samples += x.shape[1]
                for total, part in zip((moments.pruned, moments.cross, moments.dense), parts, strict=True):
                    total += part
            assert moments is not None
            yield names, moments
