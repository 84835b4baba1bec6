"""fuse_: let the quantized layers of a model do what stands around them, in place, under the same names."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lepton_kernels._select import children_of, sites_of
from lepton_kernels.nn import FusedFeedForward, FusedResidualNorm, QuantLinear
from lepton_kernels.nn.fused import FusedActivation, FusedElsewhere, activation_name
from lepton_kernels.nn.quant_linear import SharedInput

# Siblings that transformer code gives the same tensor. Where it does not, they find out and part (SharedInput).
_SIBLINGS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
)
# Relative, of a fused part to what it replaces: room for a value on a rounding boundary, and for half types.
_TOLERANCE, _ROUNDINGS = 1e-3, 4
_Half = tuple[QuantLinear, nn.Dropout, nn.LayerNorm]


@dataclass
class FuseReport:
    """What fuse_ did: (name of the module, what it is now, how many layers are in it) a row.

    parts: every layer that is part of something now, normalizations too, and what that is; by the layer's name.
    """

    rows: list[tuple[str, str, int]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    parts: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, what: str, layers: list[str], norm: str | None = None) -> None:
        """A row: the module's name, what it is now, the names of the quantized layers and the normalization in it."""
        self.rows.append((name, what, len(layers)))
        self.parts.update(dict.fromkeys(layers if norm is None else [*layers, norm], what))

    def __str__(self) -> str:
        names = [name for name, _, _ in self.rows] + [name for name, _ in self.skipped]
        width = max(len(name) for name in [*names, "module"])
        lines = [f"{'module':{width}}  layers  fused as"]
        lines += [f"{name:{width}}  {layers:6}  {what}" for name, what, layers in self.rows]
        lines += [f"{name:{width}}  {'':6}  skipped: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def fuse_(model: nn.Module, *, optional: bool = False) -> FuseReport:
    """Fuses what it knows around the QuantLinear layers of `model`, in place; a model is quantized first, then fused.

    - an activation behind a layer of an nn.Sequential becomes the layer's own;
    - query, key and value (gate and up) of one input become one product, which quantizes the input once;
    - of BERT-like blocks, `dense, dropout, LayerNorm(. + residual)` and the feed-forward half become one native call
      each; a fused part is tried on random input first and must agree with what it replaces.

    Names of the state dict stay, and so do files. Under autograd, torch.compile or on another device the parts run one
    by one. What has hooks is left alone; one that is added later to a part of a fused block is not called. In inference
    mode, do not write into a layer's input between the layers that share it. Raises ValueError when nothing was fused,
    unless optional=True.
    """
    report = FuseReport()
    with torch.inference_mode():
        _fuse_sequences(model, report)
        _fuse_blocks(model, report)
    _share_inputs(model, report)
    if not report.rows and not optional:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.skipped)
        raise ValueError(
            f"fuse_: nothing to fuse in {type(model).__name__} ({reasons or 'no pattern found'}); allowed: a model "
            "with layers from quantize_, and activations in an nn.Sequential, siblings of one input or BERT-like blocks"
        )
    return report


