"""Recurrent layers with int8 weights on a native kernel: QuantLSTM, QuantGRU, and the cells.

Weights are int8 with a scale per output channel, activations and hidden states uint8 with a scale and zero point a row
(w8a8); the cell state, sigmoid and tanh are float32. Each weight is a QuantLinear, `ih_l0`, `hh_l0`, `ih_l0_reverse`,
..., so state_dict has `ih_l0.weight_packed`, `ih_l0.weight_scale`, `ih_l0.bias` and so on. CPU only; backward raises
RuntimeError (what trains is their training form, lepton_ai.training). bfloat16 and float16 inputs are computed in
float32; results have the input's dtype.
"""

from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from lepton_kernels import _ops, _ops_recurrent
from lepton_kernels._backends import cpu_recurrent
from lepton_kernels._backends.derived import version
from lepton_kernels.nn.quant_linear import QuantLinear
from lepton_kernels.reference_recurrent import GATES, Direction


def _quantize(weight: Tensor, bias: Tensor | None) -> QuantLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return QuantLinear.from_linear(linear, "w8a8")


def _dequantize(layer: QuantLinear) -> tuple[Tensor, ...]:
    return (layer.weight,) if layer.bias is None else (layer.weight, layer.bias.detach().clone())


class _Known(NamedTuple):
    """Tiles, and what they were made from: the two layers, and each of their tensors with its place and version."""

    packed: cpu_recurrent.PackedDirection
    ih: QuantLinear
    hh: QuantLinear
    tensors: list[tuple[dict[str, Any], str, Tensor | None, int]]


