"""Quantized and sparse layers that train: float32 master weights, which compute what the compressed layer will.

In every forward a master W [n, k] passes through the rounding of the compressed layer, and x through that of the
kernels, a scale and zero point a row: Y = X~ @ W~^T + bias. Gradients pass the rounding as if it were not there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lepton_ai.training.grid import dequantized, quantized_rows, requantize, straight_through
from lepton_kernels import QuantScheme, reference
from lepton_kernels.nn import QuantEmbedding, QuantLinear, SparseLinear
from lepton_kernels.nn.quant_linear import keeping_dtypes


@dataclass(frozen=True)
class Stored:
    """What a TrainLinear becomes again: a SparseLinear or a QuantLinear. scheme None: float weights of `dtype`."""

    sparse: bool
    scheme: QuantScheme | None
    dtype: torch.dtype
    bias_dtype: torch.dtype
    activation: str
    activation_is_fused: bool = False


class TrainLinear(nn.Module):
    """A QuantLinear or SparseLinear that trains: parameters weight f32 [out_features, in_features] and bias f32.

    Computes in float32, under autocast too; the output has x's dtype, as that of the compressed layer. mask bool, like
    weight: False where a weight is zero for good; or None. weight_scale and weight_zero_point are the grid that the
    weight comes from, which never changes. Dtypes stay through .to(dtype), .half() and .float().
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    mask: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stored: Stored,
        mask: Tensor | None = None,
        weight_scale: Tensor | None = None,
        weight_zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.stored = stored
        self.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True))
        trained = None if bias is None else nn.Parameter(bias.detach().to(torch.float32, copy=True))
        self.register_parameter("bias", trained)
        self.register_buffer("mask", mask)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("weight_zero_point", weight_zero_point)

    @classmethod
    def from_quant(cls, layer: QuantLinear, mask: Tensor | None = None) -> "TrainLinear":
        """The training form of a QuantLinear; mask: what of its weight is not zero for good."""
        dtype, activation = torch.float32, layer.activation
        stored = Stored(False, layer.scheme, dtype, dtype, activation, layer.activation_is_fused)
        new = cls(layer.weight, layer.bias, stored, mask, layer.weight_scale, layer.weight_zero_point)
        return new.train(layer.training)

    @classmethod
    def from_sparse(cls, layer: SparseLinear) -> "TrainLinear":
        """The training form of a SparseLinear: what it does not store stays zero."""
        scheme = layer.scheme
        dtype = layer.weight_compressed.dtype if scheme is None else torch.float32
        stored = Stored(
            True, scheme, dtype, torch.float32 if layer.bias is None else layer.bias.dtype, layer.activation
        )
        mask = reference.unpack_bitmask(layer.weight_bitmask, layer.in_features)
        new = cls(layer.weight, layer.bias, stored, mask, layer.weight_scale, layer.weight_zero_point)
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        device, scheme = x.device.type, self.stored.scheme
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            rows = x.to(torch.float32)
            if scheme is not None and scheme.activation == "int8":
                rows = quantized_rows(rows)
            y = functional.linear(rows, self.rounded_weight(), self.bias)
            return reference.ACTIVATIONS[self.stored.activation](y).to(x.dtype)

    def masked_weight(self) -> Tensor:
        """The weight with its zeros."""
        return self.weight if self.mask is None else torch.where(self.mask, self.weight, 0.0)

    def rounded_weight(self) -> Tensor:
        """The weight that the compressed layer will have, f32, to the bit; straight-through to `weight`."""
        weight = self.masked_weight()
        values, scale, zero_point = self._encode(weight.detach())
        if self.stored.scheme is None:
            return straight_through(weight, values.to(torch.float32))
        return straight_through(weight, dequantized(values, cast(Tensor, scale), zero_point, self.stored.scheme))

    def _encode(self, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.stored.scheme is None:
            return weight.to(self.stored.dtype), None, None
        return requantize(weight, self.stored.scheme, cast(Tensor, self.weight_scale), self.weight_zero_point)

    @torch.no_grad()
    def compressed(self) -> QuantLinear | SparseLinear:
        """The compressed layer of these weights, on their device."""
        values, scale, zero_point = self._encode(self.masked_weight())
        stored, n, k = self.stored, self.out_features, self.in_features
        has_bias, device = self.bias is not None, self.weight.device
        layer: QuantLinear | SparseLinear
        if stored.sparse:
            mask, kept = cast(Tensor, self.mask), values[cast(Tensor, self.mask)]
            layer = SparseLinear(k, n, len(kept), has_bias, stored.dtype, device, stored.activation, stored.scheme)
            of_four = stored.scheme is not None and stored.scheme.weight_bits == 4
            layer.weight_compressed = reference.pack_nibbles(kept) if of_four else kept
            layer.weight_bitmask = reference.pack_bitmask(mask)
            layer.weight_scale, layer.weight_zero_point = scale, zero_point
        else:
            scheme = cast(QuantScheme, stored.scheme)
            layer = QuantLinear(k, n, has_bias, scheme, device, stored.activation)
            layer.activation_is_fused = stored.activation_is_fused
            layer.weight_packed = values if scheme.stored_bits == 8 else reference.pack_int4(values)
            layer.weight_scale, layer.weight_zero_point = cast(Tensor, scale), zero_point
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(stored.bias_dtype, copy=True), requires_grad=False)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        stored = self.stored
        weight = str(stored.dtype) if stored.scheme is None else stored.scheme.name
        kind = SparseLinear.__name__ if stored.sparse else QuantLinear.__name__
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"masked={self.mask is not None}, becomes={kind} {weight}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrainLinear":
        super()._apply(keeping_dtypes(fn), recurse)
        return self


class TrainEmbedding(nn.Module):
    """A QuantEmbedding that trains: parameter weight f32 [num_embeddings, embedding_dim]; the output has `dtype`."""

    weight_scale: Tensor

    def __init__(self, layer: QuantEmbedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx, self.dtype = layer.padding_idx, layer.dtype
        self.scheme = QuantScheme(layer.weight_bits, step=layer.step)
        self.weight = nn.Parameter(reference.dequantize_int8(layer.weight_packed, layer.weight_scale))
        self.register_buffer("weight_scale", layer.weight_scale)
        self.train(layer.training)

    def forward(self, index: Tensor) -> Tensor:
        # A row has its own scale: those that are asked for are rounded alone.
        rows = functional.embedding(index, self.weight, self.padding_idx).reshape(-1, self.embedding_dim)
        old_scale = functional.embedding(index, self.weight_scale).reshape(-1, 1)
        values, scale, _ = requantize(rows.detach(), self.scheme, old_scale, None)
        rounded = straight_through(rows, dequantized(values, scale, None, self.scheme))
        return rounded.view(*index.shape, self.embedding_dim).to(self.dtype)

    @torch.no_grad()
    def compressed(self) -> QuantEmbedding:
        """The compressed layer of these weights, on their device."""
        layer = QuantEmbedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, self.dtype, self.weight.device,
            self.scheme.weight_bits, self.scheme.step,
        )  # fmt: skip
        layer.weight_packed, layer.weight_scale, _ = requantize(self.weight, self.scheme, self.weight_scale, None)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, becomes={QuantEmbedding.__name__}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrainEmbedding":
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        super()._apply(keeping_dtypes(fn), recurse)
        return self
