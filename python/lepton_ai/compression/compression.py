"""Compression: how the saved file is entropy-coded."""

from dataclasses import dataclass

CODECS = ("huffman", "lzw", "none")


@dataclass(frozen=True)
class Compression:
    """The lossless codec of CompressedModel.save: "huffman", "lzw" or "none"."""

    codec: str = "huffman"

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"Compression: codec is {self.codec!r}; allowed: {', '.join(CODECS)}")