def _hooked(*modules: nn.Module) -> bool:
    """Whether something wants to be called when one of the modules, or of their parts, is."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for module in modules
        for part in module.modules()
    )


def _fuse_sequences(model: nn.Module, report: FuseReport) -> None:
    uses = Counter(id(module) for _, _, _, module in sites_of(model))
    for prefix, sequence in model.named_modules():
        if type(sequence) is not nn.Sequential:
            continue
        for (name, layer), (place, after) in pairwise(children_of(sequence)):
            if not isinstance(layer, QuantLinear) or layer.activation != "none" or isinstance(after, QuantLinear):
                continue
            activation = activation_name(after) if not after.state_dict() and not _hooked(after) else None
            if activation in (None, "none"):
                continue
            full = f"{prefix}.{name}" if prefix else name
            if uses[id(layer)] > 1:
                report.skipped.append((full, "the layer stands in several places"))
            elif _hooked(layer):
                report.skipped.append((full, "it has hooks"))
            else:
                layer.activation, layer.activation_is_fused = activation, True
                setattr(sequence, place, FusedActivation(activation))
                report.add(full, f"linear + {activation}", [full])


def _half(module: nn.Module) -> _Half | None:
    """The parts of a module that is dense, dropout and LayerNorm of a residual, by names and types."""
    parts = dict(module.named_children())
    if isinstance(module, FusedResidualNorm) or set(parts) != {"dense", "dropout", "LayerNorm"}:
        return None
    dense, dropout, norm = parts["dense"], parts["dropout"], parts["LayerNorm"]
    if not (type(dense) is QuantLinear and type(dropout) is nn.Dropout and type(norm) is nn.LayerNorm):
        return None
    if norm.weight is None or norm.bias is None or tuple(norm.normalized_shape) != (dense.out_features,):
        return None
    return dense, dropout, norm


def _agree(old: Callable[..., Any], new: Callable[..., Any], *inputs: Tensor) -> bool:
    try:
        want = old(*inputs)
    except Exception:  # it takes other inputs than the block we know
        return False
    got = new(*inputs)
    if not isinstance(want, Tensor) or want.shape != got.shape or want.dtype != got.dtype:
        return False
    tolerance = max(_TOLERANCE, _ROUNDINGS * torch.finfo(want.dtype).eps)
    return bool((got.float() - want.float()).norm() <= tolerance * want.float().norm())


def _probe(features: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, features, generator=generator, device="cpu").to(like.device, like.dtype)


def _reason_to_skip(child: nn.Module, norm: nn.LayerNorm) -> str | None:
    if child.training:
        return "in training mode; call model.eval() first"
    if norm.weight.is_meta:
        return "on the meta device, where it can not be tried"
    return "it has hooks" if _hooked(child) else None


def _fuse_blocks(model: nn.Module, report: FuseReport) -> None:
    for parent, name, full, child in list(sites_of(model)):
        parts = _half(child)
        if parts is None:
            continue
        reason = _reason_to_skip(child, parts[2])
        if reason:
            report.skipped.append((full, reason))
            continue
        inside, norm_inside = f"{full}.dense", f"{full}.LayerNorm"
        if name == "output" and hasattr(parent, "feed_forward_chunk"):
            if _fuse_feed_forward(parent, parts):
                expand = f"{full.removesuffix(name)}intermediate.dense"
                report.add(full, "feed-forward + residual + layer norm", [expand, inside], norm_inside)
                continue
            report.skipped.append((full, "the activation before it: its feed-forward half computes something else"))
        dense, _, norm = parts
        fused = FusedResidualNorm(*parts).eval()
        if _agree(child, fused, _probe(dense.in_features, norm.weight), _probe(dense.out_features, norm.weight)):
            setattr(parent, name, fused)
            report.add(full, "linear + residual + layer norm", [inside], norm_inside)
        else:
            report.skipped.append((full, "it computes something else than LayerNorm(dense(x) + residual)"))


def _fuse_feed_forward(parent: Any, parts: _Half) -> bool:
    """Fuses parent.intermediate and parent.output where parent.feed_forward_chunk then gives the same."""
    intermediate, output = getattr(parent, "intermediate", None), parent.output
    if not isinstance(intermediate, nn.Module) or _hooked(intermediate):
        return False
    expand = getattr(intermediate, "dense", None)
    others = [child for name, child in children_of(intermediate) if name != "dense"]
    if type(expand) is not QuantLinear or expand.activation != "none" or len(others) != 1 or others[0].state_dict():
        return False
    activation = activation_name(others[0])
    if activation is None:
        return False
    x = _probe(expand.in_features, parts[2].weight)
    want = parent.feed_forward_chunk(x)
    parent.intermediate = FusedElsewhere(expand)
    parent.output = FusedFeedForward(parent.intermediate, activation, *parts).eval()
    if _agree(lambda _: want, parent.feed_forward_chunk, x):
        return True
    parent.intermediate, parent.output = intermediate, output
    return False


def _product(layer: QuantLinear) -> tuple[object, ...]:
    """What layers must have in common to be one product; bits above 4 and steps are in the weights alone."""
    scheme = layer.scheme
    weights = layer.in_features, scheme.stored_bits, scheme.group_size, scheme.symmetric, layer.weight_packed.device
    return *weights, scheme.activation, layer.bias is None, layer.activation


def _share_inputs(model: nn.Module, report: FuseReport) -> None:
    for prefix, parent in model.named_modules():
        for names in _SIBLINGS:
            candidates = [getattr(parent, name, None) for name in names]
            layers = [layer for layer in candidates if isinstance(layer, QuantLinear) and layer._shared is None]
            if len({id(layer) for layer in layers}) < len(names):
                continue
            if len({_product(layer) for layer in layers}) == 1:
                SharedInput(layers)
                members = [f"{prefix}.{name}" if prefix else name for name in names]
                report.add(prefix, " + ".join(names) + " of one input", members)
