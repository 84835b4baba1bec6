"""SynchronousUpdate: how data-parallel ranks share gradients, as a communication hook of DistributedDataParallel, or
each a part of all (sharding.py).

fp32, bf16 and fp16 are plain all-reduces in that type. int8 and int4 send quantized blocks (compressed_mean.py), with
error feedback: what rounding lost of a gradient is added to the next one (Seide et al. 2014; Karimireddy et al. 2019).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from lepton_ai.distributed.compressed_mean import CompressedMean
from lepton_ai.distributed.sharding import Shard, Traffic, is_choice, shard_parameters_

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_BITS = {"int8": 8, "int4": 4}
COMPRESSIONS = ("fp32", *_HALVES, *_BITS)

_PROBE_VALUES = 1 << 20  # 4 MiB of gradients, about what a bucket of DDP's holds
_PROBE_ROUNDS = 5
_PAYS = 0.95  # of the plain all-reduce's time: compression that takes more is turned off


@dataclass(frozen=True)
class UpdateStats:
    """What SynchronousUpdate did on this rank.

    active: whether gradients are compressed now. bytes_sent: payload that this rank sent for gradients, without
    headers; bytes_fp32: what a ring all-reduce in float32 would have sent. bytes_parameters: payload sent to gather
    sharded parameters, before forward and again before backward; 0 without shard. seconds_plain, seconds_compressed:
    one exchange of 4 MiB in float32 and compressed, the slowest rank's median; None where it was not measured.
    """

    compression: str
    active: bool
    steps: int
    bytes_sent: int
    bytes_fp32: int
    bytes_parameters: int
    seconds_plain: float | None
    seconds_compressed: float | None


class SynchronousUpdate:
    """How gradients are averaged over data-parallel ranks after every backward pass.

    compression: "fp32", "bf16", "fp16", "int8" or "int4" (128 values share a scale; 3.88 and 7.53 times fewer bytes).
    error_feedback: for int8 and int4. automatic: when training begins, the ranks time one compressed exchange and one
    in float32 and use the faster: on a fast link compression costs more than it saves (stats() says what was measured).
    Two runs may then decide otherwise, and differ in their bits; a resumed one keeps to what was decided.
    timeout: seconds after which a rank that does not answer ends the job, with its number in the error (PeerError).

    shard: each rank keeps a part of the trained parameters, their gradients and the optimizer's state, instead of all;
    compression, "fp32", "bf16" or "fp16", is the type in which gradients are exchanged, and automatic does not matter.
    True: blocks that are repeated in an nn.ModuleList or nn.Sequential are whole while they compute, one at a time, the
    rest of the model for the whole step. A module type, a tuple of them or a function of a module: these are the
    blocks; it has to pickle where workers are started. The model reads a block's parameters in the block's forward
    alone.

    Raises ValueError for another compression, another shard, and a timeout that is not positive.
    """

    def __init__(
        self, compression: str = "fp32", *, shard: Shard = False, error_feedback: bool = True, automatic: bool = True,
        timeout: float = 60.0,
    ) -> None:  # fmt: skip
        if compression not in COMPRESSIONS:
            raise ValueError(f"SynchronousUpdate: compression is {compression!r}; allowed: {', '.join(COMPRESSIONS)}")
        if not timeout > 0:
            raise ValueError(f"SynchronousUpdate: timeout is {timeout!r}; allowed: seconds, more than 0")
        if not is_choice(shard):
            raise ValueError(
                f"SynchronousUpdate: shard is {shard!r}; allowed: True, False, a module type, a tuple of them or a "
                f"function of a module"
            )
        if shard and compression in _BITS:
            raise ValueError(
                f"SynchronousUpdate: compression is {compression!r} with shard; allowed with shard: "
                f"{', '.join(name for name in COMPRESSIONS if name not in _BITS)}"
            )
        self.compression, self.shard, self.error_feedback = compression, shard, error_feedback
        self.automatic, self.timeout = automatic, timeout
        self._active = compression != "fp32"
        self._group: dist.ProcessGroup | None = None
        self._mean: CompressedMean | None = None
        self._names: dict[nn.Parameter, str] = {}
        self._residuals: dict[tuple[str, ...], Tensor] = {}  # by the parameters of a bucket, f32 [values]
        self._loaded: dict[str, Tensor] = {}  # by parameter, until its bucket is seen
        self._traffic = Traffic()
        self._seconds: tuple[float | None, float | None] = None, None

    def attach(self, model: DistributedDataParallel) -> "SynchronousUpdate":
        """Makes `model` average its gradients this way. All ranks of its process group call it at once."""
        self._group = model.process_group
        self._names = {parameter: name for name, parameter in model.module.named_parameters()}
        if self.compression in _BITS:
            self._mean = CompressedMean(_BITS[self.compression], self._group, self.timeout)
        if self.automatic and self.compression != "fp32":
            self._active = self._pays()
        model.register_comm_hook(self, _hook)
        return self

    def shard_(self, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Shards `model` over the "data" ranks of a ModelParallel's mesh, in place: what attach is without shard.

        Returns the model. Raises ValueError as shard_parameters_ does.
        """
        self._group = mesh.get_group("data")
        shard_parameters_(model, mesh, self.shard, _HALVES.get(self.compression), self._traffic)
        model.register_forward_hook(self._count_step)
        return model

    def detach(self) -> None:
        """Ends what attach began; the model's process group may go then."""
        if self._mean is not None:
            self._mean.close()
            self._traffic.gradient_bytes += self._mean.bytes_sent
            self._mean = None

    def stats(self) -> UpdateStats:
        """What was sent so far, and what was measured."""
        ranks = 1 if self._group is None else self._group.size()
        compressed = 0 if self._mean is None else self._mean.bytes_sent
        traffic = self._traffic
        return UpdateStats(
            self.compression, self._active, traffic.steps, traffic.gradient_bytes + compressed,
            ring_bytes(traffic.gradient_values * 4, ranks), traffic.parameter_bytes, *self._seconds,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The residuals of error feedback by parameter (of all, once attached), and whether compression is on."""
        keeps = self._mean is not None and self.error_feedback
        residuals = {name: torch.zeros(p.numel()) for p, name in self._names.items() if keeps and p.requires_grad}
        residuals |= self._loaded
        for names, residual in self._residuals.items():
            residuals.update(zip(names, residual.split(self._sizes(names)), strict=True))
        return {
            "compression": self.compression, "active": self._active,
            "residuals": {name: residual.clone() for name, residual in residuals.items()},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where state_dict() was taken. Raises ValueError for the state of another compression."""
        if state["compression"] != self.compression:
            raise ValueError(
                f"SynchronousUpdate.load_state_dict: compression is {state['compression']!r}; allowed: "
                f"{self.compression!r}, as this one has"
            )
        self._active = self._active if self.shard else bool(state["active"])
        self._residuals = {}
        self._loaded = {name: residual.clone() for name, residual in state["residuals"].items()}

    def __getstate__(self) -> dict[str, Any]:
        if self._mean is not None:
            raise TypeError("SynchronousUpdate: it is attached to a model; allowed: to pickle it before attach()")
        return self.__dict__

    def _count_step(self, *_: Any) -> None:
        self._traffic.steps += torch.is_grad_enabled()

    def _sizes(self, names: tuple[str, ...]) -> list[int]:
        by_name = {name: parameter for parameter, name in self._names.items()}
        return [by_name[name].numel() for name in names]

    def _pays(self) -> bool:
        """Whether a compressed exchange is the faster; on every rank the same answer."""
        values = torch.randn(_PROBE_VALUES)
        before = self._traffic.gradient_bytes

        def seconds_of(exchange: Callable[[Tensor], Any]) -> float:
            buffer = values.clone()
            start = time.perf_counter()
            exchange(buffer)
            return time.perf_counter() - start

        def plain(buffer: Tensor) -> None:
            dist.all_reduce(buffer, group=self._group)

        pairs = [(seconds_of(plain), seconds_of(lambda x: self._average(x, None).wait())) for _ in range(_PROBE_ROUNDS)]
        slowest = torch.tensor([median(column) for column in zip(*pairs[1:], strict=True)], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=self._group)
        self._seconds = float(slowest[0]), float(slowest[1])
        self._traffic.gradient_bytes = before
        if self._mean is not None:
            self._mean.bytes_sent = 0
        return self._seconds[1] < _PAYS * self._seconds[0]

    def _residual_of(self, parameters: list[Tensor]) -> Tensor | None:
        """The residual of a bucket; where DDP forms its buckets anew, or one was loaded, it lies in others."""
        if not self.error_feedback:
            return None
        names = tuple(self._names[cast(nn.Parameter, parameter)] for parameter in parameters)
        if names not in self._residuals:
            for other in [key for key in self._residuals if not set(key).isdisjoint(names)]:
                parts = self._residuals.pop(other).split(self._sizes(other))
                self._loaded.update(zip(other, parts, strict=True))
            zeros = {name: torch.zeros(p.numel()) for name, p in zip(names, parameters, strict=True)}
            self._residuals[names] = torch.cat([self._loaded.pop(name, zeros[name]).flatten() for name in names])
        return self._residuals[names]

    def _average(self, buffer: Tensor, residual: Tensor | None) -> torch.futures.Future[Tensor]:
        if self._mean is not None:
            return self._mean.start(buffer, residual)
        sent = buffer.to(_HALVES[self.compression])
        self._traffic.gradient_bytes += ring_bytes(sent.numel() * sent.element_size(), self._ranks())
        return self._all_reduce(sent, buffer)

    def _all_reduce(self, sent: Tensor, buffer: Tensor) -> torch.futures.Future[Tensor]:
        sent.div_(self._ranks())
        work = dist.all_reduce(sent, group=self._group, async_op=True)
        return work.get_future().then(lambda _: buffer if sent is buffer else buffer.copy_(sent))  # type: ignore[union-attr]

    def _ranks(self) -> int:
        return dist.get_world_size(self._group)

    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        self._traffic.steps += bucket.is_last()
        self._traffic.gradient_values += buffer.numel()
        if not self._active:
            self._traffic.gradient_bytes += ring_bytes(buffer.numel() * buffer.element_size(), self._ranks())
            return self._all_reduce(buffer, buffer)
        if self._mean is None:
            return self._average(buffer, None)
        residual = self._residual_of(bucket.parameters())
        if buffer.dtype is torch.float32 and buffer.device.type == "cpu":
            return self._average(buffer, residual)
        on_cpu = buffer.to("cpu", torch.float32)
        return self._average(on_cpu, residual).then(lambda future: buffer.copy_(future.value()))


def ring_bytes(size: int, ranks: int) -> int:
    """What each rank sends in a ring all-reduce of `size` bytes: each part once to be summed, and once as the sum."""
    return 2 * (ranks - 1) * size // ranks


def _hook(update: SynchronousUpdate, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    return update._reduce(bucket)
