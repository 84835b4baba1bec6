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
    with torch.device("cpu"):
        near, far = torch.linspace(-6, 6, 97, dtype=torch.float32), torch.logspace(1, 4, 16, dtype=torch.float32)
    probe = torch.cat([near, far, -far])  # far: ReLU6 and the like are cut off somewhere
    try:
        with torch.inference_mode():
            y = function(probe.clone())  # it may write in place
    except Exception:  # not a function of one tensor: no activation of ours
        return None
    if not isinstance(y, Tensor) or y.shape != probe.shape:
        return None
    return next((name for name, ours in ACTIVATIONS.items() if torch.allclose(y, ours(probe), 1e-6, 2e-6)), None)


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
        self.dense, self.LayerNorm, self.dropout = dense, norm, dropout  # in the order of the modules it stands for

    def _native(self, x: Tensor, residual: Tensor, *layers: nn.Module) -> bool:
        norm, dropout = self.LayerNorm, self.dropout
        return (
            all(type(layer) is QuantLinear for layer in (self.dense, *layers))  # none was replaced since
            and runs_native(x, self.dense, *layers)
            and runs_native(residual)
            and residual.dtype == x.dtype
            and residual.shape == (*x.shape[:-1], self.dense.out_features)
            and not (dropout.training and dropout.p > 0)
            and not (torch.is_grad_enabled() and (norm.weight.requires_grad or norm.bias.requires_grad))
        )

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if not self._native(x, residual):
            return self.LayerNorm(self.dropout(self.dense(x)) + residual)
        _ops.check_input(x, self.dense.in_features)
        return cpu.linear_block(x, [_layer(self.dense)], residual, _norm(self.LayerNorm))


class FusedFeedForward(FusedResidualNorm):
    """LayerNorm(dropout(dense(activation(expand.dense(x)))) + residual); `expand` stays where it was in the model."""

    def __init__(
        self, expand: "FusedElsewhere", activation: str, dense: QuantLinear, dropout: nn.Dropout, norm: nn.LayerNorm
    ) -> None:
        super().__init__(dense, dropout, norm)
        self._expand, self._activation = (expand,), activation  # in a tuple: registered where it was, not twice

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        expand = self._expand[0].dense
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
