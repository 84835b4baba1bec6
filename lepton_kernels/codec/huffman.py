"""Order-0 Huffman, its bits in tree order: decoded 8 to 64 symbols an instruction, in chunks on all threads."""

from typing import Any

from lepton_kernels.codec import frame


def encode(
    data: Any, *, layout: str = "auto", threads: int | None = None, chunk_size: int = frame.DEFAULT_CHUNK_SIZE
) -> bytes:
    """The frame (docs/codec-format.md) of a bytes-like object, numpy array or torch tensor, read as bytes.

    layout: "bytes", for packed 4-bit values too; "nibbles" codes the halves of bytes apart; "bf16", "fp16", "fp32" code
    the exponents apart from the mantissas; "auto" picks by dtype, else bytes. chunk_size: bytes a chunk, a multiple of
    4096; smaller chunks are finer random access and a little larger. threads: None for as many as torch uses. Data that
    would shrink by less than 3 % is stored as it is: the output is never larger than the input by more than 1 % and 64
    bytes.
    Raises ValueError or TypeError for arguments that fit nothing.
    """
    return frame.encode("huffman", data, layout, threads, chunk_size)


def decode(
    blob: Any,
    *,
    start: int = 0,
    stop: int | None = None,
    out: Any = None,
    threads: int | None = None,
    max_size: int = frame.DEFAULT_MAX_SIZE,
) -> Any:
    """The bytes start..stop of what `blob` holds; only the chunks that hold them are read.

    out: a writable buffer, array or tensor of stop - start bytes to decode into (returned), else new bytes.
    Raises CorruptDataError for every blob that encode did not write, before it allocates more than max_size bytes (and
    the first and the last chunk, where they are needed in part); `out` then holds anything.
    """
    return frame.decode("huffman", blob, start, stop, out, threads, max_size)
