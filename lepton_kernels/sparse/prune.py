"""prune_: set the weights of a model to zero that its outputs need least, in place, and report on each layer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lepton_kernels._progress import progress
from lepton_kernels._select import Selector, as_selectors, check_selectors, matches, sites_of
from lepton_kernels.pattern import Pattern
from lepton_kernels.sparse import sparsegpt
from lepton_kernels.sparse.calibration import InputStatistics, Layer, as_matrix, as_weight, collect
from lepton_kernels.sparse.masks import fix, stored_weight
from lepton_kernels.sparse.sequential import one_after_the_other

METHODS = ("magnitude", "wanda", "sparsegpt")
ALLOCATIONS = ("uniform", "global", "sensitivity")
_MOST = 0.99  # of a layer's weights, where layers get shares of their own


@dataclass(frozen=True)
class PrunedLayer:
    """One layer of a report.

    relative_error: Frobenius norm of the weight's change over that of the weight. output_error: the same of the layer's
    output over the calibration, as if inputs were independent but with "sparsegpt" and sequential; None without
    calibration. note: what held pruning back. skipped: why nothing was done. pattern, method: as given to prune_.
    """

    name: str
    shape: tuple[int, ...]
    sparsity_before: float
    sparsity_after: float
    relative_error: float = 0.0
    output_error: float | None = None
    note: str = ""
    skipped: str | None = None
    pattern: str = ""
    method: str = ""


@dataclass
class PruneReport:
    """What prune_ did, a row a layer."""

    rows: list[PrunedLayer] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """The share of zeros in all layers of the report together."""
        sizes = [torch.Size(row.shape).numel() for row in self.rows]
        zeros = sum(row.sparsity_after * size for row, size in zip(self.rows, sizes, strict=True))
        return zeros / max(sum(sizes), 1)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [5])
        lines = [f"{'layer':{width}}  {'shape':>14}  zeros before   after   error  output error"]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            output = "" if row.output_error is None else f"{row.output_error:.4f}"
            note = f"skipped: {row.skipped}" if row.skipped else row.note
            lines.append(
                f"{row.name:{width}}  {shape:>14}  {row.sparsity_before:12.4f}  {row.sparsity_after:6.4f}  "
                f"{row.relative_error:6.4f}  {output:>12}  {note}".rstrip()
            )
        lines.append(f"{'all':{width}}  {'':14}  {'':12}  {self.sparsity:6.4f}")
        return "\n".join(lines)


def layers_to_prune(
    function: str,
    model: nn.Module,
    include: Sequence[Selector] | None,
    exclude: Sequence[Selector],
) -> tuple[dict[str, Layer], list[PrunedLayer]]:
    """The nn.Linear and nn.Conv2d layers to prune, each weight once, and rows for those that are skipped.

    Raises ValueError when a selector matches nothing or nothing is left.
    """
    selectors, excluded = as_selectors(include), as_selectors(exclude)
    layers = {name: module for _, _, name, module in sites_of(model) if isinstance(module, (nn.Linear, nn.Conv2d))}
    check_selectors(function, "include", selectors, list(layers.items()))
    check_selectors(function, "exclude", excluded, list(layers.items()))
    if not layers:
        raise ValueError(
            f"{function}: nothing to prune in {type(model).__name__}: "
            "no nn.Linear or nn.Conv2d found (quantize after it)"
        )
    chosen: dict[str, Layer] = {}
    skipped: list[PrunedLayer] = []
    seen: set[int] = set()
    for name, module in layers.items():
        weight = module.weight
        identity = id(stored_weight(module))
        if (selectors and not any(matches(selector, name, module) for selector in selectors)) or identity in seen:
            continue
        reason = None
        if any(matches(selector, name, module) for selector in excluded):
            reason = "excluded"
        elif weight.is_meta:
            reason = "its weight is on the meta device"
        elif not torch.isfinite(weight).all():
            reason = "its weight holds NaN or infinity"
        if reason:
            zeros = 0.0 if weight.is_meta else float((weight == 0).float().mean())
            skipped.append(PrunedLayer(name, tuple(weight.shape), zeros, zeros, skipped=reason))
            continue
        seen.add(identity)
        chosen[name] = module
    if not chosen:
        reasons = ", ".join(f"{row.name} ({row.skipped})" for row in skipped)
        raise ValueError(f"{function}: nothing to prune in {type(model).__name__}; skipped: {reasons}")
    return chosen, skipped


def _lost_energy(weight: Tensor, statistics: InputStatistics | None) -> Tensor:
    """[rows, columns]: what a layer's output loses with each weight; its square without statistics."""
    return weight.square() if statistics is None else statistics.energy(weight)


