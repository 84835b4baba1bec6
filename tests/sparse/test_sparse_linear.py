"""SparseLinear as a torch module: exact weights, gradients, files, copies, compile; sparsify_ and what it reports."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lepton_kernels as lk
from lepton_kernels import reference
from lepton_kernels._ops_sparse import sparse_linear
from lepton_kernels.sparse import sparsify_

INT8_SCHEMES = ["w8a8", "w7a8", "w6a8", "w5a8", lk.QuantScheme(step=0.005), lk.QuantScheme(6, step=0.005)]


def pruned(k: int = 40, n: int = 30, sparsity: float = 0.7, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(k, n).to(dtype)
    lk.prune_(nn.Sequential(linear), sparsity)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_linear_layer_without_its_zeros(dtype):
    linear = pruned(dtype=dtype)
    layer = lk.nn.SparseLinear.from_linear(linear)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.to_dense().weight, linear.weight)
    assert layer.nonzeros == int((linear.weight != 0).sum())
    assert layer.sparsity == pytest.approx(0.7, abs=0.01)
    x = torch.randn(3, 5, 40).to(dtype)
    want = nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
    torch.testing.assert_close(layer(x).float(), want, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)
    assert layer(x).dtype is dtype
    assert "sparsity=0.7000" in repr(layer)


@pytest.mark.parametrize("scheme", INT8_SCHEMES, ids=str)
def test_a_sparse_quantized_layer_is_the_quantized_layer(scheme):
    linear = pruned(400, 300, 0.8)
    layer, want = lk.nn.SparseLinear.from_linear(linear, scheme=scheme), lk.nn.QuantLinear.from_linear(linear, scheme)
    assert layer.scheme == want.scheme
    assert torch.equal(layer.weight, want.weight)
    assert (layer.weight[linear.weight == 0] == 0).all()
    assert layer.nonzeros == int((linear.weight != 0).sum())
    assert layer.weight_compressed.abs().max() <= layer.scheme.limit
    assert (layer.weight_scale >= layer.scheme.step).all()
    stored = layer.weight_compressed, layer.weight_bitmask, layer.weight_scale
    for m in (1, 9, 130):
        x = torch.randn(m, 400)
        assert torch.equal(layer(x), want(x))
        assert torch.equal(layer(x), reference.sparse_linear(x, *stored, layer.bias))
    assert torch.equal(layer.half().float()(x), want(x))
    assert f"scheme={layer.scheme.name}" in repr(layer)
    y = torch.compile(layer, fullgraph=True)(x)
    assert torch.equal(y, want(x))
    x.requires_grad_()
    assert torch.autograd.grad(layer(x).sum(), x)[0].shape == x.shape


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("16x4", 0.7), ("16x1", 0.7)])
def test_patterns_are_detected(pattern, sparsity):
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    lk.prune_(nn.Sequential(linear), sparsity, pattern=pattern)
    layer = lk.nn.SparseLinear.from_linear(linear, pattern=pattern)
    assert str(layer.pattern) == pattern
    with pytest.raises(ValueError, match="the weight's zeros are unstructured; allowed with pattern '2:4'"):
        lk.nn.SparseLinear.from_linear(pruned(), pattern="2:4")


def test_the_report_names_the_kernels():
    isa = lk.backends()["isa"]
    assert lk.backends()["sparse"]["float"] == f"sparse_rows[{isa}]"
    assert set(lk.backends()["sparse"]) == {"float", "w8a8", "w4a16"}


def test_gradients():
    layer = lk.nn.SparseLinear.from_linear(pruned(), activation="gelu")
    x = torch.randn(4, 40, dtype=torch.float32, requires_grad=True)
    values = layer.weight_compressed.clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    y = sparse_linear(x, values, layer.weight_bitmask, None, bias, "gelu")
    got = torch.autograd.grad(y.square().sum(), (x, values, bias))
    weight = layer.weight.requires_grad_()
    dense = nn.functional.gelu(nn.functional.linear(x, weight, bias))
    want = torch.autograd.grad(dense.square().sum(), (x, weight, bias))
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], want[1][layer.weight != 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-5)


def test_the_operator_is_sound():
    layer = lk.nn.SparseLinear.from_linear(pruned())
    values = layer.weight_compressed.clone().requires_grad_()
    torch.library.opcheck(
        sparse_linear, (torch.randn(3, 40, requires_grad=True), values, layer.weight_bitmask, None, None)
    )


def test_compile_export_copies_and_pickle():
    layer = lk.nn.SparseLinear.from_linear(pruned())
    x = torch.randn(6, 40)
    want = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), want)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), want)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)


def test_state_dict_and_the_meta_device():
    layer = lk.nn.SparseLinear.from_linear(pruned())
    empty = lk.nn.SparseLinear(40, 30, layer.nonzeros, device="meta")
    with pytest.raises(RuntimeError, match="meta device; load a state dict"):
        empty(torch.randn(1, 40))
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 40)
    want = layer(x)
    assert torch.equal(empty(x), want)
    want = 2 * (want - layer.bias)
    with torch.no_grad():  # the two share their tensors
        empty.weight_compressed.mul_(2)
        empty.bias.zero_()
    torch.testing.assert_close(empty(x), want)
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("scheme", [None, *INT8_SCHEMES], ids=str)
@pytest.mark.parametrize("codec", ["huffman", "none"])
def test_files(tmp_path, codec, scheme):
    model = nn.Sequential(pruned(400, 300, 0.8), nn.ReLU(), nn.Linear(300, 5))
    dense = copy.deepcopy(model)
    model[0] = lk.nn.SparseLinear.from_linear(model[0], scheme=scheme, activation="relu")
    lk.save(model, tmp_path / "a", codec)
    loaded = lk.load(tmp_path / "a", model=dense)
    assert isinstance(loaded[0], lk.nn.SparseLinear)
    assert loaded[0].activation == "relu"
    assert loaded[0].scheme == model[0].scheme
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    x = torch.randn(3, 400)
    assert torch.equal(loaded(x), model(x))
    assert (tmp_path / "a").stat().st_size < 0.3 * 400 * 300 * 4
    with pytest.raises(ValueError, match=r"layer '0' is an nn.Linear in the file and ReLU in the model"):
        lk.load(tmp_path / "a", model=nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Linear(300, 5)))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, 3, 0), "in_features is 0"),
        ((3, 0, 0), "out_features is 0"),
        ((3, 3, 10), "nonzeros is 10; allowed: 0 to 9"),
        ((3, 3, 3, True, torch.float64), "dtype is torch.float64"),
        ((3, 3, 3, True, torch.float32, None, "none", "w4a8"), "scheme is 'w4a8'; allowed: None, 'w8a8'"),
        ((3, 3, 3, True, torch.float32, None, "none", "w6a16"), "scheme is 'w6a16'; allowed: None, 'w8a8', 'w7a8'"),
    ],
)
def test_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        lk.nn.SparseLinear(*arguments)


def test_inputs_that_do_not_fit():
    layer = lk.nn.SparseLinear.from_linear(pruned())
    with pytest.raises(ValueError, match=r"x has shape \(2, 41\); allowed: \[..., 40\]"):
        layer(torch.randn(2, 41))
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64"):
        layer(torch.randn(2, 40, dtype=torch.float64))


def test_sparsify_measures_and_replaces(monkeypatch):
    def in_turn(candidates, x):  # no test depends on a clock: one layer is faster sparse, the other is not
        assert {name: type(layer).__name__ for name, layer in candidates.items()}["sparse"] == "SparseLinear"
        return {"dense": 2e-3, "sparse": 1e-3 if candidates["sparse"].sparsity > 0.9 else 1.99e-3}

    monkeypatch.setattr("lepton_kernels.sparse.sparsify._in_turn", in_turn)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.Linear(1024, 7))
    lk.prune_(model, 0.98, include=["0"], keep_masks=True)
    x = torch.randn(4, 1024)
    want = model(x)
    report = sparsify_(model, rows=(1, 64), exclude=["3"])
    assert isinstance(model[0], lk.nn.SparseLinear)
    assert type(model[2]) is nn.Linear
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    by_name = {row.name: row for row in report.rows}
    assert by_name["0"].chosen == "sparse"
    assert by_name["2"].chosen == "dense"
    assert by_name["3"].skipped == "excluded"
    assert set(by_name["0"].milliseconds) == {"dense", "sparse"}
    assert all(len(values) == 2 for values in by_name["0"].milliseconds.values())
    assert by_name["0"].bytes_after < 0.1 * by_name["0"].bytes_before
    assert "sparse" in str(report)


def test_sparsify_with_a_scheme_knows_dense_quantized_layers(monkeypatch):
    monkeypatch.setattr(
        "lepton_kernels.sparse.sparsify._in_turn",
        lambda candidates, x: {"dense": 3.0, "sparse": 2.0, "w8a8": 1.0, "sparse w8a8": 1.5},
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024))
    report = sparsify_(model, scheme="w8a8", rows=(64,))
    assert set(report.rows[0].milliseconds) == {"dense", "sparse", "w8a8", "sparse w8a8"}
    assert report.rows[0].chosen == "w8a8"
    assert isinstance(model[0], lk.nn.QuantLinear)


@pytest.mark.parametrize("scheme", ["w6a8", "w8a8"])
def test_sparsify_gives_each_layer_the_step_that_quantize_gives(scheme, monkeypatch):
    monkeypatch.setattr(
        "lepton_kernels.sparse.sparsify._in_turn",
        lambda candidates, x: {name: 1.0 if name == f"sparse {scheme}" else 2.0 for name in candidates},
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 7))
    lk.prune_(model, 0.6)
    dense, conv = copy.deepcopy(model), model[0].weight.detach()
    sparsify_(model, scheme=scheme, step=0.1, rows=(64,), example=torch.randn(1, 3, 5, 5))
    lk.quantize_(dense, scheme, step=0.1)
    assert model[2].scheme == dense[2].scheme
    assert torch.equal(model[2].weight, dense[2].weight)
    assert model[0].product.scheme.step == pytest.approx(0.1 * conv.square().mean().sqrt().item(), rel=1e-6)
    assert model[0].product.scheme.name == scheme


def test_sparsify_times_for_real():
    model = nn.Sequential(nn.Linear(64, 64))
    report = sparsify_(model, rows=(1, 3))
    assert all(ms > 0 for values in report.rows[0].milliseconds.values() for ms in values)


def test_sparsify_errors():
    with pytest.raises(ValueError, match=r"nothing to do in Sequential; skipped: no nn\.Linear or nn\.Conv2d found"):
        sparsify_(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"rows is \(\); allowed"):
        sparsify_(nn.Sequential(nn.Linear(4, 4)), rows=())
    with pytest.raises(ValueError, match="include holds 'nowhere'"):
        sparsify_(nn.Sequential(nn.Linear(4, 4)), include=["nowhere"])
    with pytest.raises(ValueError, match=r"sparsify_: step is 0.1 without a scheme; allowed: 0"):
        sparsify_(nn.Sequential(nn.Linear(4, 4)), step=0.1)
    with pytest.raises(ValueError, match=r"sparsify_: step is 0.1 with w4a16; allowed: 0 at 4 bits"):
        sparsify_(nn.Sequential(nn.Linear(4, 4)), scheme="w4a16", step=0.1)


def test_sparsify_leaves_what_can_not_be_quantized():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"skipped: 0 \(its weight holds NaN or infinity\)"):
        sparsify_(model, scheme="w8a8")
