"""explain: a row for each layer of a compressed model: what it is now, what became of its weights, and why."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import lepton_kernels as lk

if TYPE_CHECKING:
    from lepton_ai.model import CompressionReport

_RECURRENT = (lk.nn.QuantLSTM, lk.nn.QuantGRU, lk.nn.QuantLSTMCell, lk.nn.QuantGRUCell, lk.nn.QuantRNNCell)
_WHOLE = (*_RECURRENT, lk.nn.SparseConv2d)  # one layer each, though their weights are in modules of their own


@dataclass(frozen=True)
class ExplainedLayer:
    """One layer that has weights.

    kind: the class it is of now. scheme: of its weights: "w8a8", "int8", ...; the dtype where they are not quantized.
    zeros: the share of them that pruning left, pattern and method: of that step; None and "" where it was not pruned.
    pruning_error, quantization_error: Frobenius norm of the step's change of the weight over that of the weight before
    it, None where it did nothing. step: QuantScheme's, in the weight's unit. kernel: what multiplies; "torch" for
    torch's own. fused: what the layer is part of. notes: what held a step back, or why nothing was done.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    scheme: str
    bytes_before: int
    bytes_after: int
    kernel: str
    zeros: float | None = None
    pattern: str = ""
    method: str = ""
    pruning_error: float | None = None
    quantization_error: float | None = None
    step: float = 0.0
    fused: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What changed in each layer and why; `not_fused` holds modules that fuse_ left alone and the reasons."""

    rows: list[ExplainedLayer]
    not_fused: list[tuple[str, str]]
    codec: str
    totals: str

    def __str__(self) -> str:
        columns = {
            "layer": [row.name or "(model)" for row in self.rows],
            "kind": [row.kind for row in self.rows],
            "shape": ["x".join(map(str, row.shape)) for row in self.rows],
            "zeros": ["" if row.zeros is None else f"{row.zeros:.1%}" for row in self.rows],
            "pruned by": [f"{row.method} {row.pattern}".strip() for row in self.rows],
            "error": [_figure(row.pruning_error) for row in self.rows],
            "weights": [row.scheme for row in self.rows],
            "step": [f"{row.step:.4g}" if row.step else "" for row in self.rows],
            "quant. error": [_figure(row.quantization_error) for row in self.rows],
            "before": [f"{row.bytes_before:,}" for row in self.rows],
            "after": [f"{row.bytes_after:,}" for row in self.rows],
            "kernel": [row.kernel for row in self.rows],
            "part of": [row.fused for row in self.rows],
            "notes": ["; ".join(row.notes) for row in self.rows],
        }
        lines = _table({title: cells for title, cells in columns.items() if any(cells)})
        lines += [f"{name}: not fused: {reason}" for name, reason in self.not_fused]
        return "\n".join([*lines, f"codec of the file: {self.codec}", self.totals])


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(columns: Mapping[str, list[str]]) -> list[str]:
    """Lines of cells under their titles, numbers to the right."""
    numbers = {"shape", "zeros", "error", "quant. error", "step", "before", "after"}
    aligned = []
    for title, cells in columns.items():
        width = max(map(len, [title, *cells]))
        aligned.append([cell.rjust(width) if title in numbers else cell.ljust(width) for cell in (title, *cells)])
    return ["  ".join(cells).rstrip() for cells in zip(*aligned, strict=True)]


def _layers(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every module that holds tensors of the state dict itself, at the first of its places."""
    seen: set[int] = set()
    for key in model.state_dict():
        name = key.rpartition(".")[0]
        above = name.rpartition(".")[0]
        if name and isinstance(modules.get(above), _WHOLE):
            name = above
        module = modules.get(name)
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield name, module


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The layer's tensors of the state dict, without those of layers inside it."""
    state = module.state_dict()
    return state if isinstance(module, _WHOLE) else {key: value for key, value in state.items() if "." not in key}


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    stored = next((tensor for key, tensor in tensors.items() if key.endswith("weight_shape")), None)
    return tuple(next(iter(tensors.values())).shape) if stored is None else tuple(stored.tolist())


