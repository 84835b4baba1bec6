"""Lepton's pipeline: prune, quantize and entropy-code a model, measure it, train and run it over processes. Names load
on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_ai import compression, distributed, serving, training, tuning
    from lepton_ai.distributed.model import LeptonDistributedModel
    from lepton_ai.model import CompressedModel, LeptonModel
    from lepton_ai.resources import ResourceManager

_SUBPACKAGES = ("compression", "distributed", "serving", "training", "tuning")
_HOMES = {
    "CompressedModel": "lepton_ai.model", "LeptonModel": "lepton_ai.model",
    "LeptonDistributedModel": "lepton_ai.distributed.model", "ResourceManager": "lepton_ai.resources",
}  # fmt: skip

__all__ = [
    "CompressedModel",
    "LeptonDistributedModel",
    "LeptonModel",
    "ResourceManager",
    "compression",
    "distributed",
    "serving",
    "training",
    "tuning",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"lepton_ai.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lepton_ai' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
