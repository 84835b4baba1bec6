"""Quantized GEMM beside its peers: Y[m, n] = X[m, k] @ W[n, k]^T, float32 in and out, quantization of X included.

Every contender is checked against the float32 product before it is timed. "memory": the weights of each call come from
DRAM (copies are used in turn, more bytes than the last-level cache holds); elsewhere they are hot.
"""

import itertools
from collections.abc import Callable

import pytest
import rivals_gemm
import roof
import torch
from torch import Tensor

import lepton_kernels as lk

LLM = (4096, 4096)
MINILM = [(384, 384), (1536, 384), (384, 1536)]  # (n, k) of attention, of the feed-forward layer's two products
ROWS = [1, 4, 16, 64, 256, 1024]
CASES = [(*LLM, m) for m in ROWS] + [(n, k, m) for n, k in MINILM for m in (1, 128, 4096)]
ERROR = {"w8a8": 0.03, "w4a8": 0.2, "w4a16": 0.2, "w8a16": 0.03}  # relative to the float32 product, random weights


def relative_error(y: object, want: Tensor) -> float:
    got = torch.as_tensor(y).float()
    return ((got - want).norm() / want.norm()).item()


def our_layer(weight: Tensor, scheme: str) -> lk.nn.QuantLinear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return lk.nn.QuantLinear.from_linear(linear, scheme)


def contenders(weight: Tensor, x: Tensor, scheme: str) -> dict[str, Callable[[Tensor], object]]:
    """Ours first, then every installed rival, all of them right."""
    makers = rivals_gemm.INT8 if scheme == "w8a8" else rivals_gemm.INT4
    layers: dict[str, Callable[[Tensor], object]] = {f"lepton {scheme}": our_layer(weight, scheme)}
    for name, make in {**rivals_gemm.FLOAT, **makers}.items():
        try:
            layers[name] = make(weight, x.shape[0])
        except ImportError:
            continue
    want = x @ weight.T
    for name, layer in layers.items():
        error = relative_error(layer(x), want)
        assert error < ERROR[scheme], f"{name}: relative error {error}"
    return layers


def split(layers: dict[str, Callable[[], object]]) -> tuple[str, Callable[[], object], dict[str, Callable[[], object]]]:
    name, *others = layers
    return name, layers[name], {other: layers[other] for other in others}


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize(("n", "k", "m"), CASES, ids=lambda value: str(value))
def test_gemm(race, scheme: str, n: int, k: int, m: int) -> None:
    generator = torch.Generator().manual_seed(m + n)
    weight, x = torch.randn(n, k, generator=generator), torch.randn(m, k, generator=generator)
    with torch.inference_mode():
        layers = contenders(weight, x, scheme)
        race(*split({name: lambda layer=layer: layer(x) for name, layer in layers.items()}),
             table=f"gemm {scheme}", row=f"{n} x {k}", column=f"M={m}", ops=2 * m * n * k,
             weight_bytes=n * k * int(scheme[1]) // 8)  # fmt: skip


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16"])
def test_gemm_from_memory(race, scheme: str) -> None:
    n, k = LLM
    copies = max(2, 3 * roof.cache_kib(3) * 1024 // (n * k * int(scheme[1]) // 8) + 1)
    copies = min(copies, 12)  # float32 copies are 64 MB each
    weight, x = torch.randn(n, k), torch.randn(1, k)
    with torch.inference_mode():
        turns = [contenders(weight.clone(), x, scheme) for _ in range(copies)]

        def cold(name: str) -> Callable[[], object]:
            layers = itertools.cycle([layers[name] for layers in turns])
            return lambda: next(layers)(x)

        race(*split({name: cold(name) for name in turns[0]}), table=f"gemm {scheme}", row=f"{n} x {k}",
             column="M=1 memory", ops=2 * n * k, weight_bytes=n * k * int(scheme[1]) // 8)  # fmt: skip
