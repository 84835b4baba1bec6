"""Fixtures of the benchmarks: threads, the machine's description, and `race`, which times contenders in turn."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lepton_kernels as lk

THREADS = int(os.environ.get("LEPTON_BENCH_THREADS", len(os.sched_getaffinity(0))))
SECONDS = float(os.environ.get("LEPTON_BENCH_SECONDS", "2"))  # of one race
ROUNDS = 5, 400  # at least, at most
QUIET = 0.004  # seconds without work before a contender starts: onnxruntime's threads spin on for up to 20 ms
SPINS = 500  # such spans, at most
WARM_UP = 0.01  # seconds of calls before those that count
COUNTED = 0.005  # seconds of calls that count, in a round
CALLS = 3, 20  # that count, in a round: at least, at most
HOPELESS = 15  # times the fastest call: such a contender is timed in the first two rounds alone
LONG = 0.03  # seconds of a call to which waking up a thread (0.3 ms) or a cache (1 ms) makes no difference

Calls = list[Callable[[], object]]

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


def settle() -> None:
    """Returns once no thread of this process has run for a while; the pools of some libraries spin for long."""
    for _ in range(SPINS):
        before = time.process_time()
        time.sleep(QUIET)
        if time.process_time() - before < QUIET / 20:
            return
    raise RuntimeError(f"the threads of a contender still run {SPINS * QUIET:.1f} s after its last call")


def in_turn(contenders: dict[str, Calls], evict: Callable[[], object] | None = None) -> dict[str, list[float]]:
    """Seconds of each contender's calls, timed in one process, in turn, round by round.

    In a round each contender waits until all threads are quiet, repeats its first call to warm up (clock, threads,
    code), and then makes its other calls, each once, until COUNTED seconds are over: these count. A call of more than
    LONG seconds needs no warm-up and counts once a round; a HOPELESS one takes part in two rounds. `evict` runs before
    each contender: calls that read weights of their own then find them in DRAM.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    long: set[str] = set()
    hopeless: set[str] = set()

    def one_round() -> None:
        for name, (warm, *counted) in contenders.items():
            if name in hopeless:
                continue
            if evict is not None:
                evict()
            settle()
            stop = time.perf_counter() + WARM_UP
            while name not in long:
                start = time.perf_counter()
                warm()
                now = time.perf_counter()
                if now - start > LONG and len(times[name]) == 0:
                    long.add(name)  # found out in the first round; its first call may be slower than others
                if now > stop:
                    break
            taken = 0.0
            for done, call in enumerate(counted[:1] if name in long else counted):
                if done >= CALLS[0] and taken > COUNTED:
                    break
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
                taken += times[name][-1]

    one_round()
    long.difference_update([name for name, samples in times.items() if min(samples) <= LONG])
    long.update(name for name, samples in times.items() if min(samples) > LONG)
    start = time.perf_counter()
    one_round()
    seconds = time.perf_counter() - start
    fastest = min(min(samples) for samples in times.values())
    hopeless.update(name for name in long if min(times[name]) > HOPELESS * fastest)
    for name, samples in times.items():
        if name not in hopeless:
            samples.clear()
        else:
            seconds -= samples[-1]
    rounds = min(max(int(SECONDS / seconds), ROUNDS[0]), ROUNDS[1])
    for _ in range(rounds):
        one_round()
    return times


@pytest.fixture
def race(benchmark) -> Callable[..., None]:
    """race(case, contenders, ...): times contenders in turn; one benchmark of the group `case` for each, with its info.

    A contender is a call, or a list of calls as in_turn takes it. `infos`: what is recorded with one contender;
    further keywords: with each.
    """

    def run(
        case: str,
        contenders: dict[str, Callable[[], object] | Calls],
        infos: dict[str, dict] | None = None,
        evict: Callable[[], object] | None = None,
        **info: object,
    ) -> None:
        lists = {name: call if isinstance(call, list) else [call] * (1 + CALLS[1]) for name, call in contenders.items()}
        benchmark._mode = "race"  # pytest-benchmark has no public way to take times from elsewhere
        for name, samples in in_turn(lists, evict).items():
            benchmark.name, benchmark.group = name, case
            benchmark.extra_info = {**info, **(infos or {}).get(name, {})}
            stats = benchmark._make_stats(iterations=1)
            for sample in samples:
                stats.update(sample)

    return run
