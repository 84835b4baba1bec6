"""LeptonModel: a model to be compressed; CompressedModel: what became of it, ready to call, to save and to load."""

import copy
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

import lepton_kernels as lk
from lepton_ai.compression import Compression, Pruning, Quantization, Recipe
from lepton_ai.explain import Explanation, explain
from lepton_ai.measure import Measurement, compare
from lepton_ai.sources import CONFIG_KEY, metadata_of, model_of_config, open_model
from lepton_ai.training import compressed_form_, train_form_
from lepton_kernels.model_file import ModelFile

Step = Pruning | Quantization | Compression | Recipe


def _state_bytes(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@dataclass
class CompressionReport:
    """What compress did: bytes of the weights before and after, of the file once saved, and a report for each step.

    layer_codecs: of layers that a recipe gives another codec than `codec`. measured: what CompressedModel.measure found
    last. load_seconds: what CompressedModel.load took, by "decode" (reading among it) and "build".
    """

    bytes_before: int
    bytes_after: int
    codec: str
    file_bytes: int | None = None
    pruning: lk.PruneReport | None = None
    quantization: lk.QuantizeReport | None = None
    fusion: lk.FuseReport | None = None
    steps: list[str] = field(default_factory=list)
    measured: Measurement | None = None
    layer_codecs: dict[str, str] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """r = bytes before / bytes after: those of the file where it was saved, codec included, else of the weights.

        After CompressedModel.load, to which the original is unknown, the bytes before are those of the loaded weights.
        """
        after = self.bytes_after if self.file_bytes is None else self.file_bytes
        return self.bytes_before / max(after, 1)

    def totals(self) -> str:
        """The line on bytes, in words."""
        file = f", file {self.file_bytes:,} ({self.codec})" if self.file_bytes is not None else ""
        share = self.bytes_after / max(self.bytes_before, 1)
        before = f"weights {self.bytes_before:,} -> {self.bytes_after:,} bytes ({share:.1%})"
        return f"{before}{file}, ratio {self.ratio:.2f}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        out: dict[str, Any] = {
            "steps": self.steps, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after,
            "codec": self.codec, "layer_codecs": self.layer_codecs, "file_bytes": self.file_bytes, "ratio": self.ratio,
            "measured": None if self.measured is None else self.measured.as_dict(),
        }  # fmt: skip
        for name in ("pruning", "quantization"):
            report = getattr(self, name)
            out[name] = None if report is None else [vars(row) for row in report.rows]
        rows = None if self.fusion is None else self.fusion.rows
        out["fusion"] = rows and [{"name": name, "fused": what, "layers": layers} for name, what, layers in rows]
        return out

    def __str__(self) -> str:
        parts = [str(report) for report in (self.pruning, self.quantization) if report is not None]
        if self.fusion is not None and self.fusion.rows:
            parts.append(str(self.fusion))
        parts.append(self.totals())
        if self.measured is not None:
            parts.append(str(self.measured))
        return "\n\n".join(parts)


def _codecs_of(file: ModelFile) -> tuple[str, dict[str, str]]:
    """The codec of most tensors of a file that have one, and those of modules that have another."""
    coded = [entry for entry in file.entries.values() if entry.codec != "none"]
    counts = Counter(entry.codec for entry in coded)
    most = min(counts, key=lambda codec: (-counts[codec], codec), default="none")
    others = {entry.name.rpartition(".")[0]: entry.codec for entry in coded if entry.codec != most}
    return most, others


