"""Quantized LSTM and GRU beside torch's: float32, and torch's dynamic quantization (fbgemm), float32 in and out.

The initial state is given, input and hidden size are the same. Every contender is checked against the float layer
before it is timed. All sizes in question: LEPTON_BENCH_ALL=1 (216 races); without it only some that differ in kind.
"""

import itertools
import os
import warnings

import pytest
import torch
from torch import nn

import lepton_kernels as lk

ERROR = 0.05  # relative to the float layer, torch's initial weights, normal inputs
if os.environ.get("LEPTON_BENCH_ALL") == "1":
    CASES = list(itertools.product(["LSTM", "GRU"], [128, 512, 1024], [1, 8, 32], [1, 32, 128], [1, 2], [False, True]))
else:
    CASES = [
        (kind, hidden, batch, steps, 1, False)
        for kind in ("LSTM", "GRU")
        for hidden in (128, 512, 1024)
        for batch, steps in ((1, 1), (1, 128), (8, 32), (32, 128))
    ] + [(kind, 512, 8, 32, 2, True) for kind in ("LSTM", "GRU")]


def dynamic(layer: nn.Module) -> nn.Module:
    """torch.ao's quantize_dynamic on its default engine for this CPU (fbgemm kernels)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "fbgemm"
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {type(layer)})[0]


@pytest.mark.parametrize(("kind", "hidden", "batch", "steps", "layers", "both"), CASES, ids=str)
def test_recurrent(race, kind: str, hidden: int, batch: int, steps: int, layers: int, both: bool) -> None:
    torch.manual_seed(0)
    layer = getattr(nn, kind)(hidden, hidden, layers, bidirectional=both).eval()
    x, h = torch.randn(steps, batch, hidden), torch.randn(layers * (2 if both else 1), batch, hidden)
    hx = (h, torch.randn_like(h)) if kind == "LSTM" else h
    ours = lk.quantize_dynamic(nn.Sequential(layer), {type(layer)})[0]
    contenders = {"lepton w8a8": ours, "torch dynamic int8 (fbgemm)": dynamic(layer), "torch fp32": layer}
    with torch.inference_mode():
        want = layer(x, hx)[0]
        errors = {name: ((run(x, hx)[0] - want).norm() / want.norm()).item() for name, run in contenders.items()}
        assert all(error < ERROR for error in errors.values()), errors
        calls = {name: (lambda run=run: run(x, hx)) for name, run in contenders.items()}
        row = (f"hidden {hidden}, {layers} layer{'s' * (layers > 1)}{', both directions' * both}, batch {batch}, "
               f"{steps} step{'s' * (steps > 1)}")  # fmt: skip
        race(f"recurrent {kind} {row}", calls, {name: {"error": error} for name, error in errors.items()},
             table=f"recurrent {kind}", row=row)  # fmt: skip
