"""Counters of energy, on a made-up sysfs and a made-up NVML, and the price of time."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lepton_ai.cost import cost_per_million, energy_reader

RANGE = 262_143_328_850  # microjoules, as an Intel machine says it


def domain(root: Path, folder: str, name: str, microjoules: int) -> Path:
    path = root / folder
    path.mkdir()
    for file, text in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", RANGE)):
        (path / file).write_text(f"{text}\n")
    return path / "energy_uj"


def test_packages_are_added_up_and_other_domains_are_not(tmp_path):
    first = domain(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    core = domain(tmp_path, "intel-rapl:0:0", "core", 1_000_000)
    second = domain(tmp_path, "intel-rapl:1", "package-1", 7)
    whole = domain(tmp_path, "intel-rapl:2", "psys", 9)
    twin = domain(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000)
    reader = energy_reader(root=tmp_path)
    assert reader.joules() == 0
    for file in (core, whole, twin):
        file.write_text("200000000")
    first.write_text("7500000")
    second.write_text("1000007")
    assert reader.joules() == pytest.approx(3.5)
    assert str(reader) == "energy of package-0, package-1"


def test_the_counter_wraps_around(tmp_path):
    file = domain(tmp_path, "intel-rapl:0", "package-0", RANGE - 1_000_000)
    reader = energy_reader(root=tmp_path)
    read = []
    for value in (RANGE, 2_000_000, 2_000_000, 5_000_000, RANGE - 1, 0):
        file.write_text(str(value))
        read.append(reader.joules())
    assert read == sorted(read)
    assert read[:4] == pytest.approx([1, 3, 3, 6])
    assert read[-1] == pytest.approx(1 + RANGE * 1e-6)


def test_what_can_not_be_read_is_none_and_says_why(tmp_path, monkeypatch):
    reader = energy_reader(root=tmp_path)
    assert reader.joules() is None
    assert str(reader) == f"energy not read: there is no package of a processor in {tmp_path}/intel-rapl:*"
    file = domain(tmp_path, "intel-rapl:0", "package-0", 1)
    read_text = Path.read_text

    def refuse(path: Path) -> str:
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refuse)
        reader = energy_reader(root=tmp_path)
    assert reader.joules() is None
    assert str(reader) == f"energy not read: {file}: permission denied (root may read it)"
    file.write_text("not a number")
    assert "invalid literal" in str(energy_reader(root=tmp_path))


class NVMLError(Exception):
    pass


def fake_nvml(millijoules: dict[str, int]) -> SimpleNamespace:
    def handle(uuid: str) -> str:
        if uuid not in millijoules:
            raise NVMLError("Not Found")
        return uuid

    return SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=millijoules.__getitem__,
    )  # fmt: skip


def test_gpus_are_read_by_nvml_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "GPU" not in str(energy_reader(root=tmp_path))
    assert "GPU-a: pynvml is not installed" in str(energy_reader(["GPU-a"], tmp_path))
    taken = {"GPU-a": 10_000, "GPU-b": 0}
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(taken))
    domain(tmp_path, "intel-rapl:0", "package-0", 0)
    reader = energy_reader(["GPU-a", "GPU-c"], tmp_path)
    taken["GPU-a"], taken["GPU-b"] = 12_500, 99_000
    assert reader.joules() == pytest.approx(2.5)
    assert str(reader) == "energy of package-0, GPU-a; energy not read: GPU-c: Not Found"


def test_price():
    assert cost_per_million(0.0036, 2.0) == pytest.approx(2.0)
    assert cost_per_million(0.0, 2.0) == 0
    for seconds, price in ((-1, 1), (1, -1), (1, math.nan), (math.inf, 1)):
        with pytest.raises(ValueError, match=r"cost_per_million: (seconds_per_sample|price_per_hour) is .*; allowed"):
            cost_per_million(seconds, price)
