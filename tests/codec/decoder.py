"""A decoder of the codec frame in plain Python, written from docs/codec-format.md alone. Slow; a test oracle."""

import struct

import xxhash


def decode(blob: bytes) -> bytes:
    magic, version, codec, layout, reserved, size, chunk_size, chunks = struct.unpack_from("<4sBBBBQII", blob)
    assert (magic, version, reserved) == (b"LPTN", 2, 0)
    payload_at = 32 + 12 * chunks
    (check,) = struct.unpack_from("<Q", blob, 24)
    assert xxhash.xxh3_64_intdigest(blob[:24] + blob[32:payload_at]) == check
    lengths = struct.unpack_from(f"<{chunks}I", blob, 32)
    checksums = struct.unpack_from(f"<{chunks}Q", blob, 32 + 4 * chunks)
    out = b""
    for length, checksum in zip(lengths, checksums, strict=True):
        payload = blob[payload_at : payload_at + length]
        assert xxhash.xxh3_64_intdigest(payload) == checksum
        wanted = min(chunk_size, size - len(out))
        part = huffman_chunk(payload, layout, wanted) if codec == 1 else lzw_chunk(payload, wanted)
        assert len(part) == wanted
        out += part
        payload_at += length
    assert payload_at == len(blob)
    return out


def huffman_chunk(payload: bytes, layout: int, size: int) -> bytes:
    if payload[0] == 0:
        return payload[1:]
    planes, element = ((1, 1), (2, 1), (2, 2), (2, 2), (4, 4))[layout]
    n, block = size // element, 1 << payload[0]
    at, symbols = 1 + 5 * planes, []
    for p in range(planes):
        mode, length = struct.unpack_from("<BI", payload, 1 + 5 * p)
        body = payload[at : at + length]
        symbols.append(body if mode == 0 else tree_plane(body, n, block))
        at += length
    assert at == len(payload)
    if layout == 0:
        return bytes(symbols[0])
    if layout == 1:
        return bytes(low | high << 4 for low, high in zip(*symbols, strict=True))
    bits, words = 8 * element, []
    for entry in zip(*symbols, strict=True):
        rotated = int.from_bytes(bytes(entry), "big")
        words.append(((rotated >> 1) | (rotated & 1) << (bits - 1)).to_bytes(element, "little"))
    return b"".join(words)


class Bits:
    """Single bits and gamma codes from `at` on, lowest bit of a byte first."""

    def __init__(self, body: bytes, at: int) -> None:
        self.body, self.position = body, 8 * at

    def bit(self) -> int:
        bit = self.body[self.position >> 3] >> (self.position & 7) & 1
        self.position += 1
        return bit

    def gamma(self) -> int:
        below = 0
        while not self.bit():
            below += 1
        return 1 << below | sum(self.bit() << i for i in range(below))

    def byte_end(self) -> int:
        while self.position % 8:
            assert self.bit() == 0
        return self.position // 8


Tree = list[tuple[list[list[int]], int]]  # of each depth: the leaves' symbols, the number of inner nodes


def read_tree(body: bytes, at: int) -> tuple[Tree, int]:
    nodes, counts = 1, []
    while not counts or counts[-1][1]:
        inner = body[at]
        counts.append((nodes - inner, inner))
        nodes, at = 2 * inner, at + 1
    leaves: list[list[int]] = [[] for _ in range(sum(n for n, _ in counts))]
    nobody: list[int] = []
    recent = [None, nobody, *leaves]
    bits, symbol = Bits(body, at), 0
    while symbol < 256:
        place = bits.gamma()
        recent.insert(0, recent.pop(place))
        run = bits.gamma()
        recent[0].extend(range(symbol, symbol + run))
        symbol += run
    assert symbol == 256
    iterator = iter(leaves)
    return [([next(iterator) for _ in range(n)], inner) for n, inner in counts], bits.byte_end()


def read_table(body: bytes) -> tuple[Tree, dict[int, Tree], int]:
    tree, at = read_tree(body, 0)
    coded: dict[int, Tree] = {}
    number, at = body[at], at + 1
    for _ in range(number):
        node = body[at]
        coded[node], at = read_tree(body, at + 1)
    return tree, coded, at


def tree_plane(body: bytes, n: int, block: int) -> list[int]:
    tree, coded, at = read_table(body)
    out: list[int] = []
    while len(out) < n:
        part, at = tree_block(body, at, tree, coded, min(block, n - len(out)))
        out += part
    assert at == len(body)
    return out


def tree_block(body: bytes, at: int, tree: Tree, coded: dict[int, Tree], n: int) -> tuple[list[int], int]:
    def numbers(data: bytes, count: int, width: int) -> list[int]:
        bits = int.from_bytes(data, "little")
        assert bits >> count * width == 0
        return [bits >> i * width & ((1 << width) - 1) for i in range(count)]

    def take(count: int, width: int) -> list[int]:
        nonlocal at
        size = (count * width + 7) // 8
        at += size
        return numbers(body[at - size : at], count, width)

    counts = [n]  # of the symbols that reach each node of this depth
    nodes: list[list[list[int]]] = []  # by depth: the symbols of its leaves, then the bits of its inner nodes
    number = 0
    for groups, _ in tree:
        level = []
        for group, count in zip(groups, counts, strict=False):
            level.append([group[place] for place in take(count, (len(group) - 1).bit_length())])
        below = []
        for count in counts[len(groups) :]:
            if number in coded:
                data, at = tree_block(body, at, coded[number], {}, (count + 7) // 8)
                level.append(numbers(bytes(data), count, 1))
            else:
                level.append(take(count, 1))
            number += 1
            below += [count - sum(level[-1]), sum(level[-1])]
        nodes.append(level)
        counts = below
    children: list[list[int]] = []
    for level, (groups, _) in zip(reversed(nodes), reversed(tree), strict=True):
        for j, bitmap in enumerate(level[len(groups) :]):
            sides = iter(children[2 * j]), iter(children[2 * j + 1])
            level[len(groups) + j] = [next(sides[bit]) for bit in bitmap]
        children = level
    return children[0], at


def lzw_chunk(payload: bytes, size: int) -> bytes:
    max_bits = payload[0]
    if max_bits == 0:
        return payload[1:]
    bits, position, k = int.from_bytes(payload[1:], "little"), 0, 0
    entries, out, previous = [bytes([i]) for i in range(256)], b"", b""
    while len(out) < size:
        width = min((255 + k).bit_length(), max_bits)
        code, position = bits >> position & ((1 << width) - 1), position + width
        string = entries[code] if code < len(entries) else previous + previous[:1]
        if k and len(entries) < 1 << max_bits:
            entries.append(previous + string[:1])
        out, previous, k = out + string, string, k + 1
    return out
