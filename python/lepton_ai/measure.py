"""measure: how long a model takes, as medians."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lepton_ai.model import CompressedModel
from lepton_kernels.model_file import ModelFile


def median_seconds(call: Callable[[], Any], seconds: float = 2.0, least: int = 5) -> float:
    """The median time of call(), run once before and then for about `seconds`."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def token_batch(model: Any, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random token ids for a Hugging Face model; the same ones for every model of that vocabulary."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bench_file(path: Path, batches: tuple[int, ...], tokens: int, seconds: float) -> dict[str, Any]:
    """Load and decode speed of a file, and, where it holds a Hugging Face model, the median latency of each batch."""
    file = ModelFile.open(path)
    size = sum(entry.size for entry in file.entries.values())

    def decode() -> None:
        for name in file.entries:
            file.read(name)

    decode_s = median_seconds(decode, seconds)
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
            out[f"latency_ms_batch_{batch}"] = 1e3 * median_seconds(partial(model, **inputs), seconds)
    return out
