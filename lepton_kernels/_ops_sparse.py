"""torch.ops.lepton.sparse_linear: schema, argument checks, output shape, gradient; _ops.py has the dense weights'."""

import torch
from torch import Tensor

from lepton_kernels import reference
from lepton_kernels._backends import cpu_sparse
from lepton_kernels._ops import (
    FLOAT_DTYPES,
    _check_bias,
    _check_devices,
    _library,
    _through_activation,
    check_activation,
    check_input,
)

_library.define(
    "sparse_linear(Tensor x, Tensor weight_compressed, Tensor weight_bitmask, Tensor? weight_scale, Tensor? bias, "
    "str activation='none') -> Tensor"
)


def check_sparse(
    x: Tensor, weight_compressed: Tensor, weight_bitmask: Tensor, weight_scale: Tensor | None, bias: Tensor | None
) -> None:
    """weight_compressed [nonzeros]: float, or int8 with weight_scale [n, 1]; weight_bitmask uint8 [n, ceil(k / 8)]."""
    dtypes = FLOAT_DTYPES if weight_scale is None else (torch.int8,)
    if weight_compressed.dim() != 1 or weight_compressed.dtype not in dtypes:
        allowed = "float32, bfloat16 or float16" if weight_scale is None else "int8"
        raise ValueError(
            f"weight_compressed is {weight_compressed.dtype} {tuple(weight_compressed.shape)}; "
            f"allowed: {allowed} [nonzeros], as weight_scale is {'None' if weight_scale is None else 'given'}"
        )
    if weight_bitmask.dim() != 2 or weight_bitmask.dtype is not torch.uint8:
        raise ValueError(
            f"weight_bitmask is {weight_bitmask.dtype} {tuple(weight_bitmask.shape)}; allowed: uint8 [n, ceil(k / 8)]"
        )
    _check_devices(
        x, weight_compressed=weight_compressed, weight_bitmask=weight_bitmask, weight_scale=weight_scale, bias=bias
    )
    check_input(x, x.shape[-1] if x.dim() else 0)
    n, size = weight_bitmask.shape
    if -(-x.shape[-1] // 8) != size:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: a last dimension of {8 * size - 7} to {8 * size}")
    if weight_scale is not None and tuple(weight_scale.shape) != (n, 1):
        raise ValueError(f"weight_scale has shape {tuple(weight_scale.shape)}; allowed: ({n}, 1)")
    _check_bias(bias, n)


def _cpu(x, weight_compressed, weight_bitmask, weight_scale, bias, activation="none"):  # type: ignore[no-untyped-def]
    check_sparse(x, weight_compressed, weight_bitmask, weight_scale, bias)
    check_activation(activation)
    return cpu_sparse.sparse_linear(x, weight_compressed, weight_bitmask, weight_scale, bias, activation)


def _cuda(x, weight_compressed, weight_bitmask, weight_scale, bias, activation="none"):  # type: ignore[no-untyped-def]
    raise NotImplementedError(f"sparse_linear: x is on {x.device}; allowed: the CPU (there is no GPU kernel yet)")


_library.impl("sparse_linear", _cpu, "CPU")
_library.impl("sparse_linear", _cuda, "CUDA")


@torch.library.register_fake("lepton::sparse_linear")
def _fake(x, weight_compressed, weight_bitmask, weight_scale, bias, activation="none"):  # type: ignore[no-untyped-def]
    check_sparse(x, weight_compressed, weight_bitmask, weight_scale, bias)
    check_activation(activation)
    return x.new_empty(*x.shape[:-1], weight_bitmask.shape[0])


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, compressed, bitmask, scale, bias, *rest = inputs  # a default that was not given is not among them
    ctx.activation, ctx.inputs = rest[0] if rest else "none", len(inputs)
    ctx.save_for_backward(compressed, bitmask, scale, x, bias)


# To the input as of the dense layer (activation quantization counts as the identity), and to float values.
def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    compressed, bitmask, scale, x, bias = ctx.saved_tensors
    grad = _through_activation(grad, ctx.activation, lambda: sparse_linear(x, compressed, bitmask, scale, bias))
    need_x, need_weight, _, _, need_bias, *_ = ctx.needs_input_grad
    rows, flat = grad.reshape(-1, grad.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
    grad_x = grad_weight = None
    if need_x:
        weight = reference.expand_sparse(compressed, bitmask, x.shape[-1]).float()
        weight = weight if scale is None else weight * scale
        grad_x = (rows @ weight).reshape(x.shape).to(x.dtype)
    if need_weight:
        grad_weight = (rows.T @ flat)[reference.unpack_bitmask(bitmask, x.shape[-1])].to(compressed.dtype)
    return (grad_x, grad_weight, None, None, rows.sum(0) if need_bias else None, None)[: ctx.inputs]


torch.library.register_autograd("lepton::sparse_linear", _backward, setup_context=_setup)

sparse_linear = torch.ops.lepton.sparse_linear.default
