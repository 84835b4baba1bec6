"""Sensitivity: how much a model's output vectors change when one layer is replaced, estimated for many replacements
from a few backward passes.

u is what of the output the metric sees: each sample's vector scaled to length one where it is a cosine, else all
vectors over their root mean square. To first order a change dy of a layer's output changes u by du = J dy; a cosine
falls by |du|^2 / 2, which is half of the noise over the signal in the other case. For a random v of independent unit
normals (v . du)^2 has the mean |du|^2 (Hutchinson 1990), and v . du = (J^T v) . dy, where J^T v is what one backward
pass gives at all layers at once. dy is measured: the replacement runs on the input that the layer has in the model.
Changes of different layers are taken as independent, so that what they cost adds up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lepton_ai.fidelity import vectors_of
from lepton_kernels._progress import progress
from lepton_kernels.sparse.calibration import call


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=change(value.data))
    if isinstance(value, Mapping):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, change) for part in value))
    return type(value)(mapped(part, change) for part in value) if isinstance(value, (tuple, list)) else value


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a structure, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, note)
    return found


@dataclass
class LayerCall:
    """One call of a layer: what it was given and what it gave, as it was then; whatever the model did with them later.

    outputs: the floating-point tensors that it gave. sources: the same in the model's graph, to differentiate by, where
    gradients were on. inputs: the tensors that it was given themselves, to tell who else was given them.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    outputs: list[Tensor]
    sources: list[Tensor]
    inputs: list[Tensor]


@contextmanager
def recorded(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[LayerCall]]]:
    """Inside, every call of the layers is added to what it gives, by their names."""
    calls: dict[str, list[LayerCall]] = {name: [] for name in layers}

    def before(name: str, arguments: Any, keywords: Any) -> Any:
        inputs = tensors_of((arguments, keywords))
        kept, named = mapped((arguments, keywords), lambda tensor: tensor.detach().clone())
        calls[name].append(LayerCall(kept, named, [], [], inputs))
        # The layer may keep its own for the backward pass, while the model writes into what it gave.
        return mapped((arguments, keywords), torch.Tensor.clone) if torch.is_grad_enabled() else None

    def after(name: str, output: Any) -> Any:
        made = calls[name][-1]

        def through(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            made.outputs.append(tensor.detach().clone())
            if not torch.is_grad_enabled():
                return tensor
            source = tensor if tensor.requires_grad else tensor.detach().requires_grad_()  # else all before is frozen
            made.sources.append(source)
            return source.clone()  # which the model may write into

        return mapped(output, through)

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(
            lambda _, arguments, keywords, name=name: before(name, arguments, keywords), with_kwargs=True
        ))  # fmt: skip
        handles.append(layer.register_forward_hook(lambda _, arguments, output, name=name: after(name, output)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _products(made: LayerCall, replacement: nn.Module, backward: Sequence[Tensor], samples: int) -> Tensor:
    """(J^T v) . dy of a call, [probes, samples], or [probes, 1] where the layer's first dimension is not theirs."""
    outputs = [t for t in tensors_of(replacement(*made.arguments, **made.keywords)) if t.is_floating_point()]
    total: Tensor | None = None
    for new, old, gradients in zip(outputs, made.outputs, backward, strict=True):
        products = gradients * (new.float() - old.float())
        # By sample is less noisy than their sum.
        by_sample = products.dim() > 2 and products.shape[1] == samples
        part = products.flatten(2).sum(2) if by_sample else products.flatten(1).sum(1, keepdim=True)
        if total is not None and total.shape != part.shape:
            total, part = total.sum(1, keepdim=True), part.sum(1, keepdim=True)
        total = part if total is None else total + part
    assert total is not None
    return total


def _change(
    calls: Sequence[LayerCall], replacement: nn.Module, backward: Sequence[list[Tensor]], samples: int
) -> float:
    """Sum over the samples of |du|^2. backward: J^T v of the outputs of each call, [probes, *output's shape]."""
    parts = [_products(made, replacement, of_call, samples) for made, of_call in zip(calls, backward, strict=True)]
    if len({part.shape for part in parts}) > 1:
        parts = [part.sum(1, keepdim=True) for part in parts]
    return float(torch.stack(parts).sum(0).square().mean(0).sum())


def _seen(vectors: Tensor, directions: bool) -> Tensor:
    """u, [samples, features]."""
    if directions:
        return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return vectors / vectors.detach().square().sum(1).mean().sqrt().clamp(min=1e-30)


def _gradients(
    seen: Tensor, calls: Mapping[str, list[LayerCall]], probes: int, generator: torch.Generator
) -> list[Tensor]:
    """J^T v at every source, [probes, *source's shape], in the order of the calls."""
    sources = [source for found in calls.values() for made in found for source in made.sources]
    if not any(calls.values()):
        raise ValueError("tune: the model calls none of its layers with these inputs; allowed: inputs that reach one")
    if not sources or not seen.requires_grad:
        raise ValueError(
            "tune: the model's output has no gradient (whole numbers, or torch.no_grad inside); allowed: a first "
            "output that its layers are seen in"
        )
    found = []
    for _ in range(probes):
        v = torch.randn(seen.shape, generator=generator).to(seen.device, seen.dtype)
        found.append(torch.autograd.grad(seen, sources, v, retain_graph=True, materialize_grads=True))
    return [torch.stack(parts).float() for parts in zip(*found, strict=True)]


def sensitivities(
    model: nn.Module,
    replacements: Mapping[str, Mapping[Any, nn.Module]],
    inputs: Sequence[Any],
    probes: int = 8,
    seed: int = 0,
    directions: bool = True,
) -> tuple[dict[str, dict[Any, float]], list[str]]:
    """For each layer's replacements (by any key) the estimated mean of |du|^2 / 2 that they cost, each alone; and the
    layers of which nothing is known, since no input reaches them or their output does not reach the vectors.

    model: in evaluation mode; nothing of it changes. inputs: as output_vectors has them. probes: random directions, one
    backward pass each for every input; so many gradients of all outputs of the layers are held, for one input.
    directions: whether the metric sees the vectors' directions alone. Raises ValueError where there is no gradient.
    """
    layers = {name: model.get_submodule(name) for name in replacements}
    generator = torch.Generator().manual_seed(seed)
    totals = {name: dict.fromkeys(found, 0.0) for name, found in replacements.items()}
    unknown, count = set(layers), 0
    for item in progress(inputs, "sensitivities"):
        with torch.inference_mode(False), torch.enable_grad(), recorded(layers) as calls:
            own = mapped(item, torch.Tensor.clone)  # one that inference mode made can not be differentiated
            vectors = vectors_of(call(model, own), own)
            backward = iter(_gradients(_seen(vectors, directions), calls, probes, generator))
        count += len(vectors)
        with torch.no_grad():
            for name, found in calls.items():
                of_layer = [[next(backward) for _ in made.sources] for made in found]
                if not any(gradient.any() for of_call in of_layer for gradient in of_call):
                    continue
                unknown.discard(name)
                for key, replacement in replacements[name].items():
                    if replacement is not layers[name]:
                        totals[name][key] += 0.5 * _change(found, replacement, of_layer, len(vectors))
    errors = {name: {key: total / count for key, total in found.items()} for name, found in totals.items()}
    return errors, [name for name in layers if name in unknown]