def shares(
    energies: Mapping[str, Tensor], sparsity: float, pattern: Pattern, allocation: str, max_error: float | None
) -> dict[str, tuple[float, str]]:
    """The sparsity of every layer and what held it back: one threshold for all layers, or the same share of each.

    energies [rows, columns]: what is lost with each weight. "global" compares them as they are, "sensitivity" as shares
    of their layer's sum: what is pruned then costs the layers the least relative change of their outputs, summed over
    the layers. Raises ValueError when `max_error` leaves nothing to prune.
    """
    units = {name: pattern.units(energy).flatten().sort().values for name, energy in energies.items()}
    wanted = dict.fromkeys(units, pattern.sparsity if pattern.sparsity is not None else sparsity)
    if allocation != "uniform" and pattern.sparsity is None:
        scale = {n: float(energies[n].sum()) if allocation == "sensitivity" else 1.0 for n, u in units.items()}
        # A unit's size counts towards the budget; units of one layer are of one size but at its edges.
        most = {name: int(_MOST * len(u)) for name, u in units.items()}
        cost = torch.cat([u[: most[n]] / max(scale[n], 1e-30) for n, u in units.items()])
        size = torch.cat([torch.full((most[n],), energies[n].numel() / len(u)) for n, u in units.items()])
        layer = torch.cat([torch.full((count,), i) for i, count in enumerate(most.values())])
        budget = sparsity * sum(energy.numel() for energy in energies.values())
        order = cost.argsort(stable=True)
        gone = order[size[order].cumsum(0) <= budget + 0.5]
        counts = torch.bincount(layer[gone], minlength=len(units))
        wanted = {name: int(counts[i]) / len(u) for i, (name, u) in enumerate(units.items())}
    out: dict[str, tuple[float, str]] = {}
    for name, share in wanted.items():
        note = ""
        if max_error is not None:
            share, note = _limited(energies[name], units[name], share, pattern, max_error)
        out[name] = share, note
    return out


def _limited(energy: Tensor, units: Tensor, share: float, pattern: Pattern, max_error: float) -> tuple[float, str]:
    """The share, or the largest one whose predicted relative error is at most max_error, and then a note."""
    whole = float(energy.sum())
    if whole == 0:
        return share, ""
    if pattern.sparsity is not None:
        error = (float(energy[~pattern.keep(energy, share)].sum()) / whole) ** 0.5
        return (share, "") if error <= max_error else (0.0, f"left dense: {pattern} would cost {error:.2f}")
    lost = units.double().cumsum(0)
    most = int((lost <= max_error**2 * float(units.double().sum())).sum())
    if round(share * len(units)) <= most:
        return share, ""
    return most / len(units), f"held at max_error; {share:.2f} asked for"


