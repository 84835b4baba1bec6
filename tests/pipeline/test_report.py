"""What a compressed model says of itself: the ratio, what was measured beside the original, a row for each layer."""

import json
import math
import string

import pytest
import torch
from lepton_ai import CompressedModel, LeptonModel
from lepton_ai.cli import app
from lepton_ai.compression import Compression, Pruning, Quantization
from lepton_ai.cost import EnergyReader
from lepton_ai.fidelity import fidelity, output_vectors
from lepton_ai.measure import Cost, Measurement, compare, in_turn
from torch import nn
from typer.testing import CliRunner

import lepton_kernels as lk


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 96)
        self.norm = nn.LayerNorm(96)
        self.body = nn.Sequential(nn.Linear(96, 192), nn.ReLU(), nn.Linear(192, 30))
        self.memory = nn.LSTM(30, 16, batch_first=True)

    def forward(self, index):
        return self.memory(self.body(self.norm(self.table(index))))


INPUTS = [torch.arange(20).view(4, 5), (torch.arange(10).view(2, 5),)]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def test_the_ratio_is_of_the_weights_and_then_of_the_file(net, tmp_path):
    compressed = LeptonModel(net).compress(Quantization("w8a8"), Compression("huffman"))
    report = compressed.report()
    assert report.ratio == report.bytes_before / report.bytes_after
    compressed.save(tmp_path / "a")
    assert report.ratio == report.bytes_before / (tmp_path / "a").stat().st_size
    assert report.as_dict()["ratio"] == report.ratio
    assert f"ratio {report.ratio:.2f}" in str(report)


def test_what_was_measured_is_in_the_report(net):
    original = LeptonModel(net)
    compressed = original.compress(Quantization("w8a8"), measure=iter(INPUTS))
    first = compressed.report().measured
    vectors = [output_vectors(model, INPUTS) for model in (net, compressed.model)]
    assert first.fidelity == fidelity(*vectors)
    assert 0.9 < first.fidelity.cosine_min < 1
    assert (first.batch, first.fidelity.samples, first.price_per_hour) == (4, 6, None)
    assert first.before.seconds > 0
    assert first.price_per_million(first.before) is None
    net.train()
    second = compressed.measure(net, INPUTS, price_per_hour=3.6, seconds=0)
    assert net.training
    assert torch.is_grad_enabled()
    assert compressed.report().measured is second
    assert second.price_per_million(second.after) == pytest.approx(1e3 * second.after.seconds / 4)
    text = json.dumps(compressed.report().as_dict(), default=str, allow_nan=False)
    assert json.loads(text)["measured"]["fidelity"]["cosine_min"] == second.fidelity.cosine_min
    assert str(second) in str(compressed.report())
    assert "for a million samples, at 3.6 an hour" in str(second)
    assert compressed.retrained(compressed.trainable()).report().measured is None


def constant(value: float) -> nn.Module:
    """A model of Net's outputs that are all `value`."""
    module = nn.Module()
    module.forward = lambda index: torch.full((*index.shape, 16), value)
    return module


def test_equal_models_and_broken_ones_can_be_told_in_json(net):
    equal = LeptonModel(net).compress(Compression("huffman"), measure=INPUTS).report().measured
    assert (equal.fidelity.cosine_min, equal.fidelity.sqnr_db) == (1, math.inf)
    broken = compare(net, constant(math.nan), [INPUTS[0]], seconds=0)
    assert broken.as_dict()["fidelity"] == {
        "cosine_mean": None, "cosine_min": None, "sqnr_db": None, "samples": 4, "non_finite": 4
    }  # fmt: skip


def test_measure_needs_an_original_inputs_and_a_price_that_is_one(net):
    with pytest.raises(ValueError, match="measure is given with inplace=True; allowed: inplace=False"):
        LeptonModel(net).compress(Quantization(), inplace=True, measure=INPUTS)
    assert type(net.table) is nn.Embedding
    compressed = LeptonModel(net).compress(Quantization())
    with pytest.raises(ValueError, match="measure: inputs is empty"):
        compressed.measure(net, [])
    with pytest.raises(ValueError, match="price_per_hour is -1; allowed"):
        compressed.measure(net, INPUTS, price_per_hour=-1)


class Ticking:
    """A counter that says another joule at each reading."""

    def __init__(self) -> None:
        self.read = 0

    def joules(self) -> float:
        self.read += 1
        return float(self.read)


def test_calls_take_turns_and_energy_is_counted_for_each():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    costs = in_turn(calls, 0, EnergyReader({"ticking": Ticking()}))
    assert order == list("ab" * 6)  # once before, and a block of one call in each of five rounds
    assert [cost.joules for cost in costs.values()] == [1, 1]
    assert in_turn(calls, 0)["a"].joules is None
    assert in_turn(calls, 0, EnergyReader({}))["a"].joules is None
    found = Measurement(costs["a"], Cost(2.0, 0.5), fidelity(torch.ones(1, 1), torch.ones(1, 1)), 1, 1, "energy of it")
    assert "1 -> 0.5 J a call\nenergy of it" in str(found)


