"""DataPartitioner: the samples of an epoch in one global order, dealt to the ranks step by step.

The order depends on seed and epoch alone, the place in it is one number that all ranks agree on. Whoever knows both can
go on from there, with any number of ranks; nothing is sent between them.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset, default_collate

STREAM_LENGTH = -1  # what a state holds as the length of a stream


def _generator_seed(seed: int, epoch: int) -> int:
    """Output number `epoch` of SplitMix64 (Steele, Lea, Flood 2014) started at `seed`, its upper 32 bits.

    torch's CPU generator reads no more than 32 bits of a seed; seed + epoch would make (0, 1) and (1, 0) the same.
    """
    mask = 2**64 - 1
    z = (seed + (epoch + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 32


def _share(samples: int, rank: int, world_size: int) -> slice:
    """A rank's part of a step: contiguous, at most one sample more than another's."""
    each, left = divmod(samples, world_size)
    start = rank * each + min(rank, left)
    return slice(start, start + each + (rank < left))


def _is_stream(dataset: Any) -> bool:
    """Whether a dataset is read from its beginning only; TypeError where it can be read in no way, or once."""
    # torch's Dataset has a __getitem__ that raises, so that of an IterableDataset says nothing.
    if isinstance(dataset, IterableDataset):
        return True
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return False
    if hasattr(dataset, "__iter__") and not hasattr(dataset, "__next__"):
        return True
    raise TypeError(
        f"DataPartitioner: dataset is {type(dataset).__name__}; allowed: one with __len__ and __getitem__, or one "
        "whose __iter__ starts anew every time (no iterator or generator: it could be read for one epoch only)"
    )


def _process_group() -> tuple[int, int]:
    """Rank and world size of torch.distributed's default group; 0 of 1 without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class DataPartitioner:
    """Deals the samples of a dataset to the ranks of a torch.distributed job; every rank makes one and iterates it.

        part = DataPartitioner(dataset, batch_size=32, seed=7).bind()
        while part.epoch < epochs:
            for batch in part:
                loss = model(batch).mean() * part.weight  # data-parallel training averages gradients over the ranks
                ...
                checkpoint["data"] = part.state_dict()  # resumes with the next batch

    dataset: map-style (an object with __len__ and __getitem__; its __getitems__, a list of indices at once, is used
    where it has one), or a stream (an IterableDataset, or any other object whose __iter__ starts anew). batch_size: of
    a rank. collate_fn: makes a batch of a list of samples; None is torch's default_collate. shuffle: None is True for
    map-style datasets, False for streams. Raises TypeError for a dataset that is neither, ValueError for a batch_size
    below 1 and for shuffle=True with a stream.

    Order. Unshuffled it is the dataset's; shuffled it is torch.randperm on the CPU, its generator seeded with the upper
    32 bits of SplitMix64's output number `epoch` from state `seed`. World size and batch_size do not enter. A step
    takes the next world_size * batch_size samples of it, and rank r the r-th contiguous share of the step. So a job can
    go on with another number of ranks, or another batch_size, from any step: over all ranks every sample of an epoch is
    seen exactly once.

    Tail. The samples of an incomplete last step are dealt evenly: shares differ by one sample at most. A rank that gets
    none takes the step's last sample, with weight 0.0: all ranks take the same number of steps, so their collective
    calls match. drop_last leaves the incomplete step out. `weight`, of the batch last yielded, is the share's samples *
    world_size / the step's samples: the mean over ranks of weight * mean loss is the mean loss of the step's samples.

    Position. A batch counts as consumed once it has been yielded, the whole step with it: a state taken in the loop's
    body resumes behind that batch, a new iterator goes on there too. When an iterator finds no further step, epoch
    grows by 1 and position becomes 0. After a state of the last step's body, or a `break` there, one pass yields
    nothing and ends the epoch; the loop over `epoch` above is right in any case. An iterator that finds the partitioner
    moved (bind, load_state_dict, a second iterator) since its last batch raises RuntimeError.

    Cost. A shuffled epoch holds 8 bytes a sample; resuming reads nothing that was skipped. A stream is read whole by
    every rank, which keeps its share of a step (and holds a step at a time); resuming reads and drops what lies before
    the position. A stream must give the same samples in the same order on every rank and every time. It pickles as
    its dataset does, with rank and position: bind it anew in another process.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Iterable[Any],
        batch_size: int = 32,
        *,
        shuffle: bool | None = None,
        seed: int = 0,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"DataPartitioner: batch_size is {batch_size!r}; allowed: 1 or more")
        self._is_stream = _is_stream(dataset)
        if self._is_stream and shuffle:
            raise ValueError(
                f"DataPartitioner: shuffle is {shuffle!r} and dataset a stream, {type(dataset).__name__}; allowed: "
                "False or None, as a stream comes in its own order"
            )
        self.dataset: Any = dataset
        self.batch_size = operator.index(batch_size)
        self.shuffle = not self._is_stream if shuffle is None else bool(shuffle)
        self.seed = operator.index(seed)
        self.drop_last = drop_last
        self.epoch = 0
        self.position = 0  # samples of the epoch that all ranks together have consumed
        self.weight = 1.0  # of the batch last yielded
        self._collate = default_collate if collate_fn is None else collate_fn
        self._place: tuple[int, int] | None = None  # (rank, world size); None until bound

    def bind(self, rank: int | None = None, world_size: int | None = None) -> "DataPartitioner":
        """Makes this rank `rank` of `world_size`; without both, torch.distributed's at this moment, or 0 of 1.

        To be called again after the world size has changed. A partitioner that was never bound asks torch.distributed
        whenever an iterator starts. Returns itself. Raises ValueError for a rank outside the world, or one without the
        other.
        """
        if rank is None and world_size is None:
            self._place = _process_group()
        elif rank is None or world_size is None or not 0 <= rank < world_size:
            raise ValueError(
                f"DataPartitioner.bind: rank is {rank!r}, world_size {world_size!r}; allowed: 0 <= rank < world_size, "
                "or None for both"
            )
        else:
            self._place = rank, world_size
        return self

    def __len__(self) -> int:
        """Steps of a whole epoch with this world size. Raises TypeError for a stream."""
        if self._is_stream:
            raise TypeError(f"a DataPartitioner of a stream, {type(self.dataset).__name__}, has no length")
        _, world_size = self._place or _process_group()
        samples, step_size = len(self.dataset), world_size * self.batch_size
        return samples // step_size if self.drop_last else -(-samples // step_size)

    def __iter__(self) -> Iterator[Any]:
        """This rank's batches of the current epoch, from the current position on."""
        rank, world_size = self._place or _process_group()
        step_size = world_size * self.batch_size
        for step in self._steps(step_size):
            if self.drop_last and len(step) < step_size:
                break
            share = step[_share(len(step), rank, world_size)]
            batch = self._collate(self._samples(share or step[-1:]))
            self.weight = len(share) * world_size / len(step)
            self.position += len(step)
            here = self.epoch, self.position, self._place
            yield batch
            if here != (self.epoch, self.position, self._place):
                raise RuntimeError(
                    "DataPartitioner: bind, load_state_dict or another iterator moved it while it was iterated; "
                    "start a new iterator"
                )
        self.epoch += 1
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        """Where the epoch stands, the same on every rank, and what must be equal where it is loaded: plain ints.

        Keys: epoch, position; seed, shuffle (0 or 1), length (of the dataset, -1 for a stream).
        """
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "length": STREAM_LENGTH if self._is_stream else len(self.dataset),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on where `state` was taken; rank, world size, batch_size and drop_last may differ.

        Raises ValueError for other keys, another seed, shuffle or length, and for a place outside the epoch.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"load_state_dict: state's keys are {sorted(state)}; allowed: {sorted(own)}")
        for key in ("seed", "shuffle", "length"):
            if state[key] != own[key]:
                raise ValueError(f"load_state_dict: {key} is {state[key]!r}; allowed: this partitioner's, {own[key]}")
        epoch, position = operator.index(state["epoch"]), operator.index(state["position"])
        if epoch < 0:
            raise ValueError(f"load_state_dict: epoch is {epoch}; allowed: 0 or more")
        if position < 0 or (not self._is_stream and position > own["length"]):
            most = "more" if self._is_stream else f"up to {own['length']}"
            raise ValueError(f"load_state_dict: position is {position}; allowed: 0 or {most}")
        self.epoch, self.position = epoch, position

    def _steps(self, step_size: int) -> Iterator[Sequence[Any]]:
        """The rest of the epoch: every step's samples of a stream, or indices of a map-style dataset."""
        if self._is_stream:
            samples = iter(self.dataset)
            skipped = sum(1 for _ in islice(samples, self.position))
            if skipped < self.position:
                raise ValueError(
                    f"DataPartitioner: the stream ended after {skipped} samples; allowed: at least {self.position}, "
                    "the position in it"
                )
            while step := list(islice(samples, step_size)):
                yield step
        else:
            order = self._order()
            for start in range(self.position, len(order), step_size):
                yield order[start : start + step_size]

    def _order(self) -> Sequence[int]:
        """The epoch's indices; slices of it copy nothing."""
        samples = len(self.dataset)
        if not self.shuffle:
            return range(samples)
        generator = torch.Generator().manual_seed(_generator_seed(self.seed, self.epoch))
        # A default device of the caller's would draw another order.
        return torch.randperm(samples, generator=generator, device="cpu").numpy().data

    def _samples(self, share: Sequence[Any]) -> list[Any]:
        if self._is_stream:
            return list(share)
        fetch = getattr(self.dataset, "__getitems__", None)
        return [self.dataset[i] for i in share] if fetch is None else fetch(list(share))
