"""quantize_: replace a model's layers by quantized ones, in place, and say what was done to each."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lepton_kernels._backends import kernel_name, recurrent_kernel_name
from lepton_kernels._progress import progress
from lepton_kernels._select import Selector, as_selectors, check_selectors, matches, sites_of
from lepton_kernels.fused_path import disable_fused_path
from lepton_kernels.nn import QuantEmbedding, QuantLinear
from lepton_kernels.nn import quant_recurrent as recurrent
from lepton_kernels.quantizers import check_step, with_step
from lepton_kernels.scheme import QuantScheme

_RECURRENT = tuple(recurrent.REPLACEMENTS)
_QUANT_RECURRENT: Any = tuple(recurrent.REPLACEMENTS.values())


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


def _weights(module: Any) -> list[Tensor]:
    """The weight matrices of a layer, float or quantized, in one order."""
    if isinstance(module, _RECURRENT):
        return [parameter for name, parameter in module.named_parameters() if name.startswith("weight")]
    if isinstance(module, _QUANT_RECURRENT):
        return [part.weight for part in module.children()]
    return [module.weight]


def _relative_error(module: nn.Module, replacement: nn.Module) -> float:
    before = [weight.detach().float() for weight in _weights(module)]
    changes = [(new.float() - old).norm() for new, old in zip(_weights(replacement), before, strict=True)]
    norm = torch.stack([weight.norm() for weight in before]).norm()
    return float(torch.stack(changes).norm() / norm.clamp(min=1e-30))


def _quantized(module: Any, scheme: QuantScheme, step: float) -> tuple[nn.Module, str, str]:
    """(the replacement, the name of its scheme, the kernel that serves it)."""
    if not isinstance(module, _RECURRENT):
        scheme = with_step(scheme, module.weight, step)
    if isinstance(module, nn.Embedding):
        bits = scheme.weight_bits if scheme.stored_bits == 8 else 8
        return QuantEmbedding.from_embedding(module, bits, scheme.step), f"int{bits}", "torch"
    if isinstance(module, nn.Linear):
        kernel = kernel_name(scheme.name, module.weight.device.type)
        return QuantLinear.from_linear(module, scheme), scheme.name, kernel
    return recurrent.from_float(module), scheme.name, recurrent_kernel_name()


def _reason_to_skip(
    name: str, module: Any, shared: bool, exclude: Sequence[Selector], scheme: QuantScheme, step: float
) -> str | None:
    if any(matches(selector, name, module) for selector in exclude):
        return "excluded"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its parent reads the weight directly (nn.MultiheadAttention)"
    if type(module) not in (nn.Linear, nn.Embedding, *_RECURRENT):
        return f"a subclass ({type(module).__name__}) may compute something else"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm renormalizes its rows"
    if isinstance(module, _RECURRENT) and scheme.name != "w8a8":
        return f"recurrent layers have no {scheme.name} kernel; allowed: w8a8"
    if isinstance(module, _RECURRENT) and step:
        return f"recurrent layers have a scale for each row; step is {step:g}"
    if getattr(module, "proj_size", 0):
        return f"proj_size is {module.proj_size}; allowed: 0"
    if isinstance(module, _RECURRENT) and next(module.parameters()).device.type == "cuda":
        return "recurrent layers have no GPU kernel"
    if shared:
        return "its weight is tied to another layer's"
    if not all(torch.isfinite(weight).all() for weight in _weights(module)):
        return "its weight holds NaN or infinity"
    return None


def _bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def quantize_(
    model: nn.Module,
    scheme: str | QuantScheme = "w8a8",
    *,
    group_size: int | None = None,
    step: float = 0.0,
    include: Sequence[Selector] | None = None,
    exclude: Sequence[Selector] = (),
    strict: bool = False,
) -> QuantizeReport:
    """Quantizes every nn.Linear of `model` in place. Where `include` picks them also nn.Embedding, to int8 rows
    (of 5, 6 or 7 bits where the scheme's weights are), and nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell and nn.RNNCell, by
    w8a8 alone.

    step: QuantScheme's, in root mean squares of each layer's weight; 5 to 8 bits. With 0.1 an entropy-coded file of
    MiniLM is as large as with w6a8 and the error smaller. 0: every row has the least scale that holds it.
    include, exclude: names, globs over names, types or callables (name, module) -> bool. `include` narrows the layers
    to those it picks. Returns a row a layer. Raises ValueError when a selector matches nothing, when nothing changed,
    and, with strict=True, when any layer was skipped (before anything is changed).
    """
    chosen = QuantScheme.of(scheme, group_size)
    check_step("quantize_", chosen, step)
    selectors, excluded = as_selectors(include), as_selectors(exclude)
    sites = [site for site in sites_of(model) if isinstance(site[3], (nn.Linear, nn.Embedding, *_RECURRENT))]
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
        (
            *site,
            _reason_to_skip(
                site[2], site[3], any(len(owners[id(w)]) > 1 for w in _weights(site[3])), excluded, chosen, step
            ),
        )
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
    made: dict[int, tuple[nn.Module, nn.Module]] = {}  # the old one too: its id must not be given to another
    for parent, attribute, name, module, reason in progress(plan, "quantizing"):
        shape, before = tuple(_weights(module)[0].shape), _bytes(module)
        if reason:
            report.rows.append(LayerRow(name, shape, "", before, before, skipped=reason))
            continue
        if id(module) not in made:
            new, label, kernel = _quantized(module, chosen, step)
            made[id(module)] = (module, new)
            error = _relative_error(module, new)
            report.rows.append(LayerRow(name, shape, label, before, _bytes(new), error, kernel))
        setattr(parent, attribute, made[id(module)][1])
    disable_fused_path(model)
    return report


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: set[type | str] | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: dict[type, type] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """torch.ao.quantization.quantize_dynamic's signature on our kernels: a copy of `model` with w8a8 layers.

    qconfig_spec: layer types (nn.Linear, nn.Embedding, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell) or names;
    None is all of these types but nn.Embedding. A type that the model does not have is passed over, as torch does.
    dtype: torch.qint8. mapping: None. inplace: change `model` itself. Raises ValueError for what is not served (another
    type, torch.float16, a mapping), for a name that matches nothing and when nothing changed.
    """
    if dtype != torch.qint8:
        raise ValueError(f"quantize_dynamic: dtype is {dtype}; allowed: torch.qint8")
    if mapping is not None:
        raise ValueError(f"quantize_dynamic: mapping is {mapping}; allowed: None")
    allowed = (nn.Linear, nn.Embedding, *_RECURRENT)
    chosen: list[Any] = list(qconfig_spec) if qconfig_spec is not None else [nn.Linear, *_RECURRENT]
    for item in chosen:
        if not isinstance(item, str) and item not in allowed:
            names = ", ".join(f"nn.{kind.__name__}" for kind in allowed)
            raise ValueError(f"quantize_dynamic: qconfig_spec holds {item!r}; allowed: {names}, names")
    inside = [module for _, _, _, module in sites_of(model)]
    present = [item for item in chosen if isinstance(item, str) or any(isinstance(m, item) for m in inside)]
    if not present:
        names = ", ".join(f"nn.{kind.__name__}" for kind in chosen if not isinstance(kind, str))
        raise ValueError(
            f"quantize_dynamic: nothing to quantize in {type(model).__name__}: it holds none of {names or 'no layer'}"
        )
    model = model if inplace else copy.deepcopy(model)
    quantize_(model, "w8a8", include=present)
    return model
