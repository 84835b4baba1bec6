"""SparseLinear: torch.nn.Linear whose weight is mostly zeros, stored without them and multiplied without them.

Y[..., out_features] = activation(X[..., in_features] @ W^T + bias), in X's dtype, sums in float32. Buffers are in the
saved, device-neutral layout (docs/formats.md).
"""

from typing import Any

import torch
from torch import Tensor, nn

from lepton_kernels import _ops, _ops_sparse, reference
from lepton_kernels._backends import cpu_sparse
from lepton_kernels._backends.derived import version
from lepton_kernels.nn.quant_linear import runs_native


class SparseLinear(nn.Module):
    """A drop-in for a pruned nn.Linear; see from_linear. Built empty, it waits for load_state_dict."""

    weight_compressed: Tensor
    weight_bitmask: Tensor
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
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        mask = torch.zeros(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        self.register_buffer("weight_compressed", torch.zeros(nonzeros, dtype=dtype, device=device))
        self.register_buffer("weight_bitmask", mask)
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        empty = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", empty)
        self._packed: tuple[tuple[Tensor, int, Tensor, int], cpu_sparse.PackedRows] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: str = "none") -> "SparseLinear":
        """The copy of a Linear without its zeros (prune_ makes them), with `activation` after it; exact to the bit.

        `linear` is not changed. Raises ValueError for a weight that is no float of 16 or 32 bits.
        """
        weight = linear.weight.detach()
        mask = weight != 0  # NaN is not zero: it stays
        nonzeros = int(mask.sum())
        layer = cls(
            linear.in_features, linear.out_features, nonzeros, linear.bias is not None, weight.dtype, weight.device,
            activation,
        )  # fmt: skip
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
            return cpu_sparse.sparse_rows(x, self.streams(), self._parameters["bias"], self.activation)
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if x.shape[-1] != self.in_features:
            _ops.check_input(x, self.in_features)
        return _ops_sparse.sparse_linear(x, self.weight_compressed, self.weight_bitmask, self.bias, self.activation)

    def streams(self) -> cpu_sparse.PackedRows:
        """The weight as the CPU kernels read it; made on first use."""
        values, mask = self._buffers["weight_compressed"], self._buffers["weight_bitmask"]
        assert values is not None
        assert mask is not None
        known = self._packed
        if known is not None:
            (old_values, values_version, old_mask, mask_version), packed = known
            if old_values is values and old_mask is mask and (version(values), version(mask)) == (
                values_version, mask_version,
            ):  # fmt: skip
                return packed
        if values.device.type == "meta":
            raise RuntimeError(
                "SparseLinear: the weights are on the meta device; load a state dict with assign=True first"
            )
        if values.device.type != "cpu":
            raise ValueError(f"weight_compressed is on {values.device}, x on the CPU; allowed: one device for all")
        packed = cpu_sparse.pack_rows(values, mask, self.in_features)
        self._packed = ((values, version(values), mask, version(mask)), packed)
        return packed

    @property
    def weight(self) -> Tensor:
        """The dense weight [out_features, in_features], made anew at every access."""
        return reference.expand_sparse(self.weight_compressed, self.weight_bitmask, self.in_features)

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
            f"sparsity={self.sparsity:.4f}{activation}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}
