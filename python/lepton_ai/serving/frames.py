"""Messages between the server and a replica: a list of parts, each a number and bytes, over a Unix socket."""

import asyncio
import struct
from collections.abc import Sequence
from typing import BinaryIO

Part = tuple[int, bytes]  # what the number means is the message's own affair
_COUNT, _PART = struct.Struct("<I"), struct.Struct("<iI")


def packed(parts: Sequence[Part]) -> bytes:
    """The bytes of a message."""
    pieces = [_COUNT.pack(len(parts))]
    for number, data in parts:
        pieces += [_PART.pack(number, len(data)), data]
    return b"".join(pieces)


async def read(reader: asyncio.StreamReader) -> list[Part]:
    """The next message. Raises asyncio.IncompleteReadError where the other side is gone."""
    (count,) = _COUNT.unpack(await reader.readexactly(_COUNT.size))
    parts = []
    for _ in range(count):
        number, size = _PART.unpack(await reader.readexactly(_PART.size))
        parts.append((number, await reader.readexactly(size)))
    return parts


def read_blocking(stream: BinaryIO) -> list[Part] | None:
    """The next message, or None where the other side is gone."""

    def exactly(size: int) -> bytes:
        data = stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    try:
        parts = []
        for _ in range(_COUNT.unpack(exactly(_COUNT.size))[0]):
            number, size = _PART.unpack(exactly(_PART.size))
            parts.append((number, exactly(size)))
        return parts
    except (EOFError, ConnectionError):
        return None
