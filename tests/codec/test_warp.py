"""The frame decoded as a GPU would: a warp a chunk, 32 lanes in step, no lane waits for another's symbol.

An emulation: every value is a vector of 32 lanes, and a step is an operation on such vectors. What it proves is that
the format needs no serial scan: of a node's bits each lane reads its own, and its rank is a popcount (`__ballot_sync`
and `__popc` on the device); of a group's numbers each lane reads its own, wherever it lies.
"""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import decoder
from test_frame import samples

from lepton_kernels.codec import huffman

WARP = 32
LANE = np.arange(WARP)


class Warp:
    """32 lanes; `steps` counts what they did together."""

    def __init__(self) -> None:
        self.steps = 0

    def windows(self, data: np.ndarray, bit: np.ndarray) -> np.ndarray:
        """Each lane's 16 bits from its own bit on (two bytes, unaligned, as a load of a GPU)."""
        self.steps += 1
        at = np.minimum(bit >> 3, data.size - 1)
        low, high = data[at].astype(np.uint32), data[np.minimum(at + 1, data.size - 1)].astype(np.uint32)
        return (low | high << 8) >> (bit & 7)

    def ballot(self, predicate: np.ndarray) -> int:
        """A word with a bit from each lane, as every lane gets it."""
        self.steps += 1
        return int((predicate.astype(np.uint64) << LANE.astype(np.uint64)).sum())

    def count(self, bits: np.ndarray, n: int) -> int:
        """The ones of n bits: each lane counts bytes of its own, then they add up (`__reduce_add_sync`)."""
        ones = np.zeros(WARP, dtype=np.int64)
        for start in range(0, (n + 7) // 8, WARP):
            mine = start + LANE
            valid = mine < (n + 7) // 8
            byte = bits[np.where(valid, mine, 0)]
            ones += np.where(valid, np.bitwise_count(byte) if hasattr(np, "bitwise_count") else POPCOUNT[byte], 0)
            self.steps += 1
        return int(ones.sum())

    def unpack(self, bits: np.ndarray, n: int, width: int, symbols: np.ndarray) -> np.ndarray:
        out = np.empty(n, dtype=np.uint8)
        for start in range(0, n, WARP):
            i = start + LANE
            mine = i[i < n]
            place = self.windows(bits, i * width)[: mine.size] & ((1 << width) - 1) if width else mine * 0
            out[mine] = symbols[place]
        return out

    def merge(self, bits: np.ndarray, n: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        out = np.empty(n, dtype=np.uint8)
        ones = 0  # before this word: the same in every lane
        for start in range(0, n, WARP):
            i = start + LANE
            valid = i < n
            bit = (self.windows(bits, i) & 1).astype(bool) & valid
            word = self.ballot(bit)
            rank = np.array([(word & ((1 << lane) - 1)).bit_count() for lane in LANE])  # __popc(word & lanes below)
            source = np.where(bit, ones + rank, start - ones + LANE - rank)[valid]
            out[i[valid]] = np.where(
                bit[valid],
                right[np.minimum(source, max(right.size - 1, 0))] if right.size else 0,
                left[np.minimum(source, max(left.size - 1, 0))] if left.size else 0,
            )
            ones += word.bit_count()
        return out

    def block(self, body: np.ndarray, at: int, tree: decoder.Tree, coded: dict, n: int) -> tuple[np.ndarray, int]:
        """A block's symbols; bits are found from the root down, symbols made from the deepest level up."""
        counts, levels, node = [n], [], 0
        for groups, _ in tree:
            level: list = []
            for group, count in zip(groups, counts, strict=False):
                width = (len(group) - 1).bit_length()
                size = (count * width + 7) // 8
                level.append((body[at : at + size], count, width, np.array(group + [0] * (256 - len(group)), np.uint8)))
                at += size
            below = []
            for count in counts[len(groups) :]:
                size = (count + 7) // 8
                if node in coded:
                    bits, at = self.block(body, at, coded[node], {}, size)
                else:
                    bits = body[at : at + size]
                    at += size
                ones = self.count(bits, count)
                level.append((bits, count))
                below += [count - ones, ones]
                node += 1
            levels.append(level)
            counts = below
        children: list[np.ndarray] = []
        for level, (groups, _) in zip(reversed(levels), reversed(tree), strict=True):
            made = [self.unpack(bits, count, width, symbols) for bits, count, width, symbols in level[: len(groups)]]
            for j, (bits, count) in enumerate(level[len(groups) :]):
                made.append(self.merge(bits, count, children[2 * j], children[2 * j + 1]))
            children = made
        return children[0], at


POPCOUNT = np.array([byte.bit_count() for byte in range(256)], dtype=np.int64)


def decode(blob: bytes) -> tuple[bytes, int]:
    """A frame of layout bytes or bf16, one warp a chunk; and the steps of the longest warp."""
    layout, size, chunk_size, chunks = struct.unpack_from("<6xBxQII", blob)
    lengths = struct.unpack_from(f"<{chunks}I", blob, 32)
    at, out, longest = 32 + 12 * chunks, b"", 0
    for length in lengths:
        warp = Warp()
        payload = blob[at : at + length]
        wanted = min(chunk_size, size - len(out))
        out += chunk(warp, payload, layout, wanted)
        at += length
        longest = max(longest, warp.steps)
    return out, longest


def chunk(warp: Warp, payload: bytes, layout: int, size: int) -> bytes:
    if payload[0] == 0:
        return payload[1:]
    planes = {0: 1, 2: 2}[layout]
    n, block = size // planes, 1 << payload[0]
    at, symbols = 1 + 5 * planes, []
    for p in range(planes):
        mode, length = struct.unpack_from("<BI", payload, 1 + 5 * p)
        body = payload[at : at + length]
        at += length
        if mode == 0:
            symbols.append(np.frombuffer(body, np.uint8))
            continue
        tree, coded, start = decoder.read_table(body)
        data, parts, done = np.frombuffer(body + bytes(8), np.uint8), [], 0
        while done < n:
            part, start = warp.block(data, start, tree, coded, min(block, n - done))
            parts.append(part)
            done += part.size
        assert start == len(body)
        symbols.append(np.concatenate(parts))
    if layout == 0:
        return symbols[0].tobytes()
    word = symbols[0].astype(np.uint16) << 8 | symbols[1]
    return (word >> 1 | word << 15).astype("<u2").tobytes()


@pytest.mark.parametrize("name", ["int8 weights", "pruned", "two symbols", "deepest tree", "one symbol", "random"])
def test_a_warp_decodes_bytes(name):
    data = samples(20_004)[name]
    decoded, _ = decode(huffman.encode(data, layout="bytes", chunk_size=8192))
    assert decoded == data


def test_a_warp_decodes_bf16():
    data = samples(40_000)["bf16"]
    decoded, _ = decode(huffman.encode(data, layout="bf16", chunk_size=16384))
    assert decoded == data


def test_steps_are_a_few_for_32_symbols_and_not_one_for_each():
    data = samples(65536)["int8 weights"]
    decoded, steps = decode(huffman.encode(data, layout="bytes", chunk_size=65536))
    assert decoded == data
    assert steps < len(data) / 3
