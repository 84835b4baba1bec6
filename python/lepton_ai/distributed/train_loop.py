"""The training loop of one rank: data-parallel, tensor-parallel or a pipeline of stages, with checkpoints that a job
resumes from to the same bits. LeptonDistributedModel runs it in every worker.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lepton_ai.distributed import checkpoint
from lepton_ai.distributed.compressed_mean import PeerError, missing_ranks
from lepton_ai.distributed.data_partitioner import DataPartitioner
from lepton_ai.distributed.exchange import broadcast_
from lepton_ai.distributed.model_parallel import ModelParallel
from lepton_ai.distributed.pipeline_parallel import Pipeline
from lepton_ai.distributed.synchronous_update import SynchronousUpdate, UpdateStats
from lepton_ai.distributed.whole_state import gather_state
from lepton_ai.resources import peak_memory

Loss = Callable[[Any, Any], Tensor]
Evaluate = Callable[[nn.Module], float]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class TrainJob:
    """What every rank needs; it pickles if the model, the dataset, loss_fn and optimizer do."""

    model: nn.Module
    partitioner: DataPartitioner
    update: SynchronousUpdate
    parallel: ModelParallel
    loss_fn: Loss
    optimizer: MakeOptimizer
    last_epoch: int  # the partitioner's epoch at which training ends
    steps: int | None
    seed: int
    checkpoint: Path | None
    checkpoint_every: int


@dataclass
class TrainReport:
    """What train() did: steps, samples and seconds of this run (not of those before a restart), the mean loss of each
    epoch over all samples, workers, what was sent for gradients, and what train's `evaluate` gave before and after."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    workers: int = 1
    losses: list[float] = field(default_factory=list)
    update: UpdateStats | None = None
    peak_memory: int = 0  # bytes, of the largest worker
    metric_before: float | None = None
    metric_after: float | None = None

    def __str__(self) -> str:
        rate = self.samples / self.seconds if self.seconds else 0.0
        lines = [f"{self.steps} steps, {self.samples} samples, {self.seconds:.2f} s, {rate:.0f} samples/s, "
                 f"{self.workers} workers"]  # fmt: skip
        lines += [f"epoch {i + 1}: loss {loss:.5g}" for i, loss in enumerate(self.losses)]
        if self.metric_before is not None and self.metric_after is not None:
            lines.append(f"evaluated: {self.metric_before:.5g} before, {self.metric_after:.5g} after")
        if self.update is not None:
            u = self.update
            state = "" if u.compression == "fp32" else (" (on)" if u.active else " (off: it did not pay)")
            lines.append(f"gradients {u.compression}{state}: {u.bytes_sent} bytes sent, float32 {u.bytes_fp32}")
            if u.bytes_parameters:
                lines.append(f"sharded parameters: {u.bytes_parameters} bytes sent")
        return "\n".join(lines)


@dataclass
class TrainOutcome:
    """What a rank brings back: the whole model's state, where the data stands, and the report."""

    state: dict[str, Tensor]
    data: dict[str, Any]
    report: TrainReport


