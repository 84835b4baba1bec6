"""The model file: a valid safetensors file whose large tensors may be entropy-coded. docs/formats.md specifies it.

A coded tensor is a U8 tensor that holds a codec frame; its own dtype and shape stand in `__metadata__`, beside a
checksum of every tensor that is not coded. Works on bytes: no torch here, so a file can be listed and verified without.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from lepton_kernels import codec
from lepton_kernels._progress import progress
from lepton_kernels._whole_file import whole_file
from lepton_kernels.codec import CorruptDataError

FORMAT_VERSION = 1
CODECS = ("huffman", "lzw", "none")
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4,
    "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
# Which symbols a dtype is coded as, else bytes, packed 4-bit values among them.
_LAYOUT = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_MIN_CODED_BYTES = 4096  # smaller tensors are left alone: a frame would cost what it saves
_WORD = 8
_AHEAD_BYTES = 64 << 20  # fetched from the disk while a tensor is decoded
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_VERSION_KEY, _TENSORS_KEY, _CHECK_KEY = "lepton.version", "lepton.tensors", "lepton.checksum"


@dataclass(frozen=True)
class Pending:
    """A tensor to be written by `codec`: `data()` gives its bytes, uint8 [size], when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]
    codec: str

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its dtype and shape when decoded, and where its bytes are (begin..end of the file)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    begin: int
    end: int
    checksum: str | None  # of the bytes as they are stored; a coded tensor's frame has its own
    frame_size: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def stored_size(self) -> int:
        return self.end - self.begin

    @property
    def ratio(self) -> float:
        """Stored bytes over decoded bytes."""
        return self.stored_size / self.size if self.size else 1.0


def _digest(header: dict[str, Any]) -> str:
    """XXH3-64 of everything the header says but this."""
    metadata = {key: value for key, value in header.get("__metadata__", {}).items() if key != _CHECK_KEY}
    canonical = json.dumps({**header, "__metadata__": metadata}, sort_keys=True, ensure_ascii=True)
    return xxhash.xxh3_64_hexdigest(canonical.encode())


