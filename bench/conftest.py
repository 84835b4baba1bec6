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
SECONDS = float(os.environ.get("LEPTON_BENCH_SECONDS", "2"))  # of one race
ROUNDS = 7, 400  # at least, at most
PAUSE = 0.03  # seconds before a contender: onnxruntime's threads spin on for up to 20 ms and would hold a core
WARM_UP = 0.01  # seconds of calls before those that count
CALLS = 3  # that count, in a round

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

    In a round each contender waits for the threads of the one before, makes calls to warm up, and three that count.
    Medians in seconds of all, by name, go to benchmark.extra_info["medians"]; pytest-benchmark's own table shows `ours`
    alone, called again and again.
    """

    def run(name: str, ours: Callable[[], object], rivals: dict[str, Callable[[], object]], **info: object) -> None:
        contenders = {name: ours, **rivals}
        times: dict[str, list[float]] = {contender: [] for contender in contenders}

        def one_round() -> None:
            for contender, call in contenders.items():
                time.sleep(PAUSE)
                stop = time.perf_counter() + WARM_UP
                call()
                while time.perf_counter() < stop:
                    call()
                for _ in range(CALLS):
                    start = time.perf_counter()
                    call()
                    times[contender].append(time.perf_counter() - start)

        one_round()
        start = time.perf_counter()
        one_round()
        rounds = min(max(int(SECONDS / (time.perf_counter() - start)), ROUNDS[0]), ROUNDS[1])
        for samples in times.values():
            samples.clear()
        for _ in range(rounds):
            one_round()
        benchmark.pedantic(ours, rounds=rounds, warmup_rounds=CALLS)
        medians = {contender: median(samples) for contender, samples in times.items()}
        benchmark.extra_info.update(ours=name, medians=medians, **info)

    return run
