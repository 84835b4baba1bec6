"""lepton tune: its search against trying everything, its estimates against what happens, and the whole of it."""

import importlib
import itertools
import json
import re
from dataclasses import replace

import pytest
import torch
from lepton_ai import LeptonModel
from lepton_ai.cli import app
from lepton_ai.compression import Choice, Recipe
from lepton_ai.fidelity import fidelity, output_vectors
from lepton_ai.tuning import CANDIDATES, Budget, tune
from lepton_ai.tuning.candidates import made, tunable_layers
from lepton_ai.tuning.latency import kernel_choice, latencies
from lepton_ai.tuning.search import Option, front, hull
from lepton_ai.tuning.sensitivity import recorded, sensitivities
from lepton_ai.tuning.tune import _units
from torch import nn
from typer.testing import CliRunner

import lepton_kernels as lk


class Attention(nn.Module):
    """Three layers of one input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        scores = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        return x + scores @ self.value(x)


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(300, width)
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.unused = nn.Linear(width, width)

    def forward(self, index):
        x = self.attention(self.table(index))
        return (x + self.down(torch.relu(self.up(x)))).mean(1)


INPUTS = [torch.arange(160).view(8, 20), torch.arange(140, 300).view(8, 20)]
FEW = {
    nn.Linear: (Choice(), *(Choice("w8a8", step=step) for step in (0.0, 0.1, 0.3)), Choice("w4a16", group_size=32)),
    nn.Embedding: (Choice(), *(Choice("w8a8", step=step) for step in (0.0, 0.1, 0.3))),
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    @torch.no_grad()
    def forward(self, x):
        return self.layer(x)


class Uncalled(Frozen):
    def forward(self, x):
        return x @ self.layer.weight


def test_budgets():
    assert Budget.of("cosine>=0.995") == Budget("cosine", 0.995)
    assert Budget.of(" sqnr >= 20 ") == Budget("sqnr", 20)
    assert str(Budget.of("cosine_min>=0.9")) == "cosine_min>=0.9"
    assert not Budget("cosine", 0.9).holds(float("nan"))
    for text in ("cosine", "cosine>0.9", "cosine>=x", "cosine>=nan", ">=1"):
        with pytest.raises(ValueError, match="allowed: METRIC>=NUMBER"):
            Budget.of(text)


def test_the_front_is_the_best_for_every_price_of_an_error(rng):
    for _ in range(20):
        counts = torch.randint(1, 7, (4,), generator=rng).tolist()
        units = [[Option(i, *torch.rand(2, generator=rng).tolist()) for i in range(count)] for count in counts]
        states = front(units)
        sums = [(sum(o.cost for o in state), sum(o.error for o in state)) for state in states]
        assert sums == sorted(sums, key=lambda s: (s[1], -s[0]))
        everything = [(sum(o.cost for o in c), sum(o.error for o in c)) for c in itertools.product(*units)]
        for price in (0.0, 0.01, 0.3, 1.0, 2.5, 100.0):
            best = min(cost + price * error for cost, error in everything)
            assert min(cost + price * error for cost, error in sums) == pytest.approx(best, rel=1e-12)
        for state, then in itertools.pairwise(states):
            assert sum(a is not b for a, b in zip(state, then, strict=True)) == 1


def test_the_hull_leaves_out_what_is_never_best():
    a, b, c, dearer, above = (
        Option("a", 4, 0),
        Option("b", 2, 1),
        Option("c", 1, 4),
        Option("d", 3, 2),
        Option("e", 1.9, 2),
    )
    assert hull([c, dearer, above, b, a]) == [a, b, c]
    assert hull([Option("x", 1, 0), Option("y", 1, 0)]) == [Option("x", 1, 0)]


def test_sensitivities_are_what_each_replacement_alone_costs(net):
    layers = tunable_layers(net, CANDIDATES)
    assert set(layers) == {"table", "attention.query", "attention.key", "attention.value", "up", "down", "unused"}
    choices = {nn.Linear: (Choice(), Choice("w8a8", step=0.15), Choice("w4a16", group_size=32)),
               nn.Embedding: (Choice(), Choice("w8a8", step=0.2))}  # fmt: skip
    replacements = {name: {c: made(layer, c) for c in choices[type(layer)]} for name, layer in layers.items()}
    for parameter in net.parameters():
        parameter.requires_grad_(False)  # it need not be a model in training
    estimated, unknown = sensitivities(net, replacements, INPUTS, probes=64)
    assert unknown == ["unused"]
    reference = output_vectors(net, INPUTS)
    for name, found in estimated.items():
        for choice, estimate in found.items():
            if choice == Choice() or name == "unused":
                assert estimate == 0
                continue
            alone = LeptonModel(net).compress(Recipe({name: choice}, fuse=False)).model
            cost = 1 - fidelity(reference, output_vectors(alone, INPUTS)).cosine_mean
            assert estimate == pytest.approx(cost, rel=0.3), (name, choice)
    assert not any(module._forward_hooks for module in net.modules())


def test_sensitivities_of_recurrent_layers_and_of_one_called_twice():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.memory = nn.Linear(48, 48), nn.LSTM(48, 24, batch_first=True)

        def forward(self, x):
            return self.memory(torch.tanh(self.same(torch.relu(self.same(x)))))[0]

    model, inputs = Twice().eval(), [torch.randn(16, 7, 48)]
    layers = tunable_layers(model, CANDIDATES)
    choices = {"same": Choice("w8a8", step=0.2), "memory": Choice("w8a8")}
    estimated, _ = sensitivities(model, {n: {c: made(layers[n], c)} for n, c in choices.items()}, inputs, probes=64)
    reference = output_vectors(model, inputs)
    for name, choice in choices.items():
        alone = LeptonModel(model).compress(Recipe({name: choice}, fuse=False)).model
        cost = 1 - fidelity(reference, output_vectors(alone, inputs)).cosine_mean
        assert estimated[name][choice] == pytest.approx(cost, rel=0.3)


class InPlace(nn.Module):
    """Writes into what its layers gave and were given."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(300, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, index):
        x = self.table(index)
        x += 0.1
        x += self.first(x)
        x.relu_()
        return self.last(x).mean(1)


