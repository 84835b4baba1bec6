"""ReplicaProfile: what a replica of a model takes, measured in a process of its own."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class ReplicaProfile:
    """What one replica takes.

    memory_bytes: the most that its process holds, with the largest batch in it. cores: that it computes on, a thread
    each. seconds_per_request: the median time of one sequence alone. startup_seconds: from the start of the process to
    its first answer. Raises ValueError for a number that is not finite and above zero.
    """

    memory_bytes: int
    cores: int
    seconds_per_request: float
    startup_seconds: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"ReplicaProfile: {name} is {value}; allowed: a finite number above 0")

    def __str__(self) -> str:
        cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        return (
            f"{self.memory_bytes / 2**20:.0f} MiB on {cores}, {1e3 * self.seconds_per_request:.3g} ms a "
            f"request, ready after {self.startup_seconds:.1f} s"
        )


def profile(
    path: str | os.PathLike[str], *, cores: int | None = None, batch: int = 32, tokens: int = 128, seconds: float = 2.0
) -> ReplicaProfile:
    """Loads a file that holds a Hugging Face model of tokens in a fresh process, and runs it there.

    cores: None for all that this process may use; they are the first of these. batch: sequences of the largest call,
    in which memory is at its peak. tokens: of each sequence. seconds: how long requests are timed. The file has been
    read once before, so startup_seconds holds no slow disk. Raises CorruptDataError for a damaged file, ValueError for
    numbers that are not allowed, for a file that does not hold its architecture, and where the process fails.
    """
    from lepton_ai.resources import usable_cores
    from lepton_ai.sources import CONFIG_KEY
    from lepton_kernels.model_file import ModelFile, verify

    usable = len(usable_cores())
    if cores is not None and not 1 <= cores <= usable:
        raise ValueError(f"profile: cores is {cores}; allowed: 1 to {usable}, which this process may use")
    for name, value in (("batch", batch), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"profile: {name} is {value}; allowed: 1 or more")
    verify(path)
    if CONFIG_KEY not in ModelFile.open(path).metadata:
        raise ValueError(f"profile: {path} does not say what model it holds; allowed: a Hugging Face model's file")
    asked = {
        "path": str(Path(path).resolve()), "cores": cores or usable, "batch": batch, "tokens": tokens,
        "seconds": seconds, "began": time.time(),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-m", __name__, json.dumps(asked)], capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["without a word"]
        raise ValueError(f"profile: {path}: the process that ran it ended with {done.returncode}: {said[-1]}")
    return ReplicaProfile(**json.loads(done.stdout.splitlines()[-1]))


def _measured(path: str, cores: int, batch: int, tokens: int, seconds: float, began: float) -> ReplicaProfile:
    """What this process, which is there for nothing else, finds; began: time.time() when it was asked for."""
    import torch

    from lepton_ai.measure import call_seconds, token_batch
    from lepton_ai.model import CompressedModel
    from lepton_ai.resources import peak_memory, usable_cores

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, usable_cores()[:cores])
    torch.set_num_threads(cores)
    model: Any = CompressedModel.load(path)
    with torch.inference_mode():
        one = token_batch(model.model, 1, tokens)
        model(**one)
        startup = time.time() - began
        model(**token_batch(model.model, batch, tokens))
        return ReplicaProfile(peak_memory(), cores, median(call_seconds(partial(model, **one), seconds)), startup)


if __name__ == "__main__":
    print(json.dumps(asdict(_measured(**json.loads(sys.argv[1])))))
