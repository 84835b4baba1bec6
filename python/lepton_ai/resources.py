"""ResourceManager: how many worker processes a job gets, on which cores, and what happens when one dies.

The local engine runs workers on this machine as processes of torch.multiprocessing: it starts them together, watches
them, and starts all of them again when one dies. Where they keep dying it goes on with fewer. An error that a worker
raises is not a death: it ends the job and is raised here.
"""

import contextlib
import os
import pickle
import resource
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from lepton_ai.distributed.compressed_mean import PeerError

ENGINES = ("local",)
_MEMORY_SHARE = 0.8  # of the memory that is free: the rest is for the page cache and all else
_PEER_IS_GONE = 75  # exit status of a worker that waited for one that died (EX_TEMPFAIL)


@dataclass(frozen=True)
class Placement:
    """Workers of a job on this machine: the cores of each, and why there are not more."""

    workers: int
    cores: tuple[tuple[int, ...], ...]  # of each worker
    reason: str

    @property
    def threads(self) -> int:
        """Threads of a worker."""
        return max(1, len(self.cores[0]))


def usable_cores() -> list[int]:
    """The cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def free_memory() -> int:
    """Bytes that new processes can take: what the system says is available, within a container's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):
        base = "/sys/fs/cgroup/memory"
        with open(f"{base}.max") as most, open(f"{base}.current") as used:
            free = min(free, int(most.read()) - int(used.read()))
    return max(free, 0)


def peak_memory() -> int:
    """The most bytes of memory that this process has held."""
    # Not getrusage where there is this: what it tells of a new program counts in the process that started it.
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ResourceManager:
    """Places workers and keeps them running, between min_workers and max_workers of them.

    engine: "local", worker processes on this machine. max_workers: None for as many as there are cores. max_restarts:
    how often a job's workers are started again, all together, before it goes on with fewer of them (or fails, at
    min_workers). Raises ValueError for another engine or numbers that do not fit.
    """

    def __init__(
        self, min_workers: int = 1, max_workers: int | None = None, *, engine: str = "local", max_restarts: int = 3
    ) -> None:
        if engine == "ray":
            raise ValueError(
                "ResourceManager: engine is 'ray', which places replicas and no trainers; allowed: 'local' here, and "
                "lepton serve --engine ray (lepton_ai.serving.ray_engine.RayEngine) to serve"
            )
        if engine not in ENGINES:
            raise ValueError(f"ResourceManager: engine is {engine!r}; allowed: {', '.join(ENGINES)}")
        if min_workers < 1:
            raise ValueError(f"ResourceManager: min_workers is {min_workers!r}; allowed: 1 or more")
        if max_workers is not None and max_workers < min_workers:
            raise ValueError(
                f"ResourceManager: max_workers is {max_workers!r}; allowed: None, or min_workers ({min_workers}) "
                "or more"
            )
        if max_restarts < 0:
            raise ValueError(f"ResourceManager: max_restarts is {max_restarts!r}; allowed: 0 or more")
        self.engine, self.min_workers, self.max_workers = engine, min_workers, max_workers
        self.max_restarts = max_restarts

    def place(self, memory: int = 0, multiple: int = 1, at_most: int | None = None) -> Placement:
        """How many workers fit here: a multiple of `multiple`, a core each and no core for two, `memory` bytes each.

        memory: what one worker takes (TrainReport.peak_memory of one before it). Cores are dealt evenly, in order.
        Where min_workers asks for more workers than there are cores, they share them. Raises ValueError where not even
        min_workers (rounded up to the multiple) fit into max_workers or the memory.
        """
        cores = usable_cores()
        least = -(-self.min_workers // multiple) * multiple
        limits = {f"{len(cores)} cores": max(len(cores), least)}
        if self.max_workers is not None:
            limits[f"max_workers {self.max_workers}"] = self.max_workers
        if at_most is not None:
            limits[f"{at_most} after failures"] = at_most
        if memory > 0:
            fit = int(free_memory() * _MEMORY_SHARE) // memory
            limits[f"memory for {fit} of {memory / 1e9:.2f} GB"] = fit
        reason, most = min(limits.items(), key=lambda item: item[1])
        workers = most // multiple * multiple
        if workers < least:
            raise ValueError(
                f"ResourceManager: {most} workers fit ({reason}); allowed: {least} or more"
                + (f", a multiple of {multiple}" if multiple > 1 else "")
            )
        each = max(1, len(cores) // workers)
        dealt = tuple(tuple(cores[(w * each + i) % len(cores)] for i in range(each)) for w in range(workers))
        return Placement(workers, dealt, reason)

    def run(
        self, entry: Callable[..., Any], arguments: Sequence[Any] = (), *, memory: int = 0, multiple: int = 1
    ) -> Any:
        """Calls entry(*arguments) in every worker, in torch.distributed's environment; returns rank 0's answer.

        All three must pickle: workers are processes of their own. When one dies (a signal, an exit) all are started
        again, and `entry` finds out by itself where it was (a checkpoint). After max_restarts of them the job goes on
        with the next smaller number of workers that fits; where there is none, RuntimeError says how the last one died.
        An exception in a worker is raised as RuntimeError with its rank and traceback.
        """
        # As bytes: torch.multiprocessing would hand tensors over as shared memory, one copy for all workers.
        call = pickle.dumps((entry, tuple(arguments)))
        placement, restarts = self.place(memory, multiple), 0
        while True:
            try:
                return _attempt(placement, call)
            except multiprocessing.ProcessRaisedException as error:
                raise RuntimeError(f"ResourceManager: worker {error.error_index} failed: {error.msg}") from error
            except multiprocessing.ProcessExitedException as error:
                restarts += 1
                if restarts <= self.max_restarts:
                    continue
                try:
                    placement, restarts = self.place(memory, multiple, placement.workers - multiple), 0
                except ValueError:
                    raise RuntimeError(
                        f"ResourceManager: worker {error.error_index} of {placement.workers} died, for the "
                        f"{restarts}th time: {error}"
                    ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _attempt(placement: Placement, call: bytes) -> Any:
    """One start of all workers; rank 0's answer."""
    with tempfile.TemporaryDirectory(prefix="lepton-") as folder:
        answer = Path(folder) / "answer"
        multiprocessing.start_processes(
            _worker, (placement, _free_port(), answer, call), placement.workers, start_method="spawn"
        )
        return pickle.loads(answer.read_bytes())


def _worker(rank: int, placement: Placement, port: int, answer: Path, call: bytes) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(placement.workers), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, placement.cores[rank])
    torch.set_num_threads(len(placement.cores[rank]))
    entry, arguments = pickle.loads(call)
    try:
        result = entry(*arguments)
    except PeerError:
        sys.exit(_PEER_IS_GONE)
    if rank == 0:
        answer.write_bytes(pickle.dumps(result))
