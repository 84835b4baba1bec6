"""SparseLinear: torch.nn.Linear whose weight is mostly zeros, stored without them and multiplied without them.

Y[..., out_features] = activation(X[..., in_features] @ W^T + bias), in X's dtype. Float weights: sums in float32.
Scheme w8a8: int8 weights and quantized activations, the bits that QuantLinear gives for the same weight. Buffers are in
the saved, device-neutral layout (docs/formats.md).
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lepton_kernels import _ops, _ops_sparse, reference
from lepton_kernels._backends import cpu_sparse
from lepton_kernels._backends.derived import version
from lepton_kernels.nn.quant_linear import keeping_dtypes, runs_native
from lepton_kernels.pattern import Pattern
from lepton_kernels.quantizers import quantize_weight
from lepton_kernels.scheme import QuantScheme

_Packed = cpu_sparse.FloatWeight | cpu_sparse.Int8Weight


class SparseLinear(nn.Module):
    """A drop-in for a pruned nn.Linear; see from_linear. Built empty, it waits for load_state_dict."""

    weight_compressed: Tensor
    weight_bitmask: Tensor
    weight_scale: Tensor | None
    weight_shape: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nonzeros: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        activation: str = "none",
        scheme: str | None = None,
    ) -> None:
        super().__init__()
        _ops.check_activation(activation)
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"SparseLinear: {name} is {value}; allowed: 1 or more")
        if not 0 <= nonzeros <= in_features * out_features:
            raise ValueError(f"SparseLinear: nonzeros is {nonzeros}; allowed: 0 to {in_features * out_features}")
        if dtype not in _ops.FLOAT_DTYPES:
            raise ValueError(f"SparseLinear: dtype is {dtype}; allowed: float32, bfloat16, float16")
        if scheme not in (None, "w8a8"):
            raise ValueError(f"SparseLinear: scheme is {scheme!r}; allowed: None, 'w8a8'")
        self.scheme = scheme
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        mask = torch.zeros(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        stored = dtype if scheme is None else torch.int8
        self.register_buffer("weight_compressed", torch.zeros(nonzeros, dtype=stored, device=device))
        self.register_buffer("weight_bitmask", mask)
        self.register_buffer("weight_scale", None if scheme is None else torch.zeros(out_features, 1, device=device))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        empty = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", empty)
        # The buffers that the packed weight was made of, and their versions.
        self._packed: tuple[Tensor, Tensor, Tensor | None, tuple[int, int, int | None], _Packed] | None = None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, pattern: str | None = None, scheme: str | None = None, activation: str = "none"
    ) -> "SparseLinear":
        """The copy of a Linear without its zeros (prune_ makes them), with `activation` after it.

        pattern: as prune_ has it, to be sure of it; None takes the zeros as they are. scheme: None keeps the weights to
        the bit, "w8a8" quantizes them. `linear` is not changed. Raises ValueError for a weight that does not have the
        pattern, is no float of 16 or 32 bits, or holds NaN or infinity where it is to be quantized.
        """
        weight = linear.weight.detach()
        mask = weight != 0  # NaN is not zero: it stays
        if pattern is not None and not Pattern.of(pattern, "SparseLinear.from_linear").fits(mask):
            raise ValueError(
                f"SparseLinear.from_linear: the weight's zeros are {Pattern.detect(mask)}; allowed with pattern "
                f"{pattern!r}: zeros that prune_ made with it"
            )
        nonzeros = int(mask.sum())
        layer = cls(
            linear.in_features, linear.out_features, nonzeros, linear.bias is not None, weight.dtype, weight.device,
            activation, scheme,
        )  # fmt: skip
        if scheme is not None:
            weight, layer.weight_scale, _ = quantize_weight(weight, QuantScheme.of(scheme))
        layer.weight_compressed, layer.weight_bitmask = weight[mask], reference.pack_bitmask(mask)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().to(torch.float32, copy=True), requires_grad=False)
        return layer.train(linear.training)

    @property
    def nonzeros(self) -> int:
        """How many weights are stored."""
        return self.weight_compressed.numel()

    @property
    def sparsity(self) -> float:
        """The share of weights that are not."""
        return 1 - self.nonzeros / (self.in_features * self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        if runs_native(x, self):
            _ops.check_input(x, self.in_features)
            packed, buffers = self.packed(), cast(Any, self._buffers)
            sources = buffers["weight_compressed"], buffers["weight_bitmask"], buffers["weight_scale"]
            return cpu_sparse.product(x, packed, sources, self._parameters["bias"], self.activation)
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if x.shape[-1] != self.in_features:
            _ops.check_input(x, self.in_features)
        return _ops_sparse.sparse_linear(
            x, self.weight_compressed, self.weight_bitmask, self.weight_scale, self.bias, self.activation
        )

    def packed(self) -> _Packed:
        """The weight as the CPU kernels read it; made on first use."""
        buffers: Any = self._buffers  # saves nn.Module's slow lookup
        values, mask, scale = buffers["weight_compressed"], buffers["weight_bitmask"], buffers["weight_scale"]
        known = self._packed
        if (
            known is not None
            and known[0] is values
            and known[1] is mask
            and known[2] is scale
            and known[3] == (version(values), version(mask), None if scale is None else version(scale))
        ):
            return known[4]
        if values.device.type == "meta":
            raise RuntimeError(
                "SparseLinear: the weights are on the meta device; load a state dict with assign=True first"
            )
        if values.device.type != "cpu":
            raise ValueError(f"weight_compressed is on {values.device}, x on the CPU; allowed: one device for all")
        packed = cpu_sparse.pack((values, mask, scale), self.in_features)
        versions = version(values), version(mask), None if scale is None else version(scale)
        self._packed = (values, mask, scale, versions, packed)
        return packed

    @property
    def pattern(self) -> Pattern:
        """What its zeros look like (Pattern.detect)."""
        return Pattern.detect(reference.unpack_bitmask(self.weight_bitmask, self.in_features))

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], dequantized, made anew at every access."""
        weight = reference.expand_sparse(self.weight_compressed, self.weight_bitmask, self.in_features)
        return weight if self.weight_scale is None else reference.dequantize_int8(weight, self.weight_scale)

    def to_dense(self) -> nn.Linear:
        """An nn.Linear with the same weights. Raises ValueError where an activation is part of it."""
        if self.activation != "none":
            raise ValueError(f"to_dense: activation is {self.activation!r}; allowed: 'none', as nn.Linear has none")
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(self.weight.dtype, copy=True))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        activation = f", activation={self.activation}" if self.activation != "none" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={self.sparsity:.4f}{f', scheme={self.scheme}' if self.scheme else ''}{activation}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        self._packed = None
        super()._apply(fn if self.scheme is None else keeping_dtypes(fn), recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}
