"""What the GEMM kernels share: which tile of Y a program computes, and how sums become outputs."""

import triton
import triton.language as tl

GROUP_ROWS = tl.constexpr(8)  # row tiles that go through the columns together, so that they find W's tiles in L2


@triton.jit
def tile_of_program(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows i64 [BLOCK_M] and columns i32 [BLOCK_N] of this program's tile of Y."""
    row_tiles = tl.cdiv(m, BLOCK_M)
    in_group = GROUP_ROWS * tl.cdiv(n, BLOCK_N)
    first = tl.program_id(0) // in_group * GROUP_ROWS
    height = tl.minimum(row_tiles - first, GROUP_ROWS)
    within = tl.program_id(0) % in_group
    rows = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    return rows.to(tl.int64), (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """reference.ACTIVATIONS[ACTIVATION] of float32."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "silu":
        y = y / (1 + tl.exp(-y))
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(0.7071067811865476 * y))
    elif ACTIVATION == "gelu_tanh":
        y = y / (1 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    return y


@triton.jit
def store_tile(y, bias_ptr, y_ptr, rows, cols, m, n, ACTIVATION: tl.constexpr):
    """Y[rows, cols] = activation(y + bias), rounded to Y's type."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, cols < n, 0.0)[None, :]
    y = activate(y, ACTIVATION)
    inside = (rows < m)[:, None] & (cols < n)[None, :]
    tl.store(y_ptr + rows[:, None] * n + cols[None, :], y.to(y_ptr.dtype.element_ty), inside)
