"""The mean of float32 gradients over ranks, sent as block-wise int8 or int4 (lepton_kernels.blockwise), in two shots.

Rank r owns the r-th share of a piece of a buffer. Every rank quantizes the piece and sends each owner its share (all to
all); an owner takes the mean of what it got, quantizes that, and sends it to all ranks (all to all again, as shares
differ in size). All ranks decode the same bytes, so they end up with the same bits. Pieces follow each other through
three stages: quantized and sent by the caller, their mean made and sent by one thread, decoded by another. The
exchanges have a process group each, so that the order within a group is that of the pieces on every rank.
"""

import queue
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lepton_kernels import blockwise


class PeerError(RuntimeError):
    """A rank did not answer in time, or is gone; the text names it."""


# Values of a piece for each rank. gloo sends and receives a large message one after the other: over 100 Mbit/s two
# ranks exchange 3.8 MB in 645 ms as one message, in 353 as 16 (302 is what the link takes).
_PIECE = 1 << 18


class _Scattered(NamedTuple):
    """A piece after the first exchange began: the shares of all ranks, what this rank's are received into, and what to
    wait for; the future where it is a buffer's last."""

    piece: Tensor  # f32 [n]
    sizes: list[int]  # values of each rank's share
    received: Tensor  # uint8 [ranks, packed_bytes of this rank's share]
    work: dist.Work
    future: torch.futures.Future[Tensor] | None
    buffer: Tensor


class _Gathered(NamedTuple):
    """A piece after the second exchange began, which receives the means of all shares, one behind the other."""

    scattered: _Scattered
    packed: list[int]  # bytes of each share
    received: Tensor  # uint8 [sum of packed]
    work: dist.Work