def test_a_row_for_each_layer_says_what_changed_and_why(net, tmp_path):
    steps = Pruning(0.5, "2:4", exclude=["body.2"]), Quantization("w8a8", include=[nn.Linear, nn.Embedding, nn.LSTM])
    compressed = LeptonModel(net).compress(*steps, Compression("huffman"))
    found = compressed.explain()
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["table", "norm", "body.0", "body.2", "memory"]
    reports = {row.name: row for row in compressed.report().quantization.rows}
    pruned = compressed.report().pruning.rows[-1]
    first = rows["body.0"]
    assert (first.kind, first.shape, first.scheme, first.fused) == ("QuantLinear", (192, 96), "w8a8", "linear + relu")
    assert (first.zeros, first.pattern, first.method) == (0.5, "2:4", "magnitude")
    assert (first.pruning_error, first.quantization_error) == (
        pruned.relative_error, reports["body.0"].relative_error
    )  # fmt: skip
    assert rows["body.2"].zeros is None
    assert rows["body.2"].notes == ("not pruned: excluded",)
    assert (rows["norm"].notes, rows["norm"].scheme, rows["norm"].kernel) == (
        ("no step picked it",), "float32", "torch"
    )  # fmt: skip
    assert (rows["table"].scheme, rows["memory"].kind, rows["memory"].shape) == ("int8", "QuantLSTM", (64, 30))
    for name, row in reports.items():
        assert (rows[name].bytes_before, rows[name].bytes_after) == (row.bytes_before, row.bytes_after)
        assert (rows[name].kernel, rows[name].scheme) == (row.kernel, row.scheme)
    assert sum(row.bytes_after for row in found.rows) == compressed.report().bytes_after
    text = str(found).splitlines()
    assert len(text) == 1 + 5 + 2
    assert text[-2:] == ["codec of the file: huffman", compressed.report().totals()]
    assert "magnitude 2:4" in text[3]

    compressed.save(tmp_path / "a")
    loaded = {row.name: row for row in CompressedModel.load(tmp_path / "a", Net().eval()).explain().rows}
    for name, row in rows.items():
        again = loaded[name]
        assert (again.kind, again.shape, again.scheme, again.kernel, again.fused, again.bytes_after) == (
            row.kind, row.shape, row.scheme, row.kernel, row.fused, row.bytes_after
        )  # fmt: skip
        assert (again.zeros, again.notes) == (None, ())


@pytest.mark.parametrize("bits", [6, 8])
def test_a_step_is_told_and_survives_the_file_and_training(bits, net, tmp_path):
    kinds = [nn.Linear, nn.Embedding]
    compressed = LeptonModel(net).compress(Quantization(f"w{bits}a8", step=0.1, include=kinds))
    rows = {row.name: row for row in compressed.explain().rows}
    served = lk.backends()["cpu"]["w8a8"]
    assert (rows["table"].scheme, rows["body.0"].scheme, rows["body.0"].kernel) == (f"int{bits}", f"w{bits}a8", served)
    for name in ("table", "body.0", "body.2"):
        weight = net.get_submodule(name).weight
        assert rows[name].step == pytest.approx(0.1 * weight.detach().square().mean().sqrt().item(), rel=1e-6)
    assert (rows["norm"].step, rows["memory"].step) == (0, 0)
    assert f"{rows['table'].step:.4g}" in str(compressed.explain())
    compressed.save(tmp_path / "a")
    loaded = CompressedModel.load(tmp_path / "a", Net().eval())
    assert [row.step for row in loaded.explain().rows] == [row.step for row in rows.values()]
    trained = loaded.retrained(loaded.trainable())
    assert [row.step for row in trained.explain().rows] == [row.step for row in rows.values()]
    assert all(torch.equal(a, b) for a, b in zip(
        trained.model.state_dict().values(), compressed.model.state_dict().values(), strict=True
    ))  # fmt: skip


def test_sparse_layers_are_told_with_their_bits_step_and_kernel(tmp_path):
    def network(conv: nn.Module, *linear: nn.Module) -> nn.Sequential:
        return nn.Sequential(conv, nn.Flatten(), *linear)

    torch.manual_seed(0)
    dense = network(nn.Conv2d(3, 8, 3), nn.Linear(72, 20), nn.Linear(20, 20), nn.Linear(20, 20))
    lk.prune_(dense, 0.5)
    schemes = lk.QuantScheme(6, step=0.01), lk.QuantScheme(step=0.02), lk.QuantScheme.of("w4a16"), None
    conv = lk.nn.SparseConv2d.from_conv(dense[0], scheme=schemes[0])
    linear = zip(dense[2:], schemes[1:], strict=True)
    model = network(conv, *(lk.nn.SparseLinear.from_linear(layer, scheme=scheme) for layer, scheme in linear))
    lk.save(model, tmp_path / "a")
    served = lk.backends()["sparse"]
    rows = CompressedModel.load(tmp_path / "a", dense).explain().rows
    assert [(row.scheme, row.step, row.kernel) for row in rows] == [
        ("w6a8", 0.01, served["w8a8"]), ("w8a8", 0.02, served["w8a8"]), ("w4a16", 0, served["w4a16"]),
        ("float32", 0, served["float"]),
    ]  # fmt: skip


