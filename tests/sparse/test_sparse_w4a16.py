"""SparseLinear with 4-bit weights: those of QuantLinear to the bit, copies, files, compile; SparseConv2d; sparsify_."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import lepton_kernels as lk
from lepton_kernels.nn import QuantLinear, SparseConv2d, SparseLinear
from lepton_kernels.nn.sparse_conv import rows_of_weight
from lepton_kernels.sparse import sparsify_

SCHEMES = [
    "w4a16",
    lk.QuantScheme(4, 32, False, "float"),
    lk.QuantScheme(4, 16, True, "float"),
    lk.QuantScheme(4, -1, False, "float"),
]


def pruned(k: int = 40, n: int = 30, sparsity: float = 0.7, dtype=torch.float32, pattern="unstructured") -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(k, n).to(dtype)
    lk.prune_(nn.Sequential(linear), sparsity, pattern=pattern)
    return linear


def check(linear: nn.Linear, scheme: str | lk.QuantScheme) -> SparseLinear:
    """The layer, whose weight is QuantLinear's to the bit and whose size is that of its nonzeros."""
    layer, want = SparseLinear.from_linear(linear, scheme=scheme), QuantLinear.from_linear(linear, scheme)
    assert torch.equal(layer.weight, want.weight)
    assert torch.equal(layer.to_dense().weight, want.weight)
    assert (layer.weight[linear.weight == 0] == 0).all()
    assert layer.nonzeros == int((linear.weight != 0).sum())
    assert layer.weight_compressed.shape == (-(-layer.nonzeros // 2),)
    assert torch.equal(layer.weight_scale, want.weight_scale)
    assert (layer.weight_zero_point is None) == (want.weight_zero_point is None)
    assert layer.state_dict().keys() >= {"weight_compressed", "weight_bitmask", "weight_scale", "weight_shape"}
    return layer


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("k", [1, 40, 128, 301])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_has_the_weights_of_the_quantized_layer(scheme, k, dtype):
    linear = pruned(k, 33, 0.6, dtype)
    with torch.no_grad():
        linear.weight[3] = 0
    layer, want = check(linear, scheme), QuantLinear.from_linear(linear, scheme)
    for m in (1, 2, 16, 33):
        x = torch.randn(m, k).to(dtype)
        # Activations are rounded to 16 bits, or not at all: 2^-15 of the largest, for each of the two.
        bound = 2**-14 * x.float().abs().amax() * want.weight.abs().sum(1) + 2 * torch.finfo(dtype).eps * (
            1 + want(x).float().abs()
        )
        assert layer(x).dtype is dtype
        assert ((layer(x).float() - want(x).float()).abs() <= bound).all()


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_all_weights_and_none(sparsity, scheme):
    linear = nn.Linear(37, 5)
    with torch.no_grad():
        linear.weight.mul_(1 - sparsity)
    layer = check(linear, scheme)
    assert layer.sparsity == sparsity
    torch.testing.assert_close(layer(torch.ones(3, 37)), layer.to_dense()(torch.ones(3, 37)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1x4", 0.7)])
def test_patterns_stay(pattern, sparsity):
    linear = pruned(64, 64, sparsity, pattern=pattern)
    check(linear, "w4a16")
    assert str(SparseLinear.from_linear(linear, pattern, "w4a16").pattern) == pattern


def test_copies_dtypes_compile_and_gradient():
    layer = SparseLinear.from_linear(pruned(400, 300, 0.8), scheme="w4a16", activation="relu")
    assert "sparsity=0.8000, scheme=w4a16, group_size=128, activation=relu" in repr(layer)
    x = torch.randn(9, 400)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).half().float()):
        assert torch.equal(other(x), want)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), want)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), want)
    with torch.no_grad():
        shared = copy.deepcopy(layer)
        before = shared(x)
        shared.weight_scale.mul_(2)
        shared.bias.mul_(2)
    torch.testing.assert_close(shared(x), 2 * before)
    x.requires_grad_()
    got = torch.autograd.grad(layer(x).sum(), x)[0]
    mask = (want > 0).float()
    torch.testing.assert_close(got, mask @ layer.weight, rtol=1e-4, atol=1e-5)


def test_compiled_training_passes_the_gradient_on():
    layer = SparseLinear.from_linear(pruned(), scheme="w4a16")
    x = torch.randn(4, 40, requires_grad=True)
    torch.compile(layer, fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nonzeros", [1, 359, 360])
def test_state_dict_and_the_meta_device(nonzeros):
    linear = nn.Linear(40, 30)
    with torch.no_grad():
        linear.weight.view(-1)[torch.randperm(1200)[nonzeros:]] = 0
    layer = SparseLinear.from_linear(linear, scheme="w4a16")
    assert layer.nonzeros == nonzeros
    empty = SparseLinear(40, 30, nonzeros, device="meta", scheme="w4a16")
    assert empty.nonzeros in (nonzeros, nonzeros + 1)
    assert "scheme=w4a16" in repr(empty)
    with pytest.raises(RuntimeError, match="meta device; load a state dict"):
        empty(torch.randn(1, 40))
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 40)
    assert empty.nonzeros == nonzeros
    assert torch.equal(empty(x), layer(x))
    other = SparseLinear(40, 30, nonzeros, scheme="w4a16")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch for weight_compressed"):
        SparseLinear(40, 30, nonzeros + 2, scheme="w4a16").load_state_dict(layer.state_dict())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("codec", ["huffman", "none"])