def shares_of(n: int, ranks: int) -> list[int]:
    """How many of n values each rank owns: whole blocks, the last ones fewer or none."""
    each = -(-n // (ranks * blockwise.BLOCK)) * blockwise.BLOCK
    return [max(0, min(each, n - rank * each)) for rank in range(ranks)]


class CompressedMean:
    """Two process groups, and the threads of the later stages. Made by all ranks of `group` at once."""

    def __init__(self, bits: int, group: dist.ProcessGroup | None, timeout: float) -> None:
        self.bits, self.timeout = bits, timeout
        self.ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        self.rank = self.ranks.index(dist.get_rank())
        self.bytes_sent = 0
        patience = timedelta(seconds=timeout)
        self._groups = [
            dist.new_group(self.ranks, timeout=patience, use_local_synchronization=True, group_desc=f"lepton-{name}")
            for name in ("scatter", "gather")
        ]
        self._scattered: queue.SimpleQueue[_Scattered | None] = queue.SimpleQueue()
        self._gathered: queue.SimpleQueue[_Gathered | None] = queue.SimpleQueue()
        self._error: Exception | None = None  # of a piece before a buffer's last
        self._threads = [
            threading.Thread(target=target, name=f"lepton-{target.__name__[1:]}", daemon=True)
            for target in (self._send_means, self._decode)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, buffer: Tensor, residual: Tensor | None) -> torch.futures.Future[Tensor]:
        """Replaces buffer, f32 [n] on the CPU, by its mean over the ranks; the future holds it when that is done.

        residual: f32 [n], what earlier calls lost by rounding; it is added, and holds what is lost now (error
        feedback). Every rank makes the same calls in the same order.
        """
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        step = _PIECE * len(self.ranks)
        for begin in range(0, max(buffer.numel(), 1), step):
            part = slice(begin, begin + step)
            is_last = begin + step >= buffer.numel()
            lost = None if residual is None else residual[part]
            self._scatter(buffer[part], lost, future if is_last else None, buffer)
        return future

    def close(self) -> None:
        """Ends the threads, after what was started."""
        self._scattered.put(None)
        for thread in self._threads:
            thread.join(self.timeout)

    def _packed_bytes(self, sizes: Sequence[int]) -> list[int]:
        return [blockwise.packed_bytes(size, self.bits) for size in sizes]

    def _scatter(
        self, piece: Tensor, residual: Tensor | None, future: torch.futures.Future[Tensor] | None, buffer: Tensor
    ) -> None:
        sizes = shares_of(piece.numel(), len(self.ranks))
        packed = self._packed_bytes(sizes)
        sent = torch.empty(sum(packed), dtype=torch.uint8)
        residuals: Sequence[Tensor | None] = [None] * len(sizes) if residual is None else residual.split(sizes)
        for share, lost, out in zip(piece.split(sizes), residuals, sent.split(packed), strict=True):
            blockwise.quantize(share, self.bits, lost, out)
        own = packed[self.rank]
        received = torch.empty(len(sizes), own, dtype=torch.uint8)
        self.bytes_sent += sum(packed) - own
        work = self._exchange(0, received.view(-1), sent, [own] * len(sizes), packed)
        self._scattered.put(_Scattered(piece, sizes, received, work, future, buffer))

    def _exchange(self, which: int, received: Tensor, sent: Tensor, receives: list[int], sends: list[int]) -> dist.Work:
        try:
            return dist.all_to_all_single(received, sent, receives, sends, group=self._groups[which], async_op=True)  # type: ignore[return-value]
        except RuntimeError as error:
            raise self._explained(error) from error

    def _send_means(self) -> None:
        while (piece := self._scattered.get()) is not None:
            try:
                piece.work.wait()
                mean = blockwise.requantize_mean(piece.received, piece.sizes[self.rank], self.bits)
                packed, ranks = self._packed_bytes(piece.sizes), len(self.ranks)
                received = torch.empty(sum(packed), dtype=torch.uint8)
                self.bytes_sent += (ranks - 1) * mean.numel()
                work = self._exchange(1, received, mean.repeat(ranks), packed, [mean.numel()] * ranks)
            except Exception as error:
                self._fail(piece, error)
            else:
                self._gathered.put(_Gathered(piece, packed, received, work))
        self._gathered.put(None)

    def _decode(self) -> None:
        while (gathered := self._gathered.get()) is not None:
            piece, packed, received, work = gathered
            try:
                work.wait()
                for share, size, out in zip(
                    received.split(packed), piece.sizes, piece.piece.split(piece.sizes), strict=True
                ):
                    blockwise.dequantize(share, size, self.bits, out)
                if piece.future is not None:
                    if self._error is not None:
                        raise self._error
                    piece.future.set_result(piece.buffer)
            except Exception as error:
                self._fail(piece, error)

    def _fail(self, piece: _Scattered, error: Exception) -> None:
        """Ends the future of a buffer's last piece; an error of an earlier one waits for it."""
        self._error = self._error or self._explained(error)
        if piece.future is not None and not piece.future.done():
            piece.future.set_exception(self._error)  # type: ignore[arg-type]

    def _explained(self, error: Exception) -> Exception:
        if isinstance(error, PeerError):
            return error
        missing = missing_ranks(self.ranks, min(self.timeout, 5.0))
        if not missing:
            return error
        who = ", ".join(f"rank {rank}" for rank in missing)
        return PeerError(f"SynchronousUpdate: {who} did not answer (timeout {self.timeout:g} s): {error}")


def missing_ranks(ranks: Sequence[int], seconds: float) -> list[int]:
    """Those of `ranks` that do not say within `seconds`, through the job's store, that they came here too."""
    store = dist.PrefixStore("lepton-alive", dist.distributed_c10d._get_default_store())
    deadline = time.monotonic() + seconds
    missing = []
    try:
        store.set(str(dist.get_rank()), "")
        for rank in ranks:
            left = max(deadline - time.monotonic(), 0.01)
            try:
                store.wait([str(rank)], timedelta(seconds=left))
            except dist.DistStoreError:
                missing.append(rank)
    except (dist.DistNetworkError, RuntimeError):
        return [0]  # rank 0 keeps the store where no launcher does
    return missing
