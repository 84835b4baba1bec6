"""Rounding with a straight-through gradient: weights to the grid of a scheme, x to the kernels' bytes."""

import torch
from torch import Tensor
from torch.nn import functional

from lepton_kernels import reference
from lepton_kernels.quantizers import quantize_weight
from lepton_kernels.scheme import QuantScheme


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`; both of one shape."""
    return rounded + (value - value.detach())  # adds zero: no bit of a finite value changes


def _spread(per_group: Tensor, k: int, scheme: QuantScheme) -> Tensor:
    return reference.expand_groups(per_group.to(torch.float32), k, scheme.group_size)


def dequantized(values: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """f32 [n, k] = (values [n, k] - zero_point [n, groups]) * scale [n, groups]."""
    k = values.shape[1]
    values = values.to(torch.float32)
    if zero_point is not None:
        values = values - _spread(zero_point, k, scheme)
    return values * _spread(scale, k, scheme)


def requantize(
    weight: Tensor, scheme: QuantScheme, old_scale: Tensor, old_zero_point: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(values int8 [n, k], scale, zero point) of weight f32 [n, k], as quantize_weight has them; but a group of which
    every weight lies on its old grid keeps that.

    quantize_weight of a dequantized weight may give another grid (symmetric int4 always does: it divides the largest
    magnitude by 7.5, and the grid ends at 7 or 8), and what training left alone has to come back to the bit.
    """
    n, k = weight.shape
    eight = scheme.stored_bits == 8
    packed, scale, zero_point = quantize_weight(weight, scheme)
    values = packed if eight else reference.unpack_int4(packed, k)
    step = _spread(old_scale, k, scheme)
    old = torch.round(weight / torch.where(step == 0, 1.0, step))
    if old_zero_point is not None:
        old = old + _spread(old_zero_point, k, scheme)
    old = old.clamp(-scheme.limit - 1, scheme.limit)
    off = dequantized(old, old_scale, old_zero_point, scheme) != weight
    groups = scheme.groups(k)
    size = k if scheme.group_size == -1 else scheme.group_size
    moved = functional.pad(off, (0, groups * size - k)).view(n, groups, size).any(2)
    values = torch.where(_spread(moved, k, scheme).bool(), values, old.to(torch.int8))
    if zero_point is not None and old_zero_point is not None:
        zero_point = torch.where(moved, zero_point, old_zero_point)
    return values, torch.where(moved, scale, old_scale), zero_point


@torch.no_grad()
def rounded_rows(x: Tensor) -> Tensor:
    """x f32 [..., k] as the w8a8 and w4a8 kernels see it: uint8 with a scale and zero point a row, dequantized."""
    q, scale, zero_point = reference.quantize_rows(x.reshape(-1, x.shape[-1]))
    return ((q - zero_point[:, None]).to(torch.float32) * scale[:, None]).view(x.shape)


def quantized_rows(x: Tensor) -> Tensor:
    """rounded_rows of x, with the gradient of x."""
    return straight_through(x, rounded_rows(x))
