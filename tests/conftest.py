"""Fixtures shared by all tests."""

import os
import platform
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports the kernels: Triton's interpreter then runs them on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

X86_ISAS = ["generic", "ssse3", "avx2", "avxvnni", "avx512vnni", "avx512vbmi2", "amx"]
ISAS = ["generic", "neondot", "neoni8mm"] if platform.machine() in ("aarch64", "arm64") else X86_ISAS
INT16_ISAS = {"generic", "ssse3", "avx2"}  # where w8a16 and w4a16 multiply int16; elsewhere two planes of bytes


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20260101)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def run_python():
    """Runs a program in a fresh interpreter, from a folder that is not the root; returns what it printed."""

    def run(code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**os.environ, **environment}, capture_output=True, text=True, cwd="/", timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def run_at_level(run_python, request):
    """Runs a program, which sees the names of the test's module and a generator rng, at a level or, where this machine
    does not have it, at one that it has."""

    def run(isa: str, program: str) -> None:
        path = request.path
        start = f"""
import sys
sys.path[:0] = [{str(path.parent)!r}, {str(path.parents[1])!r}]
from {path.stem} import *
rng = torch.Generator().manual_seed(7)
"""
        run_python(start + program, LEPTON_MAX_ISA=isa)

    return run


@pytest.fixture(scope="session")
def bert_config():
    """A BERT of two layers, random weights."""
    transformers = pytest.importorskip("transformers")
    return transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=150,
        max_position_embeddings=64,
    )  # fmt: skip


@pytest.fixture(scope="session")
def compressed():
    """The model of the tests in serving/, compressed."""
    from lepton_ai import LeptonModel
    from lepton_ai.compression import Compression, Quantization
    from net import make

    return LeptonModel(make()).compress(Quantization("w8a8"), Compression("huffman"))


@pytest.fixture(scope="session")
def spec(compressed, tmp_path_factory):
    """What a replica needs to serve it."""
    pytest.importorskip("starlette")
    import net
    from lepton_ai.serving.replica import ReplicaSpec

    path = tmp_path_factory.mktemp("serving") / "net.safetensors"
    compressed.save(path)
    return ReplicaSpec(str(path), f"{net.__file__}:make", warm_up=net.body(1.0).decode())
