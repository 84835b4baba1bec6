"""Drop-in torch modules on native kernels."""

from lepton_kernels.nn.fused import FusedFeedForward, FusedResidualNorm
from lepton_kernels.nn.quant_embedding import QuantEmbedding
from lepton_kernels.nn.quant_linear import QuantLinear

__all__ = ["FusedFeedForward", "FusedResidualNorm", "QuantEmbedding", "QuantLinear"]
