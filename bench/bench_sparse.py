"""Sparse layers beside dense ones and other libraries' sparse products, all on the same pruned weight.

Ours: SparseLinear of floats, of int8 (w8a8) and of 4 bits (w4a16), and the dense QuantLinear of the last two, which is
the bar for them. Every contender is checked against the float product before it is timed. LEPTON_BENCH_CASES=quick: a
look.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import rivals_sparse
import torch
from bench_gemm import relative_error
from gemm_shapes import BASE, LLM
from torch import Tensor

import lepton_kernels as lk
from lepton_kernels.sparse import Pattern

UP, DOWN = BASE[1], BASE[1][::-1]  # feed-forward of an encoder with 768 features
SCHEMES = "w8a8", "w4a16"
FLOAT_ERROR, ERROR = 1e-5, {"w8a8": 0.04, "w4a16": 0.15, "int4pack": 0.15}  # allowed, by what a contender's name holds


@dataclass(frozen=True)
class Case:
    n: int
    k: int
    pattern: str
    sparsity: float
    m: int

    @property
    def id(self) -> str:
        """For pytest's -k: "4096x4096-16x4-80-M128"."""
        return f"{self.n}x{self.k}-{self.pattern}-{round(100 * self.sparsity)}-M{self.m}"

    def __str__(self) -> str:
        return f"{self.n}x{self.k} {self.pattern} {self.sparsity:.0%} M={self.m}"


def cases(size: str) -> list[Case]:
    if size == "quick":
        return [Case(*LLM, pattern, 0.8, m) for pattern in ("unstructured", "16x4") for m in (1, 128)]
    if size not in ("default", "full"):
        raise ValueError(f"LEPTON_BENCH_CASES is {size!r}; allowed: quick, default, full")
    return [
        *(Case(*LLM, "unstructured", s, m) for s in (0.5, 0.7, 0.8, 0.9, 0.95) for m in (1, 16, 128, 512)),
        *(Case(*LLM, pattern, s, m) for pattern in ("16x4", "1x4", "16x1") for s in (0.8, 0.9) for m in (1, 128)),
        *(Case(*LLM, "2:4", 0.5, m) for m in (1, 128)), *(Case(*LLM, "32x32", s, 128) for s in (0.8, 0.9)),
        *(Case(*shape, "unstructured", s, 128) for shape in (UP, DOWN) for s in (0.7, 0.8, 0.9)),
        *(Case(*shape, "16x4", 0.8, 128) for shape in (UP, DOWN)),
    ]  # fmt: skip


def linear(weight: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


@functools.lru_cache(maxsize=1)  # the cases of a weight follow each other
def contenders(n: int, k: int, pattern: str, sparsity: float) -> tuple[Tensor, dict[str, Callable]]:
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator)
    weight *= Pattern.of(pattern).keep(torch.rand(n, k, generator=generator) + 0.01, sparsity)
    dense = linear(weight)
    ours = {
        "lepton fp32": lk.nn.SparseLinear.from_linear(dense),
        **{f"lepton {scheme}": lk.nn.SparseLinear.from_linear(dense, scheme=scheme) for scheme in SCHEMES},
        **{f"dense {scheme}": lk.nn.QuantLinear.from_linear(dense, scheme) for scheme in SCHEMES},
    }
    binds: dict[str, Callable] = {
        name: lambda x, layer=layer: functools.partial(layer, x) for name, layer in ours.items()
    }
    binds.update({name: make(weight) for name, make in rivals_sparse.installed(pattern).items()})
    return weight, binds


@pytest.mark.parametrize("case", cases(os.environ.get("LEPTON_BENCH_CASES", "default")), ids=lambda case: case.id)
def test_sparse(race, case: Case) -> None:
    with torch.inference_mode():
        weight, binds = contenders(case.n, case.k, case.pattern, case.sparsity)
        x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(case.m))
        want = x @ weight.T
        calls = {name: bind(x) for name, bind in binds.items()}
        for name, call in calls.items():
            got = torch.as_tensor(call())
            turned = got.shape != want.shape or name.endswith(("CSR", "BSR"))
            error = relative_error(got.T if turned else got, want, True)
            allowed = next((most for part, most in ERROR.items() if part in name), FLOAT_ERROR)
            assert error < allowed, f"{name}: relative error {error}"
        race(str(case), calls, table="sparse", n=case.n, k=case.k, pattern=case.pattern, sparsity=case.sparsity,
             m=case.m)  # fmt: skip