class Recurrent(nn.Module):
    """What layers and cells share: weights as pairs of QuantLinear, checks, and the way to the kernel.

    A training form has layers of another class in their place: it overrides _linear, _is_plain and _run_op.
    """

    _kernel_cell: str

    def __init__(self, input_size: int, hidden_size: int, bias: bool) -> None:
        super().__init__()
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} is {value}; allowed: 1 or more")
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self._packed: dict[str, _Known] = {}

    def _add(self, suffix: str, input_size: int, device: Any) -> None:
        rows = GATES[self._kernel_cell] * self.hidden_size
        for name, columns in (("ih", input_size), ("hh", self.hidden_size)):
            self.add_module(name + suffix, QuantLinear(columns, rows, self.bias, "w8a8", device))

    def _quantize_from(self, suffix: str, source: nn.Module) -> None:
        for name in ("ih", "hh"):
            weight, bias = getattr(source, f"weight_{name}{suffix}"), getattr(source, f"bias_{name}{suffix}", None)
            self.add_module(name + suffix, _quantize(weight, bias if self.bias else None))

    def _dequantize_to(self, suffix: str, target: nn.Module) -> None:
        for name in ("ih", "hh"):
            for kind, value in zip(("weight", "bias"), _dequantize(self._linear(name + suffix)), strict=False):
                setattr(target, f"{kind}_{name}{suffix}", nn.Parameter(value))

    def _linear(self, name: str) -> QuantLinear:
        """The layer of that name, as it is compressed."""
        return cast(QuantLinear, self._modules[name])

    def _direction(self, suffix: str) -> Direction:
        ih, hh = self._linear("ih" + suffix), self._linear("hh" + suffix)
        return Direction(ih.weight_packed, ih.weight_scale, hh.weight_packed, hh.weight_scale, ih.bias, hh.bias)

    def _tiles(self, suffix: str) -> cpu_recurrent.PackedDirection:
        # Straight from the modules' dictionaries: attribute access would cost more than a short step.
        known = self._packed.get(suffix)
        modules: dict[str, Any] = self._modules
        ih, hh = modules["ih" + suffix], modules["hh" + suffix]
        if known is not None and known.ih is ih and known.hh is hh:
            for place, name, tensor, seen in known.tensors:
                if place.get(name) is not tensor or (tensor is not None and version(tensor) != seen):
                    break
            else:
                return known.packed
        direction = self._direction(suffix)
        if direction.weight_ih.is_meta:
            raise RuntimeError(
                f"{type(self).__name__}: the weights are on the meta device; load a state dict with assign=True first"
            )
        packed = cpu_recurrent.pack(self._kernel_cell, direction)
        tensors: list[tuple[dict[str, Any], str, Tensor | None, int]] = []
        for layer in (ih, hh):
            for place, name in (
                (layer._buffers, "weight_packed"), (layer._buffers, "weight_scale"), (layer._parameters, "bias"),
            ):  # fmt: skip
                tensor = place.get(name)
                tensors.append((place, name, tensor, 0 if tensor is None else version(tensor)))
        self._packed[suffix] = _Known(packed, ih, hh, tensors)
        return packed

    def _is_plain(self, x: Tensor, states: tuple[Tensor, ...]) -> bool:
        """Whether the kernel may be called directly; else the operator is, which torch sees."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) is not Tensor:
            return False
        return not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *states, *self.parameters()))

    def _check_input(self, x: Tensor, dims: tuple[int, int], shapes: str) -> None:
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: input is {type(x).__name__}; allowed: a tensor")
        if x.dtype not in _ops.FLOAT_DTYPES:
            raise ValueError(f"{name}: input has dtype {x.dtype}; allowed: float32, bfloat16, float16")
        if x.dim() not in dims or x.shape[-1] != self.input_size:
            raise ValueError(f"{name}: input has shape {tuple(x.shape)}; allowed: {shapes}")
        if x.device.type not in ("cpu", "meta"):
            raise ValueError(f"{name}: input is on {x.device}; allowed: cpu (recurrent layers have no GPU kernel)")

    def _check_state(self, name: str, state: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
        if not isinstance(state, Tensor):
            raise TypeError(f"{type(self).__name__}: {name} is {type(state).__name__}; allowed: a tensor")
        if tuple(state.shape) != shape or state.dtype != x.dtype or state.device != x.device:
            raise ValueError(
                f"{type(self).__name__}: {name} is {state.dtype} {tuple(state.shape)} on {state.device}; "
                f"allowed: {x.dtype} {shape} on {x.device}"
            )

    def _run_op(
        self,
        suffixes: list[str],
        x: Tensor,
        batch_sizes: Tensor | None,
        batch: int,
        states: tuple[Tensor, ...],
        batch_first: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y and the last states of one layer, by the operator; the states are [directions, batch, hidden]."""
        lstm = self._kernel_cell == "lstm"
        zeros = x.new_zeros(len(suffixes), batch, self.hidden_size)
        h0, c0 = states if len(states) == 2 else (*states, zeros) if states else (zeros, zeros)
        weights = [t for suffix in suffixes for t in self._direction(suffix) if t is not None]
        y, *ends = _ops_recurrent.recurrent(
            self._kernel_cell, x, batch_sizes, h0, c0 if lstm else None, weights, self.bias, batch_first
        )
        return y, tuple(ends[: 2 if lstm else 1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}


class _RecurrentLayers(Recurrent):
    """QuantLSTM and QuantGRU but for their states."""

    _float_type: ClassVar[Any]
    _kernel_states: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias)
        if num_layers < 1:
            raise ValueError(f"{type(self).__name__}: num_layers is {num_layers}; allowed: 1 or more")
        if not 0 <= dropout <= 1:
            raise ValueError(f"{type(self).__name__}: dropout is {dropout}; allowed: 0 to 1")
        self.num_layers, self.batch_first, self.dropout = num_layers, batch_first, float(dropout)
        self.bidirectional = bidirectional
        directions = 2 if bidirectional else 1
        self._suffix_table = [self._suffixes(layer) for layer in range(num_layers)]
        for layer in range(num_layers):
            for suffix in self._suffixes(layer):
                self._add(suffix, input_size if layer == 0 else directions * hidden_size, device)

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"] if self.bidirectional else [f"_l{layer}"]

    @classmethod
    def empty_like(cls, module: Any, device: torch.device | str | None = None) -> Any:
        """One with the sizes and options of `module` (torch's or ours) and no weights yet.

        Raises ValueError when it projects its hidden state (proj_size).
        """
        if getattr(module, "proj_size", 0):
            raise ValueError(f"{cls.__name__}: proj_size is {module.proj_size}; allowed: 0")
        return cls(
            module.input_size, module.hidden_size, module.num_layers, module.bias, module.batch_first,
            module.dropout, module.bidirectional, device=device,
        ).train(module.training)  # fmt: skip

    @classmethod
    def _from_float(cls, module: nn.RNNBase) -> Any:
        if type(module) is not cls._float_type:
            raise TypeError(f"{cls.__name__}: got {type(module).__name__}; allowed: nn.{cls._float_type.__name__}")
        layers = cls.empty_like(module, device="meta")
        for layer in range(layers.num_layers):
            for suffix in layers._suffixes(layer):
                layers._quantize_from(suffix, module)
        return layers.train(module.training)

    def dequantize(self) -> Any:
        """torch's layer in float32 with the dequantized weights."""
        module = self._float_type(
            self.input_size, self.hidden_size, self.num_layers, self.bias, self.batch_first, self.dropout,
            self.bidirectional, device="meta",
        )  # fmt: skip
        for layer in range(self.num_layers):
            for suffix in self._suffixes(layer):
                self._dequantize_to(suffix, module)
        return module.train(self.training)

    def flatten_parameters(self) -> None:
        """Nothing: for models that call it on torch's layer."""

    def _forward(self, x: Any, hx: tuple[Tensor, ...] | None) -> tuple[Any, tuple[Tensor, ...]]:
        packed = x if isinstance(x, PackedSequence) else None
        batch_sizes = None
        if packed is not None:
            x, batch_sizes = packed.data, packed.batch_sizes
            self._check_input(x, (2, 2), f"[rows, {self.input_size}] in a PackedSequence")
            _ops_recurrent.check_batch_sizes(batch_sizes, x.shape[0])  # a PackedSequence may be made by hand
            batched, batch_first, batch, steps = True, False, int(batch_sizes[0]), batch_sizes.shape[0]
        else:
            self._check_input(
                x, (2, 3), f"[{'batch, steps' if self.batch_first else 'steps, batch'}, {self.input_size}] or "
                f"[steps, {self.input_size}]",
            )  # fmt: skip
            batched = x.dim() == 3
            batch_first = self.batch_first and batched
            x = x if batched else x.unsqueeze(1)
            batch, steps = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        if steps == 0:
            raise ValueError(f"{type(self).__name__}: input has no time step; allowed: one or more")
        dtype, directions = x.dtype, 2 if self.bidirectional else 1
        states: list[Tensor] = []
        if hx is not None:
            shape = (directions * self.num_layers, *([batch] if batched else []), self.hidden_size)
            for name, state in zip(("h_0", "c_0"), hx, strict=False):
                self._check_state(name, state, x, shape)
                state = state if batched else state.unsqueeze(1)
                if packed is not None and packed.sorted_indices is not None:
                    state = state.index_select(1, packed.sorted_indices)
                states.append(state if dtype is torch.float32 else state.to(torch.float32))

        y = x if dtype is torch.float32 else x.to(torch.float32)
        plain, ends = self._is_plain(x, tuple(states)), []
        starts = tuple(state.contiguous() for state in states)
        rows = directions * self.num_layers
        if plain:
            last = tuple(y.new_empty(rows, batch, self.hidden_size) for _ in range(self._kernel_states))
        for layer in range(self.num_layers):
            suffixes, first = self._suffix_table[layer], layer * directions
            if plain:
                y = cpu_recurrent.run_layer(
                    self._kernel_cell, y, batch_sizes, steps, batch, starts, last, first,
                    [self._tiles(suffix) for suffix in suffixes], self.hidden_size, batch_first,
                )  # fmt: skip
            else:
                part = tuple(state[first : first + directions] for state in states)
                y, end = self._run_op(suffixes, y, batch_sizes, batch, part, batch_first)
                ends.append(end)
            if self.dropout and self.training and layer < self.num_layers - 1:
                y = functional.dropout(y, self.dropout, training=True)
        if not plain:
            last = tuple(torch.cat(layers) for layers in zip(*ends, strict=True))

        if packed is not None and packed.unsorted_indices is not None:
            last = tuple(state.index_select(1, packed.unsorted_indices) for state in last)
        if not batched:
            y, last = y.squeeze(1), tuple(state.squeeze(1) for state in last)
        if dtype is not torch.float32:
            y, last = y.to(dtype), tuple(state.to(dtype) for state in last)
        if packed is None:
            return y, last
        return PackedSequence(y, batch_sizes, packed.sorted_indices, packed.unsorted_indices), last

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        for name, default in (
            ("num_layers", 1), ("bias", True), ("batch_first", False), ("dropout", 0.0), ("bidirectional", False),
        ):  # fmt: skip
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, scheme=w8a8"


