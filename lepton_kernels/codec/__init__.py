"""Lossless codecs for weights and other bytes: order-0 Huffman in tree order, and LZW. Imports without torch."""

from lepton_kernels.codec import huffman, lzw
from lepton_kernels.codec.frame import CorruptDataError, FrameInfo, entropy, info

__all__ = ["CorruptDataError", "FrameInfo", "entropy", "huffman", "info", "lzw"]
