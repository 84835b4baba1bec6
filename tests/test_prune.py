"""prune_: exact sparsity, the smallest weights go, zeros survive quantization; selectors and errors."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import lepton_kernels as lk


def model_of(*sizes: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(k, n) for k, n in pairwise(sizes)])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.99])
def test_magnitude_zeroes_exactly_the_smallest(sparsity):
    model = model_of(50, 33, 7)
    before = [layer.weight.detach().clone() for layer in model]
    report = lk.prune_(model, sparsity)
    for layer, old, row in zip(model, before, report.rows, strict=True):
        new, drop = layer.weight.detach(), round(sparsity * old.numel())
        assert int((new == 0).sum()) == drop
        assert torch.equal(new[new != 0], old[new != 0])
        if 0 < drop < old.numel():
            assert old[new == 0].abs().max() <= old[new != 0].abs().min()
        assert row.sparsity_after == pytest.approx(drop / old.numel())
        assert row.relative_error == pytest.approx(float((old - new).norm() / old.norm()), abs=1e-6)


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


def test_selectors():
    model = model_of(20, 20, 20, 20)
    report = lk.prune_(model, 0.5, exclude=["2"])
    assert [row.skipped for row in report.rows] == [None, None, "excluded"]
    assert (model[2].weight != 0).all()
    assert "excluded" in str(report)
    model = model_of(20, 20, 20)
    assert [row.name for row in lk.prune_(model, 0.5, include=["1"]).rows] == ["1"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0; allowed: 0 <= sparsity < 1"),
        ({"sparsity": 0.5, "pattern": "3:7"}, "pattern is '3:7'; allowed: 'unstructured'"),
        ({"sparsity": 0.5, "method": "luck"}, "method is 'luck'; allowed: 'magnitude'"),
        ({"sparsity": 0.5, "include": ["nowhere"]}, "include holds 'nowhere', which matches no layer"),
        ({"sparsity": 0.5, "exclude": ["*"]}, "nothing to prune in Sequential"),
    ],
)
def test_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        lk.prune_(model_of(4, 4), **arguments)


def test_a_model_without_linear_layers_is_an_error():
    with pytest.raises(ValueError, match=r"no nn.Linear found"):
        lk.prune_(nn.Sequential(nn.ReLU()), 0.5)