def _header_bytes(header: dict[str, Any], length: int | None = None) -> bytes:
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    if length is None:
        length = -(-len(text) // 8) * 8
    return length.to_bytes(8, "little") + text.ljust(length)


def encode(data: np.ndarray, dtype: str, codec_name: str) -> bytes | None:
    """The frame of a tensor's bytes, uint8 [size], as it would stand in a file; None where coding does not pay."""
    if codec_name == "none" or data.size < _MIN_CODED_BYTES:
        return None
    if codec_name == "lzw":
        frame = codec.lzw.encode(data)
    else:
        frame = codec.huffman.encode(data, layout=_LAYOUT.get(dtype, "bytes"))
    return frame if len(frame) < data.size * 31 // 32 else None


def write(path: str | os.PathLike[str], tensors: Sequence[Pending], metadata: dict[str, str]) -> None:
    """Writes a model file atomically: it is complete under `path`, or not there at all.

    One tensor is in memory at a time. Raises ValueError for an unknown codec or dtype, OSError when writing fails.
    """
    for codec_name in sorted({pending.codec for pending in tensors} - set(CODECS)):
        raise ValueError(f"save: codec is {codec_name!r}; allowed: {', '.join(CODECS)}")
    with whole_file(Path(path)) as file:
        _write(file, tensors, metadata)


def _write(file: BinaryIO, tensors: Sequence[Pending], metadata: dict[str, str]) -> None:
    # Falling element size keeps plain tensors aligned; frames are padded to whole words for the same reason.
    order = sorted(tensors, key=lambda pending: (-DTYPE_BYTES[pending.dtype], pending.name))
    # Room for the header is reserved with the longest numbers that it may hold, so that data is written only once.
    most = sum(2 * pending.size + 4096 for pending in order)
    header: dict[str, Any] = {
        p.name: {"dtype": p.dtype, "shape": [most, *p.shape], "data_offsets": [most, most]} for p in order
    }
    table: dict[str, Any] = {
        p.name: {"dtype": p.dtype, "shape": p.shape, "codec": p.codec, "frame": most, "xxh3": 16 * "0"} for p in order
    }
    texts = {**metadata, _VERSION_KEY: str(FORMAT_VERSION), _TENSORS_KEY: json.dumps(table), _CHECK_KEY: 16 * "0"}
    room = len(_header_bytes({"__metadata__": texts, **header})) - 8
    file.write(bytes(8 + room))

    position = 0
    for pending in progress(order, "writing"):
        data = pending.data()
        frame = encode(data, pending.dtype, pending.codec)
        if frame is None:
            stored: bytes | memoryview = data.data if data.size else b""
            table[pending.name] = {"codec": "none", "xxh3": xxhash.xxh3_64_hexdigest(stored)}
            dtype, shape = pending.dtype, list(pending.shape)
        else:
            stored = frame
            table[pending.name] = {
                "dtype": pending.dtype, "shape": list(pending.shape), "codec": pending.codec, "frame": len(frame),
            }  # fmt: skip
            dtype, shape = "U8", [len(frame) + -len(frame) % _WORD]
        padding = b"" if frame is None else bytes(-len(frame) % _WORD)
        end = position + len(stored) + len(padding)
        file.write(stored)
        file.write(padding)
        header[pending.name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
        del data, frame, stored  # before the next one is made
    texts[_TENSORS_KEY] = json.dumps(table)
    complete = {"__metadata__": texts, **header}
    texts[_CHECK_KEY] = _digest(complete)
    file.seek(0)
    file.write(_header_bytes(complete, room))


@dataclass
class ModelFile:
    """An open file's header. `read` gives one tensor's bytes, checked; nothing else of the file is touched."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "ModelFile":
        """Reads and checks the header of any safetensors file, ours or not.

        Raises CorruptDataError for a file that breaks the format or whose header's checksum does not match,
        ValueError for a format version that this release does not know, OSError when it can not be read.
        """
        self = cls(Path(path))
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CorruptDataError(f"{path}: no safetensors file: {size} bytes, a header of {length}")
            text = file.read(length)
        try:
            header = json.loads(text)
            self._read_header(header, 8 + length, size)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, CorruptDataError) or "format version" in str(error):
                raise
            raise CorruptDataError(f"{path}: the header is no safetensors header: {error}") from error
        return self

    def _read_header(self, header: dict[str, Any], data_at: int, size: int) -> None:
        self.metadata = dict(header.get("__metadata__", {}))
        ours = _VERSION_KEY in self.metadata
        if ours and self.metadata[_VERSION_KEY] != str(FORMAT_VERSION):
            raise ValueError(
                f"{self.path}: format version {self.metadata[_VERSION_KEY]}; this release reads {FORMAT_VERSION}"
            )
        if ours and self.metadata.get(_CHECK_KEY) != _digest(header):
            raise CorruptDataError(f"{self.path}: the header's checksum does not match")
        table = json.loads(self.metadata.get(_TENSORS_KEY, "{}"))
        position = data_at
        tensors = [(name, spec) for name, spec in header.items() if name != "__metadata__"]
        for name, spec in sorted(tensors, key=lambda item: item[1]["data_offsets"]):
            begin, end = (data_at + int(offset) for offset in spec["data_offsets"])
            stored = math.prod(spec["shape"]) * DTYPE_BYTES[spec["dtype"]]
            if begin != position or end - begin != stored or any(n < 0 for n in spec["shape"]):
                raise CorruptDataError(f"{self.path}: tensor {name}: its shape or place does not fit the file")
            position = end
            own = table.get(name, {})
            coded = own.get("codec", "none") != "none"
            real = own if coded else spec
            if coded and own["codec"] not in CODECS:
                raise ValueError(f"tensor {name} has codec {own['codec']!r}")
            shape = tuple(int(n) for n in real["shape"])
            entry = Entry(
                name, real["dtype"], shape, own.get("codec", "none"), begin, end, own.get("xxh3"), own.get("frame", 0)
            )
            if any(n < 0 for n in shape) or entry.dtype not in DTYPE_BYTES or entry.frame_size > entry.stored_size:
                raise ValueError(f"tensor {name} has dtype {entry.dtype} and shape {shape}")
            self.entries[name] = entry
        if position != size:
            raise CorruptDataError(f"{self.path}: the file has {size} bytes; its tensors end at {position}")

    def read(self, name: str, threads: int | None = None) -> np.ndarray:
        """The decoded bytes of one tensor, uint8 [size], writable. Raises CorruptDataError that names the tensor."""
        entry = self.entries[name]
        stored = np.empty(entry.stored_size, dtype=np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.begin)
            view, got = stored.data, 0
            while got < entry.stored_size:
                n = file.readinto(view[got:]) or 0
                if n == 0:
                    raise CorruptDataError(f"{self.path}: tensor {name}: the file ends too early")
                got += n
        if entry.codec == "none":
            if entry.checksum is not None and xxhash.xxh3_64_hexdigest(view) != entry.checksum:
                raise CorruptDataError(f"{self.path}: tensor {name}: its checksum does not match")
            return stored
        try:
            frame = stored[: entry.frame_size]
            found = codec.info(frame)
            if found.size != entry.size or found.codec != entry.codec or stored[entry.frame_size :].any():
                raise CorruptDataError(
                    f"its frame holds {found.size} bytes of {found.codec}, not {entry.size} of {entry.codec}"
                )
            out = np.empty(entry.size, dtype=np.uint8)
            coder = codec.huffman if entry.codec == "huffman" else codec.lzw
            return coder.decode(frame, out=out, threads=threads, max_size=max(entry.size, 1))
        except CorruptDataError as error:
            raise CorruptDataError(f"{self.path}: tensor {name}: {error}") from error

    def read_all(self, threads: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """`read` of every tensor, in the file's order. While one is decoded the system fetches the next ones from the
        disk into its own cache, which takes no memory of the process."""
        with self.path.open("rb", buffering=0) as file:
            for name, entry in self.entries.items():
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), entry.end, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
                yield name, self.read(name, threads)


def inspect(path: str | os.PathLike[str]) -> list[Entry]:
    """The tensors of a file, in its order: dtype, shape, codec, stored and decoded bytes. Reads the header alone.

    Raises CorruptDataError and OSError as ModelFile.open does.
    """
    return list(ModelFile.open(path).entries.values())


def verify(path: str | os.PathLike[str]) -> list[Entry]:
    """Reads, checks and decodes every tensor of a file; the first damaged one raises CorruptDataError with its name.

    Tensors of a safetensors file that is not ours have no checksum: their `checksum` is None and only their place in
    the file is checked.
    """
    file = ModelFile.open(path)
    for _ in file.read_all():
        pass
    return list(file.entries.values())
