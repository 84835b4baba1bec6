"""The chunked, checksummed frame that both codecs write; docs/codec-format.md specifies it byte by byte.

    header   magic "LPTN", version, codec, layout, 0 (4 x uint8), size (uint64), chunk_size, chunks (2 x uint32)
    check    XXH3-64 of the header and the two tables (uint64)
    tables   length of each chunk's payload (uint32), XXH3-64 of each payload (uint64)
    payloads one after the other

Integers are little-endian. Chunks are independent: they are decoded on several threads, or alone.
"""

import ctypes
import struct
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from lepton_kernels._runtime import C

MAGIC = b"LPTN"
VERSION = 2
CODECS = {"huffman": 1, "lzw": 2}
LAYOUTS = ("bytes", "nibbles", "bf16", "fp16", "fp32")
ELEMENT_BYTES = (1, 1, 2, 2, 4)
PLANES = (1, 2, 2, 2, 4)
DEFAULT_CHUNK_SIZE = 256 * 1024
MIN_CHUNK_SIZE = 4096
DEFAULT_MAX_SIZE = 1 << 34  # 16 GiB: what a decoder allocates at most unless told otherwise

_HEADER = struct.Struct("<4sBBBBQIIQ")
HEADER_BYTES = _HEADER.size
_CHECKED_HEADER_BYTES = HEADER_BYTES - 8
_LAYOUT_OF_DTYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class CorruptDataError(ValueError):
    """The bytes are not what an encoder wrote: damaged, cut off, of another kind, or made to do harm."""


@dataclass(frozen=True)
class FrameInfo:
    """What a frame's header says. `ratio` is compressed bytes over original bytes."""

    codec: str
    layout: str
    size: int
    compressed_size: int
    chunk_size: int
    chunks: int

    @property
    def ratio(self) -> float:
        return self.compressed_size / self.size if self.size else 1.0


@dataclass(frozen=True)
class Frame:
    """A parsed frame: `lengths` of its chunks' payloads and their `offsets` in `data`, int64; they end at `end`."""

    data: np.ndarray
    codec: int
    layout: int
    size: int
    chunk_size: int
    lengths: np.ndarray
    offsets: np.ndarray
    checksums: np.ndarray
    end: int

    @classmethod
    def of(
        cls, header: "Header", data: np.ndarray, payloads_at: int, lengths: np.ndarray, checksums: np.ndarray
    ) -> "Frame":
        ends = payloads_at + np.cumsum(lengths)
        end = int(ends[-1]) if ends.size else payloads_at
        return cls(
            data, header.codec, header.layout, header.size, header.chunk_size, lengths, ends - lengths, checksums, end
        )


def as_bytes(function: str, argument: str, data: Any) -> tuple[np.ndarray, str]:
    """The memory of a bytes-like object, numpy array or torch tensor as uint8 [size], and the name of its dtype."""
    if type(data).__module__.partition(".")[0] == "torch" and hasattr(data, "detach"):
        torch = sys.modules["torch"]
        tensor = data.detach().cpu().contiguous()
        name = str(tensor.dtype).removeprefix("torch.")
        return tensor.reshape(-1).view(torch.uint8).numpy(), name
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8), data.dtype.name
    try:
        view = memoryview(data)
        return np.frombuffer(view.cast("B") if view.nbytes else b"", dtype=np.uint8), "uint8"
    except (TypeError, ValueError, BufferError) as error:
        raise TypeError(
            f"{function}: {argument} is {type(data).__name__}; allowed: a contiguous bytes-like object, "
            "a numpy array or a torch tensor"
        ) from error


def _layout(function: str, layout: str, dtype: str, size: int) -> int:
    if layout == "auto":
        layout = _LAYOUT_OF_DTYPE.get(dtype, "bytes")
    if layout not in LAYOUTS:
        raise ValueError(f"{function}: layout is {layout!r}; allowed: auto, {', '.join(LAYOUTS)}")
    index = LAYOUTS.index(layout)
    if size % ELEMENT_BYTES[index]:
        raise ValueError(
            f"{function}: layout is {layout!r} and data has {size} bytes; allowed: a multiple of {ELEMENT_BYTES[index]}"
        )
    return index


def thread_count(function: str, threads: int | None) -> int:
    """`threads`, or what torch and OpenMP would use."""
    if threads is None:
        return C.default_threads()
    if threads < 1:
        raise ValueError(f"{function}: threads is {threads}; allowed: 1 or more")
    return threads


