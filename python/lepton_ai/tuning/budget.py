"""Budget: what a tuned model has to keep: a metric and the least value of it."""

import math
import re
from dataclasses import dataclass

from lepton_ai.fidelity import Fidelity

METRICS = {"cosine": "cosine_mean", "cosine_min": "cosine_min", "sqnr": "sqnr_db"}


@dataclass(frozen=True)
class Budget:
    """metric: "cosine" or "cosine_min", the mean or the least cosine between a sample's output vectors before and
    after; "sqnr" in decibels (all as lepton_ai.fidelity has them); or a name of one's own. least: it is kept at least.
    """

    metric: str
    least: float

    @classmethod
    def of(cls, text: "str | Budget") -> "Budget":
        """From "cosine>=0.995". Raises ValueError for anything else."""
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(r"\s*(\w+)\s*>=\s*(\S+)\s*", text)
        try:
            least = float(match[2]) if match else math.nan
        except ValueError:
            least = math.nan
        if match is None or not math.isfinite(least):
            raise ValueError(f"budget is {text!r}; allowed: METRIC>=NUMBER, such as 'cosine>=0.995'")
        return cls(match[1], least)

    @property
    def sees_directions(self) -> bool:
        """Whether the metric sees the vectors' directions alone, and not their lengths."""
        return self.metric in ("cosine", "cosine_min")

    def check_metric(self, own: bool) -> None:
        """Raises ValueError for a metric that is neither known nor the caller's own."""
        if not own and self.metric not in METRICS:
            raise ValueError(f"budget's metric is {self.metric!r}; allowed: {', '.join(METRICS)}, or a metric= to call")

    def of_fidelity(self, found: Fidelity) -> float:
        """The metric of outputs that were compared."""
        return float(getattr(found, METRICS[self.metric]))

    def holds(self, value: float) -> bool:
        """Whether the value keeps the budget; NaN does not."""
        return value >= self.least

    def __str__(self) -> str:
        return f"{self.metric}>={self.least:g}"