def under_launcher() -> bool:
    """Whether a launcher (torchrun, ResourceManager) started this process as one rank of several or one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@cache
def _store() -> dist.TCPStore:
    """The store that the launcher keeps, or rank 0."""
    at_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, world_size, rank == 0 and not at_launcher)


_groups = count()


def join_group(timeout: float) -> bool:
    """Joins the job's process group where a launcher made one. Returns whether this call did it.

    A store outlives the groups that meet in it, and with torchrun the processes: each group has names of its own there,
    or ranks would find the addresses of a group that is gone.
    """
    if dist.is_initialized() or not under_launcher():
        return False
    name = f"lepton-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{next(_groups)}"
    dist.init_process_group(
        "gloo", store=dist.PrefixStore(name, _store()), rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    return True


@contextmanager
def job_group(timeout: float) -> Iterator[None]:
    """Is in the job's process group. Raises PeerError, in the place of gloo's error, where another rank is gone."""
    joined = join_group(timeout)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PeerError) or not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        missing = missing_ranks(range(dist.get_world_size()), 5.0)
        if not missing:
            raise
        who = ", ".join(f"rank {rank}" for rank in missing)
        raise PeerError(f"train: {who} did not answer: {error}") from error
    finally:
        if joined:
            dist.destroy_process_group()


def run_job(job: TrainJob) -> TrainOutcome:
    """Trains as this rank of the job. Raises PeerError where another rank is gone."""
    with job_group(job.update.timeout):
        return _Trainer(job).run()


def metric_of(model: nn.Module, evaluate: Evaluate) -> float:
    """evaluate(model), in eval mode and without gradients; all ranks call it and get what rank 0 found.

    Raises TypeError where evaluate does not give a number.
    """
    training = model.training
    try:
        with torch.inference_mode():
            value = evaluate(model.eval())
    finally:
        model.train(training)
    try:
        metric = torch.tensor(float(value), dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"train: evaluate gave {value!r}; allowed: a number") from error
    if dist.is_initialized():
        dist.broadcast(metric, 0)
    return float(metric)


class _Touchable(nn.Module):
    """A model that can also be asked for the sum of all its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, lepton_touch: bool = False, **named: Any) -> Any:
        if not lepton_touch:
            return self.model(*inputs, **named)
        return sum(parameter.sum() for parameter in self.model.parameters() if parameter.requires_grad)


def data_parallel(model: nn.Module, group: dist.ProcessGroup) -> DistributedDataParallel:
    """`model` in DistributedDataParallel, its buckets of gradients settled.

    DDP orders its buckets after the first backward pass by when gradients came. A resumed run would have the first
    order where an undisturbed one has the second, and blocks of compressed gradients, hence bits, would differ. So a
    first pass is made here, in which gradients come in the parameters' reverse order.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped = DistributedDataParallel(_Touchable(model), process_group=group, broadcast_buffers=False)
    wrapped(lepton_touch=True).backward()
    wrapped.zero_grad(set_to_none=True)
    return wrapped


def statistics_of(model: nn.Module) -> list[Tensor]:
    """The buffers that a step changes, which data ranks take from rank 0 after it: running statistics of norms."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
    return [buffer for module in norms for buffer in module.buffers(recurse=False)]


