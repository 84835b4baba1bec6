"""An nn.Sequential as stages on several processes, which work on several parts of a batch (microbatches) at a time.

A stage is a range of children; the largest stage's bytes are as few as they can be. torch.distributed.pipelining moves
activations and gradients: 1F1B for training, which keeps few microbatches in memory, GPipe's order for inference. It is
told every stage's shapes: left to itself it finds them by running the stages on uninitialized memory, in training mode.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from lepton_ai.distributed.exchange import broadcast_state
from lepton_ai.distributed.whole_state import load_state

Loss = Callable[[Tensor, Tensor], Tensor]


def balanced(sizes: Sequence[int], stages: int) -> list[range]:
    """Contiguous ranges of `sizes`, one a stage and none empty, whose largest sum is the least possible."""

    @cache
    def best(begin: int, left: int) -> tuple[int, tuple[int, ...]]:
        """(the largest sum, where the stages end) of the sizes from `begin` on in `left` stages."""
        if left == 1:
            return sum(sizes[begin:]), (len(sizes),)
        options = []
        for end in range(begin + 1, len(sizes) - left + 2):
            largest, ends = best(end, left - 1)
            options.append((max(sum(sizes[begin:end]), largest), (end, *ends)))
        return min(options)

    ends = best(0, stages)[1]
    return [range(begin, end) for begin, end in zip((0, *ends[:-1]), ends, strict=True)]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def cut(model: nn.Module, stages: int) -> list[nn.Sequential]:
    """The stages of an nn.Sequential; their children are the model's and keep its names.

    Raises ValueError for another module, fewer children than stages, and a parameter that two stages would share.
    """
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            f"Pipeline: model is {type(model).__name__}; allowed: nn.Sequential, whose children are staged"
        )
    children = list(model.named_children())
    if len(children) != len(model):
        raise ValueError("Pipeline: model holds a module twice; allowed: every child once")
    if len(children) < stages:
        raise ValueError(f"Pipeline: model has {len(children)} children; allowed: at least {stages}, one a stage")
    ranges = balanced([sum(t.nbytes for t in _tensors(child)) for _, child in children], stages)
    parts = [nn.Sequential(OrderedDict(children[part.start : part.stop])).train(model.training) for part in ranges]
    owners: dict[int, int] = {}
    for stage, part in enumerate(parts):
        for name, parameter in part.named_parameters():
            if owners.setdefault(id(parameter), stage) != stage:
                raise ValueError(f"Pipeline: {name} is shared with another stage; allowed: parameters of one stage")
    return parts


@dataclass(frozen=True)
class _Edge:
    """What flows from one stage to the next for a microbatch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "_Edge":
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, requires_grad=self.requires_grad)


