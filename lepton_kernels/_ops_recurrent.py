"""The torch operator of recurrent layers, `torch.ops.lepton.recurrent`: schema, argument checks, output shapes.

One layer of an LSTM, a GRU or a plain RNN, one or both directions. reference_recurrent.py says what it computes. It has
no gradient: backward through it raises RuntimeError.
"""

import itertools
from typing import NoReturn

import torch
from torch import Tensor

from lepton_kernels._backends import cpu_recurrent
from lepton_kernels.reference_recurrent import GATES, directions_of

_library = torch.library.Library("lepton", "FRAGMENT")
_library.define(
    "recurrent(str cell, Tensor x, Tensor? batch_sizes, Tensor h0, Tensor? c0, Tensor[] weights, bool has_bias, "
    "bool batch_first) -> (Tensor, Tensor, Tensor)"
)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def check_recurrent(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    weights: list[Tensor],
    has_bias: bool,
    batch_first: bool,
) -> None:
    """x f32, h0 and c0 f32 [directions, batch, hidden], weights as directions_of reads them, all on the CPU."""
    _check(cell in GATES, f"cell is {cell!r}; allowed: {', '.join(GATES)}")
    width = 6 if has_bias else 4
    _check(len(weights) in (width, 2 * width), f"weights holds {len(weights)} tensors; allowed: {width} or {2 * width}")
    dims = 3 if batch_sizes is None else 2
    _check(x.dtype is torch.float32 and x.dim() == dims, f"x is {x.dtype} {tuple(x.shape)}; allowed: float32, {dims}-D")
    _check(batch_sizes is None or not batch_first, "batch_first is True with batch_sizes; allowed: False")
    directions = directions_of(weights, has_bias)
    n, k = directions[0].weight_ih.shape
    hidden = directions[0].weight_hh.shape[1]
    _check(x.shape[-1] == k, f"x has shape {tuple(x.shape)}; allowed: a last dimension of {k}")
    _check(n == GATES[cell] * hidden, f"weight_ih has {n} rows; allowed: {GATES[cell] * hidden}")
    for w in directions:
        for tensor, dtype, shape in (
            (w.weight_ih, torch.int8, (n, k)), (w.scale_ih, torch.float32, (n, 1)),
            (w.weight_hh, torch.int8, (n, hidden)), (w.scale_hh, torch.float32, (n, 1)),
            (w.bias_ih, torch.float32, (n,)), (w.bias_hh, torch.float32, (n,)),
        ):  # fmt: skip
            _check(
                tensor is None or (tensor.dtype is dtype and tuple(tensor.shape) == shape),
                f"weights holds a {tensor is not None and (tensor.dtype, tuple(tensor.shape))}; "
                f"allowed here: {dtype} {shape}",
            )
    if batch_sizes is None:
        batch = x.shape[0 if batch_first else 1]
        _check(x.shape[1 if batch_first else 0] > 0, f"x has shape {tuple(x.shape)}; allowed: one time step or more")
    else:
        batch = h0.shape[1] if h0.dim() == 3 else 0
    _check((c0 is not None) == (cell == "lstm"), f"c0 is {'' if c0 is None else 'not '}None with cell {cell!r}")
    for name, state in (("h0", h0), ("c0", c0)):
        _check(
            state is None or (state.dtype is torch.float32 and tuple(state.shape) == (len(directions), batch, hidden)),
            f"{name} is {state is not None and (state.dtype, tuple(state.shape))}; "
            f"allowed: float32 {(len(directions), batch, hidden)}",
        )


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """int64 on the CPU, contiguous, positive, not rising, `rows` in all: what the native loop trusts."""
    _check(
        batch_sizes.dtype is torch.int64 and batch_sizes.dim() == 1 and batch_sizes.device.type == "cpu"
        and batch_sizes.is_contiguous(),
        f"batch_sizes is {batch_sizes.dtype} {tuple(batch_sizes.shape)} on {batch_sizes.device}; "
        "allowed: int64 [steps], contiguous, on the CPU",
    )  # fmt: skip
    sizes = batch_sizes.tolist()
    _check(
        bool(sizes) and sizes[-1] > 0 and all(a >= b for a, b in itertools.pairwise(sizes))
        and sum(sizes) == rows,
        f"batch_sizes is {sizes[:8]}{'...' if len(sizes) > 8 else ''}; allowed: positive, not rising, {rows} in all",
    )  # fmt: skip


def _recurrent_cpu(cell, x, batch_sizes, h0, c0, weights, has_bias, batch_first):  # type: ignore[no-untyped-def]
    check_recurrent(cell, x, batch_sizes, h0, c0, weights, has_bias, batch_first)
    if batch_sizes is not None:
        check_batch_sizes(batch_sizes, x.shape[0])
        _check(
            int(batch_sizes[0]) == h0.shape[1], f"h0 has shape {tuple(h0.shape)}; allowed: {int(batch_sizes[0])} rows"
        )
    directions = directions_of(weights, has_bias)
    packed = [cpu_recurrent.pack(cell, direction) for direction in directions]
    hidden = directions[0].weight_hh.shape[1]
    batch, steps = h0.shape[1], x.shape[1 if batch_first else 0] if batch_sizes is None else batch_sizes.shape[0]
    states = tuple(state.contiguous() for state in (h0, c0) if state is not None)
    ends = tuple(torch.empty_like(state) for state in states)
    y = cpu_recurrent.run_layer(cell, x, batch_sizes, steps, batch, states, ends, 0, packed, hidden, batch_first)
    return y, ends[0], ends[1] if c0 is not None else x.new_empty(0)


_library.impl("recurrent", _recurrent_cpu, "CPU")


@torch.library.register_fake("lepton::recurrent")
def _recurrent_fake(cell, x, batch_sizes, h0, c0, weights, has_bias, batch_first):  # type: ignore[no-untyped-def]
    check_recurrent(cell, x, batch_sizes, h0, c0, weights, has_bias, batch_first)
    y = x.new_empty(*x.shape[:-1], h0.shape[0] * h0.shape[2])
    return y, x.new_empty(h0.shape), x.new_empty(h0.shape if cell == "lstm" else 0)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.cell = inputs[0]


def _backward(ctx, *grads) -> NoReturn:  # type: ignore[no-untyped-def]
    raise RuntimeError(
        f"a quantized recurrent layer ({ctx.cell}) has no gradient; allowed: forward alone (torch.no_grad(), or detach)"
    )


torch.library.register_autograd("lepton::recurrent", _backward, setup_context=_setup)

recurrent = torch.ops.lepton.recurrent.default