def check_chunk_size(function: str, chunk_size: int) -> None:
    if not MIN_CHUNK_SIZE <= chunk_size <= C.MAX_CHUNK_BYTES or chunk_size % MIN_CHUNK_SIZE:
        raise ValueError(
            f"{function}: chunk_size is {chunk_size}; "
            f"allowed: a multiple of {MIN_CHUNK_SIZE} from {MIN_CHUNK_SIZE} to {C.MAX_CHUNK_BYTES}"
        )


def encode(codec: str, data: Any, layout: str, threads: int | None, chunk_size: int) -> bytes:
    """The frame of `data`; codec.huffman.encode and codec.lzw.encode say what the arguments mean."""
    function = f"codec.{codec}.encode"
    source, dtype = as_bytes(function, "data", data)
    layout_id = _layout(function, layout, dtype, source.size)
    check_chunk_size(function, chunk_size)
    chunks = -(-source.size // chunk_size)
    lengths = np.zeros(chunks, dtype=np.int64)
    checksums = np.zeros(chunks, dtype="<u8")
    head = HEADER_BYTES + 12 * chunks
    blob, address = C.encode_chunks(
        CODECS[codec], layout_id, source.ctypes.data, source.size, chunk_size, head, lengths.ctypes.data,
        checksums.ctypes.data, thread_count(function, threads),
    )  # fmt: skip
    tables = lengths.astype("<u4").tobytes() + checksums.tobytes()
    fields = (MAGIC, VERSION, CODECS[codec], layout_id, 0, source.size, chunk_size, chunks)
    check = xxhash.xxh3_64_intdigest(_HEADER.pack(*fields, 0)[:_CHECKED_HEADER_BYTES] + tables)
    ctypes.memmove(address, _HEADER.pack(*fields, check) + tables, head)
    return blob


def new_bytes(size: int) -> tuple[bytes, np.ndarray]:
    """New bytes and their memory, to be filled before anybody else sees them: no copy of what may be gigabytes."""
    blob, address = C.new_bytes(size)
    return blob, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


@dataclass(frozen=True)
class Header:
    """The first HEADER_BYTES of a frame. Nothing is allocated before they are found to be possible."""

    data: np.ndarray
    codec: int
    layout: int
    size: int
    chunk_size: int
    chunks: int
    check: int

    @property
    def tables_size(self) -> int:
        return 12 * self.chunks


def parse_header(function: str, data: np.ndarray) -> Header:
    """Reads the start of a frame; raises CorruptDataError."""
    if data.size < HEADER_BYTES:
        raise CorruptDataError(f"{function}: blob has {data.size} bytes; a frame has {HEADER_BYTES} or more")
    data = data[:HEADER_BYTES]
    magic, version, codec, layout, reserved, size, chunk_size, chunks, check = _HEADER.unpack(data.data)
    if magic != MAGIC:
        raise CorruptDataError(f"{function}: blob starts with {magic!r}; a frame starts with {MAGIC!r}")
    if version != VERSION:
        raise CorruptDataError(f"{function}: blob has format version {version}; this version reads {VERSION}")
    if (
        codec not in CODECS.values()
        or layout >= len(LAYOUTS)
        or reserved
        or not MIN_CHUNK_SIZE <= chunk_size <= C.MAX_CHUNK_BYTES
        or chunk_size % MIN_CHUNK_SIZE
        or size % ELEMENT_BYTES[layout]
        or chunks != -(-size // chunk_size)
    ):
        raise CorruptDataError(f"{function}: the header holds values that no encoder writes")
    return Header(data, codec, layout, size, chunk_size, chunks, check)


def parse_tables(function: str, header: Header, tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lengths and checksums of a frame's payloads, checked against the header; raises CorruptDataError."""
    digest = xxhash.xxh3_64(header.data[:_CHECKED_HEADER_BYTES].data)
    digest.update(tables.data)
    if digest.intdigest() != header.check:
        raise CorruptDataError(f"{function}: the header's checksum does not match")
    lengths = np.frombuffer(tables[: 4 * header.chunks].tobytes(), dtype="<u4").astype(np.int64)
    if lengths.size and lengths.max() > header.chunk_size + 1:
        raise CorruptDataError(f"{function}: a chunk is longer than any encoder writes")
    return lengths, np.frombuffer(tables[4 * header.chunks :].tobytes(), dtype="<u8")


def parse(function: str, blob: Any) -> Frame:
    """Reads and checks a frame's header and tables; raises CorruptDataError."""
    data, _ = as_bytes(function, "blob", blob)
    header = parse_header(function, data)
    tables_end = HEADER_BYTES + header.tables_size
    if tables_end > data.size:
        raise CorruptDataError(
            f"{function}: blob has {data.size} bytes; its {header.chunks} chunks' tables need {tables_end}"
        )
    lengths, checksums = parse_tables(function, header, data[HEADER_BYTES:tables_end])
    frame = Frame.of(header, data, tables_end, lengths, checksums)
    if frame.end != data.size:
        raise CorruptDataError(f"{function}: blob has {data.size} bytes; its chunks do not fill it exactly")
    return frame


def _output(function: str, out: Any, size: int) -> tuple[Any, np.ndarray]:
    if out is None:
        return new_bytes(size)
    memory, _ = as_bytes(function, "out", out)
    here = out.ctypes.data if isinstance(out, np.ndarray) else out.data_ptr() if hasattr(out, "data_ptr") else None
    if here is not None and size and memory.ctypes.data != here:
        raise ValueError(f"{function}: out is not contiguous in the CPU's memory; allowed: one that is")
    if memory.size != size or not memory.flags.writeable:
        raise ValueError(
            f"{function}: out has {memory.size} bytes, writeable: {memory.flags.writeable}; allowed: {size}, writeable"
        )
    return out, memory


def decode(codec: str, blob: Any, start: int, stop: int | None, out: Any, threads: int | None, max_size: int) -> Any:
    """Bytes start..stop of what a frame holds; codec.huffman.decode says what the arguments mean."""
    function = f"codec.{codec}.decode"
    frame = parse(function, blob)
    if frame.codec != CODECS[codec]:
        raise CorruptDataError(f"{function}: blob was written by codec id {frame.codec}; wanted: {CODECS[codec]}")
    stop = frame.size if stop is None else stop
    if not 0 <= start <= stop <= frame.size:
        raise ValueError(f"{function}: start, stop are {start}, {stop}; allowed: 0 <= start <= stop <= {frame.size}")
    if stop - start > max_size:
        raise CorruptDataError(f"{function}: blob says that it holds {stop - start} bytes; max_size is {max_size}")
    result, memory = _output(function, out, stop - start)
    decode_range(function, frame, start, stop, memory, thread_count(function, threads))
    return result


def decode_range(function: str, frame: Frame, start: int, stop: int, out: np.ndarray, threads: int) -> None:
    """Decodes bytes start..stop of a frame to out, uint8 [stop - start]; reads and checks the chunks that hold them."""
    if start == stop:
        return
    first, last = start // frame.chunk_size, -(-stop // frame.chunk_size)
    begin, end = first * frame.chunk_size, min(last * frame.chunk_size, frame.size)
    whole = begin == start and end == stop
    target = out if whole else np.empty(end - begin, dtype=np.uint8)
    lengths, offsets = frame.lengths[first:last].copy(), frame.offsets[first:last].copy()
    sums = frame.checksums[first:last].copy()
    bad = C.decode_chunks(
        frame.codec, frame.layout, frame.data.ctypes.data, offsets.ctypes.data, lengths.ctypes.data, sums.ctypes.data,
        last - first, frame.chunk_size, target.ctypes.data, target.size, threads,
    )  # fmt: skip
    if bad is not None:
        raise CorruptDataError(f"{function}: chunk {first + bad[0]}: {bad[1]}")
    if not whole:
        out[:] = target[start - begin : stop - begin]


def info(blob: Any) -> FrameInfo:
    """What a frame's header says; raises CorruptDataError when its header or tables are damaged."""
    frame = parse("codec.info", blob)
    codec = next(name for name, number in CODECS.items() if number == frame.codec)
    return FrameInfo(codec, LAYOUTS[frame.layout], frame.size, frame.data.size, frame.chunk_size, len(frame.lengths))


def entropy(data: Any, layout: str = "auto") -> float:
    """Order-0 entropy of `data` in bits per byte: what an ideal code for each symbol of each plane would take.

    layout: as in codec.huffman.encode. Raises ValueError when the data is no whole number of elements.
    """
    source, dtype = as_bytes("codec.entropy", "data", data)
    layout_id = _layout("codec.entropy", layout, dtype, source.size)
    if not source.size:
        return 0.0
    counts = np.zeros((PLANES[layout_id], 256), dtype=np.int64)
    C.count_symbols(layout_id, source.ctypes.data, source.size, counts.ctypes.data)
    share = counts / counts.sum(axis=1, keepdims=True)
    bits = -np.sum(share * np.log2(share, out=np.zeros_like(share), where=share > 0))
    return float(bits / ELEMENT_BYTES[layout_id])
