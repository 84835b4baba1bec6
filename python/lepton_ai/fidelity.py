"""Fidelity: how close the outputs of two models are, sample by sample, on the same inputs."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lepton_kernels.sparse.calibration import call, evaluating


@dataclass(frozen=True)
class Fidelity:
    """How close vectors are to reference vectors of the same samples.

    cosine_mean, cosine_min: of the cosines between a sample's two vectors; two zero vectors count as 1, one alone as 0.
    sqnr_db: 10 log10(sum of the reference's squares / sum of the squared differences) over all samples, in decibels;
    inf where nothing differs. non_finite: how many samples hold NaN or infinity in either; one is enough to make all
    three figures NaN, so that no comparison with a limit holds.
    """

    cosine_mean: float
    cosine_min: float
    sqnr_db: float
    samples: int
    non_finite: int = 0

    def __str__(self) -> str:
        if self.non_finite:
            return f"{self.non_finite} of {self.samples} outputs hold NaN or infinity"
        figures = f"cosine {self.cosine_mean:.5f}, least {self.cosine_min:.5f}, SQNR {self.sqnr_db:.1f} dB"
        return f"{figures}, of {self.samples} samples"


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    found = (_first_tensor(part) for part in output) if isinstance(output, (tuple, list)) else iter(())
    return next((tensor for tensor in found if tensor is not None), None)


def vectors_of(output: Any, item: Any) -> Tensor:
    """The vectors [samples, features] that output_vectors takes from a model's output for one input, on its device."""
    y = _first_tensor(getattr(output, "last_hidden_state", output))
    if y is None or y.dim() == 0:
        what = type(output).__name__ if y is None else "a single number"
        raise ValueError(
            f"output_vectors: the model gave {what}; allowed: a tensor of samples, or a structure with one first"
        )
    y = y.float()
    mask = item.get("attention_mask") if isinstance(item, Mapping) else None
    if mask is None or y.dim() < 3 or y.shape[:2] != mask.shape:
        return y.flatten(1) if y.dim() > 1 else y[:, None]
    weights = mask.to(y.device).view(*mask.shape, *[1] * (y.dim() - 2))
    return ((y * weights).sum(1) / weights.sum(1).clamp(min=1)).flatten(1)


def listed(function: str, inputs: Iterable[Any]) -> list[Any]:
    """The model inputs as a list. Raises ValueError for one input in place of several, and for none."""
    if isinstance(inputs, (Tensor, Mapping)):
        raise ValueError(
            f"{function}: inputs is one {type(inputs).__name__}; allowed: an iterable of model inputs, such as [x]"
        )
    items = list(inputs)
    if not items:
        raise ValueError(f"{function}: inputs is empty; allowed: an iterable of one or more model inputs")
    return items


def output_vectors(model: Callable[..., Any], inputs: Iterable[Any]) -> Tensor:
    """One vector a sample, f32 [samples, features] on the CPU, of the output's last_hidden_state or its first tensor.

    inputs: each a tensor, a tuple or list of arguments, or a mapping of keywords. Where it is a mapping with an
    attention_mask [samples, tokens] and the output is [samples, tokens, ...], the mean over the tokens that the mask
    keeps, as sentence encoders are used; else the sample's output, flattened. An nn.Module runs in evaluation mode and
    gets its own back. Raises ValueError when `inputs` is empty or one input alone, and when outputs differ in size.
    """
    with evaluating(model) if isinstance(model, nn.Module) else torch.no_grad():
        parts = [vectors_of(call(model, item), item).cpu() for item in listed("output_vectors", inputs)]
    sizes = sorted({part.shape[1] for part in parts})
    if len(sizes) > 1:
        raise ValueError(f"output_vectors: samples have {sizes} output features; allowed: inputs that give one size")
    return torch.cat(parts)


def fidelity(reference_vectors: Tensor, vectors: Tensor) -> Fidelity:
    """How close `vectors` [samples, features] are to `reference_vectors`; both as output_vectors gives them.

    Raises ValueError when their shapes differ or there is no sample.
    """
    if reference_vectors.dim() != 2 or reference_vectors.shape != vectors.shape or not len(vectors):
        raise ValueError(
            f"fidelity: vectors is {tuple(vectors.shape)}, reference_vectors {tuple(reference_vectors.shape)}; "
            "allowed: one shape [samples, features] with one sample or more"
        )
    want, got = reference_vectors.double(), vectors.double()
    samples, finite = len(got), (want.isfinite() & got.isfinite()).all(1)
    if not finite.all():
        return Fidelity(math.nan, math.nan, math.nan, samples, samples - int(finite.sum()))
    norms = want.norm(dim=1) * got.norm(dim=1)
    cosine = (want * got).sum(1) / norms.where(norms > 0, 1)
    cosine = cosine.clamp(-1, 1).where((want != got).any(1), 1)
    signal, noise = float(want.square().sum()), float((got - want).square().sum())
    sqnr = math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)
    return Fidelity(float(cosine.mean()), float(cosine.min()), sqnr, samples)
