"""Recurrent layers on CPU tensors: the native loop over time steps behind the operator `recurrent`.

Its weights are gemm_int8's tiles, with rows in blocks of 16 hidden units (csrc/cpu/recurrent.h); made on first use and
kept while the saved weights live.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lepton_kernels._backends import cpu
from lepton_kernels._backends.derived import Derived
from lepton_kernels._runtime import C
from lepton_kernels.reference_recurrent import GATES, Direction

UNIT_BLOCK = 16
_CELLS = {cell: index for index, cell in enumerate(GATES)}


class PackedDirection(NamedTuple):
    """The tiles of one direction, and the addresses a call needs."""

    tensors: tuple[object, ...]  # what the addresses point into
    addresses: tuple[int, int, int, int]  # input weight, hidden weight, their biases


_packed: Derived[PackedDirection] = Derived()


def in_blocks(rows: Tensor, gates: int) -> Tensor:
    """[gates * hidden, ...] as [ceil(hidden / 16) * gates * 16, ...]: the gates of 16 units together, padded with 0."""
    hidden, rest = rows.shape[0] // gates, rows.shape[1:]
    blocks = -(-hidden // UNIT_BLOCK)
    out = rows.new_zeros(gates, blocks * UNIT_BLOCK, *rest)
    out[:, :hidden] = rows.reshape(gates, hidden, *rest)
    return out.view(gates, blocks, UNIT_BLOCK, *rest).transpose(0, 1).reshape(-1, *rest)


def pack(cell: str, direction: Direction) -> PackedDirection:
    """The tiles of a direction; made once, then found again."""

    def make() -> PackedDirection:
        w, gates = direction, GATES[cell]
        tiles = [
            cpu.pack_int8(in_blocks(weight.detach(), gates), in_blocks(scale.detach().to(torch.float32), gates))
            for weight, scale in ((w.weight_ih, w.scale_ih), (w.weight_hh, w.scale_hh))
        ]
        biases = [
            None if bias is None else in_blocks(bias.detach().to(torch.float32), gates)
            for bias in (w.bias_ih, w.bias_hh)
        ]
        addresses = (
            *(tile.address for tile in tiles),
            *(0 if bias is None else bias.data_ptr() for bias in biases),
        )
        return PackedDirection((*tiles, *biases), addresses)  # type: ignore[arg-type]

    return _packed.get(tuple(t for t in direction if t is not None), (_CELLS[cell],), make)


def run_layer(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    steps: int,
    batch: int,
    states: tuple[Tensor, ...],
    ends: tuple[Tensor, ...],
    first: int,
    directions: list[PackedDirection],
    hidden: int,
    batch_first: bool,
) -> Tensor:
    """y of one layer; h_n, and c_n, are written to the rows from `first` on of `ends` [all, batch, hidden].

    states: h0, and c0, of which it reads the same rows; contiguous. Or nothing, for zeros.
    """
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], len(directions) * hidden)
    row_bytes = 4 * batch * hidden
    h0, c0 = (0 if state is None else state.data_ptr() for state in (*states, None, None)[:2])
    h_n, c_n = (0 if end is None else end.data_ptr() for end in (*ends, None)[:2])
    calls = []
    for d, packed in enumerate(directions, first):
        at = d * row_bytes
        calls.append((*packed.addresses, h0 and h0 + at, c0 and c0 + at, h_n + at, c_n and c_n + at))
    C.recurrent(
        _CELLS[cell], x.data_ptr(), steps, batch, batch_first, 0 if batch_sizes is None else batch_sizes.data_ptr(),
        x.shape[-1], hidden, calls, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y
