"""QuantLinear: torch.nn.Linear with int8 or int4 weights on native kernels.

Y[..., out_features] = activation(X[..., in_features] @ dequantize(W)^T + bias), in X's dtype. Buffers are in the saved,
device-neutral layout (docs/formats.md) and keep their dtypes through .to(dtype), .half() and .float().
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lepton_kernels import _ops, reference
from lepton_kernels._backends import cpu
from lepton_kernels._backends.derived import version
from lepton_kernels.quantizers import quantize_weight
from lepton_kernels.scheme import QuantScheme


def runs_native(x: Tensor, *layers: nn.Module) -> bool:
    """Whether x may go straight to the CPU kernels: nothing traces it, casts it or asks for its gradient."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or any(_trains_bias(layer) for layer in layers)))
    )


def _trains_bias(layer: nn.Module) -> bool:
    bias = layer._parameters["bias"]  # saves nn.Module's slow lookup
    return bias is not None and bias.requires_grad


def keeping_dtypes(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """fn for nn.Module._apply: devices move, dtypes stay, so that .half().float() gives the same bits back."""

    def moved(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return new if new.dtype == tensor.dtype else tensor.to(new.device)

    return moved


class _Waiting(threading.local):
    """What a thread has computed and not yet taken: the input, its version, outputs by place in the group."""

    outputs: tuple[Tensor, int, dict[int, Tensor]] | None = None


class SharedInput:
    """Layers that are given the same tensor, one after the other: one product for all of them (fuse_).

    The first call computes all outputs; the others take theirs. Layers that turn out not to share their input go back
    to products of their own.
    """

    _ENOUGH_MISSES = 2

    def __init__(self, layers: "list[QuantLinear]") -> None:
        self._layers = layers
        self._waiting = _Waiting()
        self._packed: tuple[tuple[tuple[Tensor, int], ...], cpu.Packed, Tensor | None] | None = None
        self._misses = 0  # of all threads
        for layer in layers:
            layer._shared = self

    def output(self, layer: "QuantLinear", x: Tensor) -> Tensor:
        """The layer's output for x."""
        place = next((i for i, member in enumerate(self._layers) if member is layer), None)
        if place is None:  # a shallow copy of one of the layers
            return layer.product(x)
        waiting = self._waiting.outputs
        if waiting is not None and waiting[0] is x and waiting[1] == version(x) and place in waiting[2]:
            y = waiting[2].pop(place)
            if not waiting[2]:
                self._waiting.outputs, self._misses = None, 0
            return y
        if waiting is not None:  # outputs that nobody took
            self._misses += 1
            if self._misses >= self._ENOUGH_MISSES:
                self.dissolve()
                return layer.product(x)
        packed, bias = self._tiles()
        y = cpu.gemm(x, packed, bias, layer.scheme.activation == "int8", layer.activation)
        outputs = dict(enumerate(y.split([member.out_features for member in self._layers], -1)))
        mine = outputs.pop(place)
        self._waiting.outputs = (x, version(x), outputs)
        return mine

    def dissolve(self) -> None:
        """Every layer computes its own product again."""
        self._waiting.outputs = None
        for layer in self._layers:
            layer._shared = None

    def forget(self) -> None:
        """Makes the tiles anew at the next call."""
        self._packed = None

    def _tiles(self) -> tuple[cpu.Packed, Tensor | None]:
        tensors = [t for layer in self._layers for t in (layer.weight_packed, layer.bias) if t is not None]
        sources = tuple((tensor, version(tensor)) for tensor in tensors)
        known = self._packed
        if known is not None and all(
            tensor is before and seen == then for (tensor, seen), (before, then) in zip(sources, known[0], strict=True)
        ):
            return known[1], known[2]

        def joined(parts: Iterable[Tensor | None]) -> Tensor | None:
            present = [part.detach() for part in parts if part is not None]
            return torch.cat(present) if present else None

        for layer in self._layers:
            layer.check_device()
        weight = torch.cat([layer.weight_packed for layer in self._layers])
        scale = torch.cat([layer.weight_scale for layer in self._layers])
        bias = joined(layer.bias for layer in self._layers)
        first = self._layers[0]
        if first.scheme.stored_bits == 8:
            packed = cpu.make_int8(weight, scale)
        else:
            zero = joined(layer.weight_zero_point for layer in self._layers)
            packed = cpu.make_int4(weight, scale, zero, first.in_features, first.scheme.group_size)
        self._packed = (sources, packed, bias)
        return packed, bias

    def __getstate__(self) -> dict[str, Any]:
        return {"_layers": self._layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layers, self._waiting, self._packed, self._misses = state["_layers"], _Waiting(), None, 0


class QuantLinear(nn.Module):
    """A drop-in for nn.Linear; see from_linear. Built empty, it waits for load_state_dict."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str | QuantScheme = "w8a8",
        device: torch.device | str | None = None,
        activation: str = "none",
    ) -> None:
        super().__init__()
        _ops.check_activation(activation)
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"QuantLinear: {name} is {value}; allowed: 1 or more")
        self.in_features, self.out_features, self.scheme = in_features, out_features, QuantScheme.of(scheme)
        self.activation = activation
        self.activation_is_fused = False  # it was a module of its own, and is one in a saved model (fuse_)
        groups = self.scheme.groups(in_features)
        eight = self.scheme.stored_bits == 8
        packed_shape = (out_features, in_features if eight else -(-in_features // 8))
        self.register_buffer(
            "weight_packed", torch.zeros(packed_shape, dtype=torch.int8 if eight else torch.int32, device=device)
        )
        scale_dtype = torch.float32 if eight else torch.bfloat16
        self.register_buffer("weight_scale", torch.zeros(out_features, groups, dtype=scale_dtype, device=device))
        zero = None if self.scheme.symmetric else torch.zeros(out_features, groups, dtype=torch.int8, device=device)
        self.register_buffer("weight_zero_point", zero)
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        empty = nn.Parameter(torch.zeros(out_features, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", empty)
        self._packed: tuple[Tensor, int, cpu.Packed] | None = None
        self._shared: SharedInput | None = None  # set by fuse_

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scheme: str | QuantScheme = "w8a8", activation: str = "none"
    ) -> "QuantLinear":
        """The quantized copy of a Linear, with `activation` after it; `linear` is not changed.

        activation: "none", "relu", "silu", "gelu" or "gelu_tanh". Raises ValueError on NaN or infinite weights.
        """
        scheme = QuantScheme.of(scheme)
        weight = linear.weight.detach()
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, scheme, weight.device, activation)
        packed, scale, zero = quantize_weight(weight, scheme)
        layer.weight_packed, layer.weight_scale, layer.weight_zero_point = packed, scale, zero
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().to(torch.float32, copy=True), requires_grad=False)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if runs_native(x, self):
            _ops.check_input(x, self.in_features)
            shared = self._shared  # once: another thread may dissolve it
            return self.product(x) if shared is None else shared.output(self, x)
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return self._forward_op(x, self.scheme.activation == "int8")

    def _forward_op(self, x: Tensor, quantize_activations: bool) -> Tensor:
        if self.scheme.stored_bits == 8:
            return _ops.gemm_int8(
                x, self.weight_packed, self.weight_scale, self.bias, quantize_activations, self.activation
            )
        if x.shape[-1] != self.in_features:
            _ops.check_input(x, self.in_features)
        return _ops.gemm_int4(
            x, self.weight_packed, self.weight_scale, self.weight_zero_point, self.bias,
            self.scheme.group_size, quantize_activations, self.activation,
        )  # fmt: skip

    def product(self, x: Tensor) -> Tensor:
        """The output for an x that runs_native and check_input have passed."""
        return cpu.gemm(x, self.tiles(), self._parameters["bias"], self.scheme.activation == "int8", self.activation)

    def check_device(self) -> None:
        """Raises where the CPU kernels can not read the weights: RuntimeError on meta, ValueError on another device."""
        device = self.weight_packed.device
        if device.type == "meta":
            raise RuntimeError(
                "QuantLinear: the weights are on the meta device; load a state dict with assign=True first"
            )
        if device.type != "cpu":
            raise ValueError(f"weight_packed is on {device}, x on the CPU; allowed: one device for all")

    def tiles(self) -> cpu.Packed:
        """The weight as the CPU kernels read it; made on first use."""
        known, weight = self._packed, self._buffers["weight_packed"]
        if known is not None and known[0] is weight and known[1] == version(weight):
            return known[2]
        self.check_device()
        if self.scheme.stored_bits == 8:
            packed = cpu.pack_int8(self.weight_packed, self.weight_scale)
        else:
            packed = cpu.pack_int4(
                self.weight_packed, self.weight_scale, self.weight_zero_point, self.in_features, self.scheme.group_size
            )
        self._packed = (self.weight_packed, version(self.weight_packed), packed)
        return packed

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, f32 [out_features, in_features], made anew at every access."""
        if self.scheme.stored_bits == 8:
            return reference.dequantize_int8(self.weight_packed, self.weight_scale)
        return reference.dequantize_int4(
            self.weight_packed, self.weight_scale, self.weight_zero_point, self.in_features, self.scheme.group_size
        )

    def dequantize(self) -> nn.Linear:
        """An nn.Linear in float32 with the dequantized weights. Raises ValueError where an activation is part of it."""
        if self.activation != "none":
            raise ValueError(f"dequantize: activation is {self.activation!r}; allowed: 'none', as nn.Linear has none")
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        group = f", group_size={self.scheme.group_size}" if self.scheme.weight_bits == 4 else ""
        activation = f", activation={self.activation}" if self.activation != "none" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme.name}{group}{activation}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        self._forget_tiles()
        super()._apply(keeping_dtypes(fn), recurse)
        return self

    def _forget_tiles(self) -> None:
        self._packed = None
        if self._shared is not None:
            self._shared.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_tiles()
        super()._load_from_state_dict(*args, **kwargs)
