"""LeptonModel.compress in every combination, save and load, sources of models, and the command line over all of it."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lepton_ai import CompressedModel, LeptonModel
from lepton_ai.cli import app
from lepton_ai.compression import Compression, Pruning, Quantization
from torch import nn
from typer.testing import CliRunner

import lepton_kernels as lk

transformers = pytest.importorskip("transformers")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 96)
        self.body = nn.Sequential(nn.Linear(96, 512), nn.ReLU(), nn.Linear(512, 30))
        nn.init.normal_(self.body[0].weight, std=0.05)  # as trained weights: uniform ones would not code

    def forward(self, index):
        return self.body(self.table(index))


INDEX = torch.arange(20).view(4, 5)
STEPS = {"pruning": Pruning(0.5), "quantization": Quantization("w8a8"), "compression": Compression("huffman")}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """A tiny BERT, as Hugging Face saves it."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256
    )
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertModel(config).eval().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "names", [c for n in (1, 2, 3) for c in itertools.combinations(STEPS, n)], ids=lambda names: "+".join(names)
)
def test_every_combination_of_steps(net, tmp_path, names):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    compressed = LeptonModel(net).compress(*[STEPS[name] for name in reversed(names)])
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    report = compressed.report()
    assert (report.pruning is not None) == ("pruning" in names)
    assert (report.quantization is not None) == ("quantization" in names)
    assert (report.bytes_after < report.bytes_before) == ("quantization" in names)
    compressed.save(tmp_path / "a.safetensors")
    assert report.file_bytes == (tmp_path / "a.safetensors").stat().st_size
    coded = {entry.codec for entry in lk.inspect(tmp_path / "a.safetensors")} - {"none"}
    assert coded == ({"huffman"} if "compression" in names else set())
    again = CompressedModel.load(tmp_path / "a.safetensors", model=Net().eval())
    assert torch.equal(again(INDEX), compressed(INDEX))
    if names == ("compression",):
        assert torch.equal(compressed(INDEX), net(INDEX))
    if "pruning" in names:
        weight = compressed.model.body[0].weight
        assert float((weight == 0).float().mean()) >= 0.5
    json.dumps(report.as_dict(), default=str)


def test_embeddings_are_quantized_unless_told_otherwise(net):
    assert type(LeptonModel(net).compress(Quantization("w8a8")).model.table) is lk.nn.QuantEmbedding
    assert type(LeptonModel(net).compress(Quantization("w8a8", embeddings=False)).model.table) is nn.Embedding


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda net: LeptonModel(net).compress(), "steps are nothing; allowed: a Recipe, or one to three others"),
        (lambda net: LeptonModel(net).compress(Pruning(0.1), Pruning(0.2)), "steps are Pruning, Pruning"),
        (lambda net: LeptonModel(net).compress("w8a8"), r"a step is 'w8a8'; allowed: Pruning"),
        (lambda net: Pruning(1.5), "sparsity is 1.5; allowed: 0 <= sparsity < 1"),
        (lambda net: Quantization("w3a3"), "scheme is 'w3a3'; allowed: 'w8a8'"),
        (lambda net: Compression("zip"), "codec is 'zip'; allowed: huffman, lzw, none"),
        (lambda net: LeptonModel("nowhere"), "model is 'nowhere'; allowed: an nn.Module, a folder"),
    ],
)
def test_errors(net, call, text):
    with pytest.raises(ValueError, match=text):
        call(net)


def test_a_file_without_its_architecture_asks_for_it(net, tmp_path):
    LeptonModel(net).compress(Quantization("w8a8")).save(tmp_path / "a")
    with pytest.raises(ValueError, match="does not say what model it holds; pass model="):
        CompressedModel.load(tmp_path / "a")


def test_a_hugging_face_folder_becomes_one_file_that_needs_nothing_else(hf_folder, tmp_path):
    ids = torch.arange(40).view(2, 20)
    compressed = LeptonModel(hf_folder).compress(Quantization("w8a8"), Compression("huffman"))
    compressed.save(tmp_path / "a.safetensors")
    again = CompressedModel.load(tmp_path / "a.safetensors")
    assert type(again.model).__name__ == "BertModel"
    with torch.inference_mode():
        assert torch.equal(again(ids).last_hidden_state, compressed(ids).last_hidden_state)
        reference = LeptonModel(hf_folder)(ids).last_hidden_state
    error = (again(ids).last_hidden_state - reference).norm() / reference.norm()
    assert error < 0.05
    assert not any(tensor.is_meta for tensor in again.model.state_dict().values())


