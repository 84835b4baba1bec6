"""Weights to integers: round to nearest, on a grid per channel (5 to 8 bit) or per group (4 bit). Runs once a layer."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from lepton_kernels import reference
from lepton_kernels.scheme import QuantScheme


def check_step(function: str, scheme: QuantScheme, step: float) -> None:
    """Raises ValueError unless with_step can give the scheme this step."""
    if not 0 <= step < math.inf or (step and scheme.stored_bits == 4):
        allowed = "0 at 4 bits" if scheme.stored_bits == 4 else "a finite number, 0 or more"
        raise ValueError(f"{function}: step is {step} with {scheme.name}; allowed: {allowed}")
    if step and scheme.step:
        raise ValueError(f"{function}: step is {step} and the scheme's own {scheme.step}; allowed: one of them")


def with_step(scheme: QuantScheme, weight: Tensor, step: float) -> QuantScheme:
    """The scheme with `step` root mean squares of the weight, which are of float64 and so the same on every machine."""
    if not step:
        return scheme
    rms = weight.detach().double().square().mean().sqrt()
    return replace(scheme, step=float((step * rms).to(torch.float32)))


def quantize_weight(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """(weight_packed, weight_scale, weight_zero_point) in the saved layout, from weight float [n, k].

    Raises ValueError when the weight holds NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("quantize_weight: the weight holds NaN or infinity; allowed: finite values")
    weight = weight.to(torch.float32)
    if scheme.stored_bits == 8:
        return (*_quantize_int8(weight, scheme.limit, scheme.step), None)
    return _quantize_int4(weight, scheme)


def _safe(scale: Tensor) -> Tensor:
    """1 where a scale is 0 (an all-zero channel or group), so that it divides."""
    return torch.where(scale == 0, 1.0, scale)


def _quantize_int8(weight: Tensor, limit: int, step: float) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / limit).clamp(min=step)
    return torch.round(weight / _safe(scale)).clamp(-limit, limit).to(torch.int8), scale


def _quantize_int4(weight: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor | None]:
    n, k = weight.shape
    size = k if scheme.group_size == -1 else scheme.group_size
    groups = scheme.groups(k)
    grouped = torch.zeros(n, groups * size, device=weight.device)
    grouped[:, :k] = weight
    grouped = grouped.view(n, groups, size)
    # The scale is rounded to bf16 first, and values are rounded to the grid it really gives.
    if scheme.symmetric:
        scale = (grouped.abs().amax(2) / 7.5).to(torch.bfloat16)
        zero = None
        values = grouped / _safe(scale.float())[..., None]
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = ((high - low) / 15).to(torch.bfloat16)
        zero = torch.round(-8 - low / _safe(scale.float())).clamp(-8, 7)
        values = grouped / _safe(scale.float())[..., None] + zero[..., None]
    values = torch.round(values).clamp(-8, 7).to(torch.int8).view(n, -1)[:, :k]
    return reference.pack_int4(values), scale, None if zero is None else zero.to(torch.int8)
