"""What lepton tune found: the points that were measured, the Pareto front among them, and the one that was chosen."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lepton_ai.compression import Recipe
from lepton_ai.cost import EnergyReader, cost_per_million, energy_reader
from lepton_ai.tuning.budget import Budget

OBJECTIVES = ("size", "latency", "cost")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raises ImportError without matplotlib and ValueError for a kind of file that it can not draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    kind = os.path.splitext(path)[1].removeprefix(".")
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if kind not in kinds:
        raise ValueError(f"plot: path is {os.fspath(path)}; allowed: a name that ends in .{', .'.join(kinds)}")


@dataclass(frozen=True)
class Point:
    """A model that was made and measured.

    recipe: what makes it; None is the model as it was. single: one choice for all layers. file_bytes: of its file.
    value: the budget's metric. seconds, joules: of a call with the example, a batch of `batch` samples; joules is None
    where no counter could be read.
    """

    label: str
    recipe: Recipe | None
    single: bool
    file_bytes: int
    value: float
    seconds: float
    batch: int
    joules: float | None = None
    allowed: bool = True

    def price_per_million(self, price_per_hour: float) -> float:
        """What a million samples cost on a machine of that price."""
        return cost_per_million(self.seconds / self.batch, price_per_hour)


@dataclass
class TuneResult:
    """points: all that were measured, the original first. chosen: the best that keeps the budget, of equals a tuned
    one. best_single: the best with one choice for all layers that keeps it; None where none does. unreached: layers
    that the inputs do not reach, so that nothing is known of them. took: seconds that tuning took. energy: which
    counters were read for `joules`, and why others were not.
    """

    budget: Budget
    minimize: str
    points: list[Point]
    chosen: Point
    best_single: Point | None
    price_per_hour: float | None = None
    unreached: list[str] = field(default_factory=list)
    took: float = 0.0
    energy: str = ""

    @classmethod
    def of(
        cls, budget: Budget, minimize: str, points: list[Point], price_per_hour: float | None, unreached: list[str]
    ) -> "TuneResult":
        """The result with the best of the points."""
        result = cls(budget, minimize, points, points[0], None, price_per_hour, unreached)
        kept = [point for point in points if point.recipe is not None and budget.holds(point.value)]
        singles = [point for point in kept if point.single]
        result.best_single = min(singles, key=result.objective, default=None)
        choices = [point for point in kept if point.allowed]
        result.chosen = min(choices, key=lambda point: (result.objective(point), point.single), default=points[0])
        return result

    def time_again(self, timed: Callable[[Sequence[Point], EnergyReader], list[Point]], gpus: Sequence[str]) -> None:
        """Times the original, the best single scheme and the chosen point once more, side by side; where the single
        scheme turns out to be better, and may be chosen, it is."""
        reader = energy_reader(gpus)
        best = list({id(p): p for p in (self.points[0], self.best_single, self.chosen) if p is not None}.values())
        fresh = {id(old): new for old, new in zip(best, timed(best, reader), strict=True)}
        self.points = [fresh.get(id(point), point) for point in self.points]
        self.chosen = fresh[id(self.chosen)]
        self.best_single = None if self.best_single is None else fresh[id(self.best_single)]
        single = self.best_single
        if single is not None and single.allowed and self.objective(single) < self.objective(self.chosen):
            self.chosen = single
        self.energy = str(reader)

    @property
    def recipe(self) -> Recipe:
        """The chosen point's recipe, with what it was found for and what was measured in its notes."""
        assert self.chosen.recipe is not None
        measured: dict[str, Any] = {
            self.budget.metric: _finite(round(self.chosen.value, 6)), "file_bytes": self.chosen.file_bytes,
            "ms_a_call": round(1e3 * self.chosen.seconds, 4), "batch": self.chosen.batch,
        }  # fmt: skip
        notes: dict[str, Any] = {"budget": str(self.budget), "minimize": self.minimize, "measured": measured}
        if self.unreached:
            notes["unreached"] = self.unreached
        return replace(self.chosen.recipe, notes=notes)

    def objective(self, point: Point) -> float:
        """What is minimized: bytes of the file, or seconds, to which cost is proportional."""
        return float(point.file_bytes) if self.minimize == "size" else point.seconds

    def front(self) -> list[Point]:
        """The points that no other beats in both the metric and the objective, the highest metric first."""
        out: list[Point] = []
        numbers = [point for point in self.points if not math.isnan(point.value)]
        for point in sorted(numbers, key=lambda p: (-p.value, self.objective(p))):
            if not out or self.objective(point) < self.objective(out[-1]):
                out.append(point)
        return out

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, which has no NaN and no infinity: they are None here."""

        def row(point: Point | None) -> dict[str, Any] | None:
            if point is None:
                return None
            out: dict[str, Any] = {key: value for key, value in vars(point).items() if key != "recipe"}
            out["value"] = _finite(point.value)
            if self.price_per_hour is not None:
                out["price_per_million"] = point.price_per_million(self.price_per_hour)
            return out

        front = {id(point) for point in self.front()}
        points = [{**(row(point) or {}), "on_front": id(point) in front} for point in self.points]
        return {
            "budget": str(self.budget), "minimize": self.minimize, "chosen": row(self.chosen),
            "best_single": row(self.best_single), "points": points, "took_s": self.took,
            "energy": self.energy, "price_per_hour": self.price_per_hour, "unreached": self.unreached,
        }  # fmt: skip

    def __str__(self) -> str:
        front = {id(point) for point in self.front()}
        titles = ["", self.budget.metric, "file, MB", "ms a call", "samples/s"]
        if self.price_per_hour is not None:
            titles.append("a million")
        rows = []
        for point in sorted(self.points, key=lambda p: -p.value):
            mark = "chosen: " if point is self.chosen else "* " if id(point) in front else "  "
            cells = [
                mark + point.label, f"{point.value:.5f}", f"{point.file_bytes / 1e6:.2f}",
                f"{1e3 * point.seconds:.2f}", f"{point.batch / point.seconds:.1f}",
            ]  # fmt: skip
            if self.price_per_hour is not None:
                cells.append(f"{point.price_per_million(self.price_per_hour):.4g}")
            rows.append(cells)
        widths = [max(len(cells[i]) for cells in [titles, *rows]) for i in range(len(titles))]
        lines = []
        for cells in [titles, *rows]:
            numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
            lines.append("  ".join([cells[0].ljust(widths[0]), *numbers]))
        lines += ["* on the Pareto front", self._verdict()]
        if self.unreached:
            lines.append(f"the inputs do not reach {', '.join(self.unreached)}: they stay, or become w8a8")
        return "\n".join(lines)

    def _verdict(self) -> str:
        what = {"size": "bytes", "latency": "time", "cost": "cost"}[self.minimize]
        said = f"{self.budget}, {self.minimize}: found in {self.took:.0f} s"
        if self.best_single is None:
            return f"{said}; no single scheme keeps the budget"
        share = self.objective(self.chosen) / self.objective(self.best_single)
        return f"{said}; {share:.3f} of the {what} of the best single scheme that keeps it ({self.best_single.label})"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the points, the front and the budget into an image file. Raises what check_plot raises."""
        check_plot(path)
        from matplotlib.figure import Figure

        scale, unit = (1e-6, "file, MB") if self.minimize == "size" else (1e3, "ms a call")

        def coordinates(points: Sequence[Point]) -> tuple[list[float], list[float]]:
            shown = [p for p in points if math.isfinite(p.value)]
            return [scale * self.objective(p) for p in shown], [p.value for p in shown]

        figure = Figure(figsize=(7.5, 4.8))
        axis = figure.subplots()
        axis.plot(*coordinates(self.front()), color="#b8bec9", zorder=1, label="Pareto front")
        tuned = [p for p in self.points if p.recipe is not None and not p.single]
        for points, color, marker, label in (
            ([p for p in self.points if p.single], "#8a94a6", "s", "one scheme for all layers"),
            (tuned, "#1f6feb", "o", "tuned"),
            ([self.chosen], "#d1242f", "*", "chosen"),
        ):
            size = 150 if marker == "*" else 30
            axis.scatter(*coordinates(points), color=color, marker=marker, s=size, label=label, zorder=2)
        for point in self.points:
            if point.single and math.isfinite(point.value):
                at = (scale * self.objective(point), point.value)
                axis.annotate(point.label, at, xytext=(5, -9), textcoords="offset points", fontsize=7, color="#57606a")
        axis.axhline(self.budget.least, color="#d1242f", linewidth=0.8, linestyle="--", label=str(self.budget))
        axis.set_xlabel(unit)
        axis.set_ylabel(self.budget.metric)
        _, values = coordinates([*tuned, self.chosen])
        if values:  # the part around the tuned points: a single scheme may be far below
            margin = 0.15 * max(max(values) - min(values), 1e-6)
            axis.set_ylim(min(values) - margin, max(values) + margin)
            places, _ = coordinates(
                [p for p in self.points if p.recipe is not None and p.value >= min(values) - margin]
            )
            axis.set_xlim(0.9 * min(places), 1.1 * max(places))
        axis.legend(fontsize=8, loc="lower right")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, dpi=150)