def test_what_surrounds_quantized_layers_is_fused_unless_told_otherwise(net, hf_folder, tmp_path):
    fused = LeptonModel(net).compress(Quantization("w8a8"))
    assert fused.report().as_dict()["fusion"] == [{"name": "body.0", "fused": "linear + relu", "layers": 1}]
    assert "linear + relu" in str(fused.report())
    plain = LeptonModel(net).compress(Quantization("w8a8", fuse=False))
    assert plain.report().fusion is None
    assert type(plain.model.body[1]) is nn.ReLU
    assert torch.equal(fused(INDEX), plain(INDEX))
    alone = LeptonModel(nn.Sequential(nn.Linear(64, 64))).compress(Quantization("w8a8")).report()
    assert alone.as_dict()["fusion"] == []

    compressed = LeptonModel(hf_folder).compress(Quantization("w8a8"))
    assert {row["layers"] for row in compressed.report().as_dict()["fusion"]} == {1, 2, 3}
    compressed.save(tmp_path / "a.safetensors")
    for fuse in (True, False):
        again = CompressedModel.load(tmp_path / "a.safetensors", fuse=fuse)
        assert any(isinstance(m, lk.nn.FusedFeedForward) for m in again.model.modules()) == fuse
        assert (again.report().fusion is not None) == fuse


def lepton(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_the_command_line(hf_folder, tmp_path):
    out = tmp_path / "small.safetensors"
    code, text = lepton(
        "compress", hf_folder, "-o", out, "--scheme", "w4a16", "--group-size", 32, "--prune", 0.3, "--json"
    )
    assert code == 0, text
    report = json.loads(text)
    assert report["file_bytes"] == out.stat().st_size
    assert {row["name"] for row in report["quantization"]} >= {"encoder.layer.0.attention.self.query"}
    code, text = lepton("inspect", out, "--json")
    rows = {row["name"]: row for row in json.loads(text)["tensors"]}
    assert code == 0
    assert rows["embeddings.word_embeddings.weight_packed"]["codec"] == "huffman"
    assert lepton("inspect", out)[0] == 0
    code, text = lepton("verify", out, "--json")
    assert (code, json.loads(text)["without_checksum"]) == (0, [])
    code, text = lepton("bench", out, "--batch", 1, "--batch", 3, "--tokens", 8, "--seconds", 0, "--json")
    figures = json.loads(text)
    assert code == 0
    assert figures["latency_ms_batch_1"] > 0
    assert figures["latency_ms_batch_3"] > 0
    assert figures["decoded_bytes"] == sum(row["size"] for row in rows.values())


def test_exit_codes(hf_folder, tmp_path):
    out = tmp_path / "a.safetensors"
    assert lepton("compress", hf_folder, "-o", out)[0] == 0
    damaged = bytearray(out.read_bytes())
    damaged[-100] ^= 1
    out.write_bytes(damaged)
    assert lepton("verify", out)[0] == 1
    assert lepton("bench", out)[0] == 1
    assert lepton("compress", hf_folder, "-o", out, "--scheme", "w9")[0] == 2
    assert lepton("compress", "nowhere", "-o", out)[0] == 2
    assert lepton("compress", hf_folder, "-o", tmp_path / "no" / "folder")[0] == 2
    assert lepton("verify", tmp_path / "nothing")[0] == 2


def test_a_model_named_as_a_python_object(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(64, 64))\n"
    )
    code, text = lepton("compress", f"{tmp_path}/mine.py:make", "-o", tmp_path / "a", "--scheme", "w8a8")
    assert code == 0, text
    assert {entry.name for entry in lk.verify(tmp_path / "a")} >= {"0.weight_packed", "0.bias"}


def test_doctor_names_a_problem_and_its_fix():
    done = subprocess.run(
        [sys.executable, "-m", "lepton_ai", "doctor", "--json"],
        env={"LEPTON_MAX_ISA": "generic", "PATH": ""}, capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["isa"] == "generic"
    assert found["kernels"]["w8a8 on the CPU"] == "gemm_int8[generic]"
    if found["isa_of_machine"] != "generic":
        assert {"problem", "fix"} == set(found["problems"][0])
        assert found["problems"][0]["fix"] == "unset LEPTON_MAX_ISA"


def test_pruning_and_quantization_of_the_folder_itself(hf_folder):
    model = LeptonModel(Path(hf_folder) / "model.safetensors")
    assert model(torch.arange(6).view(1, 6)).last_hidden_state.shape == (1, 6, 128)
