"""Coded streams: files and pipes, random access, cut and damaged streams, the commands pack and unpack."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_frame import samples

from lepton_kernels import codec
from lepton_kernels.codec import CorruptDataError, stream

FRAME = 1 << 16  # bytes a frame in these tests
DATA = b"".join(samples(90_000, seed=4).values())


def coded(data: bytes, **options) -> bytes:
    file = io.BytesIO()
    with codec.Writer(file, frame_size=FRAME, chunk_size=8192, **options) as writer:
        at = 0
        for size in np.random.default_rng(len(data)).integers(0, 50_000, 10_000):
            writer.write(data[at : at + size])
            at += int(size)
            if at >= len(data):
                break
    assert (writer.original_bytes, writer.coded_bytes) == (len(data), file.tell())
    return file.getvalue()


class Pipe(io.RawIOBase):
    """A source that is no file, and gives no more than 1000 bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self.rest = memoryview(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = min(len(buffer), 1000, len(self.rest))
        buffer[:n], self.rest = self.rest[:n], self.rest[n:]
        return n


@pytest.mark.parametrize("size", [0, 1, 3, FRAME - 1, FRAME, FRAME + 5, len(DATA)])
@pytest.mark.parametrize("name", ["huffman", "lzw"])
def test_round_trip(tmp_path, name, size):
    blob = coded(DATA[:size], codec=name)
    assert codec.Reader(Pipe(blob)).read() == DATA[:size]
    path = tmp_path / "data.lptn"
    path.write_bytes(blob)
    with codec.open(path) as reader:
        assert reader.read() == DATA[:size]
        assert reader.tell() == size


def test_random_access_reads_only_what_it_needs(tmp_path):
    path = tmp_path / "data.lptn"
    path.write_bytes(coded(DATA))
    rng = np.random.default_rng(0)
    with codec.open(path) as reader:
        assert reader.seekable()
        for _ in range(60):
            start, size = int(rng.integers(0, len(DATA))), int(rng.integers(0, 150_000))
            assert reader.seek(start) == start
            got = b""
            while part := reader.read(size - len(got)):
                got += part
            assert got == DATA[start : start + size]
        assert reader.seek(-5, os.SEEK_END) == len(DATA) - 5
        assert reader.read() == DATA[-5:]
        assert reader.seek(10, os.SEEK_END) == len(DATA) + 10
        assert reader.read() == b""
        reader.seek(-3, os.SEEK_CUR)
        with pytest.raises(ValueError, match=r"offset is -99999999 from \d+; allowed: 0 or more"):
            reader.seek(-99_999_999, os.SEEK_CUR)

    damaged = bytearray(path.read_bytes())
    damaged[-32 - 2] ^= 1  # in the last frame with data: what is before it can be read all the same
    path.write_bytes(damaged)
    with codec.open(path) as reader:
        assert reader.read(FRAME) == DATA[:FRAME]
        reader.seek(len(DATA) - 10)
        with pytest.raises(CorruptDataError, match="checksum does not match"):
            reader.read(10)


def test_a_stream_may_begin_anywhere_in_a_file_and_ends_with_it(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"head" + coded(DATA[:1000]))
    with path.open("rb") as file:
        file.seek(4)
        assert codec.Reader(file).read() == DATA[:1000]
    path.write_bytes(coded(DATA[:1000]) + b"x")
    for source in (path.open("rb"), Pipe(path.read_bytes())):
        with (
            source,
            pytest.raises(CorruptDataError, match="bytes follow the end of the stream, which holds 1000 bytes"),
        ):
            codec.Reader(source).readall()


def test_every_cut_is_noticed(tmp_path):
    blob = coded(DATA[: 2 * FRAME])
    for length in [*range(40), *range(40, len(blob), 997), len(blob) - 32, len(blob) - 1]:
        with pytest.raises(CorruptDataError):
            codec.Reader(Pipe(blob[:length])).readall()
    path = tmp_path / "cut.lptn"
    path.write_bytes(blob[:-32])  # a whole frame too few
    with codec.open(path) as reader, pytest.raises(CorruptDataError, match="ends after 131072 bytes, before its end"):
        reader.readall()


def test_an_exception_leaves_no_whole_stream():
    file = io.BytesIO()
    writer = codec.Writer(file, frame_size=FRAME, chunk_size=8192)

    def fail():
        with writer:
            writer.write(DATA[: 3 * FRAME])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert writer.closed
    with pytest.raises(CorruptDataError):
        codec.Reader(Pipe(file.getvalue())).readall()
    with pytest.raises(ValueError, match="the stream is closed"):
        writer.write(b"more")


def test_auto_finds_the_layout_of_each_frame():
    weights = torch.randn(200_000) * 0.02
    for tensor, layout in ((weights, "fp32"), (weights.bfloat16(), "bf16"), (weights.half(), "bf16")):  # one split
        raw = tensor.view(torch.uint8).numpy()
        assert stream.best_layout(raw)[0] == layout
    assert stream.best_layout(np.frombuffer(b"a text, of words and more words; " * 1000, np.uint8))[0] == "bytes"
    assert stream.best_layout(np.empty(0, np.uint8)) == ("bytes", 0.0)
    mixed = weights.bfloat16().view(torch.uint8).numpy().tobytes() + b"text" * 5000 + b"!"
    assert codec.Reader(Pipe(coded(mixed))).read() == mixed


def test_memory_is_bounded_by_what_the_reader_allows():
    blob = coded(DATA)
    with pytest.raises(CorruptDataError, match=f"holds {FRAME} bytes; max_frame_size is 1000"):
        codec.Reader(Pipe(blob), max_frame_size=1000).read()


def test_errors_name_the_argument_the_value_and_what_is_allowed(tmp_path):
    for options, text in [
        ({"codec": "zip"}, "codec is 'zip'; allowed: huffman, lzw"),
        ({"layout": "x"}, "layout is 'x'; allowed: auto, bytes"),
        ({"frame_size": 10}, "frame_size is 10; allowed: a multiple of 4 from chunk_size 262144"),
    ]:
        with pytest.raises(ValueError, match=text):
            codec.Writer(io.BytesIO(), **options)
    with pytest.raises(ValueError, match="mode is 'r'; allowed: rb, wb, xb"):
        codec.open(tmp_path / "x", "r")
    with pytest.raises(FileNotFoundError):
        codec.open(tmp_path / "x")
    with pytest.raises(io.UnsupportedOperation):
        codec.Reader(Pipe(b"")).seek(0)


def lepton(*arguments: str, data: bytes | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("lepton")), *arguments]
    return subprocess.run(command, input=data, capture_output=True, cwd=cwd)


