"""A small model in a file, and what a replica needs to serve it."""

from pathlib import Path

import pytest
from lepton_ai import LeptonModel
from lepton_ai.compression import Compression, Quantization

pytest.importorskip("starlette")

from lepton_ai.serving.replica import ReplicaSpec
from net import body, make


@pytest.fixture(scope="session")
def compressed():
    return LeptonModel(make()).compress(Quantization("w8a8"), Compression("huffman"))


@pytest.fixture(scope="session")
def spec(compressed, tmp_path_factory) -> ReplicaSpec:
    path = tmp_path_factory.mktemp("serving") / "net.safetensors"
    compressed.save(path)
    return ReplicaSpec(str(path), f"{Path(__file__).with_name('net.py')}:make", warm_up=body(1.0).decode())
