"""ResourceManager's local engine: what fits, who starts, what a death or an error does."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lepton_ai import ResourceManager, resources


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"engine": "slurm"}, "engine is 'slurm'; allowed: local"),
        ({"engine": "ray"}, "engine is 'ray', .*; allowed: 'local' here, and lepton serve --engine ray"),
        ({"min_workers": 0}, "min_workers is 0; allowed: 1 or more"),
        ({"min_workers": 3, "max_workers": 2}, r"max_workers is 2; allowed: None, or min_workers \(3\) or more"),
        ({"max_restarts": -1}, "max_restarts is -1; allowed: 0 or more"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        ResourceManager(**arguments)


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(resources, "usable_cores", lambda: list(range(8)))
    monkeypatch.setattr(resources, "free_memory", lambda: 10_000)


@pytest.mark.parametrize(
    ("limits", "asked", "workers", "threads", "reason"),
    [
        ((1, None), {}, 8, 1, "8 cores"),
        ((1, 3), {}, 3, 2, "max_workers 3"),
        ((1, None), {"multiple": 3}, 6, 1, "8 cores"),
        ((1, None), {"memory": 2000}, 4, 2, "memory for 4 of 0.00 GB"),
        ((1, None), {"at_most": 2}, 2, 4, "2 after failures"),
        ((12, None), {}, 12, 1, "8 cores"),
    ],
)
def test_placement(eight_cores, limits, asked, workers, threads, reason):
    placement = ResourceManager(*limits).place(**asked)
    assert (placement.workers, placement.threads, placement.reason) == (workers, threads, reason)
    assert len(placement.cores) == workers
    dealt = [core for cores in placement.cores for core in cores]
    assert set(dealt) <= set(range(8))
    if workers <= 8:
        assert len(dealt) == len(set(dealt))


@pytest.mark.parametrize(
    ("limits", "asked", "text"),
    [
        ((2, None), {"memory": 5000}, r"1 workers fit \(memory for 1 of 0.00 GB\); allowed: 2 or more"),
        ((1, 3), {"multiple": 4}, r"3 workers fit \(max_workers 3\); allowed: 4 or more, a multiple of 4"),
    ],
)
def test_what_does_not_fit(eight_cores, limits, asked, text):
    with pytest.raises(ValueError, match=text):
        ResourceManager(*limits).place(**asked)


def test_what_the_machine_has():
    assert resources.usable_cores()
    assert resources.free_memory() > 0
    assert resources.peak_memory() > 1 << 20


def test_peak_memory_is_that_of_this_process_and_not_of_its_parent(run_python):
    ballast = torch.ones(2**30, dtype=torch.uint8)
    child = int(run_python("from lepton_ai.resources import peak_memory\nprint(peak_memory())"))
    assert child < ballast.nbytes < resources.peak_memory()


def entry(folder: Path, what: str) -> tuple[float, int, int]:
    """Each start leaves a file; rank 1 dies or fails as it is told."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    starts = len(list(folder.glob("start-*")))
    dist.barrier()
    if rank == 0:
        (folder / f"start-{starts}").touch()
    if rank == 1 and (what == "dies always" or (what == "dies once" and starts == 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and what == "fails":
        raise KeyError("no such thing")
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    dist.destroy_process_group()
    return float(total), ranks, torch.get_num_threads()


@pytest.mark.slow
def test_workers_run_restart_and_become_fewer(tmp_path):
    manager = ResourceManager(1, 2, max_restarts=1)
    two = len(resources.usable_cores()) >= 2
    for what, starts, ranks in (("works", 1, 2), ("dies once", 2, 2), ("dies always", 3, 1)):
        folder = tmp_path / what
        folder.mkdir()
        total, seen, _ = (manager if two else ResourceManager(2, 2)).run(entry, (folder, what))
        assert (seen, total) == (ranks, sum(range(1, ranks + 1))), what
        assert len(list(folder.glob("start-*"))) == starts, what


@pytest.mark.slow
def test_an_error_in_a_worker_is_raised_at_once(tmp_path):
    with pytest.raises(RuntimeError, match=r"worker 1 failed: (.|\n)*KeyError: 'no such thing'"):
        ResourceManager(2, 2).run(entry, (tmp_path, "fails"))
    assert len(list(tmp_path.glob("start-*"))) == 1
