"""The steps of LeptonModel.compress: what to do, as values. Each checks itself when it is made."""

from lepton_ai.compression.compression import Compression
from lepton_ai.compression.pruning import Pruning
from lepton_ai.compression.quantization import Quantization
from lepton_ai.compression.recipe import Choice, Recipe

__all__ = ["Choice", "Compression", "Pruning", "Quantization", "Recipe"]
