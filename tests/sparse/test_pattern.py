"""Pattern.keep against plain loops: which weights stay, how many, at odd sizes; names that are refused."""

import pytest
import torch

from lepton_kernels.sparse import Pattern

SHAPES = [(1, 1), (1, 4), (5, 7), (16, 16), (33, 18), (40, 131)]  # one, one group, odd, a block, one past, many


def energies(rows: int, columns: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns)) + 0.01


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "4:8", "3:5"])
def test_n_of_m(shape, text):
    energy, pattern = energies(*shape), Pattern.of(text)
    mask = pattern.keep(energy, 0.0)
    for row in range(shape[0]):
        for begin in range(0, shape[1], pattern.second):
            group, kept = energy[row, begin : begin + pattern.second], mask[row, begin : begin + pattern.second]
            assert int(kept.sum()) == min(pattern.first, len(group))
            if not kept.all():
                assert group[kept].min() >= group[~kept].max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_unstructured(shape, sparsity):
    energy = energies(*shape)
    mask = Pattern.of("unstructured").keep(energy, sparsity)
    assert int((~mask).sum()) == round(sparsity * energy.numel())
    if 0 < mask.sum() < mask.numel():
        assert energy[mask].min() >= energy[~mask].max()
    by_row = Pattern.of("unstructured").keep(energy, sparsity, by_row=True)
    assert ((~by_row).sum(1) == round(sparsity * shape[1])).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", ["16x1", "1x4", "16x4", "32x32", "3x5"])
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.8])
def test_blocks(shape, text, sparsity):
    energy, pattern = energies(*shape), Pattern.of(text)
    mask = pattern.keep(energy, sparsity)
    means, kept = [], []
    for r in range(0, shape[0], pattern.first):
        for c in range(0, shape[1], pattern.second):
            window = slice(r, r + pattern.first), slice(c, c + pattern.second)
            assert mask[window].all() or not mask[window].any()
            means.append(float(energy[window].mean()))
            kept.append(bool(mask[window].all()))
    assert kept.count(False) == round(sparsity * len(kept))
    if 0 < sum(kept) < len(kept):
        stay = [mean for mean, keep in zip(means, kept, strict=True) if keep]
        go = [mean for mean, keep in zip(means, kept, strict=True) if not keep]
        assert min(stay) >= max(go) - 1e-6


@pytest.mark.parametrize("text", ["unstructured", "2:4", "16x1", "32x32"])
def test_names(text):
    assert str(Pattern.of(text)) == text
    assert Pattern.of(Pattern.of(text)) == Pattern.of(text)


@pytest.mark.parametrize("text", ["", "4:4", "5:4", "0:4", "x", "16x", "16x0", "2:4:8", "structured", 3, None])
def test_names_that_are_refused(text):
    with pytest.raises(ValueError, match="allowed: 'unstructured', N:M"):
        Pattern.of(text)


def test_the_share_that_a_pattern_fixes():
    assert Pattern.of("2:4").sparsity == 0.5
    assert Pattern.of("1:4").sparsity == 0.75
    assert Pattern.of("16x1").sparsity is None


@pytest.mark.parametrize("text", ["2:4", "1:4", "16x1", "1x4", "16x4", "32x32"])
def test_what_keep_makes_is_detected(text):
    energy, pattern = energies(128, 256), Pattern.of(text)
    mask = pattern.keep(energy, 0.7)
    assert pattern.fits(mask)
    assert Pattern.detect(mask) == pattern


def test_what_is_no_pattern():
    energy = energies(128, 256)
    mask = Pattern.of("unstructured").keep(energy, 0.5)
    assert Pattern.detect(mask) == Pattern.of("unstructured")
    assert Pattern.detect(torch.ones(4, 4, dtype=torch.bool)) == Pattern.of("unstructured")
    assert not Pattern.of("2:4").fits(mask)
    assert not Pattern.of("16x4").fits(mask)
