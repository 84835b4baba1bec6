"""Quantized GEMM beside its peers: Y[m, n] = X[m, k] @ W[n, k]^T, X and Y of one dtype, quantization of X included.

Every contender is checked against the float32 product before it is timed. From memory: each call that counts has
weights of its own, and before each contender a buffer larger than the last-level cache is read: weights come from DRAM,
code and activations are warm. LEPTON_BENCH_CASES: quick (a look), default, or full (every size at every shape).
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import rivals_gemm
import roof
import torch
from conftest import CALLS
from gemm_shapes import BASE, DOWN, LLM, MINILM, UP
from rivals_gemm import BFLOAT16, FLOAT32, Bind
from torch import Tensor

import lepton_kernels as lk

SCHEMES = ("w8a8", "w8a16", "w4a8", "w4a16")
ERROR = {32: 1e-5, 16: 0.01, 8: 0.04, 4: 0.15}  # allowed, relative to the float32 product, by bits of a normal weight
COPIES = 1 + CALLS[0]  # of the weights of a contender that reads them from memory: one to warm up
EVICT_BYTES = min(6 * roof.cache_kib(3) * 1024 // 5, 1 << 30)
ROWS = [1, 2, 4, 8, 16, 17, 32, 33, 64, 128, 256, 1024]  # 17, 33: one past a tile


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    m: int
    dtype: torch.dtype = FLOAT32
    cold: bool = False

    @property
    def id(self) -> str:
        """For pytest's -k: "4096x4096-M16-bf16-warm"."""
        dtype = "bf16" if self.dtype is BFLOAT16 else "fp32"
        return f"{self.n}x{self.k}-M{self.m}-{dtype}-{'memory' if self.cold else 'warm'}"

    def __str__(self) -> str:
        return f"{self.n}x{self.k} M={self.m}" + " bf16" * (self.dtype is BFLOAT16) + " from memory" * self.cold


def cases(size: str) -> list[Case]:
    if size == "quick":
        return [
            *(Case(*LLM, m) for m in (1, 16, 256)), Case(*LLM, 1, BFLOAT16), Case(*LLM, 1, cold=True),
            *(Case(*MINILM[0], m) for m in (1, 128)),
        ]  # fmt: skip
    if size == "full":
        shapes = [LLM, UP, DOWN, *MINILM, *BASE]
        rows = [*ROWS, 4096]
        warm = [Case(*shape, m, dtype) for shape in shapes for dtype in (FLOAT32, BFLOAT16) for m in rows]
        return [*warm, *(Case(*shape, 1, dtype, True) for shape in (LLM, UP, DOWN) for dtype in (FLOAT32, BFLOAT16))]
    if size != "default":
        raise ValueError(f"LEPTON_BENCH_CASES is {size!r}; allowed: quick, default, full")
    return [
        *(Case(*LLM, m) for m in ROWS), *(Case(*LLM, m, BFLOAT16) for m in (1, 16, 256)),
        *(Case(*shape, m) for shape in (UP, DOWN) for m in (1, 16, 128)),
        *(Case(*shape, m) for shape in MINILM for m in (1, 128, 4096)),
        *(Case(*shape, m) for shape in BASE for m in (1, 128)), Case(*MINILM[0], 128, BFLOAT16),
        Case(*LLM, 1, cold=True), Case(*LLM, 1, BFLOAT16, cold=True),
    ]  # fmt: skip


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0] + shape[1]))


def ours(scheme: str, weight: Tensor) -> lk.nn.QuantLinear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return lk.nn.QuantLinear.from_linear(linear, scheme)


@functools.lru_cache(maxsize=1)  # all cases of a shape follow each other
def layers(n: int, k: int, dtype: torch.dtype, copies: int) -> tuple[dict[str, list[Bind]], dict[str, dict]]:
    """Every contender's layers on the same weights, ours first, and what is recorded about each."""
    torch._dynamo.reset()
    weight = matrix(n, k)
    bound: dict[str, list[Bind]] = {}
    infos: dict[str, dict] = {}
    for scheme in SCHEMES:
        own = [ours(scheme, weight) for _ in range(copies)]
        parts = (own[0].weight_packed, own[0].weight_scale, own[0].weight_zero_point)
        bound[f"lepton {scheme}"] = [lambda x, layer=layer: functools.partial(layer, x) for layer in own]
        infos[f"lepton {scheme}"] = {
            "scheme": scheme, "bits": int(scheme[1]), "group": own[0].scheme.group_size, "full": True,
            "library": "lepton",
            "weight_bytes": sum(part.nbytes for part in parts if part is not None),
        }  # fmt: skip
    for name, peer in rivals_gemm.installed().items():
        if dtype in peer.dtypes:
            bound[name] = [peer.make(weight, dtype) for _ in range(copies)]
            infos[name] = {
                "scheme": peer.scheme, "bits": peer.bits, "group": peer.group, "full": peer.full,
                "library": peer.library,
            }  # fmt: skip
    return bound, infos


def relative_error(y: object, want: Tensor, full: bool) -> float:
    got = torch.as_tensor(y).float().reshape(want.shape)
    if not full:  # a product without its scales: right up to a factor
        got = got * ((got * want).sum() / (got * got).sum())
    return ((got - want).norm() / want.norm()).item()


@functools.cache
def _elsewhere() -> Tensor:
    return torch.ones(EVICT_BYTES // 8, dtype=torch.int64)


def evict() -> None:
    """Fills the caches with other data, unchanged so that nothing is written back later."""
    _elsewhere().sum()


@pytest.mark.parametrize("case", cases(os.environ.get("LEPTON_BENCH_CASES", "default")), ids=lambda case: case.id)
def test_gemm(race, case: Case) -> None:
    with torch.inference_mode():
        bound, infos = layers(case.n, case.k, case.dtype, COPIES if case.cold else 1)
        x = matrix(case.m, case.k).to(case.dtype)
        want = x.float() @ matrix(case.n, case.k).T
        calls: dict[str, list[Callable[[], object]]] = {}
        for name, binds in bound.items():
            calls[name] = [bind(x) for bind in binds] if case.cold else [binds[0](x)] * (1 + CALLS[1])
            info = infos[name] = {**infos[name], "error": 0.0}
            for call in set(calls[name]):
                info["error"] = max(info["error"], relative_error(call(), want, info["full"]))
            assert info["error"] < ERROR[info["bits"]], f"{name}: relative error {info['error']}"
        race(str(case), calls, infos, evict if case.cold else None, table="gemm", n=case.n, k=case.k, m=case.m,
             dtype="bf16" if case.dtype is BFLOAT16 else "fp32", cold=case.cold)  # fmt: skip
