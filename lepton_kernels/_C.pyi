"""Native kernels: raw addresses and sizes in, exceptions out. Internal; the public names are in lepton_kernels."""

MAX_K: int
GROUP_MULTIPLE: int
SPARSE_SLICE: int
SHORT_SLICE: int
LONG_SLICE: int
SCALE_BLOCK: int

def isa() -> str: ...
def isa_of_machine() -> str: ...
def splits_activations() -> bool: ...
def default_threads() -> int: ...
def packed_bytes(n: int, k: int, bits: int, group: int, symmetric: bool) -> int: ...
def pack_int8(weight: int, scale: int, n: int, k: int, packed: int) -> None: ...
def pack_int4(weight: int, row_bytes: int, scale: int, zero: int, n: int, k: int, group: int, packed: int) -> None: ...
def gemm(
    x: int,
    dtype: int,
    x_stride: int,
    m: int,
    packed: int,
    n: int,
    k: int,
    bits: int,
    group: int,
    symmetric: bool,
    bias: int,
    activation: int,
    y: int,
    quantize_activations: bool,
    threads: int,
) -> None: ...
def linear_block(
    x: int,
    dtype: int,
    x_stride: int,
    m: int,
    layers: list[tuple[int, int, int, int, int, bool, int, int, bool]],
    residual: int,
    residual_stride: int,
    norm_weight: int,
    norm_bias: int,
    norm_eps: float,
    y: int,
    threads: int,
) -> None: ...
def recurrent(
    cell: int,
    x: int,
    steps: int,
    batch: int,
    batch_first: bool,
    batch_sizes: int,
    k: int,
    hidden: int,
    directions: list[tuple[int, int, int, int, int, int, int, int]],
    y: int,
    threads: int,
) -> None: ...
def check_bitmask(bitmask: int, n: int, k: int, nonzeros: int) -> None: ...
def step_bytes() -> int: ...
def count_steps(weight: int, n: int, k: int) -> int: ...
def int8_blocks_bytes(n: int, k: int, steps: int) -> int: ...
def pack_int8_blocks(weight: int, scale: int, n: int, k: int, steps: int, packed: int) -> None: ...
def gemm_int8_blocks(
    x: int,
    dtype: int,
    x_stride: int,
    m: int,
    packed: int,
    n: int,
    k: int,
    steps: int,
    bias: int,
    activation: int,
    y: int,
    threads: int,
) -> None: ...
def count_items(bitmask: int, n: int, k: int, form: int, slice: int) -> int: ...
def group_columns() -> int: ...
def count_panels(m: int, form: int, vectors: int) -> int: ...
def sparse_rows_bytes(n: int, k: int, form: int, slice: int, items: int) -> int: ...
def pack_sparse_rows(
    values: int, bitmask: int, n: int, k: int, form: int, slice: int, items: int, packed: int
) -> None: ...
def sparse_rows(
    x: int,
    dtype: int,
    x_stride: int,
    m: int,
    packed: int,
    n: int,
    k: int,
    form: int,
    slice: int,
    items: int,
    scale: int,
    bias: int,
    activation: int,
    y: int,
    threads: int,
) -> None: ...
def blockwise_bytes(n: int, bits: int) -> int: ...
def quantize_blockwise(x: int, residual: int, n: int, bits: int, packed: int, threads: int) -> None: ...
def mean_blockwise(packed: int, rows: int, n: int, bits: int, mean: int, mean_packed: int, threads: int) -> None: ...

MAX_CHUNK_BYTES: int

def new_bytes(size: int) -> tuple[bytes, int]: ...
def encode_chunks(
    codec: int,
    layout: int,
    src: int,
    size: int,
    chunk_size: int,
    head: int,
    lengths: int,
    sums: int,
    threads: int,
) -> tuple[bytes, int]: ...
def decode_chunks(
    codec: int,
    layout: int,
    frame: int,
    offsets: int,
    lengths: int,
    sums: int,
    chunks: int,
    chunk_size: int,
    dst: int,
    size: int,
    threads: int,
) -> tuple[int, str] | None: ...
def xxh3(data: int, size: int) -> int: ...
def count_symbols(layout: int, src: int, size: int, counts: int) -> None: ...
def lzw_stream_bound(variant: int, size: int) -> int: ...
def lzw_stream_encode(variant: int, src: int, size: int, dst: int) -> int: ...
def lzw_stream_decode(variant: int, src: int, size: int, limit: int) -> tuple[bytes, str | None]: ...
def cuda_architectures() -> list[int]: ...
def cuda_most_rows() -> int: ...
def cuda_gemm(
    bits: int,
    x: int,
    x_stride: int,
    weight: int,
    scales: int,
    row_scale: int,
    row_zero: int,
    column_sum: int,
    bias: int,
    y: int,
    m: int,
    n: int,
    k: int,
    dtype: int,
    activation: int,
    stream: int,
) -> None: ...  # only where cuda_architectures() is not empty
