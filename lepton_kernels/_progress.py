"""A progress line on stderr; nothing at all when that is not a terminal."""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
_WIDTH = 30


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """Yields the items of a sized collection and shows how many have been taken."""
    if not sys.stderr.isatty() or not isinstance(items, Sized) or not len(items):
        yield from items
        return
    total = len(items)
    try:
        for done, item in enumerate(items):
            bar = "#" * (_WIDTH * done // total)
            print(f"\r{what} [{bar:{_WIDTH}}] {done}/{total}", end="", file=sys.stderr, flush=True)
            yield item
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
