"""Files that are complete under their name or not there at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, permissions: int | None = None) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends, and is gone after an exception.

    permissions: its mode bits; None for those of new files. Raises OSError when writing fails.
    """
    temporary = path.parent / f".lepton-{secrets.token_hex(8)}.tmp"
    create = os.O_RDWR | os.O_CREAT | os.O_EXCL
    descriptor = os.open(temporary, create, 0o666 if permissions is None else permissions)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            if permissions is not None:
                os.fchmod(file.fileno(), permissions)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
