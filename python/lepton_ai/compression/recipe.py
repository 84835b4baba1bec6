"""Recipe: a choice for each layer, as lepton tune finds them: a step of LeptonModel.compress, and a YAML file."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from lepton_ai.compression.compression import Compression
from lepton_ai.compression.pruning import Pruning
from lepton_ai.compression.quantization import Quantization
from lepton_kernels import PruneReport, QuantizeReport, QuantScheme
from lepton_kernels._whole_file import whole_file
from lepton_kernels.fused_path import disable_fused_path
from lepton_kernels.nn import SparseLinear
from lepton_kernels.nn.quant_recurrent import REPLACEMENTS
from lepton_kernels.nn.sparse_linear import SCHEMES
from lepton_kernels.quantize import LayerRow
from lepton_kernels.quantizers import with_step
from lepton_kernels.sparse import Pattern

_VERSION_KEY, _VERSION = "lepton_recipe", 1
_QUANTIZED = (nn.Linear, nn.Embedding, *REPLACEMENTS)
_NUMBER = "a number (with a point where it has an exponent, not in quotes)"
_FIELDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("scheme", (str, type(None)), "a scheme's name, or none"),
    ("group_size", (int, type(None)), "a whole number, or none"),
    ("step", (int, float), _NUMBER),
    ("sparsity", (int, float), _NUMBER),
    ("pattern", (str,), "a pattern's name (in quotes in YAML: '2:4' is a number there without)"),
    ("sparse", (bool,), "true, false"),
    ("codec", (str,), "a codec's name"),
)


@dataclass(frozen=True)
class Choice:
    """What becomes of one layer.

    sparsity, pattern: the share of its weights that becomes zero first, the smallest ones, as in Pruning; 0: none, or
    what the pattern says.
    scheme, group_size, step: as in Quantization; None keeps the layer's dtype. An nn.Embedding gets int8 rows, of 5, 6
    or 7 bits where the scheme's weights are. sparse: its zeros are neither stored nor multiplied (nn.SparseLinear).
    codec: of the layer's tensors in the file.
    """

    scheme: str | None = None
    group_size: int | None = None
    step: float = 0.0
    sparsity: float = 0.0
    pattern: str = "unstructured"
    sparse: bool = False
    codec: str = "huffman"

    def __post_init__(self) -> None:
        for name, kinds, allowed in _FIELDS:
            value = getattr(self, name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise ValueError(f"Choice: {name} is {value!r}; allowed: {allowed}")
        Compression(self.codec)
        pattern = Pattern.of(self.pattern, "Choice")
        if pattern.sparsity is not None and not self.sparsity:
            object.__setattr__(self, "sparsity", pattern.sparsity)
        if self.sparsity:
            Pruning(self.sparsity, self.pattern)
        if self.sparse and self.scheme not in (None, *SCHEMES):
            raise ValueError(f"Choice: scheme is {self.scheme!r} with sparse=True; allowed: None, {', '.join(SCHEMES)}")
        if self.scheme is not None:
            replace(QuantScheme.of(self.scheme, self.group_size), step=self.step)
        elif self.group_size is not None or self.step:
            raise ValueError(
                f"Choice: group_size is {self.group_size} and step {self.step} without a scheme; allowed: None and 0"
            )

    def __str__(self) -> str:
        parts = [f"{self.sparsity:.0%} {self.pattern} zeros"] if self.sparsity else []
        parts += ["sparse"] if self.sparse else []
        group = f" g{self.group_size}" if self.group_size is not None else ""
        parts += [f"{self.scheme}{group}" if self.scheme is not None else "float"]
        parts += [f"step {self.step:g}"] if self.step else []
        parts += [self.codec] if self.codec != "huffman" else []
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and JSON, without those that are as by default."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def check(self, function: str, name: str, layer: nn.Module) -> None:
        """Raises ValueError where the choice can not be of this layer."""
        for wanted, kinds, what in (
            (self.scheme is not None and not self.sparse, _QUANTIZED, f"scheme {self.scheme!r}"),
            (self.sparsity, (nn.Linear, nn.Conv2d), f"sparsity {self.sparsity:g}"),
            (self.sparse, (nn.Linear,), "sparse=True"),
        ):
            if wanted and type(layer) not in kinds:
                allowed = ", ".join(f"nn.{kind.__name__}" for kind in kinds)
                raise ValueError(f"{function}: {name} is {type(layer).__name__} with {what}; allowed: {allowed}")

    def apply(self, model: nn.Module, layers: Iterable[nn.Module]) -> tuple[PruneReport | None, QuantizeReport | None]:
        """Makes these layers of `model` so, in place, wherever they stand. Raises what prune_ and quantize_ raise."""
        wanted = {id(layer) for layer in layers}

        def chosen(_: str, layer: nn.Module) -> bool:
            return id(layer) in wanted

        pruned = quantized = None
        if self.sparsity:
            pruned = Pruning(self.sparsity, self.pattern, include=[chosen]).apply(model)
        if self.sparse:
            quantized = self._sparsify(model, wanted)
        elif self.scheme is not None:
            step = Quantization(self.scheme, self.group_size, include=[chosen], strict=True, step=self.step)
            quantized = step.apply(model)
        return pruned, quantized

    def _sparsify(self, model: nn.Module, wanted: set[int]) -> QuantizeReport:
        report = QuantizeReport()
        made: dict[int, tuple[nn.Linear, SparseLinear]] = {}  # the old one too: its id must not be given to another
        for name, layer in list(model.named_modules(remove_duplicate=False)):
            if id(layer) not in wanted:
                continue
            assert isinstance(layer, nn.Linear)  # check() saw to it
            if id(layer) not in made:
                scheme = None
                if self.scheme is not None:
                    scheme = with_step(QuantScheme.of(self.scheme, self.group_size), layer.weight, self.step)
                new = SparseLinear.from_linear(layer, scheme=scheme)
                made[id(layer)] = layer, new
                before, after = (
                    sum(t.numel() * t.element_size() for t in m.state_dict().values()) for m in (layer, new)
                )
                weight = layer.weight.detach().float()
                error = float((new.weight.float() - weight).norm() / weight.norm().clamp(min=1e-30))
                row = LayerRow(name, tuple(weight.shape), self.scheme or "", before, after, error, "sparse")
                report.rows.append(row)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, made[id(layer)][1])
        return report


@dataclass(frozen=True, repr=False)
class Recipe:
    """A choice for each layer by its name; layers that it does not name stay as they are, coded by Huffman.

    fuse: as in Quantization. notes: what the file says besides, of how the recipe was found; nothing depends on it. No
    choice depends on data, so the same recipe makes of the same weights the same file, bit for bit.
    """

    layers: Mapping[str, Choice]
    fuse: bool = True
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("Recipe: layers is empty; allowed: a Choice for one layer or more")

    def __repr__(self) -> str:
        return f"Recipe({len(self.layers)} layers, {len(self.by_choice())} choices)"

    def by_choice(self) -> dict[Choice, list[str]]:
        """The names of the layers that share a choice."""
        out: dict[Choice, list[str]] = {}
        for name, choice in self.layers.items():
            out.setdefault(choice, []).append(name)
        return out

    @property
    def codec(self) -> str:
        """Of all in the file that layer_codecs does not name."""
        return "huffman"

    @property
    def layer_codecs(self) -> dict[str, str]:
        """The codecs of layers that have another than the rest."""
        return {name: choice.codec for name, choice in self.layers.items() if choice.codec != self.codec}

    def apply(self, model: nn.Module) -> tuple[PruneReport | None, QuantizeReport | None]:
        """Prunes and quantizes `model` in place.

        Raises ValueError for names that it does not have, layers that can not be what is chosen, and two choices for
        one layer, before anything is changed.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        unknown = sorted(set(self.layers) - set(modules))
        if unknown:
            raise ValueError(
                f"Recipe: layers holds {', '.join(unknown[:5])} ({len(unknown)} in all), which {type(model).__name__} "
                "does not have; allowed: names of its layers"
            )
        chosen: dict[int, tuple[str, Choice]] = {}
        groups: dict[Choice, list[nn.Module]] = {}
        for name, choice in self.layers.items():
            choice.check("Recipe", name, modules[name])
            effect = replace(choice, codec=self.codec)
            first, known = chosen.setdefault(id(modules[name]), (name, effect))
            if known != effect:
                raise ValueError(
                    f"Recipe: {first} and {name} are one layer, and have {known} and {effect}; allowed: one choice"
                )
            groups.setdefault(effect, []).append(modules[name])
        done = [choice.apply(model, layers) for choice, layers in groups.items()]
        disable_fused_path(model)
        pruned = [row for report, _ in done if report is not None for row in report.rows]
        quantized = [row for _, report in done if report is not None for row in report.rows]
        return PruneReport(pruned) if pruned else None, QuantizeReport(quantized) if quantized else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the recipe as YAML: a list of choices, each with the names of its layers."""
        import yaml

        choices = [{**choice.as_dict(), "layers": names} for choice, names in self.by_choice().items()]
        content = {_VERSION_KEY: _VERSION, "notes": dict(self.notes), "fuse": self.fuse, "choices": choices}
        with whole_file(Path(path)) as file:
            file.write(yaml.safe_dump(content, sort_keys=False, width=120).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Reads what save wrote, or a person. Raises ValueError that names what is wrong, OSError."""
        import yaml

        def wrong(what: str, allowed: str) -> ValueError:
            return ValueError(f"Recipe.load: {path}: {what}; allowed: {allowed}")

        try:
            content = yaml.safe_load(Path(path).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise wrong(f"no YAML: {error}", "what Recipe.save writes") from error
        if not isinstance(content, dict) or content.get(_VERSION_KEY) != _VERSION:
            version = content.get(_VERSION_KEY) if isinstance(content, dict) else None
            raise wrong(f"{_VERSION_KEY} is {version!r}", str(_VERSION))
        extra = sorted(map(str, set(content) - {_VERSION_KEY, "notes", "fuse", "choices"}))
        if extra:
            raise wrong(f"it has {', '.join(extra)}", f"{_VERSION_KEY}, notes, fuse, choices")
        fuse, choices, notes = content.get("fuse", True), content.get("choices"), content.get("notes") or {}
        if not isinstance(notes, dict):
            raise wrong(f"notes is {notes!r}", "names with values")
        if not isinstance(fuse, bool):
            raise wrong(f"fuse is {fuse!r}", "true, false")
        if not isinstance(choices, list) or not all(isinstance(item, dict) for item in choices):
            raise wrong(f"choices is {type(choices).__name__}", "a list of choices, each with its layers")
        known = {f.name for f in fields(Choice)}
        layers: dict[str, Choice] = {}
        for item in choices:
            names = item.pop("layers", None)
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise wrong(f"layers of {item} is {names!r}", "a list of names (numbers in quotes)")
            unknown = sorted(map(str, set(item) - known))
            if unknown:
                raise wrong(f"a choice has {', '.join(unknown)}", ", ".join(sorted(known | {"layers"})))
            try:
                choice = Choice(**item)
            except ValueError as error:
                raise ValueError(f"Recipe.load: {path}: {item}: {error}") from error
            for name in names:
                if name in layers:
                    raise wrong(f"{name} stands in two choices", "each layer once")
                layers[name] = choice
        return cls(layers, fuse, notes)
