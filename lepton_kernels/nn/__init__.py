"""Drop-in torch modules on native kernels."""

from lepton_kernels.nn.fused import FusedFeedForward, FusedResidualNorm
from lepton_kernels.nn.quant_embedding import QuantEmbedding
from lepton_kernels.nn.quant_linear import QuantLinear
from lepton_kernels.nn.quant_recurrent import QuantGRU, QuantGRUCell, QuantLSTM, QuantLSTMCell, QuantRNNCell
from lepton_kernels.nn.sparse_conv import SparseConv2d
from lepton_kernels.nn.sparse_linear import SparseLinear

__all__ = [
    "FusedFeedForward",
    "FusedResidualNorm",
    "QuantEmbedding",
    "QuantGRU",
    "QuantGRUCell",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantLinear",
    "QuantRNNCell",
    "SparseConv2d",
    "SparseLinear",
]