def test_files(tmp_path, codec, scheme):
    model = nn.Sequential(pruned(400, 300, 0.8), nn.ReLU(), nn.Linear(300, 5))
    dense = copy.deepcopy(model)
    model[0] = SparseLinear.from_linear(model[0], scheme=scheme, activation="relu")
    lk.save(model, tmp_path / "a", codec)
    loaded = lk.load(tmp_path / "a", model=dense)
    assert isinstance(loaded[0], SparseLinear)
    assert loaded[0].scheme == lk.QuantScheme.of(scheme)
    x = torch.randn(3, 400)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded[0].weight, model[0].weight)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert (tmp_path / "a").stat().st_size < stored + 4096  # the header
    values = {entry.name: entry for entry in lk.inspect(tmp_path / "a")}["0.weight_compressed"]
    assert (values.dtype, values.shape) == ("U8", (-(-model[0].nonzeros // 2),))


def test_a_file_says_what_it_did_before(tmp_path):
    for scheme, text in ((None, None), ("w8a8", "w8a8"), ("w6a8", "w6a8")):
        lk.save(nn.Sequential(SparseLinear.from_linear(pruned(), scheme=scheme)), tmp_path / "a")
        size = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
        header = json.loads((tmp_path / "a").read_bytes()[8 : 8 + size])
        layer = json.loads(header["__metadata__"]["lepton.layers"])["0"]
        assert layer["scheme"] == text
        assert layer["dtype"] == ("F32" if scheme is None else None)


def test_what_does_not_fit():
    for scheme in ("w4a8", "w8a16", lk.QuantScheme(4, 32, True, "int8")):
        with pytest.raises(ValueError, match=r"SparseLinear: scheme is .*; allowed: None, .*'w5a8', 'w4a16', or such"):
            SparseLinear(40, 30, 3, scheme=scheme)
    bad = pruned()
    with torch.no_grad():
        bad.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        SparseLinear.from_linear(bad, scheme="w4a16")
    layer = SparseLinear.from_linear(pruned(), scheme="w4a16")
    layer.weight_compressed = layer.weight_compressed[1:].clone()
    with pytest.raises(ValueError, match="weight_compressed has 179 bytes; allowed: 180, two values each for the 360"):
        layer(torch.randn(1, 40))


def test_a_convolution_is_the_sparse_linear_of_its_rows(tmp_path):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 19, 3, padding=1)
    lk.prune_(nn.Sequential(conv), 0.7)
    layer = SparseConv2d.from_conv(conv, scheme="w4a16")
    linear = nn.Linear(45, 19)
    linear.weight = nn.Parameter(rows_of_weight(conv.weight.detach()))
    assert torch.equal(rows_of_weight(layer.weight), QuantLinear.from_linear(linear, "w4a16").weight)
    x = torch.randn(2, 5, 6, 7)
    want = nn.functional.conv2d(x, layer.weight, conv.bias, padding=1)
    torch.testing.assert_close(layer(x), want, rtol=1e-3, atol=1e-3)
    lk.save(nn.Sequential(layer), tmp_path / "a")
    loaded = lk.load(tmp_path / "a", nn.Sequential(nn.Conv2d(5, 19, 3)))
    assert torch.equal(loaded(x), layer(x))


def test_sparsify_knows_sparse_4_bit_layers(monkeypatch):
    seen = []

    def in_turn(candidates, x):
        seen.append({name: type(layer).__name__ for name, layer in candidates.items()})
        return {name: 1.0 if name == "sparse w4a16" else 2.0 for name in candidates}

    monkeypatch.setattr("lepton_kernels.sparse.sparsify._in_turn", in_turn)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 7))
    lk.prune_(model, 0.8)
    scheme = lk.QuantScheme.of("w4a16", 32)
    report = sparsify_(model, scheme=scheme, rows=(64,), example=torch.randn(1, 3, 5, 5))
    assert seen == [
        {"dense": "Conv2d", "sparse": "SparseConv2d", "sparse w4a16": "SparseConv2d"},
        {"dense": "Linear", "sparse": "SparseLinear", "w4a16": "QuantLinear", "sparse w4a16": "SparseLinear"},
    ]
    assert [row.chosen for row in report.rows] == ["sparse w4a16"] * 2
    assert isinstance(model[2], SparseLinear)
    assert model[2].scheme == scheme
    assert model[0].product.scheme == scheme
