"""int4 group-wise GEMM: Y[m, n] = X[m, k] @ ((V - zero) * scale)[n, k]^T + bias, one scale and zero point a group of k.

A group's sum is made first and scaled after, in group order: one product a group instead of one a weight. V - zero lies
in -15..15, exact in every operand type. INTEGER (w4a8): X holds q - 128 of quantize_rows, a group's sum is exact int32,
    Y = (sum over groups of (sum q'v) * scale - zero' * column_sum) * row_scale + bias.
Else (w4a16): weights are widened to X's type and sums are float32.

X comes with its even columns first and its odd ones after, so that a byte of W is an operand of each of two products:
nothing has to change places between registers.
"""

import triton
import triton.language as tl

from lepton_kernels.triton_kernels.tiles import store_tile, tile_of_program


@triton.jit
def add_block(
    sums, x_row_ptr, w_col_ptr, row_ok, col_ok, zero, pair0, end, pairs,
    BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """sums + X @ (V - zero)^T over the bytes pair0 : end of W, at most BLOCK_PAIRS of them."""
    at = pair0 + tl.arange(0, BLOCK_PAIRS)
    x_ok = row_ok[:, None] & (at < end)[None, :]
    even = tl.load(x_row_ptr + at[None, :], x_ok, 0)
    odd = tl.load(x_row_ptr + (pairs + at)[None, :], x_ok, 0)
    packed = tl.load(w_col_ptr + at[:, None], col_ok[None, :] & (at < end)[:, None], 0)
    low = (packed & 15).to(tl.int8) - 8
    high = (packed >> 4).to(tl.int8) - 8
    if zero is not None:
        low -= zero[None, :]
        high -= zero[None, :]
    sums = tl.dot(even, low.to(even.dtype), sums, input_precision="ieee", out_dtype=sums.dtype)
    return tl.dot(odd, high.to(odd.dtype), sums, input_precision="ieee", out_dtype=sums.dtype)


@triton.jit
def gemm_int4(
    x_ptr,  # i8 or float [m, 2, pairs]: X[:, 0::2], then X[:, 1::2], zeros past k
    w_ptr,  # u8 [n, pairs]: V + 8, k = 2i in byte i's low nibble, 2i + 1 in its high one
    scale_ptr,  # bf16 or f32 [n, groups]
    zero_ptr,  # i8 [n, groups], or None
    row_scale_ptr,  # f32 [m], or None
    row_zero_ptr,  # i32 [m], zero - 128, or None
    column_sum_ptr,  # f32 [n], sum of (V - zero) * scale, or None
    bias_ptr,  # f32 [n], or None
    y_ptr,  # float [m, n]
    m,
    n,
    pairs,
    groups,
    INTEGER: tl.constexpr,
    ACTIVATION: tl.constexpr,  # a name of reference.ACTIVATIONS
    GROUP: tl.constexpr,  # consecutive k that share a scale; even, the whole row counts up to 2 * pairs
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, cols = tile_of_program(m, n, BLOCK_M, BLOCK_N)
    row_ok = rows < m
    col_ok = cols < n
    x_row_ptr = x_ptr + rows[:, None] * (2 * pairs)
    w_col_ptr = w_ptr + cols[None, :].to(tl.int64) * pairs
    of_group = cols.to(tl.int64) * groups
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(0, groups):
        end = tl.minimum((group + 1) * (GROUP // 2), pairs)
        zero = None if zero_ptr is None else tl.load(zero_ptr + of_group + group, col_ok, 0)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
        pair0 = group * (GROUP // 2)
        if GROUP <= BLOCK_K:  # no inner loop: only innermost loops load ahead
            sums = add_block(sums, x_row_ptr, w_col_ptr, row_ok, col_ok, zero, pair0, end, pairs, BLOCK_K // 2)
        else:
            for at in range(pair0, end, BLOCK_K // 2):
                sums = add_block(sums, x_row_ptr, w_col_ptr, row_ok, col_ok, zero, at, end, pairs, BLOCK_K // 2)
        y += sums.to(tl.float32) * tl.load(scale_ptr + of_group + group, col_ok, 0.0).to(tl.float32)[None, :]

    if INTEGER:
        row_zero = tl.load(row_zero_ptr + rows, row_ok, 0).to(tl.float32)
        y -= row_zero[:, None] * tl.load(column_sum_ptr + cols, col_ok, 0.0)[None, :]
        y *= tl.load(row_scale_ptr + rows, row_ok, 0.0)[:, None]
    store_tile(y, bias_ptr, y_ptr, rows, cols, m, n, ACTIVATION)
