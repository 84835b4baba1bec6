"""Recurrent layers and cells that train: their weights are TrainLinear, their values those of the native kernel.

The forward pass is the kernel's, run with the rounded masters, so training and inference give the same bits: float sums
would send a hidden state to the other side of a rounding boundary now and then, and drift away step by step. The
gradient is that of the float cell at the kernel's hidden states, and passes the rounding of weights, inputs and states
as if it were not there. Its loop over time steps is in Python; the inputs' product and the rounding of states are
outside it.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lepton_ai.training.grid import rounded_rows, straight_through
from lepton_ai.training.layers import TrainLinear
from lepton_kernels.nn import QuantGRU, QuantGRUCell, QuantLinear, QuantLSTM, QuantLSTMCell, QuantRNNCell
from lepton_kernels.nn.quant_recurrent import Recurrent

States = tuple[Tensor, ...]  # h, and c of an LSTM


def _step(cell: str, x: Tensor, hidden: Tensor, states: States) -> States:
    """The new states [rows, hidden] from x W_i^T + b_i, h W_h^T + b_h [rows, gates * hidden] and the old ones."""
    if cell == "lstm":
        i, f, g, o = (x + hidden).chunk(4, 1)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), hidden.chunk(3, 1)
        candidate = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return (candidate + (x_z + h_z).sigmoid() * (states[0] - candidate),)
    return ((x + hidden).relu() if cell == "rnn_relu" else (x + hidden).tanh(),)


def _first(state: Tensor, rows: int) -> Tensor:
    return state if len(state) == rows else state[:rows]


def _replaced(state: Tensor, new: Tensor) -> Tensor:
    """`state` with `new` as its first rows: sequences of a packed batch that have ended, or not begun, keep theirs."""
    return new if len(new) == len(state) else torch.cat([new, state[len(new) :]])


class TrainRecurrent(Recurrent):
    """What the training forms share: the layer's class comes after it among the bases."""

    def _linear(self, name: str) -> QuantLinear:
        return cast(QuantLinear, self._master(name).compressed())

    def _master(self, name: str) -> TrainLinear:
        return cast(TrainLinear, self._modules[name])

    def _is_plain(self, x: Tensor, states: States) -> bool:
        return False

    def _run_op(
        self,
        suffixes: list[str],
        x: Tensor,
        batch_sizes: Tensor | None,
        batch: int,
        states: States,
        batch_first: bool,
    ) -> tuple[Tensor, States]:
        with torch.no_grad():
            y, ends = super()._run_op(suffixes, x, batch_sizes, batch, states, batch_first)
        if not torch.is_grad_enabled():
            return y, ends

        def steps_of(rows: Tensor) -> list[Tensor]:
            if batch_sizes is not None:
                return list(rows.split(batch_sizes.tolist()))
            return list(rows.unbind(1 if batch_first else 0))

        states = states or tuple(torch.zeros_like(end) for end in ends)
        outputs, lasts = [], []
        with torch.autocast(x.device.type, enabled=False):
            for d, (suffix, values) in enumerate(zip(suffixes, y.split(self.hidden_size, -1), strict=True)):
                from_x = steps_of(self._master("ih" + suffix)(x))
                starts = tuple(state[d] for state in states)
                out, last = self._unrolled(suffix, from_x, steps_of(values), steps_of(rounded_rows(values)), starts)
                lasts.append(tuple(straight_through(state, end[d]) for state, end in zip(last, ends, strict=True)))
                outputs.append(torch.cat(out) if batch_sizes is not None else torch.stack(out, 1 if batch_first else 0))
        return torch.cat(outputs, -1), tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))

    def _unrolled(
        self, suffix: str, from_x: list[Tensor], values: list[Tensor], rounded: list[Tensor], states: States
    ) -> tuple[list[Tensor], States]:
        """(h of each step, the last states) of one direction.

        from_x: each step's x W_i^T + b_i; values: its h, of the kernel; rounded: that h as the next product sees it.
        """
        layer = self._master("hh" + suffix)
        weight, old = layer.rounded_weight(), rounded_rows(states[0])
        out = list(values)
        for t in range(len(values))[:: -1 if suffix.endswith("_reverse") else 1]:
            rows = len(values[t])
            before = tuple(_first(state, rows) for state in states)
            hidden = functional.linear(straight_through(before[0], _first(old, rows)), weight, layer.bias)
            h, *rest = _step(self._kernel_cell, from_x[t], hidden, before)
            out[t] = straight_through(h, values[t])
            states = tuple(_replaced(*pair) for pair in zip(states, (out[t], *rest), strict=True))
            old = _replaced(old, rounded[t])
        return out, states

    def compressed(self) -> nn.Module:
        """This module itself, of the class that it had; its weights are compressed by themselves."""
        self.__class__ = _PLAIN[type(self)]  # type: ignore[assignment]
        return self


class TrainLSTM(TrainRecurrent, QuantLSTM):
    """A QuantLSTM that trains."""


class TrainGRU(TrainRecurrent, QuantGRU):
    """A QuantGRU that trains."""


class TrainLSTMCell(TrainRecurrent, QuantLSTMCell):
    """A QuantLSTMCell that trains."""


class TrainGRUCell(TrainRecurrent, QuantGRUCell):
    """A QuantGRUCell that trains."""


class TrainRNNCell(TrainRecurrent, QuantRNNCell):
    """A QuantRNNCell that trains."""


# Exact types: a subclass may compute something else.
_PLAIN: dict[type, type[Recurrent]] = {
    TrainLSTM: QuantLSTM,
    TrainGRU: QuantGRU,
    TrainLSTMCell: QuantLSTMCell,
    TrainGRUCell: QuantGRUCell,
    TrainRNNCell: QuantRNNCell,
}
TRAINABLE: dict[type, Any] = {plain: form for form, plain in _PLAIN.items()}


def train_recurrent_(layer: nn.Module) -> nn.Module:
    """The layer itself, of its class in TRAINABLE; its weights become TrainLinear by themselves (train_form_)."""
    layer._packed = {}  # type: ignore[assignment]  # tiles of weights that are gone
    layer.__class__ = TRAINABLE[type(layer)]
    return layer
