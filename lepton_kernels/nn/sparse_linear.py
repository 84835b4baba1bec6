"""SparseLinear: torch.nn.Linear whose weight is mostly zeros, stored without them and multiplied without them.

Y[..., out_features] = activation(X[..., in_features] @ W^T + bias), in X's dtype. Float weights: sums in float32.
Schemes w8a8 to w5a8: int8 weights and quantized activations, the bits that QuantLinear gives for the same weight.
Scheme w4a16: QuantLinear's 4-bit weights, activations left as they are. Buffers are in the saved, device-neutral layout
(docs/formats.md).
"""

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lepton_kernels import _ops, _ops_sparse, reference
from lepton_kernels._backends import cpu_sparse
from lepton_kernels._backends.derived import version
from lepton_kernels.nn.quant_linear import keeping_dtypes, runs_native
from lepton_kernels.pattern import Pattern
from lepton_kernels.quantizers import quantize_weight
from lepton_kernels.scheme import QuantScheme

SCHEMES = ("w8a8", "w7a8", "w6a8", "w5a8", "w4a16")  # which there are sparse layers of, by QuantScheme.name


def _scheme_of(scheme: str | QuantScheme | None) -> QuantScheme | None:
    found = None if scheme is None else QuantScheme.of(scheme)
    if found is not None and found.name not in SCHEMES:
        raise ValueError(
            f"SparseLinear: scheme is {scheme!r}; allowed: None, {', '.join(map(repr, SCHEMES))}, or such a QuantScheme"
        )
    return found


def _stored_values(nonzeros: int, scheme: QuantScheme | None, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """The length and dtype of weight_compressed."""
    if scheme is None:
        return nonzeros, dtype
    return (nonzeros, torch.int8) if scheme.stored_bits == 8 else (-(-nonzeros // 2), torch.uint8)


class SparseLinear(nn.Module):
    """A drop-in for a pruned nn.Linear; see from_linear. Built empty, it waits for load_state_dict."""

    weight_compressed: Tensor
    weight_bitmask: Tensor
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
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
        scheme: str | QuantScheme | None = None,
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
        self.scheme = scheme = _scheme_of(scheme)
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        mask = torch.zeros(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        length, stored = _stored_values(nonzeros, scheme, dtype)
        scale = zero = None
        if scheme is not None:
            shape, eight = (out_features, scheme.groups(in_features)), scheme.stored_bits == 8
            scale = torch.zeros(shape, dtype=torch.float32 if eight else torch.bfloat16, device=device)
            zero = None if scheme.symmetric else torch.zeros(shape, dtype=torch.int8, device=device)
        self.register_buffer("weight_compressed", torch.zeros(length, dtype=stored, device=device))
        self.register_buffer("weight_bitmask", mask)
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        # Last: torch.export counts buffers that are None, and takes a wrong name for what follows them.
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", zero)
        empty = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", empty)
        # The buffers that the packed weight was made of, and their versions.
        self._packed: tuple[cpu_sparse.Sources, list[int | None], cpu_sparse.Weight] | None = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        pattern: str | None = None,
        scheme: str | QuantScheme | None = None,
        activation: str = "none",
    ) -> "SparseLinear":
        """The copy of a Linear without its zeros (prune_ makes them), with `activation` after it.

        pattern: as prune_ has it, to be sure of it; None takes the zeros as they are. scheme: None keeps the weights to
        the bit, "w8a8" (to "w5a8"), "w4a16" or such a QuantScheme, `step` included, quantizes them as QuantLinear does.
        A zero stays a zero; a weight that is rounded to one is stored as one. `linear` is not changed.
        Raises ValueError for a weight that does not have the pattern, is no float of 16 or 32 bits, or holds NaN or
        infinity where it is to be quantized.
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
        if layer.scheme is not None:
            weight, layer.weight_scale, layer.weight_zero_point = quantize_weight(weight, layer.scheme)
        if layer._nibbles:
            layer.weight_compressed = reference.pack_nibbles(reference.unpack_int4(weight, layer.in_features)[mask])
        else:
            layer.weight_compressed = weight[mask]
        layer.weight_bitmask = reference.pack_bitmask(mask)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().to(torch.float32, copy=True), requires_grad=False)
        return layer.train(linear.training)

    @property
    def nonzeros(self) -> int:
        """How many weights are stored. Of 4 bits on the meta device, where no mask can be read: or one more."""
        stored = self.weight_compressed.numel()
        if not self._nibbles:
            return stored
        if self.weight_bitmask.is_meta:
            return min(2 * stored, self.in_features * self.out_features)
        return reference.count_ones(self.weight_bitmask, self.in_features)

    @property
    def sparsity(self) -> float:
        """The share of weights that are not."""
        return 1 - self.nonzeros / (self.in_features * self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        if runs_native(x, self):
            _ops.check_input(x, self.in_features)
            sources = self._sources()
            return cpu_sparse.product(x, self.packed(), sources, self._parameters["bias"], self.activation)
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if x.shape[-1] != self.in_features:
            _ops.check_input(x, self.in_features)
        return _ops_sparse.sparse_linear(
            x, self.weight_compressed, self.weight_bitmask, self.weight_scale, self.bias, self.activation,
            self.weight_zero_point, self._group_size,
        )  # fmt: skip

    @property
    def _nibbles(self) -> bool:
        """Whether two weights are a byte."""
        return self.scheme is not None and self.scheme.weight_bits == 4

    @property
    def _group_size(self) -> int:
        return -1 if self.scheme is None else self.scheme.group_size

    def _sources(self) -> cpu_sparse.Sources:
        buffers: Any = self._buffers  # saves nn.Module's slow lookup
        return (
            buffers["weight_compressed"], buffers["weight_bitmask"], buffers["weight_scale"],
            buffers["weight_zero_point"],
        )  # fmt: skip

    def packed(self) -> cpu_sparse.Weight:
        """The weight as the CPU kernels read it; made on first use."""
        sources, known = self._sources(), self._packed
        versions = [None if tensor is None else version(tensor) for tensor in sources]
        if known is not None and all(map(is_, known[0], sources)) and known[1] == versions:
            return known[2]
        device = sources[0].device
        if device.type == "meta":
            raise RuntimeError(
                "SparseLinear: the weights are on the meta device; load a state dict with assign=True first"
            )
        if device.type != "cpu":
            raise ValueError(f"weight_compressed is on {device}, x on the CPU; allowed: one device for all")
        packed = cpu_sparse.pack(sources, self.in_features, self._group_size)
        self._packed = (sources, versions, packed)
        return packed

    @property
    def pattern(self) -> Pattern:
        """What its zeros look like (Pattern.detect)."""
        return Pattern.detect(reference.unpack_bitmask(self.weight_bitmask, self.in_features))

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], dequantized, made anew at every access."""
        return reference.dequantize_sparse(*self._sources(), self.in_features, self._group_size)

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
        scheme = "" if self.scheme is None else f", scheme={self.scheme.name}"
        group = f", group_size={self._group_size}" if self._nibbles else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={self.sparsity:.4f}{scheme}{group}{activation}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        self._packed = None
        super()._apply(fn if self.scheme is None else keeping_dtypes(fn), recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}
