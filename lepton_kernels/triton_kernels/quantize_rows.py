"""Activations to int8, a row at a time: x ~ scale * (q - zero), q in 0..255; the same bits as reference.quantize_rows.

q and zero are stored less 128, so that both operands of the tensor cores are signed. One program a row, which reads
the row twice (the second time from L2): the product that follows reads it once more for every tile of columns.
"""

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: x + ROUND - ROUND is x to the nearest even integer for |x| < 2^22
STEP = tl.constexpr(1 / 255)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def quantize_rows(
    x_ptr,  # float [m, k], rows x_stride apart
    q_ptr,  # i8 [m, k], q - 128; with pairs > 0 [m, 2, pairs], even columns and then odd ones
    scale_ptr,  # f32 [m]; NaN for a row that holds NaN or infinity
    zero_ptr,  # i32 [m], zero - 128
    k,
    x_stride,
    pairs,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for k0 in range(0, k, BLOCK):
        cols = k0 + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + cols, cols < k, 0.0).to(tl.float32)
        finite = tl.abs(x) < float("inf")
        bad += tl.where(finite, 0, 1)
        x = tl.where(finite, x, 0.0)
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
    is_bad = tl.sum(bad, 0) > 0
    low_most = tl.min(low, 0)
    scale = tl.max(high, 0) * STEP - low_most * STEP
    none = is_bad | (scale < SMALLEST_NORMAL)
    inverse = tl.where(none, 0.0, tl.div_rn(1.0, tl.where(none, 1.0, scale)))
    zero = tl.minimum(tl.maximum(-low_most * inverse + ROUND - ROUND, 0.0), 255.0)
    tl.store(scale_ptr + row, tl.where(is_bad, float("nan"), tl.where(none, 0.0, scale)))
    tl.store(zero_ptr + row, zero.to(tl.int32) - 128)
    for k0 in range(0, k, BLOCK):
        cols = k0 + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + cols, cols < k, 0.0).to(tl.float32)
        x = tl.where(is_bad, 0.0, x)
        q = tl.minimum(tl.maximum(x * inverse + ROUND - ROUND + zero, 0.0), 255.0)
        at = row * k + cols if pairs == 0 else (2 * row + cols % 2) * pairs + cols // 2
        tl.store(q_ptr + at, (q.to(tl.int32) - 128).to(tl.int8), cols < k)