def _quant_scheme(module: Any) -> lk.QuantScheme | None:
    """That of a quantized linear layer or convolution."""
    scheme = getattr(module.product if isinstance(module, lk.nn.SparseConv2d) else module, "scheme", None)
    return scheme if isinstance(scheme, lk.QuantScheme) else None


def _scheme(module: Any, tensors: Mapping[str, Tensor]) -> tuple[str, float]:
    """What the weights are stored as, and the step that they share."""
    if isinstance(module, lk.nn.QuantEmbedding):
        return f"int{module.weight_bits}", module.step
    if isinstance(module, _RECURRENT):
        return "w8a8", 0.0
    scheme = _quant_scheme(module)
    if scheme is not None:
        return scheme.name, scheme.step
    return str(next(iter(tensors.values())).dtype).removeprefix("torch."), 0.0


def _kernel(module: nn.Module, on_gpu: bool) -> str:
    served, scheme = lk.backends(), _quant_scheme(module)
    if isinstance(module, _RECURRENT):
        return served["recurrent"]
    if isinstance(module, (lk.nn.SparseLinear, lk.nn.SparseConv2d)):
        return served["sparse"]["float" if scheme is None else scheme.kernels]
    if isinstance(module, lk.nn.QuantLinear):
        return (served["cuda" if on_gpu else "cpu"] or {}).get(module.scheme.kernels, "none: triton is not installed")
    return "torch"


def _explained(name: str, module: nn.Module, pruning: Any, quantization: Any, fused: str, left: str) -> ExplainedLayer:
    """The row of a layer; pruning, quantization: its rows of the reports or None; left: why nothing was done to it."""
    tensors = _own_tensors(module)
    scheme, step = _scheme(module, tensors)
    after = sum(t.numel() * t.element_size() for t in tensors.values())
    kernel = _kernel(module, next(iter(tensors.values())).is_cuda)
    reasons = {"pruned": pruning and pruning.skipped, "quantized": quantization and quantization.skipped}
    notes = [f"not {done}: {reason}" for done, reason in reasons.items() if reason]
    if pruning and pruning.note:
        notes.append(pruning.note)
    if left and not (pruning or quantization or fused):
        notes.append(left)
    row = ExplainedLayer(
        name, type(module).__name__, _shape(tensors), scheme, after, after, kernel, step=step, fused=fused,
        notes=tuple(notes),
    )  # fmt: skip
    if pruning and not pruning.skipped:
        row = replace(row, zeros=pruning.sparsity_after, pattern=pruning.pattern, method=pruning.method,
                      pruning_error=pruning.relative_error)  # fmt: skip
    if quantization and not quantization.skipped:
        row = replace(row, bytes_before=quantization.bytes_before, quantization_error=quantization.relative_error)
    return row


def explain(model: nn.Module, report: "CompressionReport") -> Explanation:
    """What the steps of `report` did to each layer of `model`.

    The modules say what a layer is now; the rest is of the steps' reports, and is empty for a loaded file, which has
    none of them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))

    def by_module(rows: Iterable[tuple[str, Any]]) -> dict[int, Any]:
        return {id(modules[name]): row for name, row in rows if name in modules}

    pruned = by_module((row.name, row) for row in (report.pruning.rows if report.pruning else ()))
    quantized = by_module((row.name, row) for row in (report.quantization.rows if report.quantization else ()))
    fused = by_module(report.fusion.parts.items() if report.fusion else ())
    left = "no step picked it" if report.steps else ""
    rows = [
        _explained(name, layer, pruned.get(id(layer)), quantized.get(id(layer)), fused.get(id(layer), ""), left)
        for name, layer in _layers(model, modules)
    ]
    return Explanation(rows, list(report.fusion.skipped) if report.fusion else [], report.codec, report.totals())