class _Trainer:
    def __init__(self, job: TrainJob) -> None:
        self.job = job
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.mesh = job.parallel.mesh() if world > 1 else None
        self.ranks, self.rank = 1, 0
        model = job.model.train()
        if self.mesh is not None:
            self.ranks, self.rank = self.mesh["data"].size(), self.mesh["data"].get_local_rank()
            job.parallel.split_(model, self.mesh)
        self.partitioner = job.partitioner.bind(self.rank, self.ranks)
        checkpoint.seed_everything(job.seed + self.rank)
        self.pipeline: Pipeline | None = None
        if self.mesh is not None and job.parallel.pipeline > 1:
            self.pipeline = self._pipeline(model)
            model = self.pipeline.stage
        self.model = self.module = model
        self.shares_gradients = self.ranks > 1 and self.pipeline is None
        is_sharded = self.shares_gradients and bool(job.update.shard)
        self.statistics = statistics_of(model)
        if is_sharded and self.mesh is not None:
            job.update.shard_(model, self.mesh)
        elif self.shares_gradients:
            self.module = data_parallel(model, self._data_group())
            job.update.attach(self.module)
        optimizer = job.optimizer(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.state = checkpoint.State(
            model, optimizer, self.partitioner, job.update, self.rank, self._layout(), is_sharded
        )
        self.report = TrainReport(workers=world)
        self.own_loss = 0.0  # sum over samples, not yet in state.losses

    def run(self) -> TrainOutcome:
        job, state = self.job, self.state
        if job.checkpoint is not None:
            checkpoint.resume(job.checkpoint, state)
        start, first = time.perf_counter(), state.step
        while self.partitioner.epoch < job.last_epoch and not self._is_done():
            epoch = self.partitioner.epoch
            state.losses += [[0.0, 0.0] for _ in range(epoch + 1 - len(state.losses))]
            before = self.partitioner.position
            for batch in self.partitioner:
                samples, before = self.partitioner.position - before, self.partitioner.position
                self.own_loss += self._step(batch) * samples
                state.losses[epoch][1] += samples
                self.report.samples += samples
                state.step += 1
                if job.checkpoint is not None and state.step % job.checkpoint_every == 0:
                    self._share_loss(epoch)
                    checkpoint.save(job.checkpoint, state)
                if self._is_done():
                    break
            self._share_loss(epoch)
        return self._outcome(state.step - first, time.perf_counter() - start)

    def _outcome(self, steps: int, seconds: float) -> TrainOutcome:
        report = self.report
        report.steps, report.seconds = steps, seconds
        report.losses = [total / count for total, count in self.state.losses if count]
        report.peak_memory = peak_memory()
        if self.mesh is None:
            return TrainOutcome(self.model.state_dict(), self.partitioner.state_dict(), report)
        peak = torch.tensor(report.peak_memory)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        report.peak_memory = int(peak)
        whole = gather_state(self.model, self.mesh)
        if self.shares_gradients:
            report.update = self.job.update.stats()
            self.job.update.detach()
        return TrainOutcome(whole, self.partitioner.state_dict(), report)

    def _is_done(self) -> bool:
        return self.job.steps is not None and self.state.step >= self.job.steps

    def _share_loss(self, epoch: int) -> None:
        """Adds all data ranks' losses since the last call to the epoch's."""
        total = torch.tensor(self.own_loss, dtype=torch.float64)
        if self.ranks > 1:
            dist.all_reduce(total, group=self._data_group())
        self.state.losses[epoch][0] += float(total)
        self.own_loss = 0.0

    def _step(self, batch: Any) -> float:
        """One step; returns this rank's part of the mean loss over the samples of all data ranks."""
        if self.pipeline is None:
            output, target = apply_batch(self.module, batch)
            loss = self.job.loss_fn(output, target) * self.partitioner.weight
            loss.backward()
            if self.shares_gradients:
                broadcast_(self.statistics, 0, self._data_group())
            mean = float(loss.detach()) / self.ranks
        else:
            mean = self._pipeline_step(self.pipeline, batch)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        return mean

    def _pipeline_step(self, pipeline: Pipeline, batch: Any) -> float:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError("train: a pipeline's batch is not a pair; allowed: (input, target)")
        weight = self.partitioner.weight / self.ranks
        inputs, targets = batch
        loss = pipeline.train_step(inputs, targets, lambda *pair: self.job.loss_fn(*pair) * weight)
        if self.ranks > 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=self._data_group())
        return loss

    def _pipeline(self, model: nn.Module) -> Pipeline:
        assert self.mesh is not None
        update = self.job.update
        if self.ranks > 1 and (update.compression != "fp32" or update.shard):
            raise ValueError(
                f"train: SynchronousUpdate({update.compression!r}, shard={update.shard!r}) with ModelParallel(pipeline="
                f"{self.job.parallel.pipeline}); allowed with a pipeline: 'fp32', shard=False"
            )
        return self.job.parallel.pipelined(model, self.mesh)

    def _data_group(self) -> dist.ProcessGroup:
        assert self.mesh is not None
        return self.mesh.get_group("data")

    def _layout(self) -> checkpoint.Layout:
        if self.mesh is None:
            return checkpoint.Layout(1, 1, 1, "0.0")
        stage, slice = (self.mesh[name].get_local_rank() for name in ("pipeline", "tensor"))
        return checkpoint.Layout(self.ranks, self.job.parallel.pipeline, self.job.parallel.tensor, f"{stage}.{slice}")


def apply_batch(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """The model's output for a batch, and what the loss compares it with: of a tuple or list (inputs ..., target) its
    last; of a mapping, which the model gets as keywords, the mapping."""
    if isinstance(batch, Mapping):
        return model(**batch), batch
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return model(*batch[:-1]), batch[-1]
    raise ValueError(
        f"train: a batch is {type(batch).__name__}; allowed: a tuple or list (inputs ..., target), or a mapping"
    )
