"""Lepton: quantize, prune and entropy-code models, and run them on native kernels. Names load on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_kernels import blockwise, codec, nn, onnx, sparse
    from lepton_kernels._backends_report import backends
    from lepton_kernels.checkpoint import load, save
    from lepton_kernels.model_file import inspect, verify
    from lepton_kernels.quantize import QuantizeReport, quantize_, quantize_dynamic
    from lepton_kernels.scheme import QuantScheme
    from lepton_kernels.sparse import PruneReport, SparsifyReport, prune_, sparsify_

__version__ = "0.1.0"

_HOMES = {
    "PruneReport": "sparse",
    "QuantScheme": "scheme",
    "QuantizeReport": "quantize",
    "backends": "_backends_report",
    "FuseReport": "fuse",
    "fuse_": "fuse",
    "inspect": "model_file",
    "load": "checkpoint",
    "prune_": "sparse",
    "quantize_": "quantize",
    "quantize_dynamic": "quantize",
    "save": "checkpoint",
    "SparsifyReport": "sparse",
    "sparsify_": "sparse",
    "verify": "model_file",
}
_SUBPACKAGES = ("blockwise", "codec", "nn", "onnx", "sparse")

__all__ = [
    "FuseReport",
    "PruneReport",
    "QuantScheme",
    "QuantizeReport",
    "SparsifyReport",
    "backends",
    "blockwise",
    "codec",
    "fuse_",
    "inspect",
    "load",
    "nn",
    "onnx",
    "prune_",
    "quantize_",
    "quantize_dynamic",
    "save",
    "sparse",
    "sparsify_",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"lepton_kernels.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"lepton_kernels.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lepton_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
