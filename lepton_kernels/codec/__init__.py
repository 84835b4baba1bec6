"""Lossless codecs for weights and other bytes: order-0 Huffman in tree order, and LZW. Imports without torch."""

from lepton_kernels.codec import huffman, lzw
from lepton_kernels.codec.frame import CorruptDataError, FrameInfo, entropy, info
from lepton_kernels.codec.stream import Reader, Writer, open

__all__ = ["CorruptDataError", "FrameInfo", "Reader", "Writer", "entropy", "huffman", "info", "lzw", "open"]
