"""Pruning: which share of the weights becomes zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lepton_kernels import PruneReport, prune_


@dataclass(frozen=True)
class Pruning:
    """Zeroes `sparsity` (0 to 1) of every nn.Linear's weights; the arguments are those of lepton_kernels.prune_."""

    sparsity: float = 0.5
    pattern: str = "unstructured"
    method: str = "magnitude"
    include: Sequence[Any] | None = None
    exclude: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"Pruning: sparsity is {self.sparsity}; allowed: 0 <= sparsity < 1")

    def apply(self, model: nn.Module) -> PruneReport:
        """Prunes `model` in place."""
        return prune_(
            model, self.sparsity, pattern=self.pattern, method=self.method, include=self.include, exclude=self.exclude
        )
