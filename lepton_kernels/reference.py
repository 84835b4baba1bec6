"""Every operator in plain torch: what it means, and the oracle of the tests.

Slow and clear. The native kernels equal these to the last bit where activations are quantized (integer sums, then a
fixed order of float steps), and within the rounding of float sums elsewhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST_NORMAL = 2.0**-126
_SCALE_BLOCK = 128  # values that share a scale in quantize_blockwise

# What a layer may do to its sums, by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
}


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q[m, k] int32 in 0..255, scale f32 [m], zero int32 [m] with x ~ scale * (q - zero), from x float [m, k].

    Asymmetric, one scale a row. A row of zeros has scale 0; one that holds NaN or infinity has scale NaN.
    """
    x = x.to(torch.float32)
    if x.shape[1] == 0:
        raise ValueError(f"quantize_rows: x has shape {tuple(x.shape)}; allowed: at least one column")
    lo = x.amin(1).clamp(max=0)
    hi = x.amax(1).clamp(min=0)
    scale = hi * torch.tensor(1 / 255, dtype=torch.float32) - lo * torch.tensor(1 / 255, dtype=torch.float32)
    tiny = scale < _SMALLEST_NORMAL
    inverse = torch.where(tiny, 0.0, 1 / scale)
    scale = torch.where(tiny, 0.0, scale)
    bad = ~torch.isfinite(x).all(1)
    scale = torch.where(bad, torch.nan, scale)
    inverse = torch.where(bad, 0.0, inverse)
    x = torch.where(bad[:, None], 0.0, x)
    lo = torch.where(bad, 0.0, lo)
    zero = torch.round(-lo * inverse).clamp(0, 255).to(torch.int32)
    q = (torch.round(x * inverse[:, None]).to(torch.int32) + zero[:, None]).clamp(0, 255)
    q = torch.where(bad[:, None], 0, q)
    return q, scale, torch.where(bad, 0, zero)


def unpack_int4(weight_packed: Tensor, k: int) -> Tensor:
    """int8 [n, k] in -8..7 from int32 [n, ceil(k / 8)]: value + 8 in nibbles, the lowest first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=weight_packed.device)
    nibbles = (weight_packed[..., None] >> shifts) & 0xF
    return (nibbles.flatten(-2)[..., :k] - 8).to(torch.int8)


def pack_int4(values: Tensor) -> Tensor:
    """int32 [n, ceil(k / 8)] from int8 [n, k] in -8..7; nibbles past k hold 0."""
    n, k = values.shape
    nibbles = torch.zeros(n, -(-k // 8) * 8, dtype=torch.int64, device=values.device)
    nibbles[:, :k] = values.to(torch.int64) + 8
    shifts = torch.arange(0, 32, 4, dtype=torch.int64, device=values.device)
    words = (nibbles.view(n, -1, 8) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def expand_groups(per_group: Tensor, k: int, group_size: int) -> Tensor:
    """[n, k] from one value a group, [n, groups]; group_size -1 is the whole row."""
    size = k if group_size == -1 else group_size
    return per_group.repeat_interleave(size, dim=1)[:, :k]


def dequantize_int8(weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    """W f32 [n, k] = weight_packed int8 [n, k] * weight_scale f32 [n, 1]."""
    return weight_packed.to(torch.float32) * weight_scale


def dequantize_int4(
    weight_packed: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, k: int, group_size: int
) -> Tensor:
    """W f32 [n, k] = (value - zero_point) * scale, from int32 [n, ceil(k / 8)] and one scale and zero point a group."""
    return scale_int4(unpack_int4(weight_packed, k), weight_scale, weight_zero_point, group_size)


def scale_int4(values: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, group_size: int) -> Tensor:
    """dequantize_int4 of values int8 [n, k] in -8..7."""
    k, values = values.shape[1], values.to(torch.int32)
    if weight_zero_point is not None:
        values = values - expand_groups(weight_zero_point, k, group_size)
    return values.to(torch.float32) * expand_groups(weight_scale.to(torch.float32), k, group_size)


def column_sums_int4(values: Tensor, weight_scale: Tensor, group_size: int) -> Tensor:
    """f32 [n]: the sum of each output's dequantized weights, values [n, k] minus zero points; groups added in order."""
    size = values.shape[1] if group_size == -1 else group_size
    total = torch.zeros(values.shape[0], dtype=torch.float32, device=values.device)
    for g, k0 in enumerate(range(0, values.shape[1], size)):
        part = values[:, k0 : k0 + size].sum(1, dtype=torch.int64)
        total = total + part.to(torch.float32) * weight_scale[:, g].to(torch.float32)
    return total


