"""Checkpoints of a training job, by torch.distributed.checkpoint: a folder step-N, complete once it has that name.

Model and optimizer of every shard are stored once for all data ranks, so a job may go on with another number of
those; random states and the residuals of error feedback belong to a rank. A job that goes on with the same ranks gives
the bits that it would have given without a stop.
"""

import pickle
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from lepton_ai.distributed.data_partitioner import DataPartitioner
from lepton_ai.distributed.synchronous_update import SynchronousUpdate

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class Layout(NamedTuple):
    """Ranks along data, pipeline and tensor, and which shard of the model is this rank's."""

    data: int
    pipeline: int
    tensor: int
    shard: str


@dataclass
class State:
    """What a checkpoint holds of a rank.

    is_sharded: all data ranks write their parts of model and optimizer; else data rank 0 of a slice writes both.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    partitioner: DataPartitioner
    update: SynchronousUpdate
    data_rank: int
    layout: Layout
    is_sharded: bool = False
    step: int = 0
    losses: list[list[float]] = field(default_factory=list)  # of each epoch: their sum over samples, and samples

    def progress(self) -> dict[str, Any]:
        return {
            "step": self.step, "losses": self.losses, "data": self.partitioner.state_dict(),
            "layout": list(self.layout[:3]),
        }  # fmt: skip

    def shard(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=_OPTIONS)
        return {"model": model, "optimizer": optimizer}

    def own(self) -> dict[str, Any]:
        return {"random": _random_states(), "update": self.update.state_dict()}


def seed_everything(seed: int) -> None:
    """Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _random_states() -> bytes:
    return pickle.dumps([random.getstate(), np.random.get_state(), torch.get_rng_state()])


def _set_random_states(states: bytes) -> None:
    python, numpy, of_torch = pickle.loads(states)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(of_torch)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch warns of a checkpoint by one process without a process group: here that is meant."""
    with warnings.catch_warnings():
        if not dist.is_initialized():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def checkpoints_of(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save(folder: Path, state: State) -> None:
    """Writes step-N of all ranks together, then drops the older ones; a stop in between leaves those."""
    final, part = folder / f"step-{state.step}", folder / f"part-{state.step}"
    if _rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    _barrier()
    contents: dict[str, Any] = {f"own-{_rank()}": state.own()}
    if state.data_rank == 0 or state.is_sharded:
        contents[f"shard-{state.layout.shard}"] = state.shard()
    if _rank() == 0:
        contents["progress"] = pickle.dumps(state.progress())
    with _alone_is_fine():
        dcp.save(contents, checkpoint_id=part)
    _barrier()
    if _rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in checkpoints_of(folder)[:-1]:
            shutil.rmtree(old)
    _barrier()


def resume(folder: Path, state: State) -> None:
    """Brings `state` to the newest checkpoint of the folder, in place, if there is one.

    Raises ValueError where it was taken with other numbers of tensor or pipeline ranks.
    """
    found = checkpoints_of(folder)
    _barrier()  # nobody writes or drops one while others look
    if not found:
        return
    progress = pickle.loads(_load(found[-1], {"progress": b""})["progress"])
    data, *shards = progress["layout"]
    if tuple(shards) != state.layout[1:3]:
        raise ValueError(
            f"train: the checkpoint {found[-1]} is of {shards[0]} pipeline and {shards[1]} tensor ranks; allowed: "
            f"{state.layout.pipeline} and {state.layout.tensor}, as this job has"
        )
    shard_name, own_name = f"shard-{state.layout.shard}", f"own-{_rank()}"
    same_ranks = data == state.layout.data
    contents = _load(found[-1], {shard_name: state.shard(), **({own_name: state.own()} if same_ranks else {})})
    shard = contents[shard_name]
    set_state_dict(
        state.model, state.optimizer, model_state_dict=shard["model"], optim_state_dict=shard["optimizer"],
        options=_OPTIONS,
    )  # fmt: skip
    state.step, state.losses = progress["step"], progress["losses"]
    state.partitioner.load_state_dict(progress["data"])
    if same_ranks:
        _set_random_states(contents[own_name]["random"])
        state.update.load_state_dict(contents[own_name]["update"])


def _load(checkpoint: Path, contents: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds under the names of `contents`, in their place."""
    with _alone_is_fine():
        dcp.load(contents, checkpoint_id=checkpoint)
    return contents