class CompressedModel:
    """A compressed model: call it as the original, or take the nn.Module from `.model`."""

    def __init__(self, model: nn.Module, report: CompressionReport) -> None:
        self.model = model
        self._report = report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def report(self) -> CompressionReport:
        """What was done; print it for a table."""
        return self._report

    def explain(self) -> Explanation:
        """What changed in each layer that has weights, and why; print it for a table."""
        return explain(self.model, self._report)

    def measure(
        self,
        original: "LeptonModel | nn.Module",
        inputs: Iterable[Any],
        *,
        price_per_hour: float | None = None,
        seconds: float = 2.0,
    ) -> Measurement:
        """Time, energy, price and fidelity beside the original, as lepton_ai.measure.compare finds them on `inputs`.

        The report keeps the result as report().measured.
        """
        before = original.model if isinstance(original, LeptonModel) else original
        self._report.measured = compare(before, self.model, inputs, price_per_hour=price_per_hour, seconds=seconds)
        return self._report.measured

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file (lepton_kernels.save), entropy-coded as Compression said; "none" without it.

        A Hugging Face model's configuration goes into the file, so that load needs nothing else.
        """
        codecs = {**self._report.layer_codecs, "": self._report.codec}
        lk.save(self.model, path, codecs, metadata=metadata_of(self.model))
        self._report.file_bytes = Path(path).stat().st_size

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module | None = None, *, fuse: bool = True
    ) -> "CompressedModel":
        """Opens a saved file. model: the architecture, where the file does not hold it (not a Hugging Face model).

        fuse: as in Quantization. Raises CorruptDataError for a damaged file, ValueError when `model` is missing or does
        not fit.
        """
        start = time.perf_counter()
        file = ModelFile.open(path)
        if model is None:
            if CONFIG_KEY not in file.metadata:
                raise ValueError(f"load: {path} does not say what model it holds; pass model=, the architecture")
            model = model_of_config(file.metadata[CONFIG_KEY])
        built = time.perf_counter()
        lk.load(path, model=model)
        decoded = time.perf_counter()
        after = _state_bytes(model)
        codec, layer_codecs = _codecs_of(file)
        size = Path(path).stat().st_size
        report = CompressionReport(after, after, codec, size, layer_codecs=layer_codecs)
        if fuse:
            report.fusion = lk.fuse_(model, optional=True)
        build = built - start + time.perf_counter() - decoded
        report.load_seconds = {"decode": decoded - built, "build": build}
        return cls(model, report)

    def trainable(self, *, mask_from: float | None = None) -> nn.Module:
        """A copy of the model to train: float32 master weights, the zeros fixed (lepton_ai.training.train_form_)."""
        return train_form_(copy.deepcopy(self.model), mask_from=mask_from)

    def retrained(self, module: nn.Module) -> "CompressedModel":
        """The model compressed anew with the weights of `module`, what trainable() gave; `module` may train on.

        Codec, schemes, zeros and mode (training, eval) are this model's; the report's tables are those of the first
        compression. Raises ValueError where `module` holds other names than the model.
        """
        fuse = self._report.fusion is not None
        model = compressed_form_(copy.deepcopy(module).train(self.model.training), fuse=fuse)
        names = set(self.model.state_dict()) ^ set(model.state_dict())
        if names:
            raise ValueError(
                f"retrained: module differs from the model in {sorted(names)[:3]}; allowed: what trainable() gave "
                "(the .module of a DistributedDataParallel)"
            )
        report = replace(self._report, bytes_after=_state_bytes(model), file_bytes=None, measured=None)
        report.steps = [*report.steps, "trained"]
        return CompressedModel(model, report)


class LeptonModel:
    """A model to be compressed: an nn.Module, or the path or name of one (lepton_ai.sources.open_model)."""

    def __init__(self, model: nn.Module | str | os.PathLike[str]) -> None:
        self.model = open_model(model if isinstance(model, (nn.Module, str)) else Path(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def compress(
        self,
        pruning: Step | None = None,
        quantization: Step | None = None,
        compression: Step | None = None,
        *,
        inplace: bool = False,
        measure: Iterable[Any] | None = None,
    ) -> CompressedModel:
        """Prunes, quantizes and chooses the file's codec: any of the three steps, in this order whatever is left out.

        One Recipe in their place does all three, layer by layer.

        Works on a copy unless inplace=True. measure: model inputs, on which the result is measured beside the original
        (CompressedModel.measure). Raises ValueError when no step or two of a kind are given, when a step finds nothing
        to do, and for measure with inplace=True, which leaves no original.
        """
        if inplace and measure is not None:
            raise ValueError("compress: measure is given with inplace=True; allowed: inplace=False, to compare with")
        steps = [step for step in (pruning, quantization, compression) if step is not None]
        kinds = [type(step) for step in steps]
        allowed = (Pruning, Quantization, Compression, Recipe)
        for step in steps:
            if type(step) not in allowed:
                raise ValueError(
                    f"compress: a step is {step!r}; allowed: {', '.join(f'{kind.__name__}(...)' for kind in allowed)}"
                )
        if not steps or len(set(kinds)) < len(kinds) or (Recipe in kinds and len(kinds) > 1):
            names = ", ".join(kind.__name__ for kind in kinds) or "nothing"
            raise ValueError(
                f"compress: steps are {names}; allowed: a Recipe, or one to three others of different kinds"
            )
        steps.sort(key=lambda step: allowed.index(type(step)))
        model = self.model if inplace else copy.deepcopy(self.model)
        before = _state_bytes(model)
        report = CompressionReport(before, before, "none", steps=[repr(step) for step in steps])
        for step in steps:
            if isinstance(step, Pruning):
                report.pruning = step.apply(model)
            elif isinstance(step, Quantization):
                report.quantization = step.apply(model)
            elif isinstance(step, Recipe):
                report.pruning, report.quantization = step.apply(model)
                report.codec, report.layer_codecs = step.codec, step.layer_codecs
            else:
                report.codec = step.codec
            if isinstance(step, (Quantization, Recipe)) and step.fuse:
                report.fusion = lk.fuse_(model, optional=True)
        report.bytes_after = _state_bytes(model)
        compressed = CompressedModel(model, report)
        if measure is not None:
            compressed.measure(self, measure)
        return compressed