def test_layers_that_no_kernel_can_take_say_why(net):
    net.body[2].weight.data[0, 0] = math.nan
    net.tied = nn.Linear(96, 50)
    net.tied.weight = net.table.weight
    rows = {row.name: row for row in LeptonModel(net).compress(Quantization("w4a16")).explain().rows}
    assert rows["body.2"].notes == ("not quantized: its weight holds NaN or infinity",)
    assert rows["tied"].notes == ("not quantized: its weight is tied to another layer's",)
    assert rows["tied"].scheme == "float32"
    assert rows["memory"].notes == ("no step picked it",)


def test_a_layer_at_two_places_and_one_with_hooks(rng):
    shared, hooked = nn.Linear(64, 64), nn.Linear(64, 64)
    hooked.register_forward_hook(lambda module, x, y: None)
    model = nn.Sequential(nn.Sequential(shared, nn.Tanh()), shared, hooked)
    found = LeptonModel(model).compress(Quantization(fuse=False)).explain()
    assert [(row.name, row.kind) for row in found.rows] == [("0.0", "QuantLinear"), ("2", "QuantLinear")]
    assert all(row.quantization_error > 0 for row in found.rows)


def test_sparse_layers_and_blocks_of_a_transformer(bert_config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    compressed = LeptonModel(transformers.BertModel(bert_config).eval()).compress(Quantization("w8a8"))
    rows = {row.name: row for row in compressed.explain().rows}
    block = "encoder.layer.1."
    assert rows[block + "attention.self.key"].fused == "query + key + value of one input"
    assert rows[block + "attention.output.LayerNorm"].fused == "linear + residual + layer norm"
    for name in ("intermediate.dense", "output.dense", "output.LayerNorm"):
        assert rows[block + name].fused == "feed-forward + residual + layer norm"
    assert rows["pooler.dense"].fused == ""
    linear, convolution = nn.Linear(64, 32), nn.Conv2d(8, 4, 3)
    for layer in (linear, convolution):
        lk.prune_(nn.Sequential(layer), 0.75, pattern="1:4")
    model = nn.Sequential(
        lk.nn.SparseConv2d.from_conv(convolution), lk.nn.SparseLinear.from_linear(linear, scheme="w8a8")
    )
    convolved, multiplied = CompressedModel(model, compressed.report()).explain().rows
    assert (convolved.name, convolved.kind, convolved.scheme) == ("0", "SparseConv2d", "float32")
    assert convolved.kernel == lk.backends()["sparse"]["float"]
    assert (multiplied.shape, multiplied.scheme) == ((32, 64), "w8a8")
    assert multiplied.kernel == lk.backends()["sparse"]["w8a8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bert_config):
    """A tiny BERT and a tokenizer of letters, as Hugging Face saves them."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    transformers.BertModel(bert_config).eval().save_pretrained(path)
    letters = string.ascii_lowercase
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer.from_pretrained(path, model_max_length=64).save_pretrained(path)
    return path


def test_the_command_line_measures_and_explains(folder, tmp_path):
    (tmp_path / "lines").write_text("a few words\nand a few more\n")

    def lepton(*options: object) -> tuple[int, str]:
        arguments = ["compress", folder, "-o", tmp_path / "a", "--calibration", tmp_path / "lines", *options]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.output

    code, text = lepton("--measure", "--price", 0.5, "--explain", "--json")
    assert code == 0, text
    found = json.loads(text)
    assert found["measured"]["fidelity"]["samples"] == 2
    assert found["measured"]["before"]["price_per_million"] > 0
    assert found["ratio"] > 1
    assert {row["name"] for row in found["layers"]} >= {"encoder.layer.0.attention.self.query", "embeddings.LayerNorm"}
    code, text = lepton("--measure", "--explain", "--exclude", "pooler.dense")
    assert code == 0, text
    assert "not quantized: excluded" in text
    assert "fidelity: cosine" in text
    assert lepton("--price", 1)[0] == 2
    (tmp_path / "a").unlink()
    for price, allowed in (("nan", "greater than or equal to 0"), ("inf", "allowed: a finite number, 0 or more")):
        code, text = lepton("--measure", "--price", price)
        assert code == 2
        assert allowed in text
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine.py").write_text("from torch import nn\nnet = nn.Sequential(nn.Linear(64, 64))\n")
    result = CliRunner().invoke(app, ["compress", f"{tmp_path}/mine.py:net", "-o", f"{tmp_path}/b", "--measure"])
    assert result.exit_code == 2
    assert "--measure: model is" in result.output
