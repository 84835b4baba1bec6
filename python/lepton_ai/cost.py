"""Cost: the energy that this machine takes, as far as it lets itself be read, and the price of its time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

RAPL = Path("/sys/class/powercap")  # Intel's and AMD's counters of energy, in folders intel-rapl:N


class Counter(Protocol):
    """Counts energy from its making on."""

    def joules(self) -> float:
        """What was taken until now: never less than before."""
        ...


class RaplCounter:
    """A processor package's energy, all its processes together. Raises OSError where it can not be read."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last, self._total = self._read(), 0

    def _read(self) -> int:
        return int(self._file.read_text())

    def joules(self) -> float:
        """The joules since the making. To be called once a turn of the counter, some minutes at full load."""
        now = self._read()
        self._total += now - self._last + (self._range if now < self._last else 0)
        self._last = now
        return self._total * 1e-6


class NvmlCounter:
    """A GPU's energy, by its UUID ("GPU-..."). Raises pynvml.NVMLError where the driver does not count it."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        nvml.nvmlInit()
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._start = nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def joules(self) -> float:
        """The joules since the making."""
        return (self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._start) * 1e-3


@dataclass(frozen=True)
class EnergyReader:
    """The counters that could be opened, by name, and what could not: a line each that says why."""

    counters: dict[str, Counter]
    missing: tuple[str, ...] = ()

    def joules(self) -> float | None:
        """The sum of all counters, which never falls; None without one."""
        return sum(counter.joules() for counter in self.counters.values()) if self.counters else None

    def __str__(self) -> str:
        parts = [f"energy of {', '.join(self.counters)}"] if self.counters else []
        return "; ".join([*parts, *(f"energy not read: {reason}" for reason in self.missing)])


def _packages(root: Path) -> tuple[dict[str, Counter], list[str]]:
    found: dict[str, Counter] = {}
    missing: list[str] = []
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
            if name.startswith("package"):  # other domains are parts of packages, or hold them
                found[name] = RaplCounter(folder)
        except PermissionError as error:
            missing.append(f"{error.filename}: permission denied (root may read it)")
        except (OSError, ValueError) as error:
            missing.append(f"{folder}: {error}")
    if not found and not missing:
        missing.append(f"there is no package of a processor in {root}/intel-rapl:*")
    return found, missing


def _gpus(uuids: Sequence[str]) -> tuple[dict[str, Counter], list[str]]:
    try:
        import pynvml
    except ImportError:
        return {}, [f"{uuid}: pynvml is not installed (pip install nvidia-ml-py)" for uuid in uuids]
    found: dict[str, Counter] = {}
    missing: list[str] = []
    for uuid in uuids:
        try:
            found[uuid] = NvmlCounter(pynvml, uuid)
        except pynvml.NVMLError as error:
            missing.append(f"{uuid}: {error}")
    return found, missing


def energy_reader(gpus: Sequence[str] = (), root: Path = RAPL) -> EnergyReader:
    """Opens RAPL's package counters (Linux, x86, as root) and NVML's of the GPUs with these UUIDs ("GPU-...").

    A counter sees all that runs on its package or GPU, so measure on an otherwise idle machine.
    """
    packages, without_packages = _packages(root)
    devices, without_devices = _gpus(gpus) if gpus else ({}, [])
    return EnergyReader({**packages, **devices}, (*without_packages, *without_devices))


def cost_per_million(seconds_per_sample: float, price_per_hour: float) -> float:
    """What a million samples cost on a machine that costs price_per_hour, in its currency, and does nothing else.

    Raises ValueError for a price or a time that is negative or not finite.
    """
    for name, value in (("seconds_per_sample", seconds_per_sample), ("price_per_hour", price_per_hour)):
        if not 0 <= value < math.inf:
            raise ValueError(f"cost_per_million: {name} is {value}; allowed: a finite number, 0 or more")
    return 1e6 * seconds_per_sample * price_per_hour / 3600
