"""prune_: set the least important weights of a model to zero, in place, and say what was done to each layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lepton_kernels._progress import progress
from lepton_kernels._select import Selector, as_selectors, check_selectors, matches, sites_of


@dataclass(frozen=True)
class PrunedLayer:
    """One layer of a report: its share of zeros before and after, the weight's relative change, why it was skipped."""

    name: str
    shape: tuple[int, ...]
    sparsity_before: float
    sparsity_after: float
    relative_error: float = 0.0  # Frobenius norm of the weight's change over that of the weight
    skipped: str | None = None


@dataclass
class PruneReport:
    """What prune_ did, a row a layer."""

    rows: list[PrunedLayer] = field(default_factory=list)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [5])
        lines = [f"{'layer':{width}}  {'shape':>14}  zeros before   after   error"]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            note = f"  skipped: {row.skipped}" if row.skipped else ""
            lines.append(
                f"{row.name:{width}}  {shape:>14}  {row.sparsity_before:12.4f}  {row.sparsity_after:6.4f}  "
                f"{row.relative_error:6.4f}{note}"
            )
        return "\n".join(lines)


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """True where a weight stays: all but the round(sparsity * numel) of least absolute value."""
    drop = round(sparsity * weight.numel())
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[weight.detach().abs().flatten().topk(drop, largest=False).indices] = False
    return mask.view_as(weight)


def prune_(
    model: nn.Module,
    sparsity: float,
    *,
    pattern: str = "unstructured",
    method: str = "magnitude",
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
) -> PruneReport:
    """Zeroes `sparsity` (0 to 1) of the weights of every nn.Linear of `model`, in place, layer by layer.

    pattern: "unstructured". method: "magnitude", the smallest absolute values go. include, exclude: names, globs,
    types or callables, as in quantize_; `include` narrows the layers to those it picks. Quantize after pruning: zeros
    stay zeros. Raises ValueError for a value that is not allowed, a selector that matches nothing, and when there is
    nothing to prune.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"prune_: sparsity is {sparsity}; allowed: 0 <= sparsity < 1")
    if pattern != "unstructured":
        raise ValueError(f"prune_: pattern is {pattern!r}; allowed: 'unstructured'")
    if method != "magnitude":
        raise ValueError(f"prune_: method is {method!r}; allowed: 'magnitude'")
    selectors, excluded = as_selectors(include), as_selectors(exclude)
    layers = {name: module for _, _, name, module in sites_of(model) if isinstance(module, nn.Linear)}
    check_selectors("prune_", "include", selectors, list(layers.items()))
    check_selectors("prune_", "exclude", excluded, list(layers.items()))
    if not layers:
        raise ValueError(f"prune_: nothing to prune in {type(model).__name__}: no nn.Linear found (quantize after it)")

    report = PruneReport()
    done: set[int] = set()
    for name, module in progress(layers.items(), "pruning"):
        weight = module.weight
        if selectors and not any(matches(selector, name, module) for selector in selectors):
            continue
        if id(weight) in done:
            continue
        before = float((weight == 0).float().mean())
        shape = tuple(weight.shape)
        if any(matches(selector, name, module) for selector in excluded):
            report.rows.append(PrunedLayer(name, shape, before, before, skipped="excluded"))
            continue
        if not torch.isfinite(weight).all():
            report.rows.append(PrunedLayer(name, shape, before, before, skipped="its weight holds NaN or infinity"))
            continue
        done.add(id(weight))
        with torch.no_grad():
            norm = weight.norm().clamp(min=1e-30)
            kept = weight * magnitude_mask(weight, sparsity)
            error = float((weight - kept).norm() / norm)
            weight.copy_(kept)
        report.rows.append(PrunedLayer(name, shape, before, float((weight == 0).float().mean()), error))
    if not done:
        skipped = ", ".join(f"{row.name} ({row.skipped})" for row in report.rows)
        raise ValueError(f"prune_: nothing to prune in {type(model).__name__}; skipped: {skipped}")
    return report