class QuantLSTM(_RecurrentLayers):
    """A drop-in for nn.LSTM without projections; see from_lstm. Built empty, it waits for load_state_dict."""

    _kernel_cell, _kernel_states, _float_type = "lstm", 2, nn.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if proj_size:
            raise ValueError(f"QuantLSTM: proj_size is {proj_size}; allowed: 0")
        self.proj_size = 0
        super().__init__(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device)

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM) -> "QuantLSTM":
        """The quantized copy of an LSTM, which is not changed.

        Raises ValueError for proj_size and for NaN or infinite weights, TypeError for anything but nn.LSTM.
        """
        return cls._from_float(lstm)

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """(output, (h_n, c_n)) as nn.LSTM gives them: output [steps, batch, directions * hidden_size] (batch first,
        unbatched or packed where the input is), the states [num_layers * directions, batch, hidden_size].

        input: float32, bfloat16 or float16 [steps, batch, input_size], [steps, input_size] or a PackedSequence.
        hx: (h_0, c_0) in the input's dtype, or None for zeros. Raises ValueError for another shape, dtype or device.
        """
        if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            raise TypeError(f"QuantLSTM: hx is {type(hx).__name__}; allowed: (h_0, c_0) or None")
        output, (h_n, c_n) = self._forward(input, None if hx is None else tuple(hx))
        return output, (h_n, c_n)


