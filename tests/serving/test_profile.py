"""What a replica takes is measured in a process that holds nothing else."""

import pytest
import torch
from lepton_ai import LeptonModel
from lepton_ai.compression import Compression, Quantization
from lepton_ai.serving.profile import ReplicaProfile, profile

import lepton_kernels as lk


@pytest.fixture(scope="module")
def file(bert_config, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("profile") / "small.safetensors"
    model = transformers.BertModel(bert_config).eval()
    LeptonModel(model).compress(Quantization("w8a8"), Compression("huffman")).save(path)
    return path


def test_a_file_is_profiled_and_the_caller_s_memory_does_not_count(file):
    ballast = torch.ones(2**30, dtype=torch.uint8)  # more than the process that loads this small model ever holds
    found = profile(file, cores=1, batch=2, tokens=16, seconds=0.01)
    assert found.cores == 1
    assert 2**26 < found.memory_bytes < ballast.nbytes
    assert 0 < found.seconds_per_request < found.startup_seconds < 120
    assert str(found).startswith(f"{found.memory_bytes / 2**20:.0f} MiB on 1 core, ")


def test_the_process_says_why_it_failed(file):
    with pytest.raises(
        ValueError, match=r"profile: .*small.safetensors: the process that ran it ended with 1: .*Error"
    ):
        profile(file, tokens=65)  # the model has 64 positions


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"cores": 0}, "profile: cores is 0; allowed: 1 to "),
        ({"cores": 10**6}, "profile: cores is 1000000; allowed: 1 to "),
        ({"batch": 0}, "profile: batch is 0; allowed: 1 or more"),
        ({"tokens": 0}, "profile: tokens is 0; allowed: 1 or more"),
    ],
)
def test_bad_arguments(file, arguments, text):
    with pytest.raises(ValueError, match=text):
        profile(file, **arguments)


def test_bad_files(file, tmp_path):
    with pytest.raises(FileNotFoundError):
        profile(tmp_path / "none.safetensors")
    lk.save(torch.nn.Linear(8, 8), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="does not say what model it holds; allowed: a Hugging Face model's file"):
        profile(tmp_path / "plain.safetensors")
    damaged = bytearray(file.read_bytes())
    damaged[-9] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.raises(lk.codec.CorruptDataError):
        profile(tmp_path / "damaged.safetensors")


@pytest.mark.parametrize("name", ["memory_bytes", "cores", "seconds_per_request", "startup_seconds"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_profile_holds_numbers_above_zero(name, value):
    numbers = {"memory_bytes": 1, "cores": 1, "seconds_per_request": 1.0, "startup_seconds": 1.0}
    assert ReplicaProfile(**numbers).cores == 1
    with pytest.raises(ValueError, match=rf"ReplicaProfile: {name} is {value}; allowed: a finite number above 0"):
        ReplicaProfile(**{**numbers, name: value})
