"""sparsify_: replace pruned layers by what multiplies them fastest here, in place, and say what was measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lepton_kernels._progress import progress
from lepton_kernels._select import Selector, as_selectors, check_selectors, matches, sites_of
from lepton_kernels.fused_path import disable_fused_path
from lepton_kernels.nn import QuantLinear, SparseConv2d, SparseLinear
from lepton_kernels.nn.sparse_linear import SCHEMES
from lepton_kernels.pattern import Pattern
from lepton_kernels.quantizers import check_step, with_step
from lepton_kernels.scheme import QuantScheme
from lepton_kernels.sparse.calibration import Layer, as_matrix, call, evaluating
from lepton_kernels.sparse.masks import finalize_

_SECONDS = 0.01  # of calls a candidate, row count and round
_ROUNDS = 5
_MARGIN = 0.97  # of the dense layer's time: a candidate that saves less is not worth a change


@dataclass(frozen=True)
class SparsifyRow:
    """One layer of a report: what it became, and the milliseconds of every candidate, one for each of `inputs`."""

    name: str
    shape: tuple[int, ...]
    sparsity: float
    chosen: str
    bytes_before: int
    bytes_after: int
    inputs: tuple[str, ...] = ()  # "128 rows", or the shape of a convolution's input
    milliseconds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    skipped: str | None = None


@dataclass
class SparsifyReport:
    """What sparsify_ did, a row a layer."""

    rows: list[SparsifyRow] = field(default_factory=list)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [5])
        lines = [f"{'layer':{width}}  {'shape':>14}   zeros  {'chosen':12}  ms"]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            times = "; ".join(
                f"{name} {', '.join(f'{ms:.3g}' for ms in values)}" for name, values in row.milliseconds.items()
            )
            what = f"skipped: {row.skipped}" if row.skipped else f"{row.chosen:12}  {' / '.join(row.inputs)}: {times}"
            lines.append(f"{row.name:{width}}  {shape:>14}  {row.sparsity:6.3f}  {what}")
        return "\n".join(lines)


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def _in_turn(candidates: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """The median seconds of a call of each, timed in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for layer in candidates.values():
            layer(x)
        for _ in range(_ROUNDS):
            for name, layer in candidates.items():
                stop = time.perf_counter() + _SECONDS
                while True:
                    start = time.perf_counter()
                    layer(x)
                    now = time.perf_counter()
                    times[name].append(now - start)
                    if now > stop:
                        break
    return {name: median(samples) for name, samples in times.items()}


def _candidates(layer: Layer, scheme: QuantScheme | None, step: float) -> dict[str, Callable[[], nn.Module]]:
    out: dict[str, Callable[[], nn.Module]] = {"dense": lambda: layer}
    if scheme is not None:
        scheme = with_step(scheme, layer.weight, step)
    if isinstance(layer, nn.Conv2d):
        out["sparse"] = lambda: SparseConv2d.from_conv(layer)
        if scheme is not None and scheme.name in SCHEMES:
            out[f"sparse {scheme.name}"] = lambda: SparseConv2d.from_conv(layer, scheme=scheme)
        return out
    out["sparse"] = lambda: SparseLinear.from_linear(layer)
    if scheme is not None:
        out[scheme.name] = lambda: QuantLinear.from_linear(layer, scheme)
        if scheme.name in SCHEMES:
            out[f"sparse {scheme.name}"] = lambda: SparseLinear.from_linear(layer, scheme=scheme)
    return out


def _reason_to_skip(
    name: str, module: Layer, shared: bool, exclude: Sequence[Selector], reached: tuple[int, ...] | None, quantize: bool
) -> str | None:
    if any(matches(selector, name, module) for selector in exclude):
        return "excluded"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its parent reads the weight directly (nn.MultiheadAttention)"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"a subclass ({type(module).__name__}) may compute something else"
    if module.weight.device.type != "cpu":
        return f"its weight is on {module.weight.device}; sparse kernels run on the CPU"
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {module.weight.dtype}"
    if shared:
        return "its weight is tied to another layer's"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"it has {module.groups} groups"
    if isinstance(module, nn.Conv2d) and reached is None:
        return "a convolution that no `example` reaches"
    if quantize and not torch.isfinite(module.weight).all():
        return "its weight holds NaN or infinity"
    return None


