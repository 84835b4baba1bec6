"""fuse_: let the quantized layers of a model do what stands around them, in place, under the same names."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

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


@dataclass
class FuseReport:
    """What fuse_ did: (name of the module, what it is now, how many layers are in it) a row."""

    rows: list[tuple[str, str, int]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, reason

    def __str__(self) -> str:
        names = [name for name, _, _ in self.rows] + [name for name, _ in self.skipped]
        width = max(len(name) for name in [*names, "module"])
        lines = [f"{'module':{width}}  layers  fused as"]
        lines += [f"{name:{width}}  {layers:6}  {what}" for name, what, layers in self.rows]
        lines += [f"{name:{width}}  {'':6}  skipped: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def fuse_(model: nn.Module) -> FuseReport:
    """Fuses what it knows around the QuantLinear layers of `model`, in place; a model is quantized first, then fused.

    - an activation behind a layer of an nn.Sequential becomes the layer's own;
    - query, key and value (gate and up) of one input become one product, which quantizes the input once;
    - of BERT-like blocks, `dense, dropout, LayerNorm(. + residual)` and the feed-forward half become one native call
      each; a fused part is tried on random input first and must agree with what it replaces.

    Names of the state dict stay. Under autograd, torch.compile or on another device the parts run one by one. In
    inference mode, do not write into a layer's input between the layers that share it. Raises ValueError when nothing
    was fused.
    """
    report = FuseReport()
    with torch.inference_mode():
        _fuse_sequences(model, report)
        _fuse_blocks(model, report)
    _share_inputs(model, report)
    if not report.rows:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.skipped)
        raise ValueError(
            f"fuse_: nothing to fuse in {type(model).__name__} ({reasons or 'no pattern found'}); allowed: a model "
            "with layers from quantize_, and activations in an nn.Sequential, siblings of one input or BERT-like blocks"
        )
    return report


def _fuse_sequences(model: nn.Module, report: FuseReport) -> None:
    uses = [id(child) for parent in model.modules() for child in parent.children()]
    for prefix, sequence in model.named_modules():
        if type(sequence) is not nn.Sequential:
            continue
        children = list(sequence.named_children())
        for (name, layer), (place, after) in pairwise(children):
            if not isinstance(layer, QuantLinear) or layer.activation != "none" or isinstance(after, QuantLinear):
                continue
            activation = activation_name(after) if not list(after.parameters()) else None
            if activation in (None, "none"):
                continue
            full = f"{prefix}.{name}" if prefix else name
            if uses.count(id(layer)) > 1:
                report.skipped.append((full, "the layer stands in several places"))
                continue
            layer.activation, layer.activation_is_fused = activation, True
            setattr(sequence, place, FusedActivation(activation))
            report.rows.append((full, f"linear + {activation}", 1))


def _half(module: nn.Module) -> tuple[QuantLinear, nn.Dropout, nn.LayerNorm] | None:
    """The parts of a module that is dense, dropout and LayerNorm of a residual, by names and types."""
    parts = dict(module.named_children())
    if set(parts) != {"dense", "dropout", "LayerNorm"}:
        return None
    dense, dropout, norm = parts["dense"], parts["dropout"], parts["LayerNorm"]
    if not (isinstance(dense, QuantLinear) and type(dropout) is nn.Dropout and type(norm) is nn.LayerNorm):
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
    return torch.randn(2, 3, features, generator=generator).to(like.device, like.dtype)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    for prefix, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            yield f"{prefix}.{name}" if prefix else name, parent, name, child


def _fuse_blocks(model: nn.Module, report: FuseReport) -> None:
    for full, parent, name, child in _blocks(model):
        parts = _half(child)
        if parts is None or child.training:
            if parts is not None:
                report.skipped.append((full, "in training mode; call model.eval() first"))
            continue
        dense, dropout, norm = parts
        expand = getattr(getattr(parent, "intermediate", None), "dense", None)
        if name == "output" and isinstance(expand, QuantLinear) and hasattr(parent, "feed_forward_chunk"):
            if _fuse_feed_forward(parent, expand, parts):
                report.rows.append((full, "feed-forward + residual + layer norm", 2))
            else:
                report.skipped.append((full, "its feed-forward half computes something else"))
            continue
        fused = FusedResidualNorm(dense, dropout, norm).eval()
        x, residual = _probe(dense.in_features, norm.weight), _probe(dense.out_features, norm.weight)
        if _agree(child, fused, x, residual):
            setattr(parent, name, fused)
            report.rows.append((full, "linear + residual + layer norm", 1))
        else:
            report.skipped.append((full, "it computes something else than LayerNorm(dense(x) + residual)"))


def _fuse_feed_forward(parent: Any, expand: QuantLinear, parts: tuple[QuantLinear, nn.Dropout, nn.LayerNorm]) -> bool:
    """Fuses parent.intermediate and parent.output where parent.feed_forward_chunk then gives the same."""
    others = [child for name, child in parent.intermediate.named_children() if name != "dense"]
    activation = activation_name(others[0]) if len(others) == 1 else None
    if activation is None or expand.activation != "none":
        return False
    x = _probe(expand.in_features, parts[2].weight)
    before = parent.intermediate, parent.output
    want = parent.feed_forward_chunk(x)
    parent.intermediate = FusedElsewhere(expand)
    parent.output = FusedFeedForward(expand, activation, *parts).eval()
    if _agree(lambda _: want, parent.feed_forward_chunk, x):
        return True
    parent.intermediate, parent.output = before
    return False


def _share_inputs(model: nn.Module, report: FuseReport) -> None:
    for prefix, parent in model.named_modules():
        for names in _SIBLINGS:
            candidates = [getattr(parent, name, None) for name in names]
            layers = [layer for layer in candidates if isinstance(layer, QuantLinear) and layer._shared is None]
            if len(layers) < len(names):
                continue
            kinds = {(x.in_features, x.scheme, x.bias is None, x.activation, x.weight_packed.device) for x in layers}
            if len(kinds) == 1:
                SharedInput(layers)
                report.rows.append((prefix, " + ".join(names) + " of one input", len(layers)))
