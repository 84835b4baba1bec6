"""Sharded data parallelism by torch's fully_shard (FSDP2): of every parameter, its gradient and its optimizer state a
data rank holds a part, along the first dimension. A block of the model is gathered while it computes, forward and
backward, and gradients are averaged once a block's backward is done.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lepton_ai.distributed.exchange import broadcast_

Shard = bool | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool]


def is_choice(shard: object) -> bool:
    """Whether `shard` is a Shard."""
    if isinstance(shard, tuple):
        return bool(shard) and all(isinstance(kind, type) for kind in shard)
    return isinstance(shard, bool) or callable(shard)


def blocks_of(model: nn.Module, shard: Shard) -> list[nn.Module]:
    """The modules whose parameters are gathered together, inner ones first; the model itself is none of them.

    shard True: of every nn.ModuleList and nn.Sequential the children whose type occurs there more than once, and
    nothing inside these. A type, several of them, or a function of a module: what these choose. Raises ValueError where
    such a choice is empty.
    """
    if shard is True:
        return list(dict.fromkeys(_repeated(model)))
    chosen = (lambda module: isinstance(module, shard)) if isinstance(shard, (type, tuple)) else shard
    inner = [module for module in model.modules() if module is not model]
    blocks = [module for module in reversed(inner) if _can_be_a_block(module) and chosen(module)]  # type: ignore[operator]
    if not blocks:
        kinds = ", ".join(sorted({type(module).__name__ for module in inner if _can_be_a_block(module)}))
        raise ValueError(
            f"SynchronousUpdate: shard is {shard!r}, which chooses no module with parameters of "
            f"{type(model).__name__}; allowed: True, or a choice among {kinds or 'none, as it has no such module'}"
        )
    return blocks


def _can_be_a_block(module: nn.Module) -> bool:
    # nn.MultiheadAttention never calls its projection: it reads the weight.
    is_called = not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    has_forward = type(module).forward is not nn.Module.forward
    return is_called and has_forward and next(module.parameters(), None) is not None


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    children = list(dict.fromkeys(module.children()))
    kinds = [type(child) for child in children]
    for child, kind in zip(children, kinds, strict=True):
        stands_in_row = isinstance(module, (nn.ModuleList, nn.Sequential)) and kinds.count(kind) > 1
        if stands_in_row and _can_be_a_block(child):
            yield child
        else:
            yield from _repeated(child)


def _check_groups(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Raises ValueError for parameters that can not be shards of these blocks."""
    owner: dict[nn.Module, nn.Module] = {}
    for block in (*blocks, model):
        for module in block.modules():
            owner.setdefault(module, block)
    block_of: dict[nn.Parameter, nn.Module] = {}
    dtype_of: dict[nn.Module, torch.dtype] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = owner[model.get_submodule(name.rpartition(".")[0])]
        if parameter.ndim == 0:
            raise ValueError(f"SynchronousUpdate: shard with {name}, a scalar; allowed: parameters [n, ...]")
        if block_of.setdefault(parameter, block) is not block:
            raise ValueError(
                f"SynchronousUpdate: shard with {name}, which is tied to a parameter of another block; allowed: ties "
                f"within a block or outside all of them, see the argument shard"
            )
        if parameter.requires_grad and dtype_of.setdefault(block, parameter.dtype) != parameter.dtype:
            raise ValueError(
                f"SynchronousUpdate: shard with {name}, {parameter.dtype} in a block with {dtype_of[block]}; allowed: "
                f"one dtype of the trained parameters of a block"
            )


@dataclass
class Traffic:
    """What a rank did for gradients and sharded parameters: steps, payload bytes sent, and values of gradients."""

    steps: int = 0
    gradient_bytes: int = 0
    gradient_values: int = 0
    parameter_bytes: int = 0


class _Exchange:
    """What fully_shard asks of a collective: the call, and the memory for it."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _MeanOfGradients(_Exchange):
    """This rank's share of the mean of a block's gradients. gloo's own reduce-scatter is an all-reduce, of twice the
    bytes. The sum is in float32 at least and in the order of ranks."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any) -> None:
        ranks = group.size()
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        total = received.view(ranks, -1).sum(0, dtype=torch.promote_types(received.dtype, torch.float32))
        output_tensor.copy_(total / ranks if op == dist.ReduceOp.AVG else total)
        self.traffic.gradient_bytes += input_tensor.nbytes * (ranks - 1) // ranks
        self.traffic.gradient_values += input_tensor.numel()


class _WholeParameters(_Exchange):
    """A block's parameters, from all ranks' shares."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool
    ) -> dist.Work | None:
        self.traffic.parameter_bytes += input_tensor.nbytes * (group.size() - 1)
        return dist.all_gather(list(output_tensor.chunk(group.size())), input_tensor, group=group, async_op=async_op)


def shard_parameters_(
    model: nn.Module, mesh: DeviceMesh, shard: Shard, reduce_dtype: torch.dtype | None, traffic: Traffic
) -> None:
    """Shards the parameters of `model` over the "data" ranks of `mesh`, in place.

    model: of the same shapes on every rank; all take the values of data rank 0. reduce_dtype: of gradients while they
    are exchanged; None for their own. traffic: counts what is sent. All ranks call it at once, and run forward and
    backward alike. Raises ValueError as blocks_of does, and for a scalar parameter, one that is tied over blocks, and
    trained parameters of several dtypes in a block.
    """
    blocks = blocks_of(model, shard)
    _check_groups(model, blocks)
    broadcast_(model.state_dict().values(), 0, mesh.get_group("data"))
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for module in (*blocks, model):
        sharded = fully_shard(module, mesh=mesh["data"], mp_policy=policy)
        sharded.set_custom_all_gather(_WholeParameters(traffic))  # type: ignore[arg-type]
        sharded.set_custom_reduce_scatter(_MeanOfGradients(traffic))  # type: ignore[arg-type]
