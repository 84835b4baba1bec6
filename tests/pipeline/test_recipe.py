"""Recipes: a choice for each layer, replayed bit for bit from Python, from YAML and from the command line."""

import pytest
import torch
from lepton_ai import CompressedModel, LeptonModel
from lepton_ai.cli import app
from lepton_ai.compression import Choice, Compression, Quantization, Recipe
from torch import nn
from typer.testing import CliRunner

import lepton_kernels as lk


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 96)
        self.body = nn.Sequential(nn.Linear(96, 256), nn.ReLU(), nn.Linear(256, 192), nn.Linear(192, 96))
        self.head = nn.Linear(96, 64)
        self.memory = nn.LSTM(64, 32, batch_first=True)
        for layer in (self.body[0], self.body[2], self.body[3], self.head):
            nn.init.normal_(layer.weight, std=0.05)

    def forward(self, index):
        return self.memory(self.head(self.body(self.table(index))))[0]


INDEX = torch.arange(20).view(4, 5)
RECIPE = Recipe(
    {
        "table": Choice("w8a8", step=0.2),
        "body.0": Choice("w8a8", step=0.1, codec="lzw"),
        "body.2": Choice("w4a16", group_size=32),
        "body.3": Choice("w8a8", sparsity=0.7, sparse=True, step=0.3),
        "head": Choice(sparsity=0.5, pattern="2:4", codec="none"),
        "memory": Choice("w8a8"),
    },
    notes={"budget": "cosine>=0.9"},
)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def test_every_choice_is_done_and_told(net, tmp_path):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    compressed = LeptonModel(net).compress(RECIPE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    model = compressed.model
    assert isinstance(model.table, lk.nn.QuantEmbedding)
    assert isinstance(model.memory, lk.nn.QuantLSTM)
    assert isinstance(model.body[3], lk.nn.SparseLinear)
    assert model.body[0].scheme.name == "w8a8"
    assert model.body[0].scheme.step == pytest.approx(0.1 * float(net.body[0].weight.detach().square().mean().sqrt()))
    assert (model.body[2].scheme.name, model.body[2].scheme.group_size) == ("w4a16", 32)
    pruned = torch.where(model.body[3].weight == 0, 0.0, net.body[3].weight.detach())
    assert model.body[3].scheme.step == pytest.approx(0.3 * float(pruned.square().mean().sqrt()), rel=1e-5)
    assert model.body[3].sparsity == pytest.approx(0.7, abs=0.01)
    assert ((model.head.weight == 0).view(64, -1, 4).sum(2) == 2).all()
    rows = {row.name: row for row in compressed.explain().rows}
    assert (rows["table"].scheme, rows["body.0"].scheme, rows["body.3"].kind) == ("int8", "w8a8", "SparseLinear")
    assert (rows["head"].zeros, rows["head"].pattern) == (0.5, "2:4")
    assert rows["body.3"].quantization_error > 0
    assert compressed.report().fusion.rows
    compressed.save(tmp_path / "a")
    codecs = {entry.name: entry.codec for entry in lk.inspect(tmp_path / "a")}
    names = ("table.weight_packed", "body.0.weight_packed", "body.2.weight_packed", "head.weight")
    assert [codecs[name] for name in names] == ["huffman", "lzw", "none", "none"]  # 4-bit noise does not code
    assert compressed.report().as_dict()["layer_codecs"] == {"body.0": "lzw", "head": "none"}
    again = CompressedModel.load(tmp_path / "a", Net())
    with torch.inference_mode():
        assert torch.equal(again(INDEX), compressed(INDEX))


def test_one_choice_for_all_is_what_quantization_does(net, tmp_path):
    everything = ["table", "body.0", "body.2", "body.3", "head"]
    for choice in (Choice("w8a8"), Choice("w6a8"), Choice("w8a16", step=0.1)):
        LeptonModel(net).compress(Recipe(dict.fromkeys(everything, choice))).save(tmp_path / "a")
        same = Quantization(choice.scheme, step=choice.step)
        LeptonModel(net).compress(same, Compression("huffman")).save(tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_layer_at_two_places_is_replaced_at_both():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.b = self.a

    for choice in (Choice("w8a8"), Choice("w8a8", sparsity=0.5, sparse=True)):
        made = LeptonModel(Twice()).compress(Recipe({"b": choice})).model
        assert type(made.a) is not nn.Linear
        assert made.a is made.b
    same = Recipe({"a": Choice("w8a8"), "b": Choice("w8a8", codec="lzw")})
    assert LeptonModel(Twice()).compress(same).model.a is not None
    with pytest.raises(ValueError, match="a and b are one layer, and have w8a8 and w8a16; allowed: one choice"):
        LeptonModel(Twice()).compress(Recipe({"a": Choice("w8a8"), "b": Choice("w8a16")}))


@pytest.mark.parametrize("name", ["linear1", "linear2"])
@pytest.mark.parametrize("choice", [Choice("w8a8"), Choice("w8a8", sparsity=0.5, sparse=True)], ids=str)
def test_torchs_own_transformer_layer_calls_what_a_recipe_made(name, choice, tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    compressed = LeptonModel(layer).compress(Recipe({name: choice}))
    compressed.save(tmp_path / "a")
    for made in (
        compressed.model,
        CompressedModel.load(tmp_path / "a", nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()).model,
    ):
        calls = []
        forward = getattr(made, name).forward
        getattr(made, name).forward = lambda x, forward=forward, calls=calls: calls.append(1) or forward(x)
        with torch.inference_mode():
            made(torch.randn(2, 5, 32))
        assert calls == [1]


def test_a_loaded_file_is_saved_again_the_same(net, tmp_path):
    for codec in ("huffman", "lzw"):
        choices = {"body.0": Choice("w8a8", step=0.3, codec=codec), "body.2": Choice("w8a8"), "body.3": Choice("w8a8")}
        LeptonModel(net).compress(Recipe(choices)).save(tmp_path / "a")
        again = CompressedModel.load(tmp_path / "a", Net().eval())
        assert again.report().layer_codecs == ({"body.0": "lzw"} if codec == "lzw" else {})
        again.save(tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_pattern_says_its_share():
    assert Choice(pattern="2:4").sparsity == 0.5
    assert Choice(pattern="2:4") == Choice(sparsity=0.5, pattern="2:4")


def test_a_recipe_is_the_same_from_its_file(net, tmp_path):
    RECIPE.save(tmp_path / "recipe.yaml")
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again == RECIPE
    for name, recipe in (("a", RECIPE), ("b", again)):
        LeptonModel(net).compress(recipe).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "step: 0.2" in (tmp_path / "recipe.yaml").read_text()


def test_a_tuned_model_trains_and_keeps_its_choices(net):
    compressed = LeptonModel(net).compress(RECIPE)
    again = compressed.retrained(compressed.trainable())
    assert again.report().layer_codecs == {"body.0": "lzw", "head": "none"}
    assert again.model.body[2].scheme == compressed.model.body[2].scheme
    assert again.model.table.step == compressed.model.table.step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "no YAML"),
        ("[]", "lepton_recipe is None; allowed: 1"),
        ("lepton_recipe: 2", "lepton_recipe is 2; allowed: 1"),
        ("{lepton_recipe: 1, choices: 3}", "choices is int; allowed: a list of choices"),
        ("{lepton_recipe: 1, fuse: 3, choices: []}", "fuse is 3; allowed: true, false"),
        ("{lepton_recipe: 1, choices: []}", "layers is empty"),
        ("{lepton_recipe: 1, choices: [{scheme: w8a8}]}", "layers of .* is None; allowed: a list of names"),
        ("{lepton_recipe: 1, choices: [{bits: 8, layers: [a]}]}", "a choice has bits; allowed: codec, group_size, lay"),
        ("{lepton_recipe: 1, choices: [{scheme: w3a8, layers: [a]}]}", "scheme is 'w3a8'; allowed"),
        ("{lepton_recipe: 1, choices: [{scheme: w4a8, step: 0.1, layers: [a]}]}", "step is 0.1 with 4 bits"),
        ("{lepton_recipe: 1, choices: [{step: 0.1, layers: [a]}]}", "step 0.1 without a scheme"),
        ("{lepton_recipe: 1, choices: [{scheme: w8a8, step: x, layers: [a]}]}", "step is 'x'; allowed: a number"),
        ("{lepton_recipe: 1, choices: [{scheme: w8a8, step: 1e-1, layers: [a]}]}", "with a point where it has an exp"),
        ("{lepton_recipe: 1, choices: [{scheme: w8a8, step: true, layers: [a]}]}", "step is True; allowed: a number"),
        ("{lepton_recipe: 1, choices: [{pattern: 2:4, layers: [a]}]}", "pattern is 124; allowed: .*in quotes"),
        ("{lepton_recipe: 1, choices: [{pattern: foo, layers: [a]}]}", "pattern"),
        ("{lepton_recipe: 1, choices: [{sparse: 'false', layers: [a]}]}", "sparse is 'false'; allowed: true, false"),
        (
            "{lepton_recipe: 1, choices: [{scheme: w4a8, sparse: true, layers: [a]}]}",
            "scheme is 'w4a8' with sparse=True",
        ),
        (
            "{lepton_recipe: 1, choices: [{scheme: w4a8, group_size: 32.0, layers: [a]}]}",
            "group_size is 32.0; allowed:",
        ),
        ("{lepton_recipe: 1, choices: [{scheme: w8a8, layers: [3]}]}", "numbers in quotes"),
        ("{lepton_recipe: 1, fused: false, choices: []}", "it has fused; allowed: lepton_recipe, notes, fuse, choices"),
        ("{lepton_recipe: 1, notes: 3, choices: []}", "notes is 3; allowed: names with values"),
        ("{lepton_recipe: 1, choices: [{sparsity: 2, layers: [a]}]}", "sparsity is 2"),
        ("{lepton_recipe: 1, choices: [{codec: zip, layers: [a]}]}", "codec is 'zip'"),
        ("{lepton_recipe: 1, choices: [{layers: [a]}, {scheme: w8a8, layers: [a]}]}", "a stands in two choices"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.load(tmp_path / "r.yaml")


def test_errors(net):
    model = LeptonModel(net)
    with pytest.raises(ValueError, match=r"layers holds boddy.0 \(1 in all\), which Net does not have"):
        model.compress(Recipe({"boddy.0": Choice("w8a8")}))
    with pytest.raises(ValueError, match=r"table is Embedding with sparse=True; allowed: nn.Linear"):
        model.compress(Recipe({"table": Choice("w8a8", sparse=True)}))
    for name, choice, what in (
        ("body", Choice("w8a8"), "body is Sequential with scheme 'w8a8'; allowed: nn.Linear, nn.Embedding, nn.LSTM"),
        ("body.1", Choice("w8a8"), "body.1 is ReLU with scheme"),
        ("table", Choice(sparsity=0.5), "table is Embedding with sparsity 0.5; allowed: nn.Linear, nn.Conv2d"),
    ):
        before = net.body[0]
        with pytest.raises(ValueError, match=what):  # though another layer could take it
            model.compress(Recipe({"body.0": choice, name: choice}), inplace=True)
        assert net.body[0] is before
    with pytest.raises(ValueError, match="steps are Recipe, Quantization; allowed: a Recipe, or one to three"):
        model.compress(RECIPE, Quantization())
    with pytest.raises(ValueError, match="recurrent layers have no w4a8 kernel"):
        model.compress(Recipe({"memory": Choice("w4a8")}))


def test_the_command_line_replays_a_recipe(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "mine.py").write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(__file__).rpartition('/')[0]!r})\n"
        "from test_recipe import Net\n"
        "def make():\n"
        "    model = Net().eval()\n"
        f"    model.load_state_dict(torch.load({str(tmp_path / 'weights.pt')!r}))\n"
        "    return model\n"
    )
    RECIPE.save(tmp_path / "recipe.yaml")
    LeptonModel(net).compress(RECIPE).save(tmp_path / "a")
    arguments = ["compress", f"{tmp_path}/mine.py:make", "-o", f"{tmp_path}/b", "--recipe", f"{tmp_path}/recipe.yaml"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    result = CliRunner().invoke(app, [*arguments, "--scheme", "w8a8", "--prune", "0.5"])
    assert result.exit_code == 2
    assert "--recipe is given with scheme, prune" in result.output