@pytest.mark.parametrize("trains", [True, False])
def test_models_that_write_in_place_are_seen_as_they_were(trains):
    torch.manual_seed(0)
    model = InPlace().eval().requires_grad_(trains)
    choice = Choice("w8a8", step=0.2)
    replacements = {name: {choice: made(layer, choice)} for name, layer in tunable_layers(model, CANDIDATES).items()}
    estimated, _ = sensitivities(model, replacements, INPUTS, probes=64)
    reference = output_vectors(model, INPUTS)
    for name in replacements:
        alone = LeptonModel(model).compress(Recipe({name: choice}, fuse=False)).model
        cost = 1 - fidelity(reference, output_vectors(alone, INPUTS)).cosine_mean
        assert estimated[name][choice] == pytest.approx(cost, rel=0.3), name


class LastState(nn.Module):
    """Uses an LSTM's last state alone, of packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(16, 32, batch_first=True, num_layers=2, dropout=0.5), nn.Linear(32, 8)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True)
        _, (h, _) = self.memory(packed)
        return self.head(h[-1])


def test_states_of_recurrent_layers_count_and_dropout_does_not():
    torch.manual_seed(0)
    model, inputs = LastState().train(), [torch.randn(16, 5, 16)]
    result = tune(model, inputs, "cosine>=0.9999", candidates=CANDIDATES, seconds=0.01)
    assert model.training
    assert result.chosen.value >= 0.9999
    choices = {"memory": {Choice("w8a8"): made(model.eval().memory, Choice("w8a8"))}}
    estimated, unknown = sensitivities(model, choices, inputs, probes=64)
    alone = LeptonModel(model).compress(Recipe({"memory": Choice("w8a8")})).model
    cost = 1 - fidelity(output_vectors(model, inputs), output_vectors(alone, inputs)).cosine_mean
    assert estimated["memory"][Choice("w8a8")] == pytest.approx(cost, rel=0.4)
    assert unknown == []


def test_where_lengths_count_they_are_seen():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).eval(), [torch.randn(200, 64)]
    choice = Choice("w8a8", step=0.2)
    replacements = {name: {choice: made(layer, choice)} for name, layer in tunable_layers(model, CANDIDATES).items()}
    estimated, _ = sensitivities(model, replacements, inputs, probes=64, directions=False)
    reference = output_vectors(model, inputs)
    for name in replacements:
        alone = LeptonModel(model).compress(Recipe({name: choice}, fuse=False)).model
        noise = 10 ** (-fidelity(reference, output_vectors(alone, inputs)).sqnr_db / 10)
        assert 2 * estimated[name][choice] == pytest.approx(noise, rel=0.3)
    result = tune(model, inputs, "sqnr>=30", seconds=0.01)
    assert result.chosen.value >= 30
    assert result.chosen.file_bytes < result.best_single.file_bytes
    json.loads(json.dumps(result.as_dict(), allow_nan=False))


def test_layers_that_no_input_reaches_are_left_all_but_alone(net):
    result = tune(net, INPUTS, "cosine>=0.9", seconds=0.01)
    assert result.unreached == ["unused"]
    choice = result.recipe.layers["unused"]
    assert (choice.scheme, choice.step, choice.sparsity) in ((None, 0, 0), ("w8a8", 0, 0))
    assert result.recipe.notes["unreached"] == ["unused"]
    assert "the inputs do not reach unused" in str(result)


def test_the_model_as_it_is_is_always_a_way_out(net, tmp_path):
    coarse = {nn.Linear: (Choice("w8a8", step=0.5),), nn.Embedding: (Choice("w8a8", step=0.5),)}
    result = tune(net, INPUTS, "sqnr>=200", candidates=coarse, seconds=0.01)
    assert result.chosen.label == "float"
    assert all(choice == Choice() for choice in result.recipe.layers.values())
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["chosen"]["value"] is None
    result.plot(tmp_path / "a.png")


def test_schemes_that_are_no_candidates_are_measured_and_not_chosen(net):
    few = {nn.Linear: (Choice(), Choice("w8a16")), nn.Embedding: (Choice(), Choice("w8a8"))}
    result = tune(net, INPUTS, "cosine>=0.99", candidates=few, seconds=0.01)
    assert {choice.scheme for choice in result.recipe.layers.values()} <= {None, "w8a16", "w8a8"}
    assert all(choice.step == 0 for choice in result.recipe.layers.values())
    assert result.best_single.file_bytes < result.chosen.file_bytes
    assert not result.best_single.allowed


def faked(monkeypatch, seconds) -> list[list[str]]:
    """Times are what seconds(choice) says, summed over layers; returns the labels that were timed again."""
    module = importlib.import_module("lepton_ai.tuning.tune")  # the package has a function of that name
    from lepton_ai.tuning.workbench import Workbench

    again: list[list[str]] = []

    def tables(layers, replacements, calls):
        return {name: {c: seconds(c) for c in found} for name, found in replacements.items()}

    def timed_again(self, points, energy, seconds):
        again.append([point.label for point in points])
        return [replace(point, seconds=2 * point.seconds, joules=1.0) for point in points]

    point = Workbench.point

    def measured(self, label, recipe, **options):
        found = point(self, label, recipe, **options)
        took = len(NAMES) * seconds(Choice()) if recipe is None else sum(map(seconds, recipe.layers.values()))
        return replace(found, seconds=took)

    monkeypatch.setattr(module, "latencies", tables)
    monkeypatch.setattr(Workbench, "point", measured)
    monkeypatch.setattr(Workbench, "timed_again", timed_again)
    return again


NAMES = ("table", "attention.query", "attention.key", "attention.value", "up", "down", "unused")


def test_time_is_minimized_where_it_is_asked_for(net, monkeypatch):
    again = faked(monkeypatch, lambda choice: {None: 5.0, "w8a8": 3.0, "w4a16": 1.0}.get(choice.scheme, 9.0))
    result = tune(net, INPUTS, "cosine>=0.9", "latency", candidates=FEW, seconds=0.01)
    linear = [result.recipe.layers[name] for name in NAMES if name not in ("table", "unused")]
    assert {(choice.scheme, choice.group_size) for choice in linear} == {("w4a16", 32)}
    assert again[-1][0] == "the model as it is"
    assert result.chosen.label in again[-1]
    assert result.chosen.joules == 1.0
    assert result.points[0].joules == 1.0
    by_size = tune(net, INPUTS, "cosine>=0.9", "size", candidates=FEW, seconds=0.01)
    assert by_size.recipe.layers["up"].scheme == "w8a8"  # with a step it takes fewer bytes than four bits
    assert by_size.chosen.file_bytes < result.chosen.file_bytes


def test_what_shares_an_input_has_one_choice_where_time_is_minimized(net, monkeypatch):
    faked(monkeypatch, lambda choice: {None: 5.0, "w8a8": 3.0 - choice.step}.get(choice.scheme, 9.0))
    result = tune(net, INPUTS, "cosine>=0.9995", "latency", candidates=FEW, seconds=0.01)
    tuned = [point for point in result.points if point.label.startswith("tuned")]
    for point in tuned:
        layers = point.recipe.layers
        names = ("attention.query", "attention.key", "attention.value")
        assert len({(layers[name].scheme, layers[name].step) for name in names}) == 1


def test_a_single_scheme_that_is_faster_when_timed_again_is_chosen(net, monkeypatch):
    faked(monkeypatch, lambda choice: 1.0)
    from lepton_ai.tuning.workbench import Workbench

    def timed_again(self, points, energy, seconds):
        return [replace(point, seconds=0.1 if point.single else 9.0) for point in points]

    monkeypatch.setattr(Workbench, "timed_again", timed_again)
    result = tune(net, INPUTS, "cosine>=0.9", "latency", candidates=FEW, seconds=0.01)
    assert result.chosen.single
    assert result.chosen.seconds == 0.1


def test_latencies_are_measured_once_for_a_shape_and_a_kernel(net, monkeypatch):
    from lepton_ai.tuning import latency

    runs = []
    monkeypatch.setattr(latency, "in_turn", lambda calls, seconds: runs.append(len(calls)) or real(calls, 0.0))
    from lepton_ai.measure import in_turn as real

    layers = tunable_layers(net, FEW)
    replacements = {name: {c: made(layer, c) for c in FEW[type(layer)]} for name, layer in layers.items()}
    with torch.no_grad(), recorded(layers) as calls:
        net(INPUTS[0])
    found = latencies(layers, replacements, calls)
    # table; query, key and value; up; down. float, w8a8 at any step, w4a16.
    assert sorted(runs) == [2, 3, 3, 3]
    assert found["attention.query"] == found["attention.value"]
    assert found["up"][Choice("w8a8")] == found["up"][Choice("w8a8", step=0.3)] > 0
    assert set(found["unused"].values()) == {0.0}
    sparse = Choice("w8a8", sparsity=0.5, sparse=True)
    assert kernel_choice(sparse) == sparse
    assert kernel_choice(Choice("w8a8", sparsity=0.5, codec="lzw")) == Choice("w8a8")


def test_layers_of_one_input_go_together_where_time_counts(net):
    layers = tunable_layers(net, FEW)
    with torch.no_grad(), recorded(layers) as calls:
        net(INPUTS[0])
    together = _units(layers, calls, True)
    assert ["attention.query", "attention.key", "attention.value"] in together
    assert len(together) == 5
    assert len(_units(layers, calls, False)) == 7


@pytest.mark.parametrize("minimize", ["size", "latency", "cost"])
def test_the_chosen_model_keeps_the_budget_and_beats_single_schemes(net, tmp_path, minimize):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    price = 2.0 if minimize == "cost" else None
    result = tune(
        net, iter(INPUTS), "cosine>=0.999", minimize, candidates=FEW, price_per_hour=price, seconds=0.05, seed=1
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    chosen = result.chosen
    compressed = LeptonModel(net).compress(result.recipe)
    close = fidelity(output_vectors(net, INPUTS), output_vectors(compressed.model, INPUTS))
    assert close.cosine_mean == chosen.value >= 0.999
    compressed.save(tmp_path / "a")
    assert (tmp_path / "a").stat().st_size == chosen.file_bytes
    assert result.best_single.value >= 0.999
    if minimize == "size":
        assert chosen.file_bytes <= result.best_single.file_bytes
        assert not chosen.single
    front = result.front()
    assert front[0].value == max(point.value for point in result.points)
    for a, b in itertools.pairwise(front):
        assert a.value > b.value
        assert result.objective(a) > result.objective(b)
    assert chosen.batch == 8
    text = str(result)
    assert "chosen: " in text
    assert ("a million" in text) == (price is not None)
    told = json.loads(json.dumps(result.as_dict()))
    assert told["chosen"]["file_bytes"] == chosen.file_bytes
    if price is not None:
        assert told["chosen"]["price_per_million"] == pytest.approx(1e6 * chosen.seconds / 8 * price / 3600)
    assert result.recipe.notes["budget"] == "cosine>=0.999"
    result.plot(tmp_path / "front.svg")
    assert "svg" in (tmp_path / "front.svg").read_text()[:400]


def test_a_metric_of_ones_own(net):
    reference = output_vectors(net, INPUTS)

    def agreement(model: nn.Module) -> float:
        return float((output_vectors(model, INPUTS).argmax(1) == reference.argmax(1)).float().mean())

    result = tune(net, INPUTS, "agreement>=1", metric=agreement, candidates=FEW, seconds=0.05)
    assert agreement(LeptonModel(net).compress(result.recipe).model) == result.chosen.value == 1
    with pytest.raises(ValueError, match="budget is agreement>=2; the model as it is has 1"):
        tune(net, INPUTS, "agreement>=2", metric=agreement, candidates=FEW, seconds=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "accuracy>=0.9"}, "metric is 'accuracy'; allowed: cosine, cosine_min, sqnr, or a metric= to call"),
        ({"minimize": "speed"}, "minimize is 'speed'; allowed: size, latency, cost"),
        ({"minimize": "cost"}, "price_per_hour is None with minimize 'cost'"),
        ({"price_per_hour": float("nan")}, "price_per_hour is nan"),
        ({"probes": 0}, "probes is 0; allowed: 1 or more"),
        ({"inputs": []}, "tune: inputs is empty"),
        ({"model": nn.Sequential(nn.ReLU())}, "Sequential has no layer to tune; allowed: a model with nn.Linear"),
        ({"model": nn.Linear(3, 3, device="meta")}, "tensors on the meta device"),
        ({"model": Frozen(), "inputs": [torch.ones(4, 3)]}, "the model's output has no gradient"),
        ({"model": Uncalled(), "inputs": [torch.ones(4, 3)]}, "calls none of its layers"),
    ],
)
def test_errors(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        tune(**{"model": net, "inputs": INPUTS, **arguments})


def test_the_command_line(net, tmp_path, monkeypatch):
    from lepton_ai.tuning import candidates

    torch.save(net.state_dict(), tmp_path / "weights.pt")
    torch.save(INPUTS, tmp_path / "inputs.pt")
    (tmp_path / "mine.py").write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(__file__).rpartition('/')[0]!r})\n"
        "from test_tuning import Net\n"
        "def make():\n"
        "    model = Net().eval()\n"
        f"    model.load_state_dict(torch.load({str(tmp_path / 'weights.pt')!r}))\n"
        "    return model\n"
    )
    assert candidates.CANDIDATES is CANDIDATES
    for kind, few in FEW.items():
        monkeypatch.setitem(CANDIDATES, kind, few)
    model, recipe = f"{tmp_path}/mine.py:make", f"{tmp_path}/recipe.yaml"
    options = ["--budget", "cosine>=0.999", "--inputs", f"{tmp_path}/inputs.pt", "--seconds", "0.05", "--json"]
    options += ["--plot", f"{tmp_path}/f.png"]
    result = CliRunner().invoke(app, ["tune", model, "-o", recipe, *options])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    result = CliRunner().invoke(app, ["compress", model, "-o", f"{tmp_path}/a", "--recipe", recipe])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a").stat().st_size == told["chosen"]["file_bytes"]
    assert all(entry.codec in ("huffman", "lzw", "none") for entry in lk.inspect(tmp_path / "a"))
    for wrong, message in (
        (["tune", model, "-o", recipe], "model is .*; allowed: a Hugging Face folder"),
        (["tune", model, "-o", f"{tmp_path}/no/r.yaml", *options], "allowed: a file in a folder that there is"),
        (["tune", model, "-o", f"{tmp_path}", *options], "allowed: a file in a folder that there is"),
        (["tune", model, "-o", recipe, *options, "--plot", "f.xyz"], "allowed: a name that ends in .*png"),
        (["tune", model, "-o", recipe, *options, "--batch", "3"], "--inputs is given with batch"),
        (["tune", model, "-o", recipe, "--inputs", f"{tmp_path}/weights.pt"], "allowed: a list of model inputs"),
        (["tune", model, "-o", recipe, "--inputs", f"{tmp_path}/mine.py"], "allowed: what torch.save wrote"),
    ):
        result = CliRunner().invoke(app, wrong)
        assert result.exit_code == 2
        assert re.search(message, result.output)
