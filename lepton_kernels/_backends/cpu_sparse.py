"""Products with sparse weights on CPU tensors: the native kernels behind sparse_linear.

Float weights are streams of nonzeros (sparse_rows). int8 weights are stored for whichever kernel the shape, the zeros
and the level make the fastest: blocks of 16 x 4 (gemm_int8_blocks), streams of groups or of pairs of nonzeros
(sparse_rows) or, where too few of the weights are zeros, all of them (gemm_int8). They give the same bits. 4-bit
weights are stored as the float streams of what they stand for or, where those are slower, all of them (gemm_int4,
gemm_int16): the same but for how activations and sums are rounded.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lepton_kernels import reference
from lepton_kernels._backends import cpu
from lepton_kernels._backends.codes import ACTIVATION_CODES, DTYPE_CODES
from lepton_kernels._backends.cpu import _address, _as_f32, _rows
from lepton_kernels._backends.derived import Derived
from lepton_kernels._runtime import C

FLOATS, PAIRS, GROUPS, TWINS = range(4)  # SparseForm in csrc/cpu/sparse_rows.h

_VECTORS = 1, 2, 4, 8  # of 16 rows of X: panels that a stream multiplies at once, full or not


class Stream(NamedTuple):
    """What a stream takes, in time that the dense kernel takes for a row of X among many, for all weights."""

    weight: tuple[
        float, float, float, float
    ]  # a row's place in a panel of 1, 2, 4, 8 vectors, if no weight were a zero
    row: float = 0.05  # a row, whatever the zeros: it is turned, and written
    panel: float = 0.0  # a panel: its sums come and go, rows of W end

    def cost(self, share: float, form: int, m: int) -> float:
        """Of m rows of X; share: of the weights, those that are multiplied."""
        counts = [C.count_panels(m, form, vectors) for vectors in _VECTORS]
        panels = (
            count * (self.panel + share * 16 * vectors * weight)
            for count, vectors, weight in zip(counts, _VECTORS, self.weight, strict=True)
        )
        return self.row * m + sum(panels)


def _even(weight: float, alone: float = 1.0) -> Stream:
    return Stream((alone * weight, weight, weight, weight))


# Streams of pairs and of groups beside the dense int8 kernel. avx2: measured, 4096 x 4096, 128 rows, on the machine
# of bench/RESULTS.md. AVX-512: fitted to 4 to 128 rows, 60 to 98 % zeros, 1024 x 2048 to 2048 x 2048, 1 thread, a
# Sapphire Rapids core; within a tenth of what was measured. The others: by the instructions that either takes, and
# the ports that run them.
_PAIRS_512 = Stream((5.0, 5.0, 4.4, 4.4), row=0.12, panel=2.8)
_GROUPS_512 = Stream((2.3, 1.9, 1.6, 1.5), row=0.05, panel=4.0)
_PAIR_COST = {
    "generic": _even(2.0), "ssse3": _even(2.0), "avx2": _even(2.0), "avxvnni": _even(3.0), "avx512vnni": _PAIRS_512,
    "avx512vbmi2": _PAIRS_512, "amx": _even(30.0), "neondot": _even(3.0), "neoni8mm": _even(6.0),
}  # fmt: skip
_GROUP_COST = {
    "generic": _even(1.45), "ssse3": _even(1.45), "avx2": _even(1.45), "avxvnni": _even(1.3),
    "avx512vnni": _GROUPS_512, "avx512vbmi2": _GROUPS_512, "amx": _even(10.0), "neondot": _even(1.3),
    "neoni8mm": _even(2.6),
}  # fmt: skip
# Time of a nonzero against one row of X over that of a weight of the dense int8 kernel with one row; measured as above.
_ROW_COST = {
    "generic": 4.0, "ssse3": 4.0, "avx2": 12.0, "avxvnni": 12.0, "avx512vnni": 11.5, "avx512vbmi2": 11.5, "amx": 16.0,
    "neondot": 12.0, "neoni8mm": 12.0,
}  # fmt: skip
# What the dense int8 kernel takes for few rows: as long as (more + rows) among many, and at least as so many: then it
# waits for the weights. Measured as above, 4 MB of weights: 10.5 rows for up to 4, 15 for 8, 20 for 16, 36 for 32.
_DENSE_LEAST = {"avx512vnni": 10.5, "avx512vbmi2": 10.5}
_DENSE_MORE = {"avx512vnni": 2.0, "avx512vbmi2": 2.0}
_NARROW = 31  # kNarrow in csrc/cpu/packed_weight.h: the largest magnitude of weights for which avx2 has another kernel
# Time of a weight of that kernel, with two rows and more, over that of the dense int8 kernel: measured at level avx2 of
# a processor with AVX-512, 2048 x 2048, 1 thread, 0.60 with 128 rows and 0.65 with 16. With one row memory decides.
_NARROW_COST = {"avx2": 0.63}
# Items of twins over nonzeros (0.5: neighbouring rows share all columns) below which they are the faster: four
# multiply-adds a nonzero take 2.5 cycles where X is loaded for each, 2 where it is loaded for two.
_TWINS = 0.6
_WIDE = ("avx512vnni", "avx512vbmi2", "amx")  # levels whose registers hold 16 floats
# Share of nonzeros above which float streams have short slices at those levels. In a slice of 256 columns four
# vectors of 16 rows of X meet 64 KiB of it, more than the first-level cache holds; one alone meets 16 KiB, and in
# short slices comes to the end of a row twice as often. 1024 x 2048, 1 thread, a Sapphire Rapids core (48 KiB), short
# over slices of 256: with 64 rows 0.84 of the time at 70 % zeros, 0.95 at 90, 1.00 at 95; with 16 rows 1.05, 1.17 and
# 1.27. Where neighbouring rows share their columns the cache holds enough of them: twins took 1.0 to 1.1 times as
# long.
_SHORT = 0.15
_MANY = 512  # rows of X: more are cut into so many (kMostRows in csrc/cpu/sparse_rows.cpp)
_ROW_START = 0.05  # of the dense kernel's time: the row is widened, sums are written
_BLOCK_COST = 1.15  # of a stored block over the dense kernel's: its index, and no panels side by side
# Time of a nonzero in a float stream over that of a weight of the dense w4a16 kernel: of many rows of X, and of one.
# generic, ssse3, avx2: measured, 4096 x 4096, 128 rows and 1, 1 thread, the processor of the costs above. amx: the
# dense kernel as measured on a processor that has it (bench/RESULTS.md), a nonzero of 64 rows at the cycles that 32
# take on avx2. AVX-512: as for int8. The others: by the instructions that either takes, and the ports that run them.
# Measured on avx2: 16 rows alone take as long as 20 of those that two 16 side by side are.
_FLOATS_512 = Stream((3.6, 3.0, 2.8, 2.8), row=0.07, panel=1.3)
_INT4_STREAM_COST = {
    "generic": _even(6.4, 1.25), "ssse3": _even(6.4, 1.25), "avx2": _even(2.4, 1.25), "avxvnni": _even(4.0, 1.25),
    "avx512vnni": _FLOATS_512, "avx512vbmi2": _FLOATS_512, "amx": _even(16.0, 1.25), "neondot": _even(3.0, 1.25),
    "neoni8mm": _even(4.5, 1.25),
}  # fmt: skip
_INT4_ROW_COST = {
    "generic": 9.0, "ssse3": 9.0, "avx2": 14.0, "avxvnni": 20.0, "avx512vnni": 25.0, "avx512vbmi2": 25.0, "amx": 25.0,
    "neondot": 16.0, "neoni8mm": 18.0,
}  # fmt: skip


class PackedRows(NamedTuple):
    """Streams of nonzeros (csrc/cpu/sparse_rows.h): their memory, and what a call needs."""

    data: Tensor  # uint8 [bytes], 64-byte aligned
    address: int
    n: int
    k: int
    form: int  # FLOATS, PAIRS, GROUPS or TWINS
    slice: int  # columns of a slice; C.LONG_SLICE where it is for single rows of X
    items: int
    scale: Tensor | None  # f32 [n] of int8 weights


class PackedBlocks(NamedTuple):
    """int8 blocks (csrc/cpu/packed_weight.h)."""

    data: Tensor  # uint8 [bytes], 64-byte aligned
    address: int
    n: int
    k: int
    steps: int


# Values [nonzeros], bitmask uint8 [n, ceil(k / 8)], scale f32 [n, 1], zero points; of 4 bits as docs/formats.md has it.
Sources = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class FloatWeight:
    """A sparse float weight as the kernels read it: a stream of nonzeros, or of columns that two rows share, and one
    with long slices for single rows of X."""

    def __init__(self, n: int, k: int, nonzeros: int, twins: int) -> None:
        self.k, self._many = k, "twins" if twins < _TWINS * nonzeros else "rows"
        self._dense = nonzeros > _SHORT * n * k
        self._forms: dict[str, PackedRows] = {}

    def kernel(self, m: int) -> str:
        """Which kernel is the fastest for m rows: "row" (m = 1), "rows" or "twins"."""
        return "row" if m == 1 else self._many

    def form(self, kernel: str, sources: Sources) -> PackedRows:
        """What a kernel reads, made of the saved tensors on first use."""
        if kernel not in self._forms:
            values, bitmask = sources[:2]
            form = TWINS if kernel == "twins" else FLOATS
            short = kernel == "rows" and self._dense and C.isa() in _WIDE
            slice = C.LONG_SLICE if kernel == "row" else C.SHORT_SLICE if short else C.SPARSE_SLICE
            self._forms[kernel] = pack_rows(values, bitmask, self.k, None, form, slice)
        return self._forms[kernel]


class Int8Weight:
    """A sparse int8 weight as the kernels read it: which one is the fastest, and the form of each that was asked for.

    It holds none of the saved tensors, so that it goes when they go.
    """

    def __init__(self, n: int, k: int, pairs: int, groups: int, steps: int, largest: int) -> None:
        weights = max(n * k, 1)
        self.n, self.k, self.steps, self.narrow = n, k, steps, largest <= _NARROW
        # Shares of the weights that each kernel multiplies, zeros among them.
        self.pairs, self.groups = 2 * pairs / weights, groups * C.group_columns() / weights
        self.blocks = steps * C.step_bytes() / weights
        self._forms: dict[str, Any] = {}
        self._kernels: dict[int, str] = {}  # by rows

    def kernel(self, m: int) -> str:
        """Which kernel is the fastest for m rows: "dense", "blocks", "groups", "pairs" or (m = 1) "row"."""
        m = min(m, _MANY)
        if m not in self._kernels:
            isa = C.isa()
            dense = max(_DENSE_LEAST.get(isa, 0.0), m + _DENSE_MORE.get(isa, 0.0))
            costs = {
                "dense": dense * (_NARROW_COST.get(isa, 1.0) if self.narrow and m > 1 else 1.0),
                "blocks": dense * _BLOCK_COST * self.blocks,
                "groups": _GROUP_COST[isa].cost(self.groups, GROUPS, m),
                "pairs": _PAIR_COST[isa].cost(self.pairs, PAIRS, m),
            }
            if m == 1:
                costs["row"] = dense * (_ROW_START + self.pairs * _ROW_COST[isa])
            self._kernels[m] = min(costs, key=costs.__getitem__)
        return self._kernels[m]

    def form(self, kernel: str, sources: Sources) -> Any:
        """What a kernel reads, made of the saved tensors on first use."""
        if kernel not in self._forms:
            values, bitmask, scale = sources[:3]
            assert scale is not None
            if kernel in ("pairs", "groups", "row"):
                form = GROUPS if kernel == "groups" else PAIRS
                slice = C.LONG_SLICE if kernel == "row" else C.SPARSE_SLICE
                self._forms[kernel] = pack_rows(values, bitmask, self.k, scale, form, slice)
            else:
                dense = reference.expand_sparse(values, bitmask, self.k)
                self._forms[kernel] = (
                    cpu.make_int8(dense, scale) if kernel == "dense" else self._as_blocks(dense, scale)
                )
        return self._forms[kernel]

    def _as_blocks(self, dense: Tensor, scale: Tensor) -> PackedBlocks:
        data = torch.empty(C.int8_blocks_bytes(self.n, self.k, self.steps), dtype=torch.uint8)
        scale = scale.float().contiguous()
        C.pack_int8_blocks(dense.data_ptr(), scale.data_ptr(), self.n, self.k, self.steps, data.data_ptr())
        return PackedBlocks(data, data.data_ptr(), self.n, self.k, self.steps)


class Int4Weight:
    """A sparse 4-bit weight as the kernels read it: all of it, or the streams of what its nonzeros stand for.

    It holds none of the saved tensors, so that it goes when they go.
    """

    def __init__(self, n: int, k: int, group_size: int, nonzeros: int, twins: int) -> None:
        weights = max(n * k, 1)
        self.k, self.group_size = k, group_size
        # Shares of the weights: nonzeros, and nonzeros that take as long as the items of the stream for many rows.
        self.nonzeros, self.items = nonzeros / weights, min(nonzeros, twins / _TWINS) / weights
        self._stream = FloatWeight(n, k, nonzeros, twins)
        self._forms: dict[str, Any] = {}
        self._kernels: dict[int, str] = {}  # by rows

    def kernel(self, m: int) -> str:
        """Which kernel is the fastest for m rows: "dense", "row" (m = 1), "rows" or "twins"."""
        m = min(m, _MANY)
        if m not in self._kernels:
            if m == 1:
                cost = _ROW_START + self.nonzeros * _INT4_ROW_COST[C.isa()]
            else:
                cost = _INT4_STREAM_COST[C.isa()].cost(self.items, FLOATS, m)
            self._kernels[m] = self._stream.kernel(m) if cost < m else "dense"
        return self._kernels[m]

    def form(self, kernel: str, sources: Sources) -> Any:
        """What a kernel reads, made of the saved tensors on first use."""
        if kernel not in self._forms:
            self._forms[kernel] = self._dense(sources) if kernel == "dense" else self._floats(kernel, sources)
        return self._forms[kernel]

    def _dense(self, sources: Sources) -> cpu.Packed:
        values, bitmask, scale, zero = sources
        assert scale is not None
        packed = reference.pack_int4(reference.expand_sparse_int4(values, bitmask, zero, self.k, self.group_size))
        return cpu.make_int4(packed, scale, zero, self.k, self.group_size)

    def _floats(self, kernel: str, sources: Sources) -> PackedRows:
        weight = reference.dequantize_sparse(*sources, self.k, self.group_size)
        values = weight[reference.unpack_bitmask(sources[1], self.k)]
        return self._stream.form(kernel, (values, sources[1], None, None))


Weight = FloatWeight | Int8Weight | Int4Weight

_weights: Derived[Weight] = Derived()


def pack_rows(
    values: Tensor,
    bitmask: Tensor,
    k: int,
    scale: Tensor | None = None,
    form: int = FLOATS,
    slice: int = C.SPARSE_SLICE,
) -> PackedRows:
    """The stream of values [nonzeros] and bitmask uint8 [n, ceil(k / 8)].

    scale: f32 [n, 1] of int8 values, whose form is PAIRS or GROUPS. slice: SPARSE_SLICE, SHORT_SLICE or, for single
    rows of X, LONG_SLICE. Raises ValueError where the bitmask does not have as many ones as there are values, or has
    some past k.
    """
    n = bitmask.shape[0]
    stored = values.to(torch.float32 if scale is None else torch.int8).contiguous()
    mask = bitmask.contiguous()
    C.check_bitmask(mask.data_ptr(), n, k, values.numel())
    items = C.count_items(mask.data_ptr(), n, k, form, slice)
    data = torch.empty(C.sparse_rows_bytes(n, k, form, slice, items), dtype=torch.uint8)
    C.pack_sparse_rows(stored.data_ptr(), mask.data_ptr(), n, k, form, slice, items, data.data_ptr())
    scales = None if scale is None else scale.to(torch.float32).flatten().clone()  # not to keep `scale` alive
    return PackedRows(data, data.data_ptr(), n, k, form, slice, items, scales)


def pack(sources: Sources, k: int, group_size: int = -1) -> Weight:
    """A sparse weight of its saved tensors; looked at once.

    group_size: of 4 bits. Raises ValueError where the bitmask does not have as many ones as there are values, or has
    some past k.
    """

    def make() -> Weight:
        values, bitmask, scale = sources[:3]
        n = bitmask.shape[0]
        mask = bitmask.contiguous()
        nonzeros = values.numel()
        if values.dtype is torch.uint8:
            nonzeros = reference.count_ones(bitmask, k)
            if values.numel() != -(-nonzeros // 2):
                raise ValueError(
                    f"sparse weight: weight_compressed has {values.numel()} bytes; allowed: {-(-nonzeros // 2)}, two "
                    f"values each for the {nonzeros} ones of the bitmask"
                )
        C.check_bitmask(mask.data_ptr(), n, k, nonzeros)
        if values.dtype is torch.int8:
            pairs, groups = (C.count_items(mask.data_ptr(), n, k, form, C.SPARSE_SLICE) for form in (PAIRS, GROUPS))
            dense = reference.expand_sparse(values, bitmask, k)
            largest = int(values.to(torch.int16).abs().max()) if nonzeros else 0
            return Int8Weight(n, k, pairs, groups, C.count_steps(dense.data_ptr(), n, k), largest)
        twins = C.count_items(mask.data_ptr(), n, k, TWINS, C.SPARSE_SLICE)
        return FloatWeight(n, k, nonzeros, twins) if scale is None else Int4Weight(n, k, group_size, nonzeros, twins)

    return _weights.get(tuple(t for t in sources if t is not None), (k, group_size), make)


def sparse_rows(x: Tensor, packed: PackedRows, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Y[..., n] = activation(X[..., k] @ W^T + bias), in x's dtype, on torch's number of threads."""
    rows, m, stride = _rows(x, packed.k)
    y = x.new_empty(*x.shape[:-1], packed.n)
    bias = _as_f32(bias)
    C.sparse_rows(
        rows.data_ptr(), DTYPE_CODES[x.dtype], stride, m, packed.address, packed.n, packed.k, packed.form,
        packed.slice, packed.items, _address(packed.scale), _address(bias), ACTIVATION_CODES[activation],
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def gemm_int8_blocks(x: Tensor, packed: PackedBlocks, bias: Tensor | None, activation: str = "none") -> Tensor:
    """The same with int8 blocks, activations quantized."""
    rows, m, stride = _rows(x, packed.k)
    y = x.new_empty(*x.shape[:-1], packed.n)
    bias = _as_f32(bias)
    C.gemm_int8_blocks(
        rows.data_ptr(), DTYPE_CODES[x.dtype], stride, m, packed.address, packed.n, packed.k, packed.steps,
        _address(bias), ACTIVATION_CODES[activation], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def product(
    x: Tensor,
    weight: Weight,
    sources: Sources,
    bias: Tensor | None,
    activation: str = "none",
    kernel: str = "",
) -> Tensor:
    """Y[..., n] = activation(X[..., k] @ W^T + bias) by the kernel that is named, or the fastest one; activations are
    quantized where the weight is int8."""
    kernel = kernel or weight.kernel(x.numel() // weight.k)
    form = weight.form(kernel, sources)
    if isinstance(form, PackedRows):
        return sparse_rows(x, form, bias, activation)
    if isinstance(form, PackedBlocks):
        return gemm_int8_blocks(x, form, bias, activation)
    return cpu.gemm(x, form, bias, form.bits == 8, activation)


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
    """The operator lepton::sparse_linear on the CPU."""
    sources = weight_compressed, weight_bitmask, weight_scale, weight_zero_point
    return product(x, pack(sources, x.shape[-1], group_size), sources, bias, activation)