class QuantGRU(_RecurrentLayers):
    """A drop-in for nn.GRU; see from_gru. Built empty, it waits for load_state_dict."""

    _kernel_cell, _kernel_states, _float_type = "gru", 1, nn.GRU

    @classmethod
    def from_gru(cls, gru: nn.GRU) -> "QuantGRU":
        """The quantized copy of a GRU, which is not changed.

        Raises ValueError for NaN or infinite weights, TypeError for anything but nn.GRU.
        """
        return cls._from_float(gru)

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        """(output, h_n) as nn.GRU gives them; see QuantLSTM.forward for shapes, dtypes and errors."""
        output, (h_n,) = self._forward(input, None if hx is None else (hx,))
        return output, h_n


class _RecurrentCell(Recurrent):
    """The cells: one step, one direction."""

    _float_type: ClassVar[type[nn.RNNCellBase]]

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: torch.device | str | None = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias)
        self._add("", input_size, device)

    @classmethod
    def empty_like(cls, module: Any, device: torch.device | str | None = None) -> Any:
        """One with the sizes of `module` (torch's or ours) and no weights yet."""
        return cls(module.input_size, module.hidden_size, module.bias, device=device).train(module.training)

    @classmethod
    def from_cell(cls, cell: Any) -> Any:
        """The quantized copy of torch's cell, which is not changed.

        Raises ValueError for NaN or infinite weights, TypeError for another type.
        """
        if type(cell) is not cls._float_type:
            raise TypeError(f"{cls.__name__}: got {type(cell).__name__}; allowed: nn.{cls._float_type.__name__}")
        new = cls.empty_like(cell, device="meta")
        new._quantize_from("", cell)
        return new.train(cell.training)

    def dequantize(self) -> Any:
        """torch's cell in float32 with the dequantized weights."""
        cell = self._float_type(self.input_size, self.hidden_size, self.bias, **self._options(), device="meta")
        self._dequantize_to("", cell)
        return cell.train(self.training)

    def _options(self) -> dict[str, Any]:
        return {}

    def _forward(self, x: Tensor, hx: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        self._check_input(x, (1, 2), f"[batch, {self.input_size}] or [{self.input_size}]")
        rows = (x if x.dim() == 2 else x.unsqueeze(0)).to(torch.float32)
        states: tuple[Tensor, ...] = ()
        if hx is not None:
            for name, state in zip(("h", "c"), hx, strict=False):
                self._check_state(name, state, x, (*x.shape[:-1], self.hidden_size))
            shape = (1, rows.shape[0], self.hidden_size)
            states = tuple(state.to(torch.float32).reshape(shape).contiguous() for state in hx)
        if self._is_plain(x, states):
            count = 2 if self._kernel_cell == "lstm" else 1
            ends = tuple(rows.new_empty(1, rows.shape[0], self.hidden_size) for _ in range(count))
            cpu_recurrent.run_layer(
                self._kernel_cell, rows.unsqueeze(0), None, 1, rows.shape[0], states, ends, 0, [self._tiles("")],
                self.hidden_size, False,
            )  # fmt: skip
        else:
            _, ends = self._run_op([""], rows.unsqueeze(0), None, rows.shape[0], states, False)
        return tuple(state.view(*x.shape[:-1], self.hidden_size).to(x.dtype) for state in ends)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}{'' if self.bias else ', bias=False'}, scheme=w8a8"


