"""LeptonDistributedModel: a model, compressed or not, trained and run over processes and machines."""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lepton_ai.distributed import exchange
from lepton_ai.distributed.data_partitioner import DataPartitioner
from lepton_ai.distributed.model_parallel import ModelParallel
from lepton_ai.distributed.slicing import shares
from lepton_ai.distributed.synchronous_update import SynchronousUpdate
from lepton_ai.distributed.train_loop import (
    Evaluate,
    Loss,
    MakeOptimizer,
    TrainJob,
    TrainOutcome,
    TrainReport,
    job_group,
    join_group,
    metric_of,
    run_job,
    under_launcher,
)
from lepton_ai.model import CompressedModel, LeptonModel
from lepton_ai.resources import ResourceManager, peak_memory

# float32 copies of the weights that training holds: they, their gradients, and two moments of Adam's.
_COPIES = 4


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """train's optimizer where none is given: AdamW, lr 1e-3."""
    return torch.optim.AdamW(parameters, lr=1e-3)


class LeptonDistributedModel:
    """A model over processes: how data is dealt, gradients are averaged and layers are split.

    model: an nn.Module, a CompressedModel (it trains in its training form and is compressed again after), a LeptonModel
    or a path as LeptonModel takes it. partitioner: the training data; None for inference alone. update: None for
    gradients in float32. parallel: None for whole models.

    Started by a launcher (`torchrun --nproc-per-node 2 script.py`), each process is a rank of the job and calls train
    and inference alike. Without one, train starts the workers that `configure` allows, on this machine, and inference
    runs in this process on all of its threads; not configured, train runs in this process too.
    """

    def __init__(
        self,
        model: nn.Module | CompressedModel | LeptonModel | str | os.PathLike[str],
        partitioner: DataPartitioner | None = None,
        update: SynchronousUpdate | None = None,
        parallel: ModelParallel | None = None,
    ) -> None:
        if isinstance(model, (str, os.PathLike)):
            model = LeptonModel(model)
        self._compressed = model if isinstance(model, CompressedModel) else None
        self._module = model.model if isinstance(model, (CompressedModel, LeptonModel)) else model
        self.partitioner = partitioner
        self.update = SynchronousUpdate() if update is None else update
        self.parallel = ModelParallel() if parallel is None else parallel
        self._manager: ResourceManager | None = None
        self._worker_memory = 0  # bytes, as the last training's largest worker reported
        self._ready: tuple[DeviceMesh, Callable[..., Any]] | None = None  # this rank's part, for inference

    @property
    def model(self) -> nn.Module | CompressedModel:
        """The model as it is now: of the kind that was given, on its own in this process."""
        return self._module if self._compressed is None else self._compressed

    def configure(self, manager: ResourceManager) -> "LeptonDistributedModel":
        """Lets `manager` start the workers of train. A launcher's ranks keep to the launcher. Returns self."""
        self._manager = manager
        return self

    def train(
        self,
        loss_fn: Loss,
        optimizer: MakeOptimizer = adamw,
        epochs: int = 1,
        *,
        steps: int | None = None,
        seed: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
        evaluate: Evaluate | None = None,
    ) -> TrainReport:
        """Trains for `epochs` more epochs of the partitioner's data, or until `steps` steps were taken.

        loss_fn(output, target): the mean loss of a batch; of batches (inputs ..., target) the model gets the inputs, of
        mappings the items as keywords, and the loss the mapping. optimizer: of the parameters that are to be trained,
        as `torch.optim.AdamW` or a functools.partial of one. checkpoint: a folder to save to every checkpoint_every
        steps and to go on from; a job that is stopped or loses a worker resumes there, to the same bits if it has as
        many ranks. Without a folder it starts anew. With workers of their own the model, the dataset, loss_fn and
        optimizer must pickle.

        evaluate(module): a number, of the nn.Module as it runs (a compressed model on its kernels), in eval mode. It is
        called here before and after training, by a launcher's ranks alike, of which rank 0's number counts. The report
        keeps both: the first is of the model that was given, not of a checkpoint that training goes on from.

        Raises ValueError without a partitioner and for numbers below 1, TypeError for an evaluate that gives no number,
        PeerError where a rank does not answer.
        """
        if self.partitioner is None:
            raise ValueError("train: the partitioner is None; allowed: a DataPartitioner")
        for name, value in (("epochs", epochs), ("steps", steps), ("checkpoint_every", checkpoint_every)):
            if value is not None and value < 1:
                raise ValueError(f"train: {name} is {value!r}; allowed: 1 or more")
        compressed = self._compressed
        module = copy.deepcopy(self._module) if compressed is None else compressed.trainable()
        folder = None if checkpoint is None else Path(checkpoint).absolute()
        job = TrainJob(
            module, self.partitioner, self.update, self.parallel, loss_fn, optimizer, self.partitioner.epoch + epochs,
            steps, seed, folder, checkpoint_every,
        )  # fmt: skip
        with job_group(self.update.timeout):
            before = None if evaluate is None else metric_of(self._module, evaluate)
            outcome = self._run(job)
            self._take(outcome)
            report = outcome.report
            report.metric_before = before
            report.metric_after = None if evaluate is None else metric_of(self._module, evaluate)
        return report

    def _take(self, outcome: TrainOutcome) -> None:
        """Makes the trained weights this model's."""
        assert self.partitioner is not None
        compressed = self._compressed
        whole = copy.deepcopy(self._module) if compressed is None else compressed.trainable()
        whole.load_state_dict(outcome.state)
        whole.train(self._module.training)
        self.partitioner.load_state_dict(outcome.data)
        self._worker_memory, self._ready = outcome.report.peak_memory, None
        if compressed is None:
            self._module = whole
        else:
            self._compressed = compressed.retrained(whole)
            self._module = self._compressed.model

    def _run(self, job: TrainJob) -> TrainOutcome:
        if under_launcher() or self._manager is None:
            return run_job(job)
        size = sum(p.numel() * 4 for p in job.model.parameters())
        memory = self._worker_memory or peak_memory() + _COPIES * size
        return self._manager.run(run_job, (job,), memory=memory, multiple=self.parallel.tensor * self.parallel.pipeline)

    @torch.inference_mode()
    def inference(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The model's output for tensors [batch, ...]. The model is in eval mode for the call.

        A launcher's ranks all call it with the same batch: it is dealt over the data ranks, each of which runs its part
        through its slices or stages of the model, and every rank gets the whole output (a tensor [batch, ...], or a
        tuple, list or mapping of such). Where the script has initialized torch.distributed, groups and slices are made
        by the first call and kept until train; else by each.
        """
        joined = join_group(self.update.timeout)
        try:
            if not dist.is_initialized() or dist.get_world_size() == 1:
                return _evaluated(self._module, inputs, named)
            return self._inference_of_rank(inputs, named)
        finally:
            if joined:
                dist.destroy_process_group()
                self._ready = None

    def _inference_of_rank(self, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> Any:
        tensors = [*inputs, *named.values()]
        staged = self.parallel.pipeline > 1
        if not tensors or (staged and len(tensors) > 1):
            allowed = "one, as stages pass on one" if staged else "one or more"
            raise ValueError(f"inference: {len(tensors)} tensors; allowed: {allowed}, [batch, ...]")
        mesh, part_of_model = self._ready = self._ready or self._make_ready()
        size = len(tensors[0])
        ranges = shares(size, mesh["data"].size())
        begin, end = ranges[mesh["data"].get_local_rank()]
        if begin == end:  # more ranks than samples: one takes part that does not count
            begin, end = 0, min(1, size)
        output = part_of_model(*(x[begin:end] for x in inputs), **{name: x[begin:end] for name, x in named.items()})
        return _joined(output, ranges, mesh.get_group("data"))

    def _make_ready(self) -> tuple[DeviceMesh, Callable[..., Any]]:
        mesh = self.parallel.mesh()
        split = self.parallel.split_(copy.deepcopy(self._module).eval(), mesh)
        if self.parallel.pipeline == 1:
            return mesh, split
        stage = self.parallel.pipelined(split, mesh)
        return mesh, lambda *inputs, **named: stage.inference(*inputs, *named.values())


def _evaluated(model: nn.Module, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> Any:
    training = model.training
    model.eval()
    try:
        return model(*inputs, **named)
    finally:
        model.train(training)


def _joined(output: Any, ranges: list[tuple[int, int]], group: dist.ProcessGroup) -> Any:
    """The parts of all data ranks, one after another."""
    if isinstance(output, Tensor):
        mine = ranges[group.rank()]
        shapes = [(end - begin, *output.shape[1:]) for begin, end in ranges]
        return torch.cat(exchange.gather(output[: mine[1] - mine[0]].contiguous(), shapes, group))
    if isinstance(output, Mapping):
        joined = {name: _joined(value, ranges, group) for name, value in output.items()}
        return type(output)(**joined) if hasattr(output, "to_tuple") else joined
    if isinstance(output, (tuple, list)):
        return type(output)(_joined(value, ranges, group) for value in output)
    return output
