"""Recurrent layers in plain torch: what the operator `recurrent` means, and the oracle of its tests.

Slow and clear; the native kernel equals it to the last bit. Every step of sigmoid and tanh is one rounded float32
product, sum or division.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lepton_kernels import reference

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class Direction(NamedTuple):
    """The weights of one direction of a layer, n = gates * hidden rows in torch's order of gates."""

    weight_ih: Tensor  # int8 [n, k]
    scale_ih: Tensor  # f32 [n, 1]
    weight_hh: Tensor  # int8 [n, hidden]
    scale_hh: Tensor  # f32 [n, 1]
    bias_ih: Tensor | None  # f32 [n]
    bias_hh: Tensor | None  # f32 [n]


def directions_of(weights: list[Tensor], has_bias: bool) -> list[Direction]:
    """The directions in an operator's flat list of weights: six tensors each, four without biases."""
    width = 6 if has_bias else 4
    fill: list[Tensor | None] = [] if has_bias else [None, None]
    return [Direction(*weights[i : i + width], *fill) for i in range(0, len(weights), width)]  # type: ignore[arg-type]


def expm1(v: Tensor) -> Tensor:
    """exp(v) - 1 of float32 |v| <= 87: v = n ln 2 + r, Cephes' polynomial in r, and 2^n."""
    n = torch.round(v * 1.44269504088896341)
    r = v - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + c
    p = p * r * r + r
    power = ((n.nan_to_num().to(torch.int32) + 127) << 23).view(torch.float32)
    return power * p + (power - 1)


def sigmoid(v: Tensor) -> Tensor:
    """1 / (1 + exp(-v)), float32."""
    return 1 / (2 + expm1(0 - v.clamp(-87, 87)))


def tanh(v: Tensor) -> Tensor:
    """(exp(2 v) - 1) / (exp(2 v) + 1), float32."""
    e = expm1((v + v).clamp(-20, 20))
    return e / (e + 2)


def sigmoid_tanh(a: Tensor, b: Tensor) -> Tensor:
    """sigmoid(a) * tanh(b) with one division, float32."""
    e = expm1((b + b).clamp(-20, 20))
    return e / ((2 + expm1(0 - a.clamp(-87, 87))) * (e + 2))


def _step(cell: str, x: Tensor, hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The new h and c [rows, hidden] from x W_i^T + b_i, h W_h^T + b_h [rows, gates * hidden] and the old ones."""
    if cell == "rnn_tanh":
        return tanh(x + hidden), c
    if cell == "rnn_relu":
        return (x + hidden).clamp(min=0), c
    if cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), hidden.chunk(3, 1)
        candidate = tanh(x_n + sigmoid(x_r + h_r) * h_n)
        return candidate + sigmoid(x_z + h_z) * (h - candidate), c
    i, f, g, o = (x + hidden).chunk(4, 1)
    c = sigmoid(f) * c + sigmoid_tanh(i, g)
    return sigmoid_tanh(o, c), c


def recurrent(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    has_bias: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer: (y, h_n, c_n) from x f32 [steps, batch, k], [batch, steps, k] or, with batch_sizes, packed [rows, k].

    h0, c0: f32 [directions, batch, hidden]. y has x's shape with directions * hidden columns; c_n is c0 but for "lstm".
    """
    if batch_first:
        y, h_n, c_n = recurrent(cell, x.transpose(0, 1), None, h0, c0, weights, has_bias, False)
        return y.transpose(0, 1).contiguous(), h_n, c_n
    steps = list(x if batch_sizes is None else x.split(batch_sizes.tolist()))
    ends, columns = [], []
    for d, w in enumerate(directions_of(weights, has_bias)):
        h, c, out = h0[d].clone(), c0[d].clone(), list(steps)
        for t in range(len(steps))[:: -1 if d else 1]:
            rows = steps[t].shape[0]
            from_x = reference.gemm_int8(steps[t], w.weight_ih, w.scale_ih, w.bias_ih, True)
            from_h = reference.gemm_int8(h[:rows], w.weight_hh, w.scale_hh, w.bias_hh, True)
            h[:rows], c[:rows] = _step(cell, from_x, from_h, h[:rows], c[:rows])
            out[t] = h[:rows].clone()
        ends.append((h, c))
        columns.append(torch.stack(out) if batch_sizes is None else torch.cat(out))
    return torch.cat(columns, -1), torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends])
