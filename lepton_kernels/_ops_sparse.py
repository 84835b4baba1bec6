"""torch.ops.lepton.sparse_linear: schema, argument checks, output shape, gradient; _ops.py has the dense weights'."""

import torch
from torch import Tensor

from lepton_kernels import reference
from lepton_kernels._backends import cpu_sparse
from lepton_kernels._ops import (
    FLOAT_DTYPES,
    _check_bias,
    _check_devices,
    _check_groups,
    _library,
    _through_activation,
    check_activation,
    check_input,
)

_library.define(
    "sparse_linear(Tensor x, Tensor weight_compressed, Tensor weight_bitmask, Tensor? weight_scale, Tensor? bias, "
    "str activation='none', Tensor? weight_zero_point=None, int group_size=-1) -> Tensor"
)


def check_sparse(
    x: Tensor,
    weight_compressed: Tensor,
    weight_bitmask: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    weight_zero_point: Tensor | None,
    group_size: int,
) -> None:
    """weight_compressed [nonzeros]: float, or int8 with weight_scale [n, 1]; weight_bitmask uint8 [n, ceil(k / 8)].

    Or two 4-bit values a byte, uint8 [ceil(nonzeros / 2)], with weight_scale [n, groups] and weight_zero_point int8
    [n, groups] or None.
    """
    dtypes = FLOAT_DTYPES if weight_scale is None else (torch.int8, torch.uint8)
    if weight_compressed.dim() != 1 or weight_compressed.dtype not in dtypes:
        allowed = "float32, bfloat16 or float16 [nonzeros]"
        if weight_scale is not None:
            allowed = "int8 [nonzeros] or uint8 [ceil(nonzeros / 2)]"
        raise ValueError(
            f"weight_compressed is {weight_compressed.dtype} {tuple(weight_compressed.shape)}; "
            f"allowed: {allowed}, as weight_scale is {'None' if weight_scale is None else 'given'}"
        )
    if weight_bitmask.dim() != 2 or weight_bitmask.dtype is not torch.uint8:
        raise ValueError(
            f"weight_bitmask is {weight_bitmask.dtype} {tuple(weight_bitmask.shape)}; allowed: uint8 [n, ceil(k / 8)]"
        )
    _check_devices(
        x, weight_compressed=weight_compressed, weight_bitmask=weight_bitmask, weight_scale=weight_scale,
        weight_zero_point=weight_zero_point, bias=bias,
    )  # fmt: skip
    check_input(x, x.shape[-1] if x.dim() else 0)
    n, size = weight_bitmask.shape
    if -(-x.shape[-1] // 8) != size:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: a last dimension of {8 * size - 7} to {8 * size}")
    if weight_compressed.dtype is not torch.uint8 and (weight_zero_point is not None or group_size != -1):
        given = "given" if weight_zero_point is not None else "None"
        raise ValueError(
            f"weight_zero_point is {given}, group_size {group_size}; allowed: None and -1, as weight_compressed is "
            f"{weight_compressed.dtype}"
        )
    if weight_scale is not None:
        _check_groups(weight_scale, weight_zero_point, n, x.shape[-1], group_size)
    _check_bias(bias, n)
    check_activation(activation)


def _cpu(  # type: ignore[no-untyped-def]
    x, weight_compressed, weight_bitmask, weight_scale, bias, activation="none", weight_zero_point=None, group_size=-1
):
    operands = weight_compressed, weight_bitmask, weight_scale, bias, activation, weight_zero_point, group_size
    check_sparse(x, *operands)
    return cpu_sparse.sparse_linear(x, *operands)


def _cuda(x, *operands):  # type: ignore[no-untyped-def]
    raise NotImplementedError(f"sparse_linear: x is on {x.device}; allowed: the CPU (there is no GPU kernel yet)")


_library.impl("sparse_linear", _cpu, "CPU")
_library.impl("sparse_linear", _cuda, "CUDA")


@torch.library.register_fake("lepton::sparse_linear")
def _fake(  # type: ignore[no-untyped-def]
    x, weight_compressed, weight_bitmask, weight_scale, bias, activation="none", weight_zero_point=None, group_size=-1
):
    check_sparse(x, weight_compressed, weight_bitmask, weight_scale, bias, activation, weight_zero_point, group_size)
    return x.new_empty(*x.shape[:-1], weight_bitmask.shape[0])


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, compressed, bitmask, scale, bias, *rest = inputs  # a default that was not given is not among them
    ctx.activation, zero_point, ctx.group_size = rest + ["none", None, -1][len(rest) :]
    ctx.inputs = len(inputs)
    ctx.save_for_backward(compressed, bitmask, scale, zero_point, x, bias)


# To the input as of the dense layer (activation quantization counts as the identity), and to float values.
def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    compressed, bitmask, scale, zero_point, x, bias = ctx.saved_tensors

    def before() -> Tensor:
        return sparse_linear(x, compressed, bitmask, scale, bias, "none", zero_point, ctx.group_size)

    grad = _through_activation(grad, ctx.activation, before)
    need_x, need_weight, _, _, need_bias, *_ = ctx.needs_input_grad
    rows, flat = grad.reshape(-1, grad.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
    grad_x = grad_weight = None
    if need_x:
        weight = reference.dequantize_sparse(compressed, bitmask, scale, zero_point, x.shape[-1], ctx.group_size)
        grad_x = (rows @ weight.float()).reshape(x.shape).to(x.dtype)
    if need_weight:
        grad_weight = (rows.T @ flat)[reference.unpack_bitmask(bitmask, x.shape[-1])].to(compressed.dtype)
    return (grad_x, grad_weight, None, None, rows.sum(0) if need_bias else None, None, None, None)[: ctx.inputs]


torch.library.register_autograd("lepton::sparse_linear", _backward, setup_context=_setup)

sparse_linear = torch.ops.lepton.sparse_linear.default
