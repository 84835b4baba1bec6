"""int8 GEMM: Y[m, n] = X[m, k] @ W[n, k]^T * scale + bias.

INTEGER (w8a8): X holds q - 128 of quantize_rows, sums are exact int32, and
    Y = (sum q'w - zero' * sum w) * (row_scale * w_scale) + bias,   q' = q - 128, zero' = zero - 128.
Else (w8a16): W is widened to X's type, exactly, and sums are float32.
"""

import triton
import triton.language as tl

from lepton_kernels.triton_kernels.tiles import store_tile, tile_of_program


@triton.jit
def gemm_int8(
    x_ptr,  # i8 or float [m, k], rows x_stride apart
    w_ptr,  # i8 [n, k]
    w_scale_ptr,  # f32 [n]
    row_scale_ptr,  # f32 [m], or None
    row_zero_ptr,  # i32 [m], zero - 128, or None
    column_sum_ptr,  # i32 [n], sum of W's row, or None
    bias_ptr,  # f32 [n], or None
    y_ptr,  # float [m, n]
    m,
    n,
    k,
    x_stride,
    INTEGER: tl.constexpr,
    ACTIVATION: tl.constexpr,  # a name of reference.ACTIVATIONS
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, cols = tile_of_program(m, n, BLOCK_M, BLOCK_N)
    row_ok = rows < m
    col_ok = cols < n
    x_row_ptr = x_ptr + rows[:, None] * x_stride
    w_col_ptr = w_ptr + cols[None, :].to(tl.int64) * k

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    for k0 in range(0, k, BLOCK_K):
        ks = k0 + tl.arange(0, BLOCK_K)
        k_ok = ks < k
        x = tl.load(x_row_ptr + ks[None, :], row_ok[:, None] & k_ok[None, :], 0)
        w = tl.load(w_col_ptr + ks[:, None], col_ok[None, :] & k_ok[:, None], 0)
        sums = tl.dot(x, w.to(x.dtype), sums, input_precision="ieee", out_dtype=sums.dtype)

    w_scale = tl.load(w_scale_ptr + cols, col_ok, 0.0)
    if INTEGER:
        row_scale = tl.load(row_scale_ptr + rows, row_ok, 0.0)
        row_zero = tl.load(row_zero_ptr + rows, row_ok, 0)
        column_sum = tl.load(column_sum_ptr + cols, col_ok, 0)
        exact = sums - row_zero[:, None] * column_sum[None, :]
        y = exact.to(tl.float32) * (row_scale[:, None] * w_scale[None, :])
    else:
        y = sums * w_scale[None, :]
    store_tile(y, bias_ptr, y_ptr, rows, cols, m, n, ACTIVATION)
