"""Sensitivity: how much a model's output vectors turn when one layer is replaced, estimated for many replacements from
a few backward passes.

To first order a change dy of a layer's output changes the vectors, scaled to length one, by du = J dy, and the cosine
by -|du|^2 / 2. For a random v of independent unit normals (v . du)^2 has the mean |du|^2 (Hutchinson 1990), and
v . du = (J^T v) . dy, where J^T v is what one backward pass gives at all layers at once. dy is measured: the
replacement runs on the input that the layer has in the model. Changes of different layers are taken as independent, so
that what they cost adds up.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lepton_ai.fidelity import vectors_of
from lepton_kernels._progress import progress
from lepton_kernels.sparse.calibration import call


@dataclass
class LayerCall:
    """One call of a layer: its arguments and what it gave."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor


def first_tensor(output: Any) -> Tensor:
    """A layer's output, of recurrent ones without the states."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def recorded(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[LayerCall]]]:
    """Inside, every call of the layers is added to what it gives, by their names."""
    calls: dict[str, list[LayerCall]] = {name: [] for name in layers}
    handles = []
    for name, layer in layers.items():

        def hook(_: nn.Module, arguments: Any, keywords: Any, output: Any, name: str = name) -> None:
            tensor = first_tensor(output)
            if torch.is_grad_enabled() and not tensor.requires_grad:  # all before it is frozen
                tensor.requires_grad_()
            calls[name].append(LayerCall(arguments, keywords, tensor))

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(map(_detached, value)) if isinstance(value, (tuple, list)) else value


def _turned(replacement: nn.Module, calls: Sequence[LayerCall], backward: Sequence[Tensor], samples: int) -> Tensor:
    """Sum over the samples of |du|^2. backward: J^T v of each call, [probes, *output's shape]."""
    per_call = []
    for made, gradients in zip(calls, backward, strict=True):
        output = first_tensor(replacement(*_detached(made.arguments), **made.keywords))
        change = (output.float() - made.output.detach().float()).reshape(-1)
        products = (gradients.flatten(1) * change).reshape(len(gradients), *made.output.shape)
        # By sample where the first dimension is theirs, which is less noisy than their sum.
        by_sample = products.dim() > 2 and products.shape[1] == samples
        per_call.append(products.flatten(2).sum(2) if by_sample else products.flatten(1).sum(1, keepdim=True))
    if len({part.shape for part in per_call}) > 1:
        per_call = [part.sum(1, keepdim=True) for part in per_call]
    return torch.stack(per_call).sum(0).square().mean(0).sum()


def sensitivities(
    model: nn.Module,
    replacements: Mapping[str, Mapping[Any, nn.Module]],
    inputs: Sequence[Any],
    probes: int = 8,
    seed: int = 0,
) -> dict[str, dict[Any, float]]:
    """For each layer's replacements (by any key) the estimated mean of 1 - cosine that they cost, each alone.

    model: in evaluation mode; nothing of it changes. inputs: as output_vectors has them. probes: random directions, one
    backward pass each for every input. A layer that is not called, or whose output does not reach the vectors, costs 0.
    """
    layers = {name: model.get_submodule(name) for name in replacements}
    generator = torch.Generator().manual_seed(seed)
    totals = {name: dict.fromkeys(found, 0.0) for name, found in replacements.items()}
    count = 0
    for item in progress(inputs, "sensitivities"):
        with torch.enable_grad(), recorded(layers) as calls:
            vectors = vectors_of(call(model, item), item)
            units = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-30)
            outputs = [made.output for found in calls.values() for made in found]
            gradients = []
            for _ in range(probes):
                v = torch.randn(units.shape, generator=generator).to(units.device, units.dtype)
                gradients.append(torch.autograd.grad(units, outputs, v, retain_graph=True, materialize_grads=True))
        backward = iter([torch.stack(parts).float() for parts in zip(*gradients, strict=True)])
        samples = len(vectors)
        count += samples
        with torch.no_grad():
            for name, found in calls.items():
                of_layer = [next(backward) for _ in found]
                for key, replacement in replacements[name].items():
                    if found and replacement is not layers[name]:
                        totals[name][key] += 0.5 * float(_turned(replacement, found, of_layer, samples))
    return {name: {key: total / count for key, total in found.items()} for name, found in totals.items()}
