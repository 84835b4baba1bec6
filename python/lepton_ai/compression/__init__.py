"""The steps of LeptonModel.compress: what to do, as values. Each checks itself when it is made."""

from lepton_ai.compression.compression import Compression
from lepton_ai.compression.pruning import Pruning
from lepton_ai.compression.quantization import Quantization

__all__ = ["Compression", "Pruning", "Quantization"]