class Pipeline:
    """This process's stage of a model, as `stage` (an nn.Sequential; give its parameters to the optimizer).

    All processes of a pipeline group call train_step and inference together, with the same arguments.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, microbatches: int) -> None:
        """model: the same on every process; mesh: from ModelParallel.mesh. Raises ValueError as `cut` does."""
        if microbatches < 1:
            raise ValueError(f"Pipeline: microbatches is {microbatches!r}; allowed: 1 or more")
        self.microbatches = microbatches
        self._group = mesh.get_group("pipeline")
        self._index, self._stages = self._group.rank(), self._group.size()
        self.stage = cut(model, self._stages)[self._index]
        self._loss_fn: Loss | None = None  # of the step that runs
        # The last schedule for training and for inference: what it was made for, and itself.
        self._schedules: dict[bool, tuple[tuple[_Edge, int], Any]] = {}

    def train_step(self, inputs: Tensor, targets: Tensor, loss_fn: Loss) -> float:
        """The mean of loss_fn(outputs, targets) over the microbatches; its gradients are added to the stage's.

        inputs, targets: [batch, ...]. loss_fn averages over a batch. Returns the loss on all processes. Raises
        ValueError for a batch that is not a multiple of the microbatches.
        """
        if len(inputs) < 1 or len(inputs) % self.microbatches:
            raise ValueError(
                f"train_step: the batch is {len(inputs)}; allowed: a multiple of {self.microbatches}, the microbatches"
            )
        if len(targets) != len(inputs):
            raise ValueError(f"train_step: {len(targets)} targets for {len(inputs)} inputs; allowed: as many")
        schedule = self._schedule(inputs, self.microbatches, training=True)
        self._loss_fn = loss_fn
        losses: list[Tensor] = []
        target = targets if self._is_last else None
        schedule.step(*self._given(inputs), target=target, losses=losses, return_outputs=False)
        loss = torch.tensor(sum(part.item() for part in losses), dtype=torch.float64)
        dist.broadcast(loss, group=self._group, group_src=self._stages - 1)
        return loss.item()

    @torch.no_grad()
    def inference(self, inputs: Tensor) -> Tensor:
        """The model's outputs for inputs [batch, ...], on all processes.

        A batch that is no multiple of the microbatches makes fewer, equal ones. Raises ValueError when it is empty.
        """
        if len(inputs) < 1:
            raise ValueError("inference: the batch is 0; allowed: 1 or more")
        parts = max(count for count in range(1, self.microbatches + 1) if len(inputs) % count == 0)
        schedule = self._schedule(inputs, parts, training=False)
        output = schedule.step(*self._given(inputs))
        state = {"output": output} if self._is_last else {}
        return broadcast_state(state, self._stages - 1, self._group)["output"]

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Loads this stage's part of the whole model's state dict."""
        mine = {name: tensor for name, tensor in state.items() if name.split(".")[0] in self.stage._modules}
        load_state(self.stage, mine)

    @property
    def _is_last(self) -> bool:
        return self._index == self._stages - 1

    def _given(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return (inputs,) if self._index == 0 else ()

    def _scaled_loss(self, output: Tensor, target: Tensor) -> Tensor:
        assert self._loss_fn is not None
        return self._loss_fn(output, target) / self.microbatches

    def _schedule(self, inputs: Tensor, parts: int, training: bool) -> Any:
        first = _Edge((len(inputs) // parts, *inputs.shape[1:]), inputs.dtype, False)
        known = self._schedules.get(training)
        if known is not None and known[0] == (first, parts):
            return known[1]
        edges = self._edges(first, training)
        before, after = edges[self._index].zeros(), edges[self._index + 1].zeros()
        stage = PipelineStage(
            self.stage, self._index, self._stages, torch.device("cpu"), before, after, group=self._group
        )
        if training:  # the loss is scaled, and not, as torch would, all gradients that are there after a step
            schedule: Any = Schedule1F1B(stage, parts, self._scaled_loss, scale_grads=False)
        else:
            schedule = ScheduleGPipe(stage, parts)
        self._schedules[training] = ((first, parts), schedule)
        return schedule

    def _edges(self, first: _Edge, training: bool) -> list[_Edge]:
        """What enters the first stage, leaves it, leaves the next, ...; found by zeros."""
        edges = [first]
        for index in range(self._stages):
            found: list[Any] = [None]
            if index == self._index:
                found = [_Edge.of(self._tried(edges[-1].zeros(), training))]
            dist.broadcast_object_list(found, group=self._group, group_src=index)
            edges += found
        return edges

    def _tried(self, zeros: Tensor, training: bool) -> Tensor:
        """The stage's output in evaluation mode, so that running statistics and random numbers are left alone."""
        modes = {module: module.training for module in self.stage.modules()}
        self.stage.eval()
        try:
            with torch.set_grad_enabled(training):
                output = self.stage(zeros)
        finally:
            for module, mode in modes.items():
                module.training = mode
        if not isinstance(output, Tensor):
            raise ValueError(f"Pipeline: stage {self._index} returns {type(output).__name__}; allowed: one tensor")
        return output
