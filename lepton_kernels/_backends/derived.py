"""What a backend derives from a saved weight (tiles, sums): made on first use, kept while it lives unchanged."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

T = TypeVar("T")


class _Entry(NamedTuple):
    value: Any
    sources: tuple[tuple[StorageWeakRef, int], ...]  # the weak storage and version of every tensor it was made from


def version(tensor: Tensor) -> int:
    """How often a tensor was written in place; inference tensors do not count and stand at 0."""
    return 0 if tensor.is_inference() else tensor._version


class Derived(Generic[T]):
    """One kind of derived value, found again by the storages of its sources and a few plain values."""

    # The key holds a storage's address; the entry's weak reference keeps that address from being given to another.
    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Entry] = {}

    def get(self, sources: tuple[Tensor, ...], plain: tuple[int, ...], make: Callable[[], T]) -> T:
        """The value that make() gave for these sources, or a new one if they are new or were written since."""
        places = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()) for t in sources]
        key = (plain, *places)
        entry = self._entries.get(key)
        if entry is not None and all(
            not storage.expired() and version(tensor) == seen
            for tensor, (storage, seen) in zip(sources, entry.sources, strict=True)
        ):
            return entry.value
        value = make()
        # Of a list, and without an error where it is gone: other threads add and remove entries meanwhile.
        for old, entry in list(self._entries.items()):
            if any(storage.expired() for storage, _ in entry.sources):
                self._entries.pop(old, None)
        self._entries[key] = _Entry(value, tuple((StorageWeakRef(t.untyped_storage()), version(t)) for t in sources))
        return value