def test_pack_and_unpack_files(tmp_path):
    weights = (torch.randn(100_000) * 0.02).bfloat16().view(torch.uint8).numpy().tobytes()
    (tmp_path / "weights.bin").write_bytes(weights)
    done = lepton("pack", "weights.bin", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"ratio 0.6" in done.stderr
    assert b"order-0 entropy 0.6" in done.stderr
    assert done.stdout == b""
    assert lepton("pack", "weights.bin", cwd=tmp_path).returncode == 2  # it is there already
    assert lepton("pack", "weights.bin", "--force", cwd=tmp_path).returncode == 0
    (tmp_path / "weights.bin").unlink()
    assert lepton("unpack", "weights.bin.lptn", cwd=tmp_path).returncode == 0
    assert (tmp_path / "weights.bin").read_bytes() == weights
    assert sorted(os.listdir(tmp_path)) == ["weights.bin", "weights.bin.lptn"]

    blob = bytearray((tmp_path / "weights.bin.lptn").read_bytes())
    blob[1000] ^= 4
    (tmp_path / "bad.lptn").write_bytes(blob)
    done = lepton("unpack", "bad.lptn", cwd=tmp_path)
    assert done.returncode == 1
    assert b"checksum does not match" in done.stderr
    assert not (tmp_path / "bad").exists()
    done = lepton("unpack", "weights.bin", cwd=tmp_path)
    assert done.returncode == 2
    assert b"without the suffix .lptn; say where to write with -o" in done.stderr


def test_pack_and_unpack_pipes():
    text = b"a text, of words and more words; " * 50_000
    packed = lepton("pack", "-", "--codec", "lzw", "--json", data=text)
    report = json.loads(packed.stderr)
    assert packed.returncode == 0
    assert report["coded_bytes"] == len(packed.stdout) < len(text) / 20
    done = lepton("unpack", "-", data=packed.stdout)
    assert done.returncode == 0
    assert done.stdout == text
    done = lepton("unpack", "-", data=packed.stdout[:-1])
    assert done.returncode == 1
    assert b"before its end" in done.stderr
    noise = np.random.default_rng(0).normal(0, 20, 100_000).astype(np.int8).tobytes()
    assert b"huffman would be smaller" in lepton("pack", "-", "--codec", "lzw", data=noise).stderr


class Half(io.RawIOBase):
    """A file that takes only a half of what it is given."""

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        part = bytes(data)[: (len(data) + 1) // 2]
        self.data += part
        return len(part)


def test_files_that_take_a_part_of_what_is_written_get_all_of_it():
    file = Half()
    with codec.Writer(file) as writer:
        writer.write(DATA)
    assert codec.Reader(Pipe(file.data)).read() == DATA


def test_a_closed_reader_reads_nothing_and_a_buffer_must_be_writable(tmp_path):
    path = tmp_path / "data.lptn"
    path.write_bytes(coded(DATA))
    reader = codec.open(path)
    with pytest.raises(TypeError, match="buffer is bytes; allowed: a writable one"):
        reader.readinto(bytes(100_000))
    reader.close()
    for call in (lambda: reader.read(1), lambda: reader.seek(0), reader.tell, lambda: reader.readinto(bytearray(8))):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_stream_inside_a_gzip_file(tmp_path):
    with gzip.open(tmp_path / "data.gz", "wb") as file:
        file.write(coded(DATA[:5000]))
    with gzip.open(tmp_path / "data.gz", "rb") as file:
        assert codec.open(file).read() == DATA[:5000]


def test_a_source_that_does_not_wait_is_not_damaged():
    read, write = os.pipe()
    os.set_blocking(read, False)
    with open(read, "rb", buffering=0) as file, pytest.raises(BlockingIOError):
        codec.Reader(file).read(10)
    os.close(write)


def test_wrong_options_leave_the_file_that_is_there(tmp_path):
    path = tmp_path / "precious"
    path.write_bytes(b"precious")
    for options in ({"codec": "zip"}, {"chunk_size": 5000}, {"threads": 0}):
        with pytest.raises(ValueError, match="allowed"):
            codec.open(path, "wb", **options)
    assert path.read_bytes() == b"precious"


def test_a_second_read_after_junk_is_refused_too():
    reader = codec.Reader(Pipe(coded(DATA[:100]) + b"junk"))
    assert reader.read(100) == DATA[:100]
    for _ in range(2):
        with pytest.raises(CorruptDataError, match=r"bytes follow|ends after|starts with"):
            reader.read(1)


def test_pack_keeps_what_is_private_private_and_follows_links(tmp_path):
    (tmp_path / "secret").write_bytes(DATA)
    (tmp_path / "secret").chmod(0o600)
    assert lepton("pack", "secret", cwd=tmp_path).returncode == 0
    assert (tmp_path / "secret.lptn").stat().st_mode & 0o777 == 0o600
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    assert lepton("unpack", "secret.lptn", "-o", "link", "--force", cwd=tmp_path).returncode == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == DATA
