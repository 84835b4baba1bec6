"""sparsify_: replace pruned layers by what multiplies them fastest here, in place, and say what was measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from lepton_kernels._progress import progress
from lepton_kernels._select import Selector, as_selectors, check_selectors, matches, sites_of
from lepton_kernels.nn import QuantLinear, SparseLinear
from lepton_kernels.pattern import Pattern
from lepton_kernels.scheme import QuantScheme
from lepton_kernels.sparse.masks import finalize_

_SECONDS = 0.01  # of calls a candidate, row count and round
_ROUNDS = 5
_MARGIN = 0.97  # of the dense layer's time: a candidate that saves less is not worth a change


@dataclass(frozen=True)
class SparsifyRow:
    """One layer of a report: what it became, and the milliseconds of every candidate, one for each number of rows."""

    name: str
    shape: tuple[int, ...]
    sparsity: float
    chosen: str
    bytes_before: int
    bytes_after: int
    milliseconds: dict[str, tuple[float, ...]] = field(default_factory=dict)
    skipped: str | None = None


@dataclass
class SparsifyReport:
    """What sparsify_ did, a row a layer. rows_of_x: the numbers of rows that were measured."""

    rows_of_x: tuple[int, ...]
    rows: list[SparsifyRow] = field(default_factory=list)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [5])
        lines = [
            f"{'layer':{width}}  {'shape':>12}   zeros  {'chosen':12}  "
            f"ms with {', '.join(map(str, self.rows_of_x))} rows"
        ]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            times = "; ".join(
                f"{name} {', '.join(f'{ms:.3g}' for ms in values)}" for name, values in row.milliseconds.items()
            )
            what = f"skipped: {row.skipped}" if row.skipped else f"{row.chosen:12}  {times}"
            lines.append(f"{row.name:{width}}  {shape:>12}  {row.sparsity:6.3f}  {what}")
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


def _candidates(layer: nn.Linear, scheme: QuantScheme | None) -> dict[str, Callable[[], nn.Module]]:
    out: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: layer,
        "sparse": lambda: SparseLinear.from_linear(layer),
    }
    if scheme is not None:
        out[scheme.name] = lambda: QuantLinear.from_linear(layer, scheme)
        if scheme.name == "w8a8":
            out["sparse w8a8"] = lambda: SparseLinear.from_linear(layer, scheme="w8a8")
    return out


def _reason_to_skip(name: str, module: nn.Linear, shared: bool, exclude: Sequence[Selector]) -> str | None:
    if any(matches(selector, name, module) for selector in exclude):
        return "excluded"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its parent reads the weight directly (nn.MultiheadAttention)"
    if type(module) is not nn.Linear:
        return f"a subclass ({type(module).__name__}) may compute something else"
    if module.weight.device.type != "cpu":
        return f"its weight is on {module.weight.device}; sparse kernels run on the CPU"
    if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {module.weight.dtype}"
    if shared:
        return "its weight is tied to another layer's"
    return None


def sparsify_(
    model: nn.Module,
    *,
    scheme: str | QuantScheme | None = None,
    rows: Sequence[int] = (1, 128),
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
) -> SparsifyReport:
    """Replaces every nn.Linear of `model` by its fastest form on this machine, in place; prune_ comes first.

    Candidates: the dense layer as it is, SparseLinear (the same weights to the bit), with `scheme` ("w8a8", ...)
    QuantLinear, with "w8a8" SparseLinear of int8 weights. Each is timed in turn with `rows` rows of random input, on
    torch's number of threads; that with the least product of its times wins, the dense layer stays where no
    other takes under 0.97 of its time. Layers of one shape, type, pattern and share of zeros (in hundredths) are timed
    once. Masks (prune_(keep_masks=True), GradualPruner) are dropped first. Returns a row a layer with all times. Raises
    ValueError when a selector matches nothing, `rows` is empty or holds a number below 1, or there is no layer.
    """
    chosen_scheme = None if scheme is None else QuantScheme.of(scheme)
    counts = tuple(rows)
    if not counts or min(counts) < 1:
        raise ValueError(f"sparsify_: rows is {rows!r}; allowed: one or more numbers, each 1 or more")
    selectors, excluded = as_selectors(include), as_selectors(exclude)
    finalize_(model)
    sites = [site for site in sites_of(model) if isinstance(site[3], nn.Linear)]
    named = [(name, module) for _, _, name, module in sites]
    check_selectors("sparsify_", "include", selectors, named)
    check_selectors("sparsify_", "exclude", excluded, named)
    owners: dict[int, set[int]] = {}
    for _, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))

    report = SparsifyReport(counts)
    measured: dict[tuple[object, ...], dict[str, tuple[float, ...]]] = {}
    made: dict[int, tuple[nn.Module, nn.Module]] = {}  # the old one too: its id must not be given to another
    for parent, attribute, name, module in progress(sites, "measuring"):
        if selectors and not any(matches(selector, name, module) for selector in selectors):
            continue
        shape, before = tuple(module.weight.shape), _bytes(module)
        zeros = 0.0 if module.weight.is_meta else float((module.weight == 0).float().mean())
        reason = _reason_to_skip(name, module, len(owners[id(module.weight)]) > 1, excluded)
        if reason:
            report.rows.append(SparsifyRow(name, shape, zeros, "", before, before, skipped=reason))
            continue
        if id(module) in made:
            setattr(parent, attribute, made[id(module)][1])
            continue
        builders = _candidates(module, chosen_scheme)
        key = (shape, module.weight.dtype, round(zeros, 2), Pattern.detect(module.weight != 0))
        if key not in measured:
            layers = {label: build() for label, build in builders.items()}
            inputs = [torch.randn(count, module.in_features, dtype=module.weight.dtype) for count in counts]
            seconds = [_in_turn(layers, x) for x in inputs]
            measured[key] = {label: tuple(1e3 * part[label] for part in seconds) for label in layers}
        times = measured[key]
        score = {label: float(torch.tensor(values).log().mean()) for label, values in times.items()}
        best = min(score, key=score.__getitem__)
        if score[best] > score["dense"] + float(torch.tensor(_MARGIN).log()):
            best = "dense"
        new = builders[best]()
        made[id(module)] = (module, new)
        setattr(parent, attribute, new)
        report.rows.append(SparsifyRow(name, shape, zeros, best, before, _bytes(new), times))
    if all(row.skipped for row in report.rows):
        skipped = ", ".join(f"{row.name} ({row.skipped})" for row in report.rows) or "no nn.Linear found"
        raise ValueError(f"sparsify_: nothing to do in {type(model).__name__}; skipped: {skipped}")
    return report