class QuantLSTMCell(_RecurrentCell):
    """A drop-in for nn.LSTMCell; see from_cell."""

    _kernel_cell, _float_type = "lstm", nn.LSTMCell

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(h, c) [batch, hidden_size] from input [batch, input_size] and hx (h, c), or all without the batch.

        Dtypes: float32, bfloat16, float16, one for all. Raises ValueError for another shape, dtype or device.
        """
        if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            raise TypeError(f"QuantLSTMCell: hx is {type(hx).__name__}; allowed: (h, c) or None")
        h, c = self._forward(input, None if hx is None else tuple(hx))
        return h, c


class QuantGRUCell(_RecurrentCell):
    """A drop-in for nn.GRUCell; see from_cell."""

    _kernel_cell, _float_type = "gru", nn.GRUCell

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h [batch, hidden_size] from input [batch, input_size] and the h before; see QuantLSTMCell.forward."""
        return self._forward(input, None if hx is None else (hx,))[0]


class QuantRNNCell(_RecurrentCell):
    """A drop-in for nn.RNNCell; see from_cell."""

    _float_type = nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: torch.device | str | None = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"QuantRNNCell: nonlinearity is {nonlinearity!r}; allowed: 'tanh', 'relu'")
        self.nonlinearity, self._kernel_cell = nonlinearity, f"rnn_{nonlinearity}"
        super().__init__(input_size, hidden_size, bias, device)

    @classmethod
    def empty_like(cls, module: Any, device: torch.device | str | None = None) -> Any:
        """One with the sizes and nonlinearity of `module` (torch's or ours) and no weights yet."""
        new = cls(module.input_size, module.hidden_size, module.bias, module.nonlinearity, device)
        return new.train(module.training)

    def _options(self) -> dict[str, Any]:
        return {"nonlinearity": self.nonlinearity}

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h [batch, hidden_size] from input [batch, input_size] and the h before; see QuantLSTMCell.forward."""
        return self._forward(input, None if hx is None else (hx,))[0]


# What replaces torch's layers, exact types: a subclass may compute something else.
REPLACEMENTS: dict[type[nn.Module], Any] = {
    nn.LSTM: QuantLSTM, nn.GRU: QuantGRU, nn.LSTMCell: QuantLSTMCell, nn.GRUCell: QuantGRUCell,
    nn.RNNCell: QuantRNNCell,
}  # fmt: skip


def from_float(module: nn.Module) -> nn.Module:
    """The quantized copy of a layer or cell whose exact type is in REPLACEMENTS."""
    kind = REPLACEMENTS[type(module)]
    return kind._from_float(module) if issubclass(kind, _RecurrentLayers) else kind.from_cell(module)
