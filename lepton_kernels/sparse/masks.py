"""Masks that outlive training: a pruned weight is a parametrization, dense * mask, until finalize_ drops it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lepton_kernels._select import Selector
from lepton_kernels.pattern import Pattern
from lepton_kernels.sparse.calibration import as_matrix, as_weight


class Mask(nn.Module):
    """weight -> weight * mask; the gradient of a zero is zero."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def mask_of(module: nn.Module) -> Mask | None:
    """The mask of a layer's weight, or None."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    steps: Any = module.parametrizations
    return next((step for step in steps["weight"] if isinstance(step, Mask)), None)


def stored_weight(module: Any) -> Tensor:
    """A layer's weight as it is stored, without its mask: a parametrized one is computed anew at every access."""
    return module.parametrizations.weight.original if parametrize.is_parametrized(module, "weight") else module.weight


def fix(module: nn.Module, mask: Tensor) -> None:
    """Keeps the weights that are False in `mask` at zero from now on; replaces a mask that is there."""
    known = mask_of(module)
    if known is not None:
        known.mask = mask
    else:
        parametrize.register_parametrization(module, "weight", Mask(mask))


def finalize_(model: nn.Module) -> int:
    """Drops every mask of `model`, in place: the weights are plain parameters again, their zeros stay. How many there
    were."""
    count = 0
    for module in list(model.modules()):
        if mask_of(module) is not None:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            count += 1
    return count


class GradualPruner:
    """Prunes while a model trains, by magnitude, along the cubic schedule of Zhu and Gupta (2017, arXiv 1710.01878):

        s(t) = final + (initial - final) * (1 - (t - begin) / (end - begin))^3

    Call step() after every optimizer.step(). Zeros stay zeros. finalize_ (or sparsify_) drops the masks at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        final_sparsity: float,
        *,
        begin_step: int,
        end_step: int,
        every: int = 10,
        initial_sparsity: float = 0.0,
        pattern: str | Pattern = "unstructured",
        include: Sequence[Selector] | None = None,
        exclude: Sequence[Selector] = (),
    ) -> None:
        """every: steps from one pruning to the next. include, exclude: as in prune_.

        Raises ValueError for values that are not allowed and when there is nothing to prune. A pattern N:M has its own
        share of zeros and is applied at end_step, at once.
        """
        from lepton_kernels.sparse.prune import layers_to_prune

        for name, value in (("initial_sparsity", initial_sparsity), ("final_sparsity", final_sparsity)):
            if not 0 <= value < 1:
                raise ValueError(f"GradualPruner: {name} is {value}; allowed: 0 <= {name} < 1")
        if initial_sparsity > final_sparsity:
            raise ValueError(
                f"GradualPruner: initial_sparsity is {initial_sparsity}; "
                f"allowed: up to final_sparsity, {final_sparsity}"
            )
        if not 0 <= begin_step < end_step:
            raise ValueError(
                f"GradualPruner: begin_step is {begin_step}, end_step {end_step}; allowed: 0 <= begin_step < end_step"
            )
        if every < 1:
            raise ValueError(f"GradualPruner: every is {every}; allowed: 1 or more")
        self.pattern = Pattern.of(pattern, "GradualPruner")
        chosen, _ = layers_to_prune("GradualPruner", model, include, exclude)
        self._layers = list(chosen.values())
        self._initial, self._final = initial_sparsity, final_sparsity
        self._begin, self._end, self._every = begin_step, end_step, every
        self.step_count = 0

    def sparsity_at(self, step: int) -> float:
        """The schedule's value after `step` steps."""
        if step < self._begin:
            return 0.0
        if self.pattern.sparsity is not None:
            return self.pattern.sparsity if step >= self._end else 0.0
        done = min((step - self._begin) / (self._end - self._begin), 1.0)
        return self._final + (self._initial - self._final) * (1 - done) ** 3

    def step(self) -> float:
        """Counts a step of training and prunes when it is time to; the sparsity aimed for now."""
        self.step_count += 1
        step, now = self.step_count, self.sparsity_at(self.step_count)
        due = step == self._end or (self._begin <= step < self._end and (step - self._begin) % self._every == 0)
        if due and now > 0:
            for layer in self._layers:
                self._prune(layer, now)
        return now

    def _prune(self, layer: Any, sparsity: float) -> None:
        with torch.no_grad():
            weight = layer.weight.detach()
            mask = as_weight(self.pattern.keep(as_matrix(weight).square(), sparsity), weight.shape)
            fix(layer, mask)
            stored_weight(layer).mul_(mask)
