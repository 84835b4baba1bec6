"""QuantEmbedding: nn.Embedding with int8 rows and a scale a row: Y[..., dim] = weight_packed[i] * weight_scale[i]."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from lepton_kernels.nn.quant_linear import keeping_dtypes
from lepton_kernels.quantizers import quantize_weight
from lepton_kernels.scheme import QuantScheme


class QuantEmbedding(nn.Module):
    """A drop-in for nn.Embedding without max_norm; the output has dtype `dtype`.

    weight_bits: 5 to 8; it and step are QuantScheme's.
    """

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        weight_bits: int = 8,
        step: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.dtype = padding_idx, dtype
        self.weight_bits, self.step = weight_bits, step
        packed = torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", torch.zeros(num_embeddings, 1, device=device))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, weight_bits: int = 8, step: float = 0.0) -> "QuantEmbedding":
        """The quantized copy of an Embedding. Raises ValueError when it renormalizes its rows (max_norm)."""
        if embedding.max_norm is not None:
            raise ValueError(f"QuantEmbedding: max_norm is {embedding.max_norm}; allowed: None")
        weight = embedding.weight.detach()
        rows, dim = weight.shape
        layer = cls(rows, dim, embedding.padding_idx, weight.dtype, weight.device, weight_bits, step)
        layer.weight_packed, layer.weight_scale, _ = quantize_weight(weight, QuantScheme(weight_bits, step=step))
        return layer.train(embedding.training)

    def forward(self, index: Tensor) -> Tensor:
        rows = functional.embedding(index, self.weight_packed).to(torch.float32)
        return (rows * functional.embedding(index, self.weight_scale)).to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantized table, made anew at every access."""
        return (self.weight_packed.to(torch.float32) * self.weight_scale).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int{self.weight_bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantEmbedding":
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight_scale.device))
        self.dtype = probe.dtype  # the output follows .to(dtype); the stored tensors keep theirs
        super()._apply(keeping_dtypes(fn), recurse)
        return self
