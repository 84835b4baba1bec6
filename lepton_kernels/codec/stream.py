"""Coded streams: frames one after another, the last one empty. Any number of bytes, from and to files, pipes, sockets.

Writing needs no seek, and reading none either. From a regular file, reading is random access: only the chunks that hold
the bytes asked for are read and decoded.
"""

import bisect
import builtins
import dataclasses
import io
import os
import stat
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np

from lepton_kernels._runtime import C
from lepton_kernels.codec import frame
from lepton_kernels.codec.frame import CorruptDataError

DEFAULT_FRAME_SIZE = 16 << 20
MAX_FRAME_SIZE = 1 << 30  # what a reader believes a frame to hold

# "auto" compares the layouts by this many pieces of so many bytes.
_SAMPLES, _SAMPLE_BYTES = 16, 8192
_NO_DIFFERENCE = 0.003  # of the size: what samples of equal entropy may differ by


def _entropy_bytes(data: np.ndarray, layout: int) -> float:
    """What an ideal order-0 code of the layout's planes would make of a sample of data, bytes a byte."""
    step = max(data.size // _SAMPLES, _SAMPLE_BYTES)
    counts = np.zeros((frame.PLANES[layout], 256), dtype=np.int64)
    for start in range(0, data.size, step):
        start -= start % 4
        piece = data[start : start + _SAMPLE_BYTES]
        C.count_symbols(layout, piece.ctypes.data, piece.size - piece.size % 4, counts.ctypes.data)
    share = counts / max(counts[0].sum(), 1)
    bits = -np.sum(share * np.log2(share, out=np.zeros_like(share), where=share > 0))
    return float(bits / frame.ELEMENT_BYTES[layout] / 8)


def best_layout(data: np.ndarray) -> tuple[str, float]:
    """The layout whose planes have the lowest order-0 entropy in a sample of data, uint8 [size], and that entropy as a
    part of the size."""
    names = ("bytes", "bf16", "fp32") if data.size % 4 == 0 else ("bytes",)  # fp16 is split as bf16 is
    entropies = {name: _entropy_bytes(data, frame.LAYOUTS.index(name)) for name in names}
    best = min(names, key=lambda name: entropies[name] + _NO_DIFFERENCE * names.index(name))
    return best, entropies[best]


def write_all(file: BinaryIO, data: Any) -> None:
    """Writes all of a bytes-like object, to files too whose `write` takes only a part. Raises BlockingIOError where it
    takes nothing."""
    rest = memoryview(data).cast("B")
    while rest:
        written = file.write(rest)
        if written is None:
            raise BlockingIOError("the file takes no more bytes now, and waits for nobody")
        rest = rest[written:]


class Writer(io.RawIOBase):
    """Codes what is written to it and writes frames to a file object, which `close` closes only if it `owns` it.

    A stream that was not closed is refused by every reader: `abort` (or an exception in a `with` block) leaves it so.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        codec: str = "huffman",
        layout: str = "auto",
        threads: int | None = None,
        frame_size: int = DEFAULT_FRAME_SIZE,
        chunk_size: int = frame.DEFAULT_CHUNK_SIZE,
        owns: bool = False,
    ) -> None:
        if codec not in frame.CODECS:
            raise ValueError(f"codec.open: codec is {codec!r}; allowed: {', '.join(frame.CODECS)}")
        if layout not in ("auto", *frame.LAYOUTS):
            raise ValueError(f"codec.open: layout is {layout!r}; allowed: auto, {', '.join(frame.LAYOUTS)}")
        frame.check_chunk_size("codec.open", chunk_size)
        if not chunk_size <= frame_size <= MAX_FRAME_SIZE or frame_size % 4:
            raise ValueError(
                f"codec.open: frame_size is {frame_size}; allowed: a multiple of 4 from chunk_size {chunk_size} "
                f"to {MAX_FRAME_SIZE}"
            )
        self._file, self._owns, self._codec, self._layout = file, owns, codec, layout
        self._threads, self._chunk_size = frame.thread_count("codec.open", threads), chunk_size
        self._pending = np.empty(frame_size, dtype=np.uint8)
        self._filled = 0
        self.original_bytes = self.coded_bytes = 0
        self.entropy_bytes = 0.0  # what an ideal order-0 code would take, by samples

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Takes all of a bytes-like object; writes a frame to the file whenever one is full."""
        if self.closed:
            raise ValueError("codec.Writer.write: the stream is closed")
        source, _ = frame.as_bytes("codec.Writer.write", "data", data)
        taken = 0
        while taken < source.size:
            n = min(source.size - taken, self._pending.size - self._filled)
            self._pending[self._filled : self._filled + n] = source[taken : taken + n]
            self._filled += n
            taken += n
            if self._filled == self._pending.size:
                self._write_frame()
        self.original_bytes += taken
        return taken

    def _write_frame(self) -> None:
        data = self._pending[: self._filled]
        layout = self._layout
        best, entropy = best_layout(data)
        self.entropy_bytes += entropy * data.size
        if self._codec == "lzw":
            layout = "bytes"
        elif layout == "auto":
            layout = best
        elif data.size % frame.ELEMENT_BYTES[frame.LAYOUTS.index(layout)]:
            layout = "bytes"  # the last frame may hold a part of an element
        blob = frame.encode(self._codec, data, layout, self._threads, self._chunk_size)
        write_all(self._file, blob)
        self.coded_bytes += len(blob)
        self._filled = 0

    def close(self) -> None:
        """Writes what is pending and the end of the stream; flushes the file, which stays open."""
        if self.closed:
            return
        try:
            if self._filled:
                self._write_frame()
            self._write_frame()  # an empty one: the end
            self._file.flush()
        finally:
            self._close()

    def abort(self) -> None:
        """Closes without an end: what was written so far is no whole stream and will not pass for one."""
        if not self.closed:
            self._close()

    def _close(self) -> None:
        self._pending = self._pending[:0]
        super().close()
        if self._owns:
            self._file.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        if hasattr(self, "_pending"):  # never an end that nobody asked for
            self.abort()


@dataclass(frozen=True)
class _Place:
    """A frame: its first byte's place in the text, and its payloads' place in the file (-1: in frame.data)."""

    start: int
    frame: frame.Frame
    payloads_at: int

    @property
    def stop(self) -> int:
        return self.start + self.frame.size


class Reader(io.RawIOBase):
    """Reads a coded stream from a file object, from its current position to its end.

    Of a regular file only what is asked for is read, with `seek` and `tell` over the decoded bytes; a pipe is read from
    end to end. `read` raises CorruptDataError when it meets damage, or the end of the file before that of the stream;
    what it returned before is right.
    """

    def __init__(
        self, file: BinaryIO, *, threads: int | None = None, max_frame_size: int = MAX_FRAME_SIZE, owns: bool = False
    ) -> None:
        self._file, self._owns, self._max_frame_size = file, owns, max_frame_size
        self._threads = frame.thread_count("codec.open", threads)
        self._of_file = self._is_file(file)
        self._next_at = file.tell() if self._of_file else 0  # of the next frame, in the file
        self._position = 0
        self._places: list[_Place] = []  # all frames so far; of a pipe the last one alone
        self._size: int | None = None  # of the text, once its end was seen
        self._chunk: tuple[int, int, np.ndarray] | None = None  # frame's start, chunk, its bytes

    @staticmethod
    def _is_file(file: BinaryIO) -> bool:
        """Whether it is a regular file itself, and not a view of one, as gzip.GzipFile is."""
        raw = getattr(file, "raw", file)
        return isinstance(raw, io.FileIO) and stat.S_ISREG(os.fstat(raw.fileno()).st_mode)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("codec.Reader: the stream is closed")

    def close(self) -> None:
        """Closes the stream, and the file if the stream `owns` it."""
        if not self.closed and self._owns:
            self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._of_file

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place in the decoded bytes. Of frames on the way only the headers are read."""
        if not self.seekable():
            raise io.UnsupportedOperation("codec.Reader.seek: the stream is no regular file")
        self._check_open()
        if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            raise ValueError(f"codec.Reader.seek: whence is {whence}; allowed: 0, 1, 2")
        while whence == os.SEEK_END and self._size is None:
            self._read_frame()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence, self._size or 0)
        if base + offset < 0:
            raise ValueError(f"codec.Reader.seek: offset is {offset} from {base}; allowed: 0 or more in all")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` from one frame, so a pipe is not waited for while there is something to return."""
        self._check_open()
        out = np.frombuffer(memoryview(buffer).cast("B"), dtype=np.uint8)
        if not out.flags.writeable:
            raise TypeError(f"codec.Reader.readinto: buffer is {type(buffer).__name__}; allowed: a writable one")
        place = self._place_of(self._position)
        if place is None or not out.size:
            return 0
        begin = self._position - place.start
        out = out[: place.frame.size - begin]
        self._decode(place, begin, out)
        self._position += out.size
        return int(out.size)

    def readall(self) -> bytes:
        """All that is left, frame by frame: as fast as readinto."""
        parts, memory = [], memoryview(bytearray(DEFAULT_FRAME_SIZE))
        while n := self.readinto(memory):
            parts.append(bytes(memory[:n]))
        return b"".join(parts)

    def _place_of(self, position: int) -> _Place | None:
        while self._size is None and (not self._places or position >= self._places[-1].stop):
            self._read_frame()
        i = bisect.bisect_right(self._places, position, key=lambda place: place.start) - 1
        return self._places[i] if i >= 0 and position < self._places[i].stop else None

    def _decode(self, place: _Place, begin: int, out: np.ndarray) -> None:
        """The bytes of a frame from `begin` on: whole chunks at once, in parallel; parts from the last chunk seen."""
        size = place.frame.chunk_size
        while out.size:
            at, left = begin % size, place.frame.size - begin
            if at == 0 and (out.size >= size or out.size == left):
                n = out.size if out.size == left else out.size - out.size % size
                self._decode_chunks(place, begin, begin + n, out[:n])
            else:
                n = min(out.size, size - at, left)
                out[:n] = self._chunk_of(place, begin // size)[at : at + n]
            out, begin = out[n:], begin + n

    def _chunk_of(self, place: _Place, index: int) -> np.ndarray:
        if self._chunk is None or self._chunk[:2] != (place.start, index):
            size = place.frame.chunk_size
            data = np.empty(min(size, place.frame.size - index * size), dtype=np.uint8)
            self._decode_chunks(place, index * size, index * size + data.size, data)
            self._chunk = (place.start, index, data)
        return self._chunk[2]

    def _decode_chunks(self, place: _Place, start: int, stop: int, out: np.ndarray) -> None:
        coded = place.frame
        if place.payloads_at >= 0:
            chunks = slice(start // coded.chunk_size, -(-stop // coded.chunk_size))
            first = int(coded.offsets[chunks.start])
            size = int(coded.offsets[chunks.stop - 1] + coded.lengths[chunks.stop - 1]) - first
            data = self._read(size, place.payloads_at + first)
            coded = dataclasses.replace(coded, data=data, offsets=coded.offsets - first)
        frame.decode_range("codec.Reader.read", coded, start, stop, out, self._threads)

    def _read(self, size: int, at: int) -> np.ndarray:
        """The next `size` bytes of a pipe, or those from `at` on of a file."""
        data, got = np.empty(size, dtype=np.uint8), 0
        while got < size:
            if self._of_file:
                n = os.preadv(self._file.fileno(), [data[got:].data], at + got)
            elif hasattr(self._file, "readinto"):
                n = self._file.readinto(data[got:].data)
            else:
                part = self._file.read(size - got)
                n = None if part is None else len(part)
                data[got : got + (n or 0)] = np.frombuffer(part or b"", dtype=np.uint8)
            if n is None:
                raise BlockingIOError("codec.Reader.read: the source has nothing to read now, and waits for nobody")
            if n == 0:
                raise CorruptDataError(
                    f"codec.Reader.read: the stream ends after {self._text_end()} bytes, before its end"
                )
            got += n
        return data

    def _text_end(self) -> int:
        return self._places[-1].stop if self._places else 0

    def _read_frame(self) -> None:
        """Reads the next frame's header and tables, and of a pipe its payloads."""
        function, start, at = "codec.Reader.read", self._text_end(), self._next_at
        header = frame.parse_header(function, self._read(frame.HEADER_BYTES, at))
        if header.size > self._max_frame_size:
            raise CorruptDataError(
                f"{function}: a frame says that it holds {header.size} bytes; max_frame_size is {self._max_frame_size}"
            )
        at += frame.HEADER_BYTES
        lengths, checksums = frame.parse_tables(function, header, self._read(header.tables_size, at))
        at += header.tables_size
        payloads = int(lengths.sum())
        self._next_at = at + payloads
        if header.size == 0:
            self._end()
            return
        data = np.empty(0, dtype=np.uint8) if self._of_file else self._read(payloads, at)
        place = _Place(start, frame.Frame.of(header, data, 0, lengths, checksums), at if self._of_file else -1)
        if not self._of_file:
            self._places.clear()
        self._places.append(place)

    def _end(self) -> None:
        size = self._text_end()
        try:
            self._read(1, self._next_at)
        except CorruptDataError:
            self._size = size
            return
        raise CorruptDataError(f"codec.Reader.read: bytes follow the end of the stream, which holds {size} bytes")


def open(file: str | os.PathLike[str] | BinaryIO, mode: str = "rb", **options: Any) -> "Reader | Writer":
    """A coded stream for reading ("rb") or writing ("wb", "xb"): a path, or a file object, which stays open.

    Writing: codec "huffman" or "lzw"; layout as in codec.huffman.encode, where "auto" picks one for each frame by the
    entropy of a sample; threads; frame_size, bytes in memory at a time; chunk_size. Reading: threads; max_frame_size.
    The file's own errors come through. `close` of a Writer ends the stream; without it the file is refused.
    """
    if mode not in ("rb", "wb", "xb"):
        raise ValueError(f"codec.open: mode is {mode!r}; allowed: rb, wb, xb")
    kind: type[Reader | Writer] = Reader if mode == "rb" else Writer
    if not isinstance(file, str | os.PathLike):
        return kind(file, **options)
    if kind is Writer:
        Writer(io.BytesIO(), **options).abort()  # wrong options must not cost the file that is there
    opened = cast(BinaryIO, builtins.open(file, mode))  # noqa: SIM115 (the stream closes it)
    try:
        return kind(opened, owns=True, **options)
    except BaseException:
        opened.close()
        raise