def _finish(y: Tensor, bias: Tensor | None, activation: str, x: Tensor) -> Tensor:
    if bias is not None:
        y = y + bias
    y = ACTIVATIONS[activation](y)
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T of integers, rounded once, to f32. Sums below 2^53 are exact in float64, and every device has that."""
    return (a.to(torch.float64) @ b.to(torch.float64).T).to(torch.float32)


def gemm_int8(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    quantize_activations: bool,
    activation: str = "none",
) -> Tensor:
    """Y[..., n] = activation(X[..., k] @ W[n, k]^T + bias), W = weight_packed int8 * weight_scale; Y has x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    if not quantize_activations:
        weight = weight_packed.to(torch.float64)
        return _finish((rows.to(torch.float64) @ weight.T).to(torch.float32) * weight_scale[:, 0], bias, activation, x)
    q, scale, zero = quantize_rows(rows)
    sums = _exact(q - zero[:, None], weight_packed)
    return _finish(sums * (scale[:, None] * weight_scale[:, 0]), bias, activation, x)


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
    """Y[..., n] = activation(X[..., k] @ W[n, k]^T + bias), with W = (value - zero_point) * scale in groups along k."""
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    if not quantize_activations:
        weight = dequantize_int4(weight_packed, weight_scale, weight_zero_point, k, group_size).to(torch.float64)
        return _finish((rows.to(torch.float64) @ weight.T).to(torch.float32), bias, activation, x)
    q, scale, zero = quantize_rows(rows)
    values = unpack_int4(weight_packed, k)
    if weight_zero_point is not None:
        values = values - expand_groups(weight_zero_point, k, group_size)
    q, zero = q - 128, zero - 128  # signed bytes: sums stay small, and so does their rounding
    size = k if group_size == -1 else group_size
    y = torch.zeros(rows.shape[0], weight_packed.shape[0], dtype=torch.float32, device=x.device)
    for g, k0 in enumerate(range(0, k, size)):
        sums = _exact(q[:, k0 : k0 + size], values[:, k0 : k0 + size])
        y = y + sums * weight_scale[:, g].to(torch.float32)
    y = y - zero[:, None].to(torch.float32) * column_sums_int4(values, weight_scale, group_size)
    return _finish(y * scale[:, None], bias, activation, x)


