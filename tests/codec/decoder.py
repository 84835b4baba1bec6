"""A decoder of the codec frame in plain Python, written from docs/codec-format.md alone. Slow; a test oracle."""

import struct

import xxhash


def decode(blob: bytes) -> bytes:
    magic, version, codec, layout, reserved, size, chunk_size, chunks = struct.unpack_from("<4sBBBBQII", blob)
    assert (magic, version, reserved) == (b"LPTN", 1, 0)
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


def tree_plane(body: bytes, n: int, block: int) -> list[int]:
    kind, leaves, max_depth = body[0], body[1] + 1, body[2]
    assert kind in (0, 1)
    per_depth = struct.unpack_from(f"<{max_depth}H", body, 3) if max_depth else (1,)
    at, out = 3 + 2 * max_depth, []
    sizes = [1 + size for size in body[at : at + leaves]] if kind else [1] * leaves
    at += leaves if kind else 0
    groups = []
    for size in sizes:
        groups.append(body[at : at + size])
        at += size
    tree = []  # the leaves of each depth
    for count in per_depth if max_depth == 0 else (0, *per_depth):
        tree.append([groups.pop(0) for _ in range(count)])
    while len(out) < n:
        part, at = tree_block(body, at, tree, min(block, n - len(out)))
        out += part
    assert at == len(body)
    return out


def tree_block(body: bytes, at: int, tree: list[list[bytes]], n: int) -> tuple[list[int], int]:
    def take(count: int, width: int) -> list[int]:
        nonlocal at
        size = (count * width + 7) // 8
        bits = int.from_bytes(body[at : at + size], "little")
        at += size
        assert bits >> count * width == 0
        return [bits >> i * width & ((1 << width) - 1) for i in range(count)]

    counts = [n]  # of the symbols that reach each node of this depth
    nodes: list[list[list[int]]] = []  # by depth: the symbols of its leaves, then the bitmaps of its inner nodes
    for groups in tree:
        level = []
        for group, count in zip(groups, counts, strict=False):
            level.append([group[place] for place in take(count, (len(group) - 1).bit_length())])
        below = []
        for count in counts[len(groups) :]:
            level.append(take(count, 1))
            below += [count - sum(level[-1]), sum(level[-1])]
        nodes.append(level)
        counts = below
    children: list[list[int]] = []
    for level, groups in zip(reversed(nodes), reversed(tree), strict=True):
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
