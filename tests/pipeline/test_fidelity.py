"""Vectors of a model's outputs, and how close two sets of them are."""

import math
from types import SimpleNamespace

import pytest
import torch
from lepton_ai.fidelity import fidelity, output_vectors
from torch import nn


class Encoder(nn.Module):
    """Gives what a Hugging Face encoder gives: an object with last_hidden_state [batch, tokens, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 7)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(pooled=None, last_hidden_state=self.dropout(self.table(input_ids)))


def test_sentence_vectors_are_means_over_the_tokens_that_count(rng):
    model = Encoder()
    lengths, ids = [1, 9, 4], torch.randint(0, 30, (3, 9), generator=rng)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    got = output_vectors(model, [{"input_ids": ids, "attention_mask": mask}])
    want = torch.stack([model.table.weight[row[:n]].mean(0) for row, n in zip(ids, lengths, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # sums of at most 9 floats, in another order
    assert model.training
    assert model.dropout.training
    short = {"input_ids": ids[:1, :1], "attention_mask": mask[:1, :1]}
    assert torch.equal(output_vectors(model, iter([short]))[0], got[0])


def test_other_outputs_are_flattened_sample_by_sample(rng):
    x, y = torch.randn(5, 3, 4, generator=rng), torch.randn(2, 3, 4, generator=rng)
    assert torch.equal(output_vectors(nn.Identity(), [x, (y,)]), torch.cat([x, y]).flatten(1))
    assert torch.equal(output_vectors(lambda a, b: {"none": None, "parts": [(a + b, a)]}, [[x, x]]), (2 * x).flatten(1))
    half = output_vectors(nn.Identity(), [x.bfloat16()[:, 0, 0]])
    assert (half.dtype, half.shape) == (torch.float32, (5, 1))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: output_vectors(nn.Identity(), x), r"inputs is one Tensor; allowed: .* such as \[x\]"),
        (lambda x: output_vectors(nn.Identity(), {"input": x}), "inputs is one dict"),
        (lambda x: output_vectors(nn.Identity(), iter(())), "inputs is empty; allowed: an iterable of one or more"),
        (lambda x: output_vectors(nn.Identity(), [x, x[:, :1]]), r"samples have \[1, 3\] output features"),
        (lambda x: output_vectors(lambda x: "text", [x]), "the model gave str; allowed: a tensor of samples"),
        (lambda x: output_vectors(torch.sum, [x]), "the model gave a single number"),
        (lambda x: fidelity(x, x[:1]), r"vectors is \(1, 3\), reference_vectors \(2, 3\); allowed: one shape"),
        (lambda x: fidelity(x[:0], x[:0]), "with one sample or more"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.ones(2, 3))


def test_figures(rng):
    want = torch.randn(50, 33, generator=rng)
    same = fidelity(want, want)
    assert (same.cosine_mean, same.cosine_min, same.sqnr_db, same.samples) == (1, 1, math.inf, 50)
    doubled = fidelity(want, 2 * want)
    assert doubled.cosine_min == pytest.approx(1, abs=1e-12)
    assert doubled.sqnr_db == 0  # the noise is as large as the signal
    got = want.clone()
    got[7] = -want[7]
    opposite = fidelity(want, got)
    assert opposite.cosine_min == pytest.approx(-1, abs=1e-12)
    assert opposite.cosine_mean == pytest.approx(48 / 50, abs=1e-12)
    ratio = want.double().square().sum() / (4 * want[7].double().square().sum())
    assert opposite.sqnr_db == pytest.approx(10 * math.log10(ratio))


def test_zero_vectors_and_values_that_are_no_numbers():
    zero, one = torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    assert fidelity(zero, zero).cosine_min == 1
    half = fidelity(zero, one)
    assert (half.cosine_mean, half.cosine_min, half.sqnr_db) == (0.5, 0, -math.inf)
    tiny = torch.full((1, 3), 1e-45)
    assert fidelity(tiny, -tiny).cosine_min == pytest.approx(-1)
    broken = one.clone()
    broken[1, 2] = math.inf
    found = fidelity(one, broken)
    assert all(math.isnan(value) for value in (found.cosine_mean, found.cosine_min, found.sqnr_db))
    assert found.non_finite == 1
    assert str(found) == "1 of 2 outputs hold NaN or infinity"