def pack_bitmask(mask: Tensor) -> Tensor:
    """uint8 [n, ceil(k / 8)] from bool [n, k]: bit i % 8 of byte i / 8 for column i; bits past k are 0."""
    n, k = mask.shape
    bits = torch.zeros(n, -(-k // 8) * 8, dtype=torch.uint8, device=mask.device)
    bits[:, :k] = mask
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits.view(n, -1, 8) * weights).sum(2, dtype=torch.uint8)


def unpack_bitmask(bitmask: Tensor, k: int) -> Tensor:
    """bool [n, k] from uint8 [n, ceil(k / 8)]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return ((bitmask[..., None] >> shifts) & 1).flatten(1)[:, :k].bool()


def count_ones(bitmask: Tensor, k: int) -> int:
    """How many columns below k a bitmask uint8 [n, ceil(k / 8)] has."""
    return int(unpack_bitmask(bitmask, k).sum())


def expand_sparse(weight_compressed: Tensor, weight_bitmask: Tensor, k: int) -> Tensor:
    """The dense weight [n, k]: weight_compressed [nonzeros], row after row, where the bitmask has a one; else 0."""
    mask = unpack_bitmask(weight_bitmask, k)
    dense = torch.zeros(mask.shape, dtype=weight_compressed.dtype, device=weight_compressed.device)
    dense[mask] = weight_compressed
    return dense


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 [ceil(count / 2)] from int8 [count] in -8..7: value + 8 in four bits each, the lower ones first."""
    nibbles = functional.pad((values + 8).to(torch.uint8), (0, values.shape[0] % 2)).view(-1, 2)
    return nibbles[:, 0] | nibbles[:, 1] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """int8 [2 * bytes] in -8..7 from uint8 [bytes]."""
    return torch.stack((packed & 0xF, packed >> 4), 1).flatten().to(torch.int8) - 8


def expand_sparse_int4(
    weight_compressed: Tensor, weight_bitmask: Tensor, weight_zero_point: Tensor | None, k: int, group_size: int
) -> Tensor:
    """The dense values int8 [n, k] in -8..7: expand_sparse of nibbles, with zero points where the bitmask has a 0."""
    mask = unpack_bitmask(weight_bitmask, k)
    zeros = mask.new_zeros(mask.shape, dtype=torch.int8)
    if weight_zero_point is not None:
        zeros = expand_groups(weight_zero_point, k, group_size)
    return zeros.masked_scatter(mask, unpack_nibbles(weight_compressed))


def dequantize_sparse(
    weight_compressed: Tensor,
    weight_bitmask: Tensor,
    weight_scale: Tensor | None,
    weight_zero_point: Tensor | None,
    k: int,
    group_size: int,
) -> Tensor:
    """The dense weight [n, k] of sparse_linear: in the values' dtype where they are floats, else f32."""
    if weight_compressed.dtype is torch.uint8 and weight_scale is not None:
        values = expand_sparse_int4(weight_compressed, weight_bitmask, weight_zero_point, k, group_size)
        return scale_int4(values, weight_scale, weight_zero_point, group_size)
    weight = expand_sparse(weight_compressed, weight_bitmask, k)
    return weight if weight_scale is None else dequantize_int8(weight, weight_scale)


def sparse_linear(
    x: Tensor,
    weight_compressed: Tensor,
    weight_bitmask: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: str = "none",
    weight_zero_point: Tensor | None = None,
    group_size: int = -1,
) -> Tensor:
    """Y[..., n] = activation(X[..., k] @ W^T + bias) in x's dtype, W from expand_sparse; sums in float32.

    With weight_scale f32 [n, 1] the values are int8 and the product is gemm_int8 with quantized activations. With
    weight_scale [n, groups] they are nibbles in uint8, and it is gemm_int4 with float ones.
    """
    k = x.shape[-1]
    if weight_compressed.dtype is torch.uint8 and weight_scale is not None:
        packed = pack_int4(expand_sparse_int4(weight_compressed, weight_bitmask, weight_zero_point, k, group_size))
        return gemm_int4(x, packed, weight_scale, weight_zero_point, bias, group_size, False, activation)
    weight = expand_sparse(weight_compressed, weight_bitmask, k)
    if weight_scale is not None:
        return gemm_int8(x, weight, weight_scale, bias, True, activation)
    return ACTIVATIONS[activation](functional.linear(x.float(), weight.float(), bias)).to(x.dtype)


def quantize_blockwise(x: Tensor, bits: int, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x f32 [n] + residual f32 [n] as codes of 8 or 4 bits and a scale for every 128 values, uint8 [bytes]; what they
    leave, f32 [n].

    A block whose scale would be no normal number has scale 0; one that holds NaN or infinity has scale NaN, leaves 0.
    """
    n, most = x.numel(), 127 if bits == 8 else 7
    v = functional.pad(x if residual is None else x + residual, (0, -n % _SCALE_BLOCK)).view(-1, _SCALE_BLOCK)
    finite = torch.isfinite(v).all(1)
    v = torch.where(finite[:, None], v, 0.0)
    scale = v.abs().amax(1) * torch.tensor(1 / most, dtype=torch.float32)
    scale = torch.where(scale < _SMALLEST_NORMAL, 0.0, scale)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    code = torch.round(v * inverse[:, None]).to(torch.int32)
    left = (v - code * scale[:, None]).flatten()[:n]
    codes = code.to(torch.int8).flatten()
    data = codes.view(torch.uint8) if bits == 8 else pack_nibbles(codes)
    scale = torch.where(finite, scale, torch.nan)
    return torch.cat([data[: _code_bytes(n, bits)], scale.view(torch.uint8)]), left


def dequantize_blockwise(packed: Tensor, n: int, bits: int) -> Tensor:
    """code * scale, f32 [n], of what quantize_blockwise packed."""
    size = _code_bytes(n, bits)
    data, scale = packed[:size], packed[size:].clone().view(torch.float32)
    code = data.view(torch.int8) if bits == 8 else unpack_nibbles(data)
    return code[:n].to(torch.float32) * scale.repeat_interleave(_SCALE_BLOCK)[:n]


def mean_blockwise(packed: Tensor, n: int, bits: int) -> Tensor:
    """The mean f32 [n] of rows uint8 [r, bytes] of quantize_blockwise, added in their order."""
    total = torch.zeros(n)
    for row in packed:
        total = total + dequantize_blockwise(row, n, bits)
    return total * torch.tensor(1 / len(packed), dtype=torch.float32)


def _code_bytes(n: int, bits: int) -> int:
    return (n * bits + 31) // 32 * 4
