"""The workbench of tune: makes a recipe's model, measures it and forgets it."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lepton_ai.compression import Compression, Recipe
from lepton_ai.cost import EnergyReader
from lepton_ai.fidelity import fidelity, output_vectors
from lepton_ai.measure import Cost, in_turn
from lepton_ai.model import LeptonModel
from lepton_ai.tuning.budget import Budget
from lepton_ai.tuning.result import Point
from lepton_kernels.sparse.calibration import call, evaluating


class Workbench:
    """original: the model to be tuned. inputs: for the budget's own metrics. example: what is timed, for about
    `seconds` each time."""

    def __init__(
        self,
        original: LeptonModel,
        inputs: list[Any],
        example: Any,
        budget: Budget,
        metric: Callable[[nn.Module], float] | None,
        seconds: float,
    ) -> None:
        self._original, self._inputs, self._example = original, inputs, example
        self._budget, self._metric = budget, metric
        self._reference = output_vectors(original.model, inputs)
        self.batch = len(output_vectors(original.model, [example]))
        self._gpus = sorted({t.get_device() for t in original.model.state_dict().values() if t.is_cuda})
        self._measure_for = seconds
        self._seconds = self._timed({"original": original.model}, seconds)["original"].seconds

    @property
    def gpus(self) -> list[str]:
        """The UUIDs of the GPUs that the model is on."""
        return [f"GPU-{torch.cuda.get_device_properties(gpu).uuid}" for gpu in self._gpus]

    def point(self, label: str, recipe: Recipe | None, *, single: bool = False, allowed: bool = True) -> Point:
        """The recipe's model, measured; None: the model as it was."""
        compressed = self._original.compress(Compression("none") if recipe is None else recipe)
        # Beside the original, and scaled by it: a noisy moment hits both.
        costs = self._timed({"original": self._original.model, "point": compressed.model}, self._measure_for)
        seconds = self._seconds * costs["point"].seconds / costs["original"].seconds
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            compressed.save(path)
            size = path.stat().st_size
        if self._metric is not None:
            value = float(self._metric(compressed.model))
        else:
            value = self._budget.of_fidelity(fidelity(self._reference, output_vectors(compressed.model, self._inputs)))
        return Point(label, recipe, single, size, value, seconds, self.batch, allowed=allowed)

    def timed_again(self, points: Sequence[Point], energy: EnergyReader, seconds: float) -> list[Point]:
        """The points with the time and energy of a call, measured in turn for about `seconds` each."""
        models = {
            str(i): self._original.model if point.recipe is None else self._original.compress(point.recipe).model
            for i, point in enumerate(points)
        }
        costs = self._timed(models, seconds * len(models), energy)
        return [
            replace(point, seconds=costs[str(i)].seconds, joules=costs[str(i)].joules) for i, point in enumerate(points)
        ]

    def _timed(
        self, models: Mapping[str, nn.Module], seconds: float, energy: EnergyReader | None = None
    ) -> dict[str, Cost]:
        def run(model: nn.Module) -> None:
            call(model, self._example)
            for gpu in self._gpus:
                torch.cuda.synchronize(gpu)

        with ExitStack() as modes:
            for model in models.values():
                modes.enter_context(evaluating(model))
            modes.enter_context(torch.inference_mode())
            return in_turn({name: partial(run, model) for name, model in models.items()}, seconds, energy)
