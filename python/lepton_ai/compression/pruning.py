"""Pruning: which share of the weights becomes zero, and how they are chosen."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lepton_kernels import PruneReport, prune_
from lepton_kernels.sparse import Pattern


@dataclass(frozen=True)
class Pruning:
    """Zeroes `sparsity` (0 to 1) of every nn.Linear's and nn.Conv2d's weights; the arguments are those of
    lepton_kernels.prune_.

    calibration: model inputs, which "wanda" and "sparsegpt" need; lepton_ai.calibration.texts makes them of sentences.
    sparsity may be left out where the pattern says it ("2:4": 0.5).
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    method: str = "magnitude"
    calibration: Iterable[Any] | None = field(default=None, repr=False)
    allocation: str = "uniform"
    max_error: float | None = None
    sequential: bool = False
    include: Sequence[Any] | None = None
    exclude: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"Pruning: sparsity is {self.sparsity}; allowed: 0 <= sparsity < 1")
        if self.sparsity is None:
            fixed = Pattern.of(self.pattern, "Pruning").sparsity
            object.__setattr__(self, "sparsity", 0.5 if fixed is None else fixed)

    def apply(self, model: nn.Module) -> PruneReport:
        """Prunes `model` in place."""
        assert self.sparsity is not None
        return prune_(
            model, self.sparsity, pattern=self.pattern, method=self.method, calibration=self.calibration,
            allocation=self.allocation, max_error=self.max_error, sequential=self.sequential, include=self.include,
            exclude=self.exclude,
        )  # fmt: skip
