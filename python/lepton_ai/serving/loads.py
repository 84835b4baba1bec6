"""Loads over time, as functions that give requests a second at a second, and recorded service times from files."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

Load = Callable[[float], float]


def steady(rate: float) -> Load:
    """Always `rate` requests a second."""
    return lambda time: rate


def diurnal(peak: float, low: float = 0.3, period: float = 86400.0) -> Load:
    """A sine from low * peak, at time 0, to peak and back in `period` seconds."""
    return lambda time: peak * (low + (1 - low) * (1 - math.cos(2 * math.pi * time / period)) / 2)


def step(rate: float, factor: float, begin: float, end: float = math.inf) -> Load:
    """rate, and factor * rate from second `begin` to `end`."""
    return lambda time: rate * factor if begin <= time < end else rate


def burst(rate: float, factor: float, every: float, lasting: float) -> Load:
    """rate, and factor * rate in the last `lasting` of every `every` seconds."""
    return lambda time: rate * factor if time % every >= every - lasting else rate


def assumed_seconds() -> list[float]:
    """A thousand times where none were recorded: log-normal, mean 40 ms, deviation 30 % of it."""
    variance = math.log(1 + 0.3**2)
    normal = NormalDist(math.log(0.04) - variance / 2, math.sqrt(variance))
    return [math.exp(normal.inv_cdf((i + 0.5) / 1000)) for i in range(1000)]


def recorded_seconds(path: Path) -> list[float]:
    """The times in a file: seconds, one a line or a JSON list, or what `lepton bench --json` printed, at batch 1.

    Raises ValueError where there is no time in it, or something else.
    """
    text = path.read_text()
    try:
        if text.lstrip()[:1] in ("[", "{"):
            found: Any = json.loads(text)
            if isinstance(found, dict):
                found = found["latencies_s_batch_1"]
        else:
            found = text.split()
        seconds = [float(value) for value in found]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: {type(error).__name__}: {error}; allowed: seconds, one a line or a JSON list, or an object with "
            "latencies_s_batch_1"
        ) from error
    if not seconds or not all(0 < value < math.inf for value in seconds):
        raise ValueError(f"{path}: it is empty or has other values; allowed: finite seconds over 0")
    return seconds
