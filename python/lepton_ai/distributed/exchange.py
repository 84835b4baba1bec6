"""Tensors of any dtype, unequal in size, between the processes of a group.

gloo gathers tensors of equal size and of some dtypes alone, so they travel as bytes, padded to the longest.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Shape = Sequence[int]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is sharded over data ranks (sharding.py) whole, on all of them; any other as it is, detached."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor, shapes: Sequence[Shape], group: dist.ProcessGroup) -> list[Tensor]:
    """The tensors of all processes: that of rank i has shapes[i]; all have one dtype."""
    sizes = [math.prod(shape) * tensor.element_size() for shape in shapes]
    if not max(sizes):
        return [tensor.new_empty(shape) for shape in shapes]
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: tensor.nbytes] = _bytes(tensor)
    received = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(received, padded, group=group)
    return [
        data[:size].view(tensor.dtype).reshape(*shape)
        for data, size, shape in zip(received, sizes, shapes, strict=True)
    ]


def gather_states(state: dict[str, Tensor], group: dist.ProcessGroup) -> list[dict[str, Tensor]]:
    """The state dicts of all processes; they have the same names and dtypes, shapes may differ."""
    shapes: list[dict[str, Shape]] = [{} for _ in range(group.size())]
    dist.all_gather_object(shapes, {name: tuple(tensor.shape) for name, tensor in state.items()}, group=group)
    gathered = {name: gather(tensor, [of[name] for of in shapes], group) for name, tensor in state.items()}
    return [{name: tensors[rank] for name, tensors in gathered.items()} for rank in range(group.size())]


def broadcast_(tensors: Iterable[Tensor], source: int, group: dist.ProcessGroup) -> None:
    """Overwrites the tensors of all processes, of the same shapes and dtypes, with those of `source` in the group."""
    for tensor in tensors:
        if tensor.numel():
            data = _bytes(tensor)
            dist.broadcast(data, group=group, group_src=source)
            tensor.detach().copy_(data.view(tensor.dtype).reshape(tensor.shape))


def broadcast_state(state: dict[str, Tensor], source: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The state dict of the process that is `source` in the group, on all; only there `state` is read."""
    described = [[(name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()]]
    dist.broadcast_object_list(described, group=group, group_src=source)
    mine = group.rank() == source
    received = {}
    for name, shape, dtype in described[0]:
        tensor = state[name].detach() if mine else torch.empty(shape, dtype=dtype)
        if tensor.numel():
            data = _bytes(tensor)
            dist.broadcast(data, group=group, group_src=source)
            tensor = tensor if mine else data.view(dtype).reshape(shape)
        received[name] = tensor
    return received