def prune_(
    model: nn.Module,
    sparsity: float,
    *,
    pattern: str | Pattern = "unstructured",
    method: str = "magnitude",
    calibration: Iterable[Any] | None = None,
    allocation: str = "uniform",
    max_error: float | None = None,
    sequential: bool = False,
    keep_masks: bool = False,
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
) -> PruneReport:
    """Zeroes `sparsity` (0 to 1) of the weights of every nn.Linear and nn.Conv2d of `model`, in place.

    pattern: "unstructured", N:M ("2:4"; its share of zeros is its own and `sparsity` must be it), or blocks of rows x
        columns ("16x1", "1x4", "16x4", "32x32"). Neighbouring columns of a convolution are input channels (Pattern).
    method: "magnitude": the smallest |w| go. "wanda": the smallest |w| times the norm of its input, in each row (Sun et
        al. 2023, arXiv 2306.11695). "sparsegpt": column by column, the other weights make up for what goes (Frantar and
        Alistarh 2023, arXiv 2301.00774). The last two need `calibration`.
    calibration: model inputs; each a tensor, a tuple or list of arguments, or a mapping of keywords. One pass, before
        anything is pruned.
    allocation: "uniform": each layer loses the same share. "global": one threshold for all layers. "sensitivity": one
        threshold on what a weight adds to its layer's output, relative to the layer, so that the budget goes where it
        hurts least. At most 0.99 of a layer goes.
    max_error: no layer is pruned further than this relative change of its output (of its weight without calibration),
        as predicted from single weights; the report says which layers it held back.
    sequential: layers are pruned one after the other, each by what the pruned ones before it give, and adjusted first
        to give from that what it gave in the dense model (sparse/sequential.py). Takes two passes a layer and a copy of
        the model; `calibration` is kept whole.
    keep_masks: zeros stay zeros in training, through a parametrization of the weight, until sparse.finalize_.
    include, exclude: names, globs, types or callables, as in quantize_; `include` narrows the layers to those it picks.

    Quantize after pruning: zeros stay zeros. Raises ValueError for a value that is not allowed, a selector that matches
    nothing, and when there is nothing to prune; `model` is then unchanged.
    """
    chosen_pattern = Pattern.of(pattern, "prune_")
    if not 0 <= sparsity < 1:
        raise ValueError(f"prune_: sparsity is {sparsity}; allowed: 0 <= sparsity < 1")
    fixed = chosen_pattern.sparsity
    if fixed is not None and abs(fixed - sparsity) > 1e-6:
        raise ValueError(f"prune_: sparsity is {sparsity}; allowed with pattern {chosen_pattern}: {fixed}")
    for name, value, allowed in (("method", method, METHODS), ("allocation", allocation, ALLOCATIONS)):
        if value not in allowed:
            raise ValueError(f"prune_: {name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
    if method != "magnitude" and calibration is None:
        raise ValueError(f"prune_: calibration is None; method {method!r} needs an iterable of model inputs")
    if sequential and calibration is None:
        raise ValueError("prune_: calibration is None; sequential=True needs an iterable of model inputs")
    if max_error is not None and not max_error > 0:
        raise ValueError(f"prune_: max_error is {max_error}; allowed: None or a number above 0")
    layers, skipped = layers_to_prune("prune_", model, include, exclude)
    report = PruneReport(skipped)
    inputs = None if calibration is None else list(calibration) if sequential else calibration

    statistics: dict[str, InputStatistics] = {}
    if inputs is not None:
        statistics = collect(model, layers, inputs, gram=method == "sparsegpt" and not sequential)
        for name in [name for name in layers if name not in statistics]:
            layer = layers.pop(name)
            zeros = float((layer.weight == 0).float().mean())
            reason = "no calibration input reached it"
            report.rows.append(PrunedLayer(name, tuple(layer.weight.shape), zeros, zeros, skipped=reason))
        if not layers:
            raise ValueError(
                f"prune_: nothing to prune in {type(model).__name__}: no calibration input reached a layer"
            )
    matrices = {name: as_matrix(layer.weight).float() for name, layer in layers.items()}
    by_input = method != "magnitude" or allocation == "sensitivity"
    energies = {
        name: _lost_energy(matrix, statistics.get(name) if by_input else None) for name, matrix in matrices.items()
    }
    plan = shares(energies, sparsity, chosen_pattern, allocation, max_error)

    def finish(name: str, after: Tensor, output_error: float | None) -> None:
        layer, before = layers[name], matrices[name]  # before: the stored weight itself, where that is float32
        new, zeros = as_weight(after, layer.weight.shape), float((before == 0).float().mean())
        mask = new != 0
        error = float((after - before).norm() / before.norm().clamp(min=1e-30))
        with torch.no_grad():
            stored_weight(layer).copy_(new)
            if keep_masks:
                fix(layer, mask)
        left = 1 - float(mask.float().mean())
        row = PrunedLayer(
            name, tuple(layer.weight.shape), zeros, left, error, output_error, plan[name][1],
            pattern=str(chosen_pattern), method=method,
        )  # fmt: skip
        report.rows.append(row)

    if sequential:
        assert isinstance(inputs, list)
        for names, moments in progress(one_after_the_other(model, layers, inputs), "pruning"):
            for name in names:
                fitted = moments.fitted(matrices[name])
                after = _pruned(fitted, plan[name][0], chosen_pattern, method, moments.statistics())
                finish(name, after, moments.output_error(matrices[name], after))
        return report
    for name in progress(list(layers), "pruning"):
        before, known, share = matrices[name], statistics.get(name), plan[name][0]
        after = _pruned(before, share, chosen_pattern, method, known) if share > 0 else before
        finish(name, after, None if known is None else known.output_error(before, after))
    return report


def _pruned(
    weight: Tensor, sparsity: float, pattern: Pattern, method: str, statistics: InputStatistics | None
) -> Tensor:
    """The pruned copy of weight [rows, columns], float32."""
    if method == "magnitude":
        return weight * pattern.keep(weight.square(), sparsity)
    assert statistics is not None
    if method == "wanda":
        return weight * pattern.keep(statistics.energy(weight), sparsity, by_row=True)
    assert statistics.gram is not None
    rows = len(weight) // len(statistics.gram)
    groups = [
        sparsegpt.prune_group(part, gram / statistics.samples, sparsity, pattern)
        for part, gram in zip(weight.split(rows), statistics.gram, strict=True)
    ]
    return torch.cat(groups)


def sensitivity(
    model: nn.Module,
    sparsities: Sequence[float] = (0.3, 0.5, 0.7, 0.8, 0.9),
    *,
    pattern: str | Pattern = "unstructured",
    calibration: Iterable[Any] | None = None,
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
) -> dict[str, dict[float, float]]:
    """How much pruning would change each layer: {layer: {sparsity: relative change of its output}}; nothing is changed.

    Without calibration: of its weight. By the weights that "wanda" (without: "magnitude") would take, over the whole
    layer; N:M has one sparsity of its own.
    """
    chosen_pattern = Pattern.of(pattern, "sensitivity")
    layers, _ = layers_to_prune("sensitivity", model, include, exclude)
    statistics = {} if calibration is None else collect(model, layers, calibration, gram=False)
    points = [chosen_pattern.sparsity] if chosen_pattern.sparsity is not None else list(sparsities)
    out: dict[str, dict[float, float]] = {}
    for name, layer in layers.items():
        if calibration is not None and name not in statistics:
            continue
        energy = _lost_energy(as_matrix(layer.weight).float(), statistics.get(name))
        whole = float(energy.sum()) or 1.0
        out[name] = {
            point: (float(energy[~chosen_pattern.keep(energy, point)].sum()) / whole) ** 0.5 for point in points
        }
    return out
