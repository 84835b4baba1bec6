"""Lepton's pipeline: prune, quantize and entropy-code a model, and measure what that did. Names load on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_ai import compression
    from lepton_ai.model import CompressedModel, LeptonModel

__all__ = ["CompressedModel", "LeptonModel", "compression"]


def __getattr__(name: str) -> Any:
    if name == "compression":
        return importlib.import_module("lepton_ai.compression")
    if name in __all__:
        return getattr(importlib.import_module("lepton_ai.model"), name)
    raise AttributeError(f"module 'lepton_ai' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
