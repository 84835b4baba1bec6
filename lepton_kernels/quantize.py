"""quantize_: replace a model's layers by quantized ones, in place, and say what was done to each."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lepton_kernels._backends import kernel_name
from lepton_kernels._progress import progress
from lepton_kernels._select import Selector, as_selectors, check_selectors, matches, sites_of
from lepton_kernels.nn import QuantEmbedding, QuantLinear
from lepton_kernels.scheme import QuantScheme


@dataclass(frozen=True)
class LayerRow:
    """One layer of a report; `skipped` says why it was left as it is."""

    name: str
    shape: tuple[int, ...]
    scheme: str
    bytes_before: int
    bytes_after: int
    relative_error: float = 0.0  # Frobenius norm of the weight's change over that of the weight
    kernel: str = ""
    skipped: str | None = None


@dataclass
class QuantizeReport:
    """What quantize_ did, a row a layer."""

    rows: list[LayerRow] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [5])
        lines = [f"{'layer':{width}}  {'shape':>14}  scheme      before       after   error  kernel"]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            what = f"skipped: {row.skipped}" if row.skipped else row.kernel
            lines.append(
                f"{row.name:{width}}  {shape:>14}  {row.scheme:6}  {row.bytes_before:10,}  {row.bytes_after:10,}  "
                f"{row.relative_error:6.4f}  {what}"
            )
        lines.append(f"{'total':{width}}  {'':14}  {'':6}  {self.bytes_before:10,}  {self.bytes_after:10,}")
        return "\n".join(lines)


def _reason_to_skip(name: str, module: Any, shared: bool, exclude: Sequence[Selector]) -> str | None:
    if any(matches(selector, name, module) for selector in exclude):
        return "excluded"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its parent reads the weight directly (nn.MultiheadAttention)"
    if type(module) not in (nn.Linear, nn.Embedding):
        return f"a subclass ({type(module).__name__}) may compute something else"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm renormalizes its rows"
    if shared:
        return "its weight is tied to another layer's"
    if not torch.isfinite(module.weight).all():
        return "its weight holds NaN or infinity"
    return None


def _bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _disable_fused_path(model: nn.Module) -> None:
    # nn.TransformerEncoderLayer's fused inference path hands linear1.weight to a float kernel; this is its own switch.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.linear1, QuantLinear):
            module.activation_relu_or_gelu = 0


def quantize_(
    model: nn.Module,
    scheme: str | QuantScheme = "w8a8",
    *,
    group_size: int | None = None,
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
    strict: bool = False,
) -> QuantizeReport:
    """Quantizes every nn.Linear of `model` in place (nn.Embedding too, to int8 rows, where `include` picks it).

    include, exclude: names, globs over names, types or callables (name, module) -> bool. `include` narrows the layers
    to those it picks. Returns a row a layer. Raises ValueError when a selector matches nothing, when nothing changed,
    and, with strict=True, when any layer was skipped (before anything is changed).
    """
    chosen = QuantScheme.of(scheme, group_size)
    selectors, excluded = as_selectors(include), as_selectors(exclude)
    sites = [site for site in sites_of(model) if isinstance(site[3], (nn.Linear, nn.Embedding))]
    named = [(name, module) for _, _, name, module in sites]
    check_selectors("quantize_", "include", selectors, named)
    check_selectors("quantize_", "exclude", excluded, named)

    def wanted(name: str, module: nn.Module) -> bool:
        if selectors:
            return any(matches(selector, name, module) for selector in selectors)
        return isinstance(module, nn.Linear)

    owners: dict[int, set[int]] = {}
    for _, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    plan = [
        (*site, _reason_to_skip(site[2], site[3], len(owners[id(site[3].weight)]) > 1, excluded))
        for site in sites
        if wanted(site[2], site[3]) or any(matches(s, site[2], site[3]) for s in excluded)
    ]
    skipped = [f"{name} ({reason})" for _, _, name, _, reason in plan if reason]
    if strict and skipped:
        raise ValueError(f"quantize_: strict=True and {len(skipped)} layers would be skipped: {', '.join(skipped)}")
    if len(skipped) == len(plan):
        raise ValueError(
            f"quantize_: nothing to quantize in {type(model).__name__}; "
            f"skipped: {', '.join(skipped) or 'no layer found'}"
        )

    report = QuantizeReport()
    made: dict[int, tuple[nn.Module, nn.Module, float]] = {}
    for parent, attribute, name, module, reason in progress(plan, "quantizing"):
        shape, before = tuple(module.weight.shape), _bytes(module)
        if reason:
            report.rows.append(LayerRow(name, shape, "", before, before, skipped=reason))
            continue
        first = id(module) not in made
        if first:
            linear = isinstance(module, nn.Linear)
            replacement = QuantLinear.from_linear(module, chosen) if linear else QuantEmbedding.from_embedding(module)
            weight = module.weight.detach().float()
            error = (replacement.weight.float() - weight).norm() / weight.norm().clamp(min=1e-30)
            made[id(module)] = (module, replacement, float(error))
        _, new, error_value = made[id(module)]
        setattr(parent, attribute, new)
        if first:
            linear = isinstance(new, QuantLinear)
            kernel = kernel_name(chosen.name, str(new.weight_scale.device.type)) if linear else "torch"
            report.rows.append(
                LayerRow(name, shape, chosen.name if linear else "int8", before, _bytes(new), error_value, kernel)
            )
    _disable_fused_path(model)
    return report


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: set[type | str] | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: dict[type, type] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """torch.ao.quantization.quantize_dynamic's signature on our kernels: a copy of `model` with w8a8 layers.

    qconfig_spec: layer types or names; None is {nn.Linear}. dtype: torch.qint8. mapping: None. inplace: change `model`
    itself. Raises ValueError for what is not served (nn.LSTM and other recurrent layers, torch.float16, a mapping).
    """
    if dtype != torch.qint8:
        raise ValueError(f"quantize_dynamic: dtype is {dtype}; allowed: torch.qint8")
    if mapping is not None:
        raise ValueError(f"quantize_dynamic: mapping is {mapping}; allowed: None")
    chosen = list(qconfig_spec) if qconfig_spec is not None else [nn.Linear]
    for item in chosen:
        if not isinstance(item, str) and item not in (nn.Linear, nn.Embedding):
            raise ValueError(f"quantize_dynamic: qconfig_spec holds {item!r}; allowed: nn.Linear, nn.Embedding, names")
    model = model if inplace else copy.deepcopy(model)
    quantize_(model, "w8a8", include=chosen)
    return model
