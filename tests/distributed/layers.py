"""Random layers of every kind that can be split."""

import torch
from torch import nn

import lepton_kernels as lk
from lepton_kernels.nn import QuantLinear, SparseLinear


def make_linear(n: int, k: int, rng: torch.Generator, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(k, n, bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / k**0.5)
    return linear


def make_sparse(n: int, k: int, rng: torch.Generator, scheme: str | None = None) -> SparseLinear:
    linear = make_linear(n, k, rng)
    with torch.no_grad():
        linear.weight *= torch.rand(n, k, generator=rng) < 0.3
    return SparseLinear.from_linear(linear, scheme=scheme)


def make_layers(n: int, k: int, rng: torch.Generator) -> list[nn.Module]:
    """One of every kind, with odd details."""
    linear = make_linear(n, k, rng)
    quantized = [QuantLinear.from_linear(linear, scheme) for scheme in ("w8a8", "w8a16", "w4a8")]
    symmetric = lk.QuantScheme(4, 16, symmetric=True, activation="float")
    return [
        linear,
        make_linear(n, k, rng, bias=False),
        *quantized,
        QuantLinear.from_linear(linear, symmetric),
        QuantLinear.from_linear(linear, lk.QuantScheme(4, 32, symmetric=False, activation="float"), activation="gelu"),
        make_sparse(n, k, rng),
        make_sparse(n, k, rng, "w8a8"),
        SparseLinear.from_linear(make_linear(n, k, rng).requires_grad_(False), scheme="w8a8", activation="relu"),
        make_sparse(n, k, rng, "w4a16"),
        make_sparse(n, k, rng, "w6a8"),
    ]


def make_mlp(rng: torch.Generator) -> nn.Sequential:
    return nn.Sequential(make_linear(13, 6, rng), nn.ReLU(), make_linear(9, 13, rng), nn.Tanh(), make_linear(3, 9, rng))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
