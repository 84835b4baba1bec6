"""doctor: what this machine has, which kernel serves what, and one line how to fix each problem."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import lepton_kernels as lk


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _caches() -> dict[str, int]:
    """Bytes of each cache that the first processor sees: {"L1d": ..., "L2": ..., "L3": ...}."""
    out = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size[:-1].isdigit():
            scale = {"K": 1 << 10, "M": 1 << 20}[size[-1]]
            out[f"L{level}{'d' if kind == 'Data' else ''}"] = int(size[:-1]) * scale
    return out


def _cpu_quota() -> float | None:
    """How many processors the control group grants, or None for no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def diagnose() -> dict[str, Any]:
    """Everything `lepton doctor` prints, as plain values; `problems` is a list of {problem, fix}."""
    import torch

    backends = lk.backends()
    affinity, quota = len(os.sched_getaffinity(0)), _cpu_quota()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    problems = []

    def problem(text: str, fix: str) -> None:
        problems.append({"problem": text, "fix": fix})

    if backends["isa"] != backends["isa_of_machine"]:
        problem(
            f"LEPTON_MAX_ISA holds the kernels at {backends['isa']}; the processor can do {backends['isa_of_machine']}",
            "unset LEPTON_MAX_ISA",
        )
    elif backends["isa"] in ("generic", "ssse3"):
        problem(
            f"the best kernels for this processor are {backends['isa']}: slower than float",
            "use a processor with AVX2 (Arm: the dot product), or check that the virtual machine passes it through",
        )
    processors = min(affinity, quota or affinity)
    if torch.get_num_threads() > processors:
        problem(
            f"torch runs {torch.get_num_threads()} threads on {processors:g} processors: they will wait for each other",
            f"set OMP_NUM_THREADS={max(1, int(processors))}",
        )
    if gpu is not None and _version("triton") is None:
        problem(f"there is a GPU ({gpu}) and no triton to serve it", "pip install 'lepton-kernels[gpu]'")
    if _version("transformers") is None:
        problem("Hugging Face folders can not be opened: no transformers", "pip install 'lepton-kernels[ai]'")
    return {
        "lepton": _version("lepton-kernels"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": _cpu_model(),
        "isa": backends["isa"],
        "isa_of_machine": backends["isa_of_machine"],
        "caches": _caches(),
        "processors": affinity,
        "cpu_quota": quota,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "kernels": {
            **{f"{scheme} on the CPU": kernel for scheme, kernel in backends["cpu"].items()},
            **({f"{scheme} on the GPU": kernel for scheme, kernel in (backends["cuda"] or {}).items()} if gpu else {}),
        },
        "problems": problems,
    }
