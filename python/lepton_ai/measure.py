"""measure: how long a model takes, as medians, and how two models compare: time, energy, price and fidelity."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from lepton_ai.cost import EnergyReader, cost_per_million, energy_reader
from lepton_ai.fidelity import Fidelity, fidelity, listed, output_vectors
from lepton_kernels.model_file import ModelFile
from lepton_kernels.sparse.calibration import call, evaluating

_ROUNDS = 5  # in which the candidates take turns: a noisy moment hits all of them


def call_seconds(call: Callable[[], Any], seconds: float = 2.0, least: int = 5) -> list[float]:
    """The times of call(), run once before and then for about `seconds`."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


@dataclass(frozen=True)
class Cost:
    """What one call takes: the median seconds, and the joules of the counters read, or None where there are none."""

    seconds: float
    joules: float | None = None


def in_turn(
    calls: Mapping[str, Callable[[], Any]], seconds: float = 2.0, energy: EnergyReader | None = None
) -> dict[str, Cost]:
    """What each call takes. They run once before, then take turns in blocks, for about `seconds` altogether."""
    block = seconds / _ROUNDS / max(len(calls), 1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    joules: dict[str, float] = dict.fromkeys(calls, 0.0)
    read = energy.joules if energy is not None else lambda: None
    for run in calls.values():
        run()
    for _ in range(_ROUNDS):
        for name, run in calls.items():
            before, stop = read(), time.perf_counter() + block
            while True:
                start = time.perf_counter()
                run()
                now = time.perf_counter()
                times[name].append(now - start)
                if now > stop:
                    break
            after = read()
            joules[name] += math.nan if before is None or after is None else after - before
    per_call = {name: joules[name] / len(times[name]) for name in calls}
    return {name: Cost(median(times[name]), None if math.isnan(j) else j) for name, j in per_call.items()}


@dataclass(frozen=True)
class Measurement:
    """Two models on the same inputs: what a call with the first input takes before and after, and how close they are.

    batch: samples in that call. energy: which counters were read, and why others were not. price_per_hour: of this
    machine, in any currency; None where none was given.
    """

    before: Cost
    after: Cost
    fidelity: Fidelity
    batch: int
    threads: int
    energy: str
    price_per_hour: float | None = None

    @property
    def speedup(self) -> float:
        """Seconds before over seconds after."""
        return self.before.seconds / self.after.seconds

    def price_per_million(self, cost: Cost) -> float | None:
        """What a million samples cost at that cost; None without a price."""
        hourly = self.price_per_hour
        return None if hourly is None else cost_per_million(cost.seconds / self.batch, hourly)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, which has no NaN and no infinity: they are None here."""
        out = dataclasses.asdict(self)
        out["speedup"] = self.speedup
        for name, cost in (("before", self.before), ("after", self.after)):
            out[name]["price_per_million"] = self.price_per_million(cost)
        close = out["fidelity"]
        out["fidelity"] = {name: value if math.isfinite(value) else None for name, value in close.items()}
        return out

    def __str__(self) -> str:
        lines = [
            f"{self.batch} samples a call, {self.threads} threads: {1e3 * self.before.seconds:.3f} -> "
            f"{1e3 * self.after.seconds:.3f} ms ({self.speedup:.2f} times as fast)"
        ]
        if self.before.joules is not None and self.after.joules is not None:
            lines.append(f"{self.before.joules:.4g} -> {self.after.joules:.4g} J a call")
        lines.append(self.energy)
        before, after = self.price_per_million(self.before), self.price_per_million(self.after)
        if before is not None and after is not None:
            lines.append(f"{before:.4g} -> {after:.4g} for a million samples, at {self.price_per_hour:g} an hour")
        return "\n".join([*lines, f"fidelity: {self.fidelity}"])


def compare(
    before: nn.Module,
    after: nn.Module,
    inputs: Iterable[Any],
    *,
    price_per_hour: float | None = None,
    seconds: float = 2.0,
) -> Measurement:
    """Times both models in turn on the first of `inputs`, for about `seconds`, and compares their outputs on all.

    inputs: each a tensor, a tuple or list of arguments, or a mapping of keywords. Both run in evaluation mode, in
    torch's number of threads, and get their modes back. Energy is that of the processor and, where a model is on GPUs,
    of these. Raises ValueError for a price that is negative or not finite, and as output_vectors does.
    """
    if price_per_hour is not None:
        cost_per_million(0.0, price_per_hour)  # a bad price is told before anything takes time
    items = listed("measure", inputs)
    close = fidelity(output_vectors(before, items), output_vectors(after, items))
    batch = len(output_vectors(before, items[:1]))
    gpus = sorted({t.get_device() for model in (before, after) for t in model.state_dict().values() if t.is_cuda})
    reader = energy_reader([f"GPU-{torch.cuda.get_device_properties(gpu).uuid}" for gpu in gpus])

    def run(model: nn.Module) -> None:
        call(model, items[0])
        for gpu in gpus:
            torch.cuda.synchronize(gpu)

    with evaluating(before), evaluating(after), torch.inference_mode():
        costs = in_turn({"before": partial(run, before), "after": partial(run, after)}, seconds, reader)
    return Measurement(
        costs["before"], costs["after"], close, batch, torch.get_num_threads(), str(reader), price_per_hour
    )


def token_batch(model: Any, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random token ids for a Hugging Face model; the same ones for every model of that vocabulary."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bench_file(path: Path, batches: tuple[int, ...], tokens: int, seconds: float) -> dict[str, Any]:
    """Load and decode speed of a file, and, where it holds a Hugging Face model, the latencies of each batch."""
    from lepton_ai.model import CompressedModel  # which imports this file

    file = ModelFile.open(path)
    size = sum(entry.size for entry in file.entries.values())

    def decode() -> None:
        for name in file.entries:
            file.read(name)

    decode_s = median(call_seconds(decode, seconds))
    out: dict[str, Any] = {
        "file_bytes": path.stat().st_size, "decoded_bytes": size, "decode_s": decode_s,
        "decode_gb_per_s": size / decode_s / 1e9, "threads": torch.get_num_threads(),
    }  # fmt: skip
    try:
        start = time.perf_counter()
        model = CompressedModel.load(path)
    except ValueError as error:
        out["latency_skipped"] = str(error)
        return out
    out["load_s"] = time.perf_counter() - start
    with torch.inference_mode():
        for batch in batches:
            inputs = token_batch(model.model, batch, tokens)
            times = call_seconds(partial(model, **inputs), seconds)
            out[f"latency_ms_batch_{batch}"] = 1e3 * median(times)
            out[f"latencies_s_batch_{batch}"] = times
    return out
