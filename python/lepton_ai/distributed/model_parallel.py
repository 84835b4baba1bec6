"""ModelParallel: one model over several processes, its layers cut in slices (tensor) and in stages (pipeline).

Processes stand in a mesh [data, pipeline, tensor]: those that share a layer are neighbours, as they talk most. What is
split comes together again in whole_state.
"""

import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lepton_ai.distributed.pipeline_parallel import Pipeline
from lepton_ai.distributed.slicing import can_slice
from lepton_ai.distributed.tensor_parallel import ColumnParallel, ParallelLayer, RowParallel, why_not_row
from lepton_kernels.nn.quant_recurrent import Recurrent

DIMENSIONS = ("data", "pipeline", "tensor")
SPLITS = ("column", "column-split", "row")


@dataclass(frozen=True)
class ModelParallel:
    """How a model is split over processes.

    tensor: processes that share each layer. pipeline: stages of layers. microbatches: parts of a batch that are in the
    pipeline together. plan: what happens to layers, by name or glob over names; the others stay whole on every process.
    "column" splits the outputs and gathers them; "column-split" leaves them split, for a "row" layer, which takes its
    input split and sums its outputs. Without a plan all layers that can be are "column".
    """

    tensor: int = 1
    pipeline: int = 1
    plan: Mapping[str, str] | None = None
    microbatches: int = 4

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "microbatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelParallel: {name} is {getattr(self, name)!r}; allowed: 1 or more")
        for glob, split in (self.plan or {}).items():
            if split not in SPLITS:
                raise ValueError(
                    f"ModelParallel: plan has {glob!r}: {split!r}; allowed: {', '.join(map(repr, SPLITS))}"
                )

    def mesh(self, world_size: int | None = None) -> DeviceMesh:
        """The processes as a mesh with dimensions "data", "pipeline" and "tensor".

        world_size: None for all processes. torch.distributed has to be initialized. Raises ValueError for a number that
        is not a multiple of tensor * pipeline.
        """
        size = dist.get_world_size() if world_size is None else world_size
        data, rest = divmod(size, self.tensor * self.pipeline)
        if rest or data < 1:
            raise ValueError(
                f"mesh: world_size is {size}; allowed: a multiple of {self.tensor * self.pipeline} "
                f"(tensor {self.tensor} * pipeline {self.pipeline})"
            )
        return init_device_mesh("cpu", (data, self.pipeline, self.tensor), mesh_dim_names=DIMENSIONS)

    def split_(self, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Puts this process's slices in the place of the model's layers; returns the model.

        model: the same on every process, with nn.Linear, QuantLinear or SparseLinear layers; recurrent ones stay whole.
        What is random outside the split layers (dropout) has to be drawn alike by the processes that share them. Raises
        ValueError for a mesh of another size, a glob that matches no layer, a layer that can not be split as planned
        and, with tensor above 1, a model with nothing to split, before anything is changed. The result can not be
        copied or saved as it is: see whole_state.gather_state.
        """
        if mesh["tensor"].size() != self.tensor:
            raise ValueError(f"split_: the mesh has {mesh['tensor'].size()} in 'tensor'; allowed: {self.tensor}")
        chosen = self._chosen(model)
        if self.tensor == 1:
            return model
        group = mesh.get_group("tensor")
        replaced: dict[nn.Module, ParallelLayer] = {}
        for parent, attribute, _, layer in list(_sites(model)):
            split = chosen.get(layer)
            if split is None:
                continue
            if layer not in replaced:
                replaced[layer] = (
                    RowParallel(layer, group) if split == "row" else ColumnParallel(layer, group, split == "column")
                )
            setattr(parent, attribute, replaced[layer])
        _leave_fused_paths(model)
        return model

    def pipelined(self, model: nn.Module, mesh: DeviceMesh) -> Pipeline:
        """This process's stage of an nn.Sequential, split_ or not. Raises ValueError as Pipeline does."""
        if mesh["pipeline"].size() != self.pipeline:
            raise ValueError(
                f"pipelined: the mesh has {mesh['pipeline'].size()} in 'pipeline'; allowed: {self.pipeline}"
            )
        return Pipeline(model, mesh, self.microbatches)

    def _chosen(self, model: nn.Module) -> dict[nn.Module, str]:
        """The split of every layer that gets one; each has been checked."""
        # The kernel of a recurrent layer reads the whole weights of its parts.
        layers = [
            (name, layer)
            for parent, _, name, layer in _sites(model)
            if can_slice(layer) and not isinstance(parent, Recurrent)
        ]
        tied = _tied(model)
        if self.plan is None:
            chosen = {layer: "column" for _, layer in layers if self._why_not(layer, "column", tied) is None}
        else:
            chosen = self._planned(layers)
        if not chosen and self.tensor > 1:
            raise ValueError(
                f"split_: nothing to split in {type(model).__name__}; allowed: a model with layers of at least "
                f"{self.tensor} outputs and weights of their own"
            )
        for name, layer in layers:
            reason = self._why_not(layer, chosen[layer], tied) if layer in chosen else None
            if reason is not None:
                raise ValueError(f"split_: {name} ({type(layer).__name__}) is {chosen[layer]!r}: {reason}")
        return chosen

    def _planned(self, layers: list[tuple[str, nn.Module]]) -> dict[nn.Module, str]:
        chosen: dict[nn.Module, str] = {}
        for glob, split in (self.plan or {}).items():
            matching = [
                (name, layer) for name, layer in layers if fnmatch.fnmatchcase(name, glob) or name.endswith("." + glob)
            ]
            if not matching:
                examples = ", ".join(name for name, _ in layers[:5])
                raise ValueError(
                    f"split_: plan holds {glob!r}, which matches no layer; layers here: {examples or 'none'}, ..."
                )
            for name, layer in matching:
                if chosen.setdefault(layer, split) != split:
                    raise ValueError(
                        f"split_: plan has {name} as {chosen[layer]!r} and {split!r}; allowed: one of them"
                    )
        return chosen

    def _why_not(self, layer: Any, split: str, tied: set[int]) -> str | None:
        size, what = (layer.in_features, "inputs") if split == "row" else (layer.out_features, "outputs")
        if size < self.tensor:
            return f"it has {size} {what}; allowed: at least {self.tensor}"
        if tied & _parameters(layer):
            return "its weight is tied to another layer's; allowed: a weight of its own"
        return why_not_row(layer) if split == "row" else None


def _sites(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """(parent, attribute, name, module) of every submodule, a shared one at each place."""
    for prefix, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                yield parent, attribute, f"{prefix}.{attribute}" if prefix else attribute, child


def _parameters(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters(recurse=False)}


def _tied(model: nn.Module) -> set[int]:
    """The parameters (their ids) that several modules have."""
    owners = Counter(parameter for module in model.modules() for parameter in _parameters(module))
    return {parameter for parameter, count in owners.items() if count > 1}


def _leave_fused_paths(model: nn.Module) -> None:
    # torch's fused encoder hands the layers' weights to a kernel of its own; these are its switches.
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
