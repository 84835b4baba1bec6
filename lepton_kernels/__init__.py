"""Lepton's kernel library: quantized layers on native kernels. Names load on first use; importing does nothing else."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_kernels import nn
    from lepton_kernels._backends_report import backends
    from lepton_kernels.quantize import QuantizeReport, quantize_
    from lepton_kernels.scheme import QuantScheme

__version__ = "0.1.0"

_HOMES = {
    "QuantScheme": "scheme",
    "QuantizeReport": "quantize",
    "backends": "_backends_report",
    "quantize_": "quantize",
}

__all__ = ["QuantScheme", "QuantizeReport", "backends", "nn", "quantize_"]


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("lepton_kernels.nn")
    if name in _HOMES:
        return getattr(importlib.import_module(f"lepton_kernels.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lepton_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
