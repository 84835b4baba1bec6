"""The torch operators: schema, argument checks, output shape, gradient. `torch.ops.lepton.gemm_int8` and `gemm_int4`.

Defined by torch.library's define/impl, so torch.compile, torch.export and autograd see through them; the checks run
once, here, and the backends trust them.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from lepton_kernels import reference
from lepton_kernels._backends import cpu, cuda

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("lepton", "DEF")
_library.define(
    "gemm_int8(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? bias, bool quantize_activations, "
    "str activation='none') -> Tensor"
)
_library.define(
    "gemm_int4(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? weight_zero_point, Tensor? bias, "
    "int group_size, bool quantize_activations, str activation='none') -> Tensor"
)


# Messages are made where a check fails: a formatted string costs as much as a small product.
def _check_devices(x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; allowed: one device for all")


def check_input(x: Tensor, k: int) -> None:
    """x must be [..., k] in a float dtype, on the CPU or with a backend of its own."""
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; allowed: float32, bfloat16, float16")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: [..., {k}] (in_features of this layer)")


def _check_bias(bias: Tensor | None, n: int) -> None:
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; allowed: ({n},)")


def _check_groups(weight_scale: Tensor, weight_zero_point: Tensor | None, n: int, k: int, group_size: int) -> None:
    if group_size != -1 and (group_size <= 0 or group_size % 16):
        raise ValueError(f"group_size is {group_size}; allowed: a positive multiple of 16, or -1 for the whole row")
    groups = 1 if group_size == -1 else -(-k // group_size)
    for name, tensor in (("weight_scale", weight_scale), ("weight_zero_point", weight_zero_point)):
        if tensor is not None and tuple(tensor.shape) != (n, groups):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: ({n}, {groups})")
    if weight_zero_point is not None and weight_zero_point.dtype is not torch.int8:
        raise ValueError(f"weight_zero_point is {weight_zero_point.dtype}; allowed: int8")


def check_int8(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """weight_packed int8 [n, k], weight_scale [n, 1], bias [n] or None."""
    if weight_packed.dim() != 2 or weight_packed.dtype is not torch.int8:
        raise ValueError(f"weight_packed is {weight_packed.dtype} {tuple(weight_packed.shape)}; allowed: int8 [n, k]")
    _check_devices(x, weight_packed=weight_packed, weight_scale=weight_scale, bias=bias)
    n, k = weight_packed.shape
    check_input(x, k)
    if tuple(weight_scale.shape) != (n, 1):
        raise ValueError(f"weight_scale has shape {tuple(weight_scale.shape)}; allowed: ({n}, 1)")
    _check_bias(bias, n)


def check_int4(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> None:
    """weight_packed int32 [n, ceil(k / 8)], weight_scale [n, groups], weight_zero_point int8 [n, groups] or None."""
    if weight_packed.dim() != 2 or weight_packed.dtype is not torch.int32:
        raise ValueError(
            f"weight_packed is {weight_packed.dtype} {tuple(weight_packed.shape)}; allowed: int32 [n, ceil(k / 8)]"
        )
    _check_devices(
        x, weight_packed=weight_packed, weight_scale=weight_scale, weight_zero_point=weight_zero_point, bias=bias
    )
    n, words = weight_packed.shape
    check_input(x, x.shape[-1])
    k = x.shape[-1]
    if -(-k // 8) != words:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: a last dimension of {8 * words - 7} to {8 * words}")
    _check_groups(weight_scale, weight_zero_point, n, k, group_size)
    _check_bias(bias, n)


def check_activation(activation: str) -> None:
    """One of reference.ACTIVATIONS."""
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed: {', '.join(reference.ACTIVATIONS)}")


def _int8_on(backend: ModuleType) -> Callable[..., Tensor]:
    def gemm_int8(
        x: Tensor,
        weight_packed: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        quantize_activations: bool,
        activation: str = "none",
    ) -> Tensor:
        check_int8(x, weight_packed, weight_scale, bias)
        check_activation(activation)
        return backend.gemm_int8(x, weight_packed, weight_scale, bias, quantize_activations, activation)

    return gemm_int8


def _int4_on(backend: ModuleType) -> Callable[..., Tensor]:
    def gemm_int4(
        x: Tensor,
        weight_packed: Tensor,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None,
        bias: Tensor | None,
        group_size: int,
        quantize_activations: bool,
        activation: str = "none",
    ) -> Tensor:
        check_int4(x, weight_packed, weight_scale, weight_zero_point, bias, group_size)
        check_activation(activation)
        return backend.gemm_int4(
            x, weight_packed, weight_scale, weight_zero_point, bias, group_size, quantize_activations, activation
        )

    return gemm_int4


for _key, _backend in (("CPU", cpu), ("CUDA", cuda)):
    _library.impl("gemm_int8", _int8_on(_backend), _key)
    _library.impl("gemm_int4", _int4_on(_backend), _key)


@torch.library.register_fake("lepton::gemm_int8")
def _gemm_int8_fake(x, weight_packed, weight_scale, bias, quantize_activations, activation="none"):  # type: ignore[no-untyped-def]
    check_int8(x, weight_packed, weight_scale, bias)
    check_activation(activation)
    return x.new_empty(*x.shape[:-1], weight_packed.shape[0])


@torch.library.register_fake("lepton::gemm_int4")
def _gemm_int4_fake(  # type: ignore[no-untyped-def]
    x, weight_packed, weight_scale, weight_zero_point, bias, group_size, quantize_activations, activation="none"
):
    check_int4(x, weight_packed, weight_scale, weight_zero_point, bias, group_size)
    check_activation(activation)
    return x.new_empty(*x.shape[:-1], weight_packed.shape[0])


# The gradient to the input is that of the dequantized layer (activation quantization counts as the identity); what the
# activation function was given is computed again.
def _int8_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight_packed, weight_scale, bias, quantize_activations, activation = inputs
    ctx.save_for_backward(weight_packed, weight_scale, *(() if activation == "none" else (x, bias)))
    ctx.x_dtype, ctx.has_bias, ctx.activation = x.dtype, bias is not None, activation
    ctx.quantize_activations = quantize_activations


def _through_activation(grad: Tensor, activation: str, before: Callable[[], Tensor]) -> Tensor:
    if activation == "none":
        return grad
    y = before().detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(reference.ACTIVATIONS[activation](y), y, grad)[0]


def _grads(ctx, grad: Tensor, weight: Tensor, bias_index: int) -> tuple[Tensor, Tensor | None]:  # type: ignore[no-untyped-def]
    grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32) if ctx.needs_input_grad[bias_index] else None
    return (grad.to(torch.float32) @ weight).to(ctx.x_dtype), grad_bias


def _int8_backward(ctx, grad):  # type: ignore[no-untyped-def]
    packed, scale, *inputs = ctx.saved_tensors

    def before() -> Tensor:
        x, bias = inputs
        return gemm_int8(x, packed, scale, bias, ctx.quantize_activations)

    grad = _through_activation(grad, ctx.activation, before)
    grad_x, grad_bias = _grads(ctx, grad, reference.dequantize_int8(packed, scale), 3)
    return grad_x, None, None, grad_bias, None, None


def _int4_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight_packed, weight_scale, weight_zero_point, bias, group_size, quantize_activations, activation = inputs
    kept = () if activation == "none" else (x, bias)
    ctx.save_for_backward(weight_packed, weight_scale, weight_zero_point, *kept)
    ctx.x_dtype, ctx.k, ctx.group_size, ctx.activation = x.dtype, x.shape[-1], group_size, activation
    ctx.quantize_activations = quantize_activations


def _int4_backward(ctx, grad):  # type: ignore[no-untyped-def]
    packed, scale, zero_point, *inputs = ctx.saved_tensors

    def before() -> Tensor:
        x, bias = inputs
        return gemm_int4(x, packed, scale, zero_point, bias, ctx.group_size, ctx.quantize_activations)

    grad = _through_activation(grad, ctx.activation, before)
    weight = reference.dequantize_int4(packed, scale, zero_point, ctx.k, ctx.group_size)
    grad_x, grad_bias = _grads(ctx, grad, weight, 4)
    return grad_x, None, None, None, grad_bias, None, None, None


torch.library.register_autograd("lepton::gemm_int8", _int8_backward, setup_context=_int8_setup)
torch.library.register_autograd("lepton::gemm_int4", _int4_backward, setup_context=_int4_setup)

gemm_int8 = torch.ops.lepton.gemm_int8.default
gemm_int4 = torch.ops.lepton.gemm_int4.default
