"""Masks hold through training; the gradual schedule follows its formula; finalize_ leaves plain layers."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import lepton_kernels as lk
from lepton_kernels.sparse import GradualPruner, finalize_


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))


def train(model: nn.Module, steps: int, after=lambda: None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    x, y = torch.randn(64, 16), torch.randint(0, 3, (64,))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()


def test_zeros_stay_zeros_in_training_and_after_it():
    model = model_of()
    lk.prune_(model, 0.7, keep_masks=True)
    zero = [layer.weight == 0 for layer in (model[0], model[2])]
    start = model[0].weight.detach().clone()
    train(model, 5)
    for layer, mask in zip((model[0], model[2]), zero, strict=True):
        assert (layer.weight[mask] == 0).all()
        assert int((layer.weight == 0).sum()) == int(mask.sum())
    assert not torch.equal(model[0].weight, start)
    y = model(torch.ones(1, 16))
    assert finalize_(model) == 2
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(torch.ones(1, 16)), y)
    assert (model[0].weight[zero[0]] == 0).all()
    assert finalize_(model) == 0


def test_pruning_again_replaces_the_mask():
    model = model_of()
    lk.prune_(model, 0.5, keep_masks=True)
    lk.prune_(model, 0.8, keep_masks=True)
    assert len(model[0].parametrizations.weight) == 1
    assert int((model[0].weight == 0).sum()) == round(0.8 * 512)


def test_schedule():
    pruner = GradualPruner(model_of(), 0.8, begin_step=10, end_step=110, initial_sparsity=0.2)
    assert pruner.sparsity_at(9) == 0
    assert pruner.sparsity_at(10) == pytest.approx(0.2)
    assert pruner.sparsity_at(60) == pytest.approx(0.8 - 0.6 * 0.5**3)
    assert pruner.sparsity_at(110) == pruner.sparsity_at(1000) == pytest.approx(0.8)


@pytest.mark.parametrize(("pattern", "final"), [("unstructured", 0.8), ("1x4", 0.75), ("2:4", 0.5)])
def test_gradual_pruning_arrives_and_never_grows_back(pattern, final):
    model = model_of()
    pruner = GradualPruner(model, final, begin_step=2, end_step=20, every=3, pattern=pattern)
    seen = []

    def after() -> None:
        pruner.step()
        seen.append(model[0].weight == 0)

    train(model, 25, after)
    for earlier, later in pairwise(seen):
        assert (later | ~earlier).all()
    assert float(seen[-1].float().mean()) == pytest.approx(final, abs=0.01)
    assert float(seen[0].float().mean()) == 0
    finalize_(model)
    lk.quantize_(model, "w8a8")
    assert (model[0].weight[seen[-1]] == 0).all()


def test_gradual_pruning_of_a_convolution_has_the_pattern_along_channels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 4, 3))
    pruner = GradualPruner(model, 0.5, begin_step=0, end_step=2, pattern="2:4")
    pruner.step()
    pruner.step()
    assert ((model[0].weight != 0).permute(0, 2, 3, 1).reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"final_sparsity": 1.0}, "final_sparsity is 1.0; allowed: 0 <= final_sparsity < 1"),
        ({"initial_sparsity": 0.9}, "initial_sparsity is 0.9; allowed: up to final_sparsity, 0.8"),
        ({"end_step": 0}, "begin_step is 0, end_step 0; allowed: 0 <= begin_step < end_step"),
        ({"every": 0}, "every is 0; allowed: 1 or more"),
        ({"pattern": "4:2"}, "pattern is '4:2'"),
        ({"include": ["nowhere"]}, "include holds 'nowhere'"),
    ],
)
def test_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        GradualPruner(model_of(), **{"final_sparsity": 0.8, "begin_step": 0, "end_step": 10, **arguments})
