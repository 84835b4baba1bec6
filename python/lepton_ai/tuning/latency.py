"""Latency tables: how long each choice of a layer takes, measured on the inputs that the layer has in the model."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from lepton_ai.compression import Choice
from lepton_ai.measure import in_turn
from lepton_ai.tuning.sensitivity import LayerCall
from lepton_kernels._progress import progress

_SECONDS = 0.06  # a candidate


def kernel_choice(choice: Choice) -> Choice:
    """The choice without what no kernel's time depends on: codec, step, and zeros that are multiplied."""
    bare = replace(choice, codec="huffman", step=0.0)
    return bare if choice.sparse else replace(bare, sparsity=0.0, pattern="unstructured")


def latencies(
    layers: Mapping[str, nn.Module],
    replacements: Mapping[str, Mapping[Choice, nn.Module]],
    calls: Mapping[str, list[LayerCall]],
) -> dict[str, dict[Choice, float]]:
    """Seconds of each layer's replacements, all its calls together, measured in turn in torch's number of threads.

    Layers of one type and shape with inputs of one shape are measured once, and so are choices of one kernel.
    """
    measured: dict[object, dict[Choice, float]] = {}
    out: dict[str, dict[Choice, float]] = {}
    for name in progress(list(layers), "latencies"):
        shapes = tuple(tuple(parameter.shape) for parameter in layers[name].parameters())
        inputs = tuple(tuple(tuple(tensor.shape) for tensor in made.inputs) for made in calls[name])
        key = type(layers[name]), shapes, inputs
        if key not in measured:
            kernels: dict[Choice, nn.Module] = {}
            for choice, replacement in replacements[name].items():
                kernels.setdefault(kernel_choice(choice), replacement)
            measured[key] = _measured(kernels, calls[name])
        out[name] = {choice: measured[key][kernel_choice(choice)] for choice in replacements[name]}
    return out


def _measured(kernels: Mapping[Choice, nn.Module], calls: list[LayerCall]) -> dict[Choice, float]:
    if not calls:
        return dict.fromkeys(kernels, 0.0)

    def run(layer: nn.Module) -> None:
        for made in calls:
            layer(*made.arguments, **made.keywords)

    names = {str(i): choice for i, choice in enumerate(kernels)}
    with torch.inference_mode():
        costs = in_turn({i: partial(run, kernels[choice]) for i, choice in names.items()}, _SECONDS * len(kernels))
    return {names[i]: cost.seconds for i, cost in costs.items()}
