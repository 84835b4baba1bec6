"""What pruning needs to know about a layer's inputs X [samples, columns]: sums of X^T X, collected by hooks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lepton_kernels.nn.sparse_conv import rows_of_weight, weight_of_rows

Layer = nn.Linear | nn.Conv2d


def as_matrix(weight: Tensor) -> Tensor:
    """A weight [out, in] or [out, in, height, width] as [rows, columns], columns as SparseConv2d has them."""
    weight = weight.detach()
    return weight if weight.dim() == 2 else rows_of_weight(weight)


def as_weight(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The weight of this shape whose as_matrix it is."""
    return matrix if len(shape) == 2 else weight_of_rows(matrix, shape)


def input_rows(layer: Layer, x: Tensor) -> Tensor:
    """The layer's input as [groups, samples, columns]: what each row of its weight multiplies; Linear: one group."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, layer.in_features)
    x = x if x.dim() == 4 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    columns = functional.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    batch, _, places = columns.shape
    grouped = columns.view(batch, layer.groups, layer.in_channels // layer.groups, -1, places)
    return grouped.permute(1, 0, 4, 3, 2).reshape(layer.groups, batch * places, -1)


@dataclass
class InputStatistics:
    """Sums over all samples. squares [groups, columns]: of x^2; gram [groups, columns, columns]: of x x^T, or None."""

    samples: int
    squares: Tensor
    gram: Tensor | None

    def energy(self, weight: Tensor) -> Tensor:
        """w^2 times the mean square of its input, [rows, columns]: what the output loses with each weight alone."""
        return weight.square() * _for_rows(self.squares / max(self.samples, 1), len(weight))

    def output_error(self, before: Tensor, after: Tensor) -> float:
        """|X (after - before)^T| / |X before^T|, Frobenius norms over all samples; without a gram by the squares."""
        lost, whole = self._energy(after - before), self._energy(before)
        return (lost / whole) ** 0.5 if whole > 0 else 0.0

    def _energy(self, weight: Tensor) -> float:
        if self.gram is None:
            return float((weight.square() * _for_rows(self.squares, len(weight))).sum())
        by_group = weight.view(len(self.gram), -1, weight.shape[1])
        return float(((by_group @ self.gram) * by_group).sum())


def _for_rows(by_group: Tensor, rows: int) -> Tensor:
    """[groups, columns] as [rows, columns]."""
    return by_group.repeat_interleave(rows // len(by_group), 0)


def call(model: Callable[..., Any], item: Any) -> Any:
    """The model on one of its inputs: a tensor, a tuple or list of arguments, or a mapping of keywords."""
    if isinstance(item, Mapping):
        return model(**item)
    return model(*item) if isinstance(item, (tuple, list)) else model(item)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; every module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def collect(
    model: nn.Module, layers: Mapping[str, Layer], calibration: Iterable[Any], gram: bool
) -> dict[str, InputStatistics]:
    """Statistics of every layer that the calibration reaches, from one pass in evaluation mode, in float32.

    Memory: columns^2 floats a layer with gram=True. Raises ValueError when `calibration` is empty.
    """
    found: dict[str, InputStatistics] = {}

    def hook(name: str, layer: Layer, arguments: tuple[Any, ...]) -> None:
        x = input_rows(layer, arguments[0]).float()
        squares = x.square().sum(1)
        product = x.transpose(1, 2) @ x if gram else None
        known = found.get(name)
        if known is None:
            found[name] = InputStatistics(x.shape[1], squares, product)
            return
        known.samples += x.shape[1]
        known.squares += squares
        if known.gram is not None and product is not None:
            known.gram += product

    handles = [
        layer.register_forward_pre_hook(lambda layer, arguments, name=name: hook(name, layer, arguments))
        for name, layer in layers.items()
    ]
    try:
        with evaluating(model):
            count = 0
            for item in calibration:
                call(model, item)
                count += 1
            if not count:
                raise ValueError("calibration is empty; allowed: an iterable of one or more model inputs")
    finally:
        for handle in handles:
            handle.remove()
    return found
