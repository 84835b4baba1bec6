"""prune_: exact shares, the weights that go are those of the method, zeros survive quantization; selectors, errors."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import lepton_kernels as lk
from lepton_kernels.sparse import sensitivity
from lepton_kernels.sparse.calibration import as_matrix, collect


def model_of(*sizes: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(k, n) for k, n in pairwise(sizes)])


def correlated(samples: int, columns: int) -> torch.Tensor:
    """Inputs as real ones are: columns of very different size that depend on each other."""
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(columns // 2 + 1, columns, generator=generator) * torch.logspace(-1, 1, columns)
    x = torch.randn(samples, len(mix), generator=generator) @ mix / len(mix) ** 0.5
    return x + 0.1 * torch.randn(samples, columns, generator=generator) * torch.logspace(-1, 1, columns)


def zeros(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.99])
def test_magnitude_zeroes_exactly_the_smallest(sparsity):
    model = model_of(50, 33, 7)
    before = [layer.weight.detach().clone() for layer in model]
    report = lk.prune_(model, sparsity)
    for layer, old, row in zip(model, before, report.rows, strict=True):
        new, drop = layer.weight.detach(), round(sparsity * old.numel())
        assert zeros(new) == drop
        assert torch.equal(new[new != 0], old[new != 0])
        if 0 < drop < old.numel():
            assert old[new == 0].abs().max() <= old[new != 0].abs().min()
        assert row.sparsity_after == pytest.approx(drop / old.numel())
        assert row.relative_error == pytest.approx(float((old - new).norm() / old.norm()), abs=1e-6)
        assert row.output_error is None


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("16x1", 0.6), ("1x4", 0.6), ("16x4", 0.5)]
)
def test_every_method_keeps_every_pattern(method, pattern, sparsity):
    model, x = model_of(72, 48, 20), correlated(64, 72)
    report = lk.prune_(model, sparsity, pattern=pattern, method=method, calibration=[x])
    for layer in model:
        weight = layer.weight.detach()
        if ":" in pattern:
            n, m = map(int, pattern.split(":"))
            assert (weight.view(len(weight), -1, m).count_nonzero(2) <= n).all()
        else:
            rows, columns = map(int, pattern.split("x"))
            for r in range(0, len(weight), rows):
                for block in weight[r : r + rows].split(columns, 1):
                    assert block.all() or not block.any()
    assert report.sparsity == pytest.approx(sparsity, abs=0.05)


def test_wanda_takes_the_least_of_each_row():
    model, x = model_of(40, 9), correlated(100, 40)
    score = model[0].weight.detach().abs() * x.norm(dim=0)
    lk.prune_(model, 0.4, method="wanda", calibration=[x])
    for row, kept in zip(score, model[0].weight != 0, strict=True):
        assert int((~kept).sum()) == 16
        assert row[kept].min() >= row[~kept].max()


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.8), ("2:4", 0.5), ("16x1", 0.5)]
)
def test_sparsegpt_loses_less_of_the_output_than_wanda_and_magnitude(pattern, sparsity):
    x, error = correlated(2000, 200), {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = model_of(200, 64)
        want = model(x).detach()
        report = lk.prune_(model, sparsity, pattern=pattern, method=method, calibration=x.split(256))
        bias = model[0].bias.detach()
        error[method] = float((model(x).detach() - want).norm() / (want - bias).norm())
        exact = method == "sparsegpt"  # the others know the squares of the inputs alone
        assert report.rows[0].output_error == pytest.approx(error[method], rel=0.01 if exact else 0.3)
    least = min(error["wanda"], error["magnitude"])
    assert error["sparsegpt"] < (0.95 if pattern == "2:4" else 0.8) * least


def test_sparsegpt_is_the_best_change_of_one_row():
    """With one column pruned first, the others must be the least-squares solution of what the paper solves."""
    x = correlated(400, 6).double()
    weight = torch.randn(1, 6, generator=torch.Generator().manual_seed(3))
    weight[0, 0] = 1e-4  # goes first: the least
    model = nn.Sequential(nn.Linear(6, 1, bias=False))
    model[0].weight.data = weight.clone()
    lk.prune_(model, 1 / 6, method="sparsegpt", calibration=[x.float()])
    got = model[0].weight.detach().double()
    assert got[0, 0] == 0
    gram = x.T @ x / len(x)
    gram += 0.01 * gram.diag().diag()
    change = torch.linalg.solve(gram[1:, 1:], gram[1:, 0] * weight[0, 0].double())
    torch.testing.assert_close(got[0, 1:], weight[0, 1:].double() + change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_convolutions(method):
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 4)
    )
    x = torch.randn(16, 3, 6, 6)
    report = lk.prune_(model, 0.5, method=method, calibration=[x])
    assert [row.name for row in report.rows] == ["0", "2", "4"]
    for row in report.rows:
        assert row.sparsity_after == pytest.approx(0.5, abs=0.02)
        assert 0 < row.output_error < 1
    known = collect(model, {"2": model[2]}, [x], gram=True)["2"]
    assert known.output_error(as_matrix(model[2].weight), as_matrix(model[2].weight)) == 0


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1x4", 0.6), ("16x4", 0.5)])
def test_neighbouring_columns_of_a_convolution_are_channels(method, pattern, sparsity):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, (1, 2), groups=2))
    report = lk.prune_(model, sparsity, pattern=pattern, method=method, calibration=[torch.randn(4, 8, 9, 7)])
    for layer in (model[0], model[2]):
        places = (layer.weight != 0).permute(0, 2, 3, 1)
        groups = places.reshape(*places.shape[:3], -1, 4).sum(-1)
        if pattern == "2:4":
            assert (groups == 2).all()
        else:
            assert ((groups == 0) | (groups == 4)).all()
        if pattern == "16x4":
            by_block = groups.view(2, 16, *groups.shape[1:])
            assert (by_block == by_block[:, :1]).all()
    assert report.sparsity == pytest.approx(sparsity, abs=0.02)


def test_dead_inputs_and_few_samples():
    x = correlated(3, 30)
    x[:, 7] = 0
    model = model_of(30, 5)
    lk.prune_(model, 0.5, method="sparsegpt", calibration=[x])
    weight = model[0].weight.detach()
    assert torch.isfinite(weight).all()
    assert (weight[:, 7] == 0).all()


@pytest.mark.parametrize("allocation", ["global", "sensitivity"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_shared_budget(method, allocation):
    model, x = model_of(64, 64, 64), correlated(200, 64)
    with torch.no_grad():
        model[1].weight *= 0.2
    report = lk.prune_(model, 0.6, method=method, calibration=[x], allocation=allocation)
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    if allocation == "global":  # the second layer's weights are the smaller ones
        assert report.rows[1].sparsity_after > report.rows[0].sparsity_after + 0.2
    assert max(row.sparsity_after for row in report.rows) <= 0.99


def test_sensitivity_spends_the_budget_where_it_hurts_least():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    with torch.no_grad():  # most of the second layer does nearly nothing
        model[1].weight[:, 8:] *= 0.01
    report = lk.prune_(model, 0.5, calibration=[torch.randn(100, 64)], allocation="sensitivity")
    assert report.rows[1].sparsity_after > 0.8
    assert report.rows[0].sparsity_after < 0.2
    curve = sensitivity(model_of(64, 64), (0.2, 0.5, 0.9))["0"]
    assert 0 < curve[0.2] < curve[0.5] < curve[0.9] < 1


@pytest.mark.parametrize("pattern", ["unstructured", "1x4"])
def test_max_error_holds_back(pattern):
    model = model_of(64, 64, 64)
    report = lk.prune_(model, 0.9, pattern=pattern, max_error=0.3)
    for row in report.rows:
        assert row.relative_error <= 0.3 + 1e-6
        assert 0.1 < row.sparsity_after < 0.9
        assert row.note == "held at max_error; 0.90 asked for"
    assert "held at max_error" in str(report)
    report = lk.prune_(model_of(64, 64), 0.5, pattern="2:4", max_error=0.01)
    assert report.rows[0].sparsity_after == 0
    assert report.rows[0].note.startswith("left dense: 2:4 would cost")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "w4a8", "w8a16"])
def test_zeros_stay_zeros_when_quantized(scheme):
    model = model_of(96, 40)
    lk.prune_(model, 0.7)
    zero = model[0].weight == 0
    lk.quantize_(model, scheme)
    assert (model[0].weight[zero] == 0).all()


def test_a_pruned_model_codes_smaller(tmp_path):
    sizes = {}
    for sparsity in (0.0, 0.8):
        model = model_of(512, 512)
        if sparsity:
            lk.prune_(model, sparsity)
        lk.quantize_(model, "w8a8")
        lk.save(model, tmp_path / "a")
        sizes[sparsity] = (tmp_path / "a").stat().st_size
    assert sizes[0.8] < 0.5 * sizes[0.0]


def test_half_types_keep_their_dtype():
    model = model_of(32, 16).to(torch.bfloat16)
    old = model[0].weight.detach().clone()
    lk.prune_(model, 0.5)
    new = model[0].weight.detach()
    assert new.dtype is torch.bfloat16
    assert torch.equal(new[new != 0], old[new != 0])


def test_selectors():
    model = model_of(20, 20, 20, 20)
    report = lk.prune_(model, 0.5, exclude=["2"])
    assert {row.name: row.skipped for row in report.rows} == {"0": None, "1": None, "2": "excluded"}
    assert (model[2].weight != 0).all()
    assert "excluded" in str(report)
    model = model_of(20, 20, 20)
    assert [row.name for row in lk.prune_(model, 0.5, include=["1"]).rows] == ["1"]


def test_layers_that_calibration_does_not_reach_are_reported():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    model = Two()
    report = lk.prune_(model, 0.5, method="wanda", calibration=[torch.randn(4, 8)])
    assert {row.name: row.skipped for row in report.rows} == {"used": None, "unused": "no calibration input reached it"}
    assert (model.unused.weight != 0).all()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0; allowed: 0 <= sparsity < 1"),
        ({"sparsity": 0.5, "pattern": "3:2"}, "pattern is '3:2'; allowed: 'unstructured'"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "sparsity is 0.6; allowed with pattern 2:4: 0.5"),
        ({"sparsity": 0.5, "method": "luck"}, "method is 'luck'; allowed: 'magnitude', 'wanda', 'sparsegpt'"),
        ({"sparsity": 0.5, "method": "wanda"}, "calibration is None; method 'wanda' needs"),
        ({"sparsity": 0.5, "allocation": "fair"}, "allocation is 'fair'; allowed: 'uniform', 'global', 'sensitivity'"),
        ({"sparsity": 0.5, "max_error": 0}, "max_error is 0; allowed: None or a number above 0"),
        ({"sparsity": 0.5, "include": ["nowhere"]}, "include holds 'nowhere', which matches no layer"),
        ({"sparsity": 0.5, "exclude": ["*"]}, "nothing to prune in Sequential"),
        ({"sparsity": 0.5, "method": "wanda", "calibration": []}, "calibration is empty"),
    ],
)
def test_errors(arguments, text):
    model = model_of(4, 4)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=text):
        lk.prune_(model, **arguments)
    assert torch.equal(model[0].weight, before)


def test_a_model_without_layers_is_an_error():
    with pytest.raises(ValueError, match=r"no nn.Linear or nn.Conv2d found"):
        lk.prune_(nn.Sequential(nn.ReLU()), 0.5)


def test_a_sequence_of_layers_makes_up_for_those_before():
    """Each layer is fitted to what the pruned ones before it give: the output of all is nearer to the dense one."""
    x, error = correlated(1500, 64), {}
    want = None
    for sequential in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
        want = model(x).detach()
        report = lk.prune_(model, 0.7, method="sparsegpt", calibration=x.split(200), sequential=sequential)
        error[sequential] = float((model(x).detach() - want).norm() / (want - want.mean(0)).norm())
        assert [row.name for row in report.rows] == ["0", "2", "4"]
        assert report.sparsity == pytest.approx(0.7, abs=0.01)
    last = float((model(x).detach() - want).norm() / (want - model[4].bias.detach()).norm())
    assert report.rows[-1].output_error == pytest.approx(last, rel=0.02)
    assert error[True] < 0.97 * error[False]


def test_layers_of_one_input_are_calibrated_together():
    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.left(x) * self.right(x))

    from lepton_kernels.sparse.sequential import one_after_the_other

    torch.manual_seed(0)
    model = Siblings()
    layers = {name: getattr(model, name) for name in ("last", "left", "right")}
    groups = [names for names, _ in one_after_the_other(model, layers, [torch.randn(5, 8)])]
    assert groups == [["left", "right"], ["last"]]
    with pytest.raises(ValueError, match="sequential=True needs an iterable"):
        lk.prune_(model, 0.5, sequential=True)