def _shapes_of_inputs(model: nn.Module, example: Any) -> dict[nn.Module, tuple[int, ...]]:
    """What reaches each convolution when the model gets `example`: the shape of its first input."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        shapes.setdefault(module, tuple(arguments[0].shape))

    handles = [module.register_forward_pre_hook(hook) for module in model.modules() if isinstance(module, nn.Conv2d)]
    try:
        with evaluating(model):
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def sparsify_(
    model: nn.Module,
    *,
    scheme: str | QuantScheme | None = None,
    step: float = 0.0,
    rows: Sequence[int] = (1, 128),
    example: Any = None,
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
) -> SparsifyReport:
    """Replaces every nn.Linear and nn.Conv2d of `model` by its fastest form on this machine, in place, after prune_.

    Candidates: the dense layer as it is, SparseLinear or SparseConv2d (the same weights to the bit), with `scheme`
    ("w8a8", ...) QuantLinear, with "w8a8" (to "w5a8") and "w4a16" sparse layers of such weights too. step: as in
    quantize_; a weight's zeros count in its root mean square. Each is timed in turn on random input, on torch's number
    of threads: an nn.Linear with each number of `rows`, an nn.Conv2d with the shape that reaches it when the model gets
    `example` (a tensor, a tuple of arguments or a mapping of keywords; without one they stay). That with the least
    product of its times wins; the dense layer stays where no other takes under 0.97 of its time. Layers of one shape,
    type, pattern and share of zeros (in hundredths) are timed once. Masks (prune_(keep_masks=True), GradualPruner) are
    dropped first. Returns a row a layer with all times. Raises ValueError when a selector matches nothing, `rows` is
    empty or holds a number below 1, `step` does not go with the scheme, or there is no layer.
    """
    chosen_scheme = None if scheme is None else QuantScheme.of(scheme)
    if chosen_scheme is not None:
        check_step("sparsify_", chosen_scheme, step)
    elif step:
        raise ValueError(f"sparsify_: step is {step} without a scheme; allowed: 0, or a scheme of 5 to 8 bits")
    counts = tuple(rows)
    if not counts or min(counts) < 1:
        raise ValueError(f"sparsify_: rows is {rows!r}; allowed: one or more numbers, each 1 or more")
    selectors, excluded = as_selectors(include), as_selectors(exclude)
    finalize_(model)
    sites = [site for site in sites_of(model) if isinstance(site[3], (nn.Linear, nn.Conv2d))]
    named = [(name, module) for _, _, name, module in sites]
    check_selectors("sparsify_", "include", selectors, named)
    check_selectors("sparsify_", "exclude", excluded, named)
    owners: dict[int, set[int]] = {}
    for _, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    reached = {} if example is None else _shapes_of_inputs(model, example)

    report = SparsifyReport()
    measured: dict[tuple[object, ...], dict[str, tuple[float, ...]]] = {}
    made: dict[int, tuple[nn.Module, nn.Module]] = {}  # the old one too: its id must not be given to another
    for parent, attribute, name, module in progress(sites, "measuring"):
        if selectors and not any(matches(selector, name, module) for selector in selectors):
            continue
        shape, before = tuple(module.weight.shape), _bytes(module)
        zeros = 0.0 if module.weight.is_meta else float((module.weight == 0).float().mean())
        shared = len(owners[id(module.weight)]) > 1
        reason = _reason_to_skip(name, module, shared, excluded, reached.get(module), chosen_scheme is not None)
        if reason:
            report.rows.append(SparsifyRow(name, shape, zeros, "", before, before, skipped=reason))
            continue
        if id(module) in made:
            setattr(parent, attribute, made[id(module)][1])
            continue
        builders = _candidates(module, chosen_scheme, step)
        if isinstance(module, nn.Conv2d):
            shapes = [reached[module]]
            geometry: tuple[object, ...] = (module.stride, module.padding, module.dilation, module.padding_mode)
            inputs = tuple("x".join(map(str, size)) for size in shapes)
        else:
            shapes, geometry = [(count, module.in_features) for count in counts], ()
            inputs = tuple(f"{count} rows" for count in counts)
        pattern = Pattern.detect(as_matrix(module.weight) != 0)
        key = (shape, module.weight.dtype, round(zeros, 2), pattern, geometry, *shapes)
        if key not in measured:
            layers = {label: build() for label, build in builders.items()}
            seconds = [_in_turn(layers, torch.randn(size, dtype=module.weight.dtype)) for size in shapes]
            measured[key] = {label: tuple(1e3 * part[label] for part in seconds) for label in layers}
        times = measured[key]
        score = {label: float(torch.tensor(values).log().mean()) for label, values in times.items()}
        best = min(score, key=score.__getitem__)
        if score[best] > score["dense"] + float(torch.tensor(_MARGIN).log()):
            best = "dense"
        new = builders[best]()
        made[id(module)] = (module, new)
        setattr(parent, attribute, new)
        report.rows.append(SparsifyRow(name, shape, zeros, best, before, _bytes(new), inputs, times))
    disable_fused_path(model)
    if all(row.skipped for row in report.rows):
        skipped = ", ".join(f"{row.name} ({row.skipped})" for row in report.rows) or "no nn.Linear or nn.Conv2d found"
        raise ValueError(f"sparsify_: nothing to do in {type(model).__name__}; skipped: {skipped}")
    return report
