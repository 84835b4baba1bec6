"""Fixtures of the benchmarks: threads, the machine's description, and `race`, which times contenders in turn."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch

import lepton_kernels as lk

THREADS = int(os.environ.get("LEPTON_BENCH_THREADS", len(os.sched_getaffinity(0))))
SECONDS = float(os.environ.get("LEPTON_BENCH_SECONDS", "3"))  # of one race
ROUNDS = 7, 400  # at least, at most
PAUSE = 0.03  # seconds before a contender: onnxruntime's threads spin on for up to 20 ms and would hold a core
WARM_UP = 0.01  # seconds of calls before the one that counts

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def cpu_model() -> str:
    """The CPU as a title: name, family and model (some machines hide the name), and the instruction-set level."""
    info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    family, model = info.get("cpu family", "?"), info.get("model", "?")
    return f"{info.get('model name', platform.machine())}, family {family}, model {model}"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    machine_info["lepton"] = {
        "cpu": cpu_model(),
        "isa": lk.backends()["isa"],
        "threads": THREADS,
        "torch": torch.__version__,
        "commit": commit.stdout.strip() + (" + changes" if dirty.stdout.strip() else ""),
    }


@pytest.fixture
def race(benchmark) -> Callable[..., None]:
    """race(ours, rivals): median time of each, in one process, in turn, round by round.

    In a round each contender waits for the threads of the one before, makes calls to warm up, and one that counts.
    `ours` is what pytest-benchmark reports;
    medians in seconds of all, by name, go to benchmark.extra_info["medians"].
    """

    def run(name: str, ours: Callable[[], object], rivals: dict[str, Callable[[], object]], **info: object) -> None:
        times: dict[str, list[float]] = {rival: [] for rival in rivals}

        def warm_up(call: Callable[[], object]) -> None:
            time.sleep(PAUSE)
            stop = time.perf_counter() + WARM_UP
            call()
            while time.perf_counter() < stop:
                call()

        def others_first() -> None:
            for rival, call in rivals.items():
                warm_up(call)
                start = time.perf_counter()
                call()
                times[rival].append(time.perf_counter() - start)
            warm_up(ours)

        others_first()
        start = time.perf_counter()
        others_first()
        ours()
        rounds = int(SECONDS / (time.perf_counter() - start))
        for samples in times.values():
            samples.clear()
        benchmark.pedantic(ours, setup=others_first, rounds=min(max(rounds, ROUNDS[0]), ROUNDS[1]))
        medians = {name: benchmark.stats.stats.median, **{rival: median(samples) for rival, samples in times.items()}}
        benchmark.extra_info.update(ours=name, medians=medians, **info)

    return run
