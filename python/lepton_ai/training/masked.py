"""Pruned float layers that train: the zeros of the weight stay zero, as no gradient reaches them."""

from typing import cast

import torch
from torch import Tensor, nn


def kept_of(weight: Tensor, mask_from: float) -> Tensor | None:
    """weight != 0 where at least the share mask_from of it is zero, but not all, as of what is yet to be trained."""
    kept = weight.detach() != 0
    return kept if 0 < float(kept.float().mean()) <= 1 - mask_from else None


class Masked(nn.Module):
    """What pruned float layers share: `weight` is the parameter of that name with its zeros, for whoever reads it.

    The parameter itself is in named_parameters() and the state dict.
    """

    mask: Tensor

    @property
    def weight(self) -> Tensor:
        weight = cast(Tensor, self._parameters["weight"])
        if hasattr(weight, "full_tensor"):  # a DTensor: fully_shard looks for its part; in forward it is a whole tensor
            return weight
        return torch.where(self.mask, weight, 0)

    @torch.no_grad()
    def compressed(self) -> nn.Module:
        """This module itself, a plain layer again."""
        cast(Tensor, self._parameters["weight"]).mul_(self.mask)
        del self.mask
        self.__class__ = _PLAIN[type(self)]  # type: ignore[assignment]
        return self


class MaskedLinear(Masked, nn.Linear):  # type: ignore[misc, override]
    """A pruned nn.Linear that trains, in its own dtype."""


class MaskedProjection(Masked, nn.modules.linear.NonDynamicallyQuantizableLinear):  # type: ignore[misc, override]
    """The pruned projection of an nn.MultiheadAttention, which reads its weight."""


class MaskedConv2d(Masked, nn.Conv2d):  # type: ignore[misc, override]
    """A pruned nn.Conv2d that trains, in its own dtype."""


class MaskedEmbedding(Masked, nn.Embedding):  # type: ignore[misc, override]
    """An nn.Embedding tied to a pruned nn.Linear."""


# Exact types: a subclass may compute something else.
_PLAIN: dict[type, type[nn.Module]] = {
    MaskedLinear: nn.Linear,
    MaskedProjection: nn.modules.linear.NonDynamicallyQuantizableLinear,
    MaskedConv2d: nn.Conv2d,
    MaskedEmbedding: nn.Embedding,
}
MASKABLE: dict[type, type[Masked]] = {plain: masked for masked, plain in _PLAIN.items()}


def mask_(module: nn.Module, mask: Tensor) -> nn.Module:
    """The module itself, of its class in MASKABLE: hooks, ties and the parameter stay."""
    module.register_buffer("mask", mask)
    module.__class__ = MASKABLE[type(module)]
    return module
