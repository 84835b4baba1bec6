"""Training and inference over processes, on torch.distributed: data dealt to ranks, gradients averaged, layers split.
Names load on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton_ai.distributed.compressed_mean import PeerError
    from lepton_ai.distributed.data_partitioner import DataPartitioner
    from lepton_ai.distributed.model_parallel import ModelParallel
    from lepton_ai.distributed.synchronous_update import SynchronousUpdate, UpdateStats
    from lepton_ai.distributed.train_loop import TrainReport

_HOMES = {
    "DataPartitioner": "data_partitioner", "ModelParallel": "model_parallel", "PeerError": "compressed_mean",
    "SynchronousUpdate": "synchronous_update", "TrainReport": "train_loop", "UpdateStats": "synchronous_update",
}  # fmt: skip

__all__ = ["DataPartitioner", "ModelParallel", "PeerError", "SynchronousUpdate", "TrainReport", "UpdateStats"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lepton_ai.distributed.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lepton_ai.distributed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
