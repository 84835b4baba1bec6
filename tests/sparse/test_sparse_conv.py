"""SparseConv2d against nn.Conv2d: geometry, dtypes, int8, gradients, files; sparsify_ with convolutions."""

import pytest
import torch
from torch import nn

import lepton_kernels as lk
from lepton_kernels.nn import SparseConv2d
from lepton_kernels.nn.sparse_conv import rows_of_weight
from lepton_kernels.sparse import sparsify_

GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": 3, "dilation": (1, 2), "padding": "same"},
    {"kernel_size": (2, 4), "padding": "same"},  # uneven: one more behind than before
    {"kernel_size": 3, "padding": "valid", "stride": 3},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 5, "padding": 1, "padding_mode": "circular", "bias": False},
]


def pruned(channels: int = 5, out: int = 19, sparsity: float = 0.7, dtype=torch.float32, **geometry) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out, **{"kernel_size": 3, **geometry}).to(dtype)
    lk.prune_(nn.Sequential(conv), sparsity)
    return conv


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("batch", [1, 7])
def test_geometry(geometry, batch, monkeypatch):
    conv = pruned(**geometry)
    layer = SparseConv2d.from_conv(conv, activation="relu")
    x = torch.randn(batch, 5, 11, 13)
    torch.testing.assert_close(layer(x), conv(x).relu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), conv(x[0]).relu(), rtol=1e-4, atol=1e-5)
    strange = torch.randn(13, 11, 5, batch).permute(3, 2, 1, 0)
    torch.testing.assert_close(layer(strange), conv(strange).relu(), rtol=1e-4, atol=1e-5)
    whole = layer(x)
    monkeypatch.setattr("lepton_kernels.nn.sparse_conv._ROW_BYTES", 1)  # an image at a time
    torch.testing.assert_close(layer(x), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight, conv.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    conv = pruned(dtype=dtype)
    x = torch.randn(2, 5, 9, 9, dtype=dtype)
    y = SparseConv2d.from_conv(conv)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), conv.float()(x.float()), rtol=2e-2, atol=2e-2)


def test_int8_is_the_sparse_linear_of_its_rows():
    conv = pruned(padding=1)
    layer = SparseConv2d.from_conv(conv, scheme="w8a8")
    linear = nn.Linear(45, 19)
    linear.weight, linear.bias = nn.Parameter(rows_of_weight(conv.weight.detach())), conv.bias
    x = torch.randn(2, 5, 6, 7)
    rows = nn.functional.unfold(x, 3, padding=1).reshape(2, 5, 9, 42).permute(0, 3, 2, 1).reshape(84, 45)
    want = lk.nn.SparseLinear.from_linear(linear, scheme="w8a8")(rows).reshape(2, 6, 7, 19).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert torch.equal(layer(x), want)
        assert (layer(x) - conv(x)).norm() < 0.03 * conv(x).norm()


@pytest.mark.parametrize(("pattern", "sparsity", "kernel"), [("16x4", 0.8, "blocks"), ("1x4", 0.9, "groups")])
def test_the_blocks_that_prune_makes_are_those_of_the_kernels(pattern, sparsity, kernel):
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 128, 3)
    lk.prune_(nn.Sequential(conv), sparsity, pattern=pattern)
    layer = SparseConv2d.from_conv(conv, pattern, "w8a8")
    assert str(layer.product.pattern) == pattern
    assert layer.product.packed().kernel(64) == kernel


def test_gradients_are_those_of_the_dense_layer():
    conv = pruned(padding=1, stride=2)
    layer = SparseConv2d.from_conv(conv)
    x = torch.randn(2, 5, 9, 9, requires_grad=True)
    layer(x).square().sum().backward()
    got, x.grad = x.grad, None
    conv(x).square().sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", [None, "w8a8"])
def test_files(scheme, tmp_path):
    def network(conv: nn.Module) -> nn.Sequential:
        return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(19 * 64, 3))

    conv = pruned(padding="same", dilation=2)
    model, x = network(SparseConv2d.from_conv(conv, scheme=scheme)), torch.randn(2, 5, 8, 8)
    lk.save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        empty = network(nn.Conv2d(5, 19, 3))  # the geometry is in the file
    loaded = lk.load(tmp_path / "model.safetensors", empty)
    assert isinstance(loaded[0], SparseConv2d)
    assert torch.equal(loaded(x), model(x))
    again = lk.load(tmp_path / "model.safetensors", loaded)  # over a sparse one
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match=r"an nn\.Conv2d in the file and Linear in the model"):
        lk.load(tmp_path / "model.safetensors", network(nn.Linear(5, 19)))


def test_what_does_not_fit():
    layer = SparseConv2d.from_conv(pruned())
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 9, 9\); allowed: \[batch, 5, height, width\]"):
        layer(torch.randn(2, 4, 9, 9))
    with pytest.raises(ValueError, match=r"x has \(2, 9\) places, padding included; allowed: no fewer"):
        layer(torch.randn(2, 5, 2, 9))
    with pytest.raises(ValueError, match="groups is 5; allowed: 1"):
        SparseConv2d.from_conv(nn.Conv2d(5, 10, 3, groups=5))
    with pytest.raises(ValueError, match="zeros are unstructured; allowed with pattern '16x4'"):
        SparseConv2d.from_conv(pruned(), pattern="16x4")
    for change, text in [
        ({"padding": (1, 1)}, r"padding is \(1, 1\); allowed: four numbers"),
        ({"stride": 0}, "stride is 0; allowed: one or two numbers, each 1 or more"),
        ({"padding_mode": "mirror"}, "padding_mode is 'mirror'; allowed: 'zeros', 'reflect'"),
    ]:
        with pytest.raises(ValueError, match=text):
            SparseConv2d(5, 19, 3, 0, **change)


def test_sparsify_takes_the_shape_that_reaches_a_convolution(monkeypatch):
    seen = []

    def in_turn(candidates, x):
        seen.append(tuple(x.shape))
        return {name: 1.0 if name == "sparse" else 2.0 for name in candidates}

    monkeypatch.setattr("lepton_kernels.sparse.sparsify._in_turn", in_turn)
    model = nn.Sequential(pruned(stride=2), nn.Conv2d(19, 38, 3, groups=19), nn.Flatten(), nn.Linear(342, 4))
    x = torch.randn(2, 5, 11, 11)
    want = model(x)
    report = sparsify_(model, example=x, rows=(2,))
    assert seen == [(2, 5, 11, 11), (2, 342)]
    assert [row.chosen or row.skipped for row in report.rows] == ["sparse", "it has 19 groups", "sparse"]
    assert report.rows[0].inputs == ("2x5x11x11",)
    assert isinstance(model[0], SparseConv2d)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_sparsify_leaves_convolutions_without_an_example():
    model = nn.Sequential(pruned(), nn.Flatten(), nn.Linear(171, 4))
    report = sparsify_(model, rows=(1,))
    assert report.rows[0].skipped == "a convolution that no `example` reaches"
    assert type(model[0]) is nn.Conv2d
