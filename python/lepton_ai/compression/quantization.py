"""Quantization: to how many bits, and which layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lepton_kernels import QuantizeReport, QuantScheme, quantize_


@dataclass(frozen=True)
class Quantization:
    """Quantizes every nn.Linear by `scheme` ("w8a8", "w8a16", "w4a8", "w4a16", "w6a8" or a QuantScheme).

    embeddings: nn.Embedding tables become int8 rows as well (half of a small encoder's bytes), of 5, 6 or 7 bits where
    the scheme's weights are. include, exclude: names, globs, types or callables; `include` narrows the layers, and then
    says itself whether embeddings are among them. step: as in lepton_kernels.quantize_.
    fuse: what stands around the quantized layers becomes part of them where lepton_kernels.fuse_ knows it; the file
    stays the same.
    """

    scheme: str | QuantScheme = "w8a8"
    group_size: int | None = None
    embeddings: bool = True
    include: Sequence[Any] | None = None
    exclude: Sequence[Any] = ()
    strict: bool = False
    fuse: bool = True
    step: float = 0.0

    def __post_init__(self) -> None:
        QuantScheme.of(self.scheme, self.group_size)

    def apply(self, model: nn.Module) -> QuantizeReport:
        """Quantizes `model` in place."""
        include = self.include
        if include is None and self.embeddings and any(isinstance(m, nn.Embedding) for m in model.modules()):
            include = [kind for kind in (nn.Linear, nn.Embedding) if any(isinstance(m, kind) for m in model.modules())]
        return quantize_(
            model, self.scheme, group_size=self.group_size, step=self.step, include=include, exclude=self.exclude,
            strict=self.strict,
        )  # fmt: skip
