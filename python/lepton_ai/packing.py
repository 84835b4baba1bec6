"""Whole files and pipes through the codec: what `lepton pack` and `lepton unpack` do."""

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lepton_kernels import codec
from lepton_kernels._whole_file import whole_file

SUFFIX = ".lptn"
_PIECE = 4 << 20  # bytes read at a time

Progress = Callable[[int], None]  # told how many more bytes of the source were read


@dataclass(frozen=True)
class PackReport:
    """Bytes in, bytes out, and what an ideal order-0 code (Huffman's limit) would take, by samples."""

    original_bytes: int
    coded_bytes: int
    entropy_bytes: float
    codec: str

    @property
    def ratio(self) -> float:
        return self.coded_bytes / self.original_bytes if self.original_bytes else 1.0

    def __str__(self) -> str:
        text = f"{self.original_bytes:,} -> {self.coded_bytes:,} bytes, ratio {self.ratio:.3f} ({self.codec})"
        if self.original_bytes:
            text += f"; order-0 entropy {self.entropy_bytes / self.original_bytes:.3f}"
        if self.codec == "lzw" and self.entropy_bytes < self.coded_bytes:
            text += ": huffman would be smaller"
        return text


@contextmanager
def reading(path: Path | None) -> Iterator[BinaryIO]:
    """A file, or standard input."""
    if path is None:
        yield sys.stdin.buffer
    else:
        with path.open("rb") as file:
            yield file


@contextmanager
def writing(path: Path | None, overwrite: bool, source: BinaryIO) -> Iterator[BinaryIO]:
    """A file that is complete under its name or not there at all, with the permissions of `source`; or standard output.

    Raises ValueError where a terminal would be written to, FileExistsError where the file is there and must not be.
    """
    if path is None:
        if sys.stdout.isatty():
            raise ValueError("output is a terminal; allowed: a file (-o FILE) or a pipe")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if path.exists() and not overwrite:
        raise FileExistsError(f"output is {path}, which exists; --force replaces it")
    path = path.resolve()  # through a link to what it names
    if path.exists() and not path.is_file():  # a pipe or a device
        with path.open("wb") as file:
            yield file
        return
    found = os.fstat(source.fileno())
    with whole_file(path, stat.S_IMODE(found.st_mode) if stat.S_ISREG(found.st_mode) else None) as file:
        yield file


def pack(
    source: BinaryIO, target: BinaryIO, codec_name: str, layout: str, threads: int | None, progress: Progress
) -> PackReport:
    """Codes all of `source` into `target` (codec.Writer says how)."""
    with codec.Writer(target, codec=codec_name, layout=layout, threads=threads) as writer:
        while piece := source.read(_PIECE):
            writer.write(piece)
            progress(len(piece))
    return PackReport(writer.original_bytes, writer.coded_bytes, writer.entropy_bytes, codec_name)


def unpack(source: BinaryIO, target: BinaryIO, threads: int | None, progress: Progress) -> int:
    """Decodes all of `source` into `target`; returns the bytes written. Raises CorruptDataError."""
    reader = codec.Reader(source, threads=threads)
    memory = memoryview(bytearray(codec.stream.DEFAULT_FRAME_SIZE))
    written = 0
    while n := reader.readinto(memory):
        codec.stream.write_all(target, memory[:n])
        written += n
        progress(n)
    return written


def packed_name(path: Path) -> Path:
    """Where `lepton pack FILE` writes to."""
    return path.with_name(path.name + SUFFIX)


def unpacked_name(path: Path) -> Path:
    """Where `lepton unpack FILE` writes to. Raises ValueError for a file of another suffix."""
    if path.suffix != SUFFIX or path.name == SUFFIX:
        raise ValueError(f"file is {path}, without the suffix {SUFFIX}; say where to write with -o")
    return path.with_suffix("")
