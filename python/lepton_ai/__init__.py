"""Lepton's pipeline: prune, quantize and entropy-code a model, and measure what that did."""

from lepton_ai import compression
from lepton_ai.model import CompressedModel, LeptonModel

__all__ = ["CompressedModel", "LeptonModel", "compression"]
