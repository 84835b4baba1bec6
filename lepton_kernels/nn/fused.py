"""Halves of a transformer block as one native call: linear layers, what follows them, residual, layer normalization.

Rows pass through in blocks that stay in a core's cache. Parts are the modules of the model that was fused, under the
names that they had; where a gradient, torch.compile or another device is involved they run one by one.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lepton_kernels import _ops
from lepton_kernels._backends import cpu
from lepton_kernels.nn.quant_linear import QuantLinear, runs_native
from lepton_kernels.reference import ACTIVATIONS


def activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name in reference.ACTIVATIONS of an activation module or function, found by what it computes."""
    probe = torch.linspace(-6, 6, 97)
    try:
        with torch.inference_mode():
            y = function(probe)
    except Exception:  # not a function of one tensor: no activation of ours
        return None
    if not isinstance(y, Tensor) or y.shape != probe.shape:
        return None
    return next((name for name, ours in ACTIVATIONS.items() if torch.allclose(y, ours(probe), rtol=0, atol=2e-6)), None)


def _layer(linear: QuantLinear, activation: str = "none") -> cpu.Layer:
    bias = linear._parameters["bias"]
    return cpu.Layer(linear.tiles(), bias, activation, linear.scheme.activation == "int8")


def _norm(norm: nn.LayerNorm) -> cpu.Norm:
    return cpu.Norm(norm.weight, norm.bias, norm.eps)


class FusedResidualNorm(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual): forward(x [..., k], residual [..., n]) gives [..., n] in x's dtype.

    On the CPU without dropout it is one native call that keeps float32 up to the end.
    """

    def __init__(self, dense: QuantLinear, dropout: nn.Dropout, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = dense, dropout, norm

    def _native(self, x: Tensor, residual: Tensor, *layers: QuantLinear) -> bool:
        return (
            runs_native(x, self.dense, *layers)
            and runs_native(residual)
            and residual.dtype == x.dtype
            and residual.shape == (*x.shape[:-1], self.dense.out_features)
            and not (self.training and self.dropout.p > 0)
            and not (torch.is_grad_enabled() and self.LayerNorm.weight.requires_grad)
        )

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if not self._native(x, residual):
            return self.LayerNorm(self.dropout(self.dense(x)) + residual)
        _ops.check_input(x, self.dense.in_features)
        return cpu.linear_block(x, [_layer(self.dense)], residual, _norm(self.LayerNorm))


class FusedFeedForward(FusedResidualNorm):
    """LayerNorm(dropout(dense(activation(expand(x)))) + residual); `expand` belongs to another module of the model."""

    def __init__(
        self, expand: QuantLinear, activation: str, dense: QuantLinear, dropout: nn.Dropout, norm: nn.LayerNorm
    ) -> None:
        super().__init__(dense, dropout, norm)
        self._expand, self._activation = (expand,), activation  # in a tuple: registered where it was, not twice

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        (expand,) = self._expand
        if not self._native(x, residual, expand):
            return super().forward(ACTIVATIONS[self._activation](expand(x)), residual)
        _ops.check_input(x, expand.in_features)
        layers = [_layer(expand, self._activation), _layer(self.dense)]
        return cpu.linear_block(x, layers, residual, _norm(self.LayerNorm))

    def extra_repr(self) -> str:
        return f"activation={self._activation}"


class FusedElsewhere(nn.Module):
    """Holds a layer whose product another module computes, and hands its input on."""

    def __init__(self, dense: QuantLinear) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedActivation(nn.Module):
    """Stands where an activation was that the layer before it now computes; hands its input on."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return self.activation
