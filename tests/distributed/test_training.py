"""Training forms of compressed layers: they compute what the compressed layer does, train, keep zeros, and go back."""

import copy
import pickle
from functools import partial

import pytest
import torch
from lepton_ai import CompressedModel, LeptonModel
from lepton_ai.compression import Compression, Pruning, Quantization
from lepton_ai.distributed.slicing import rows_of
from lepton_ai.training import (
    MaskedConv2d,
    MaskedEmbedding,
    MaskedLinear,
    MaskedProjection,
    TrainEmbedding,
    TrainLinear,
    compressed_form_,
    train_form_,
)
from operands import float_bound
from torch import Tensor, nn

import lepton_kernels as lk
from lepton_kernels import QuantScheme, reference
from lepton_kernels.nn import QuantEmbedding, QuantLinear, QuantLSTM, SparseConv2d, SparseLinear
from lepton_kernels.pattern import Pattern

N, K = 33, 70  # neither is a multiple of a group, a panel or a byte of mask
SCHEMES = {
    "w8a8": QuantScheme.of("w8a8"),
    "w8a16": QuantScheme.of("w8a16"),
    "w6a8": QuantScheme.of("w6a8"),
    "w8a8 step": QuantScheme(step=0.01),  # a seventh of the root mean square
    "w4a8": QuantScheme.of("w4a8"),
    "w4a16": QuantScheme.of("w4a16"),
    "w4a8 groups": QuantScheme(4, 16, False),
    "w4a8 symmetric": QuantScheme(4, 32, True),
    "w4a16 symmetric row": QuantScheme(4, -1, True, "float"),
}
SLOPE = 1.13  # the steepest that an activation of ours is (gelu)


def linear(pruned: bool = False, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(K, N, bias)
    if pruned:
        lk.prune_(nn.Sequential(layer), 0.5, pattern="2:4")
    return layer


def convolution() -> nn.Conv2d:
    torch.manual_seed(1)
    layer = nn.Conv2d(5, 13, 3, stride=2, padding=1, padding_mode="reflect")
    lk.prune_(nn.Sequential(layer), 0.6)
    return layer


LINEAR = {
    **{name: partial(lambda s: QuantLinear.from_linear(linear(), s), scheme) for name, scheme in SCHEMES.items()},
    **{
        f"{name} pruned": partial(lambda s: QuantLinear.from_linear(linear(True, False), s, "relu"), scheme)
        for name, scheme in SCHEMES.items()
    },
    "sparse": lambda: SparseLinear.from_linear(linear(True), "2:4", activation="silu"),
    "sparse bf16": lambda: SparseLinear.from_linear(linear(True).bfloat16(), "2:4").bfloat16(),
    "sparse w8a8": lambda: SparseLinear.from_linear(linear(True, False), "2:4", "w8a8", "gelu"),
    "sparse w6a8": lambda: SparseLinear.from_linear(linear(True), "2:4", "w6a8"),
    "sparse w8a8 step": lambda: SparseLinear.from_linear(linear(True), "2:4", QuantScheme(step=0.01), "relu"),
    "sparse w4a16": lambda: SparseLinear.from_linear(linear(True), "2:4", "w4a16"),
}
OTHERS = {
    "convolution": lambda: SparseConv2d.from_conv(convolution()),
    "convolution w8a8": lambda: SparseConv2d.from_conv(convolution(), scheme="w8a8", activation="relu"),
    "convolution w5a8 step": lambda: SparseConv2d.from_conv(convolution(), scheme=QuantScheme(5, step=0.02)),
    "pruned linear": lambda: linear(True),
    "pruned linear bf16": lambda: linear(True).bfloat16(),
    "pruned convolution": convolution,
    "embedding": lambda: QuantEmbedding.from_embedding(nn.Embedding(40, 24, padding_idx=3)),
    "embedding bf16": lambda: QuantEmbedding.from_embedding(nn.Embedding(40, 24)).bfloat16(),
}
LAYERS = {**LINEAR, **OTHERS}
PRUNED = [name for name in LAYERS if "embedding" not in name and (name not in SCHEMES)]


def input_of(layer: nn.Module, rng: torch.Generator) -> Tensor:
    if isinstance(layer, (QuantEmbedding, TrainEmbedding)):
        return torch.randint(0, 40, (4, 6), generator=rng)
    convolves = isinstance(layer, (nn.Conv2d, SparseConv2d))
    x = torch.randn((2, 5, 9, 8) if convolves else (2, 5, K), generator=rng)
    first = next((t for t in layer.state_dict().values() if t.is_floating_point()), x)
    return x.bfloat16() if first.dtype is torch.bfloat16 and not isinstance(layer, QuantLinear) else x


def same_bits(got: nn.Module, want: nn.Module) -> bool:
    """Whether two state dicts are equal, dtypes and the bits of floats included."""
    a, b = got.state_dict(), want.state_dict()
    return sorted(a) == sorted(b) and all(
        a[name].dtype == b[name].dtype
        and torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))
        for name in a
    )


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    assert got.dtype == want.dtype
    return bool((got.float() - want.float()).norm() <= tolerance * want.float().norm())


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    """What is masked, by the name of the parameter."""
    return {name.replace("mask", "weight"): ~mask for name, mask in model.named_buffers() if name.endswith("mask")}


def holds(model: nn.Module, zeros: dict[str, Tensor]) -> bool:
    parameters = dict(model.named_parameters())
    return all(bool((parameters[name][mask] == 0).all()) for name, mask in zeros.items())


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, loss, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


# One layer


@pytest.mark.parametrize("name", LAYERS)
def test_there_and_back_is_the_identity(name):
    layer = LAYERS[name]().eval()
    model = train_form_(nn.Sequential(copy.deepcopy(layer)))
    assert not same_bits(model[0], layer)
    assert all(p.requires_grad for p in model.parameters())
    assert compressed_form_(model) is model
    assert type(model[0]) is type(layer)
    assert repr(model[0]) == repr(layer)
    assert not model[0].training
    assert same_bits(model[0], layer)


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_form_computes_what_the_compressed_layer_does(name, rng):
    layer = LINEAR[name]()
    form = train_form_(copy.deepcopy(layer))
    assert type(form) is TrainLinear
    assert torch.equal(form.rounded_weight(), layer.weight.float())
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if name in SCHEMES else (input_of(layer, rng).dtype,)
    for dtype in dtypes:
        x = torch.randn(9, K, generator=rng).to(dtype)
        got, want = form(x), layer(x)
        assert got.dtype == want.dtype
        bits = layer.scheme.weight_bits if isinstance(layer, QuantLinear) else 8
        bound = SLOPE * float_bound(x, layer.weight.float(), dtype, bits)
        assert ((got.float() - want.float()).abs() <= bound).all()
    assert form(torch.empty(0, K)).shape == (0, N)


@pytest.mark.parametrize("name", OTHERS)
def test_other_forms_compute_what_the_compressed_layer_does(name, rng):
    layer = OTHERS[name]()
    x = input_of(layer, rng)
    form = train_form_(copy.deepcopy(layer))
    got, want = form(x), layer(x)
    if isinstance(layer, SparseConv2d):
        assert type(form.product) is TrainLinear
        # k roundings of sums whose terms are below 1 in size, relative to outputs of that order.
        assert close(got, want, layer.product.in_features * 2.0**-23)
    else:
        assert type(form) in (MaskedLinear, MaskedConv2d, TrainEmbedding)
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", LAYERS)
def test_trained_forms_give_the_weights_that_they_computed_with(name, rng):
    layer = LAYERS[name]()
    model = train_form_(nn.Sequential(copy.deepcopy(layer)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))  # zeros too: the mask holds them
    form = copy.deepcopy(model[0])
    compressed_form_(model)
    assert not same_bits(model[0], layer)
    assert [(n, t.shape, t.dtype) for n, t in model[0].state_dict().items()] == [
        (n, t.shape, t.dtype) for n, t in layer.state_dict().items()
    ]
    inner, compressed = (form.product, model[0].product) if isinstance(form, SparseConv2d) else (form, model[0])
    if isinstance(inner, TrainLinear):
        assert torch.equal(inner.rounded_weight(), compressed.weight.float())
        assert (model[0].weight[gone_from(layer)] == 0).all()
    x = input_of(layer, rng)
    with torch.no_grad():
        # bf16 SparseLinear: its bias is rounded to bf16 with the output.
        assert close(model[0](x), form(x), 2.0**-7 if model[0](x).dtype is torch.bfloat16 else 1e-4)


def gone_from(layer):
    """Where a pruned layer has no weight; one that 4 bits round to zero is there, and may become another."""
    if isinstance(layer, SparseLinear):
        return ~reference.unpack_bitmask(layer.weight_bitmask, layer.in_features)
    zeros = layer.weight == 0
    return zeros if float(zeros.float().mean()) > 0.4 else torch.zeros_like(zeros)


@pytest.mark.parametrize("name", LINEAR)
def test_the_gradient_is_that_of_the_dense_layer(name, rng):
    layer = LINEAR[name]()
    form = train_form_(copy.deepcopy(layer))
    x = input_of(layer, rng).requires_grad_()
    y = form(x)
    seed = torch.randn(y.shape, generator=rng).to(y.dtype)
    y.backward(seed)
    dense = x.detach().float()
    quantizes = form.stored.scheme is not None and form.stored.scheme.activation == "int8"
    if quantizes:
        q, scale, zero = reference.quantize_rows(dense.flatten(0, 1))
        dense = ((q - zero[:, None]) * scale[:, None]).view(dense.shape)
    dense.requires_grad_()
    weight = layer.weight.float().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().float().requires_grad_()
    product = nn.functional.linear(dense, weight, bias)
    reference.ACTIVATIONS[form.stored.activation](product).to(x.dtype).backward(seed)
    kept = torch.ones_like(weight, dtype=torch.bool) if form.mask is None else form.mask
    assert torch.equal(form.weight.grad, torch.where(kept, weight.grad, 0))
    assert torch.equal(x.grad, dense.grad.to(x.dtype))
    if bias is not None:
        assert torch.equal(form.bias.grad, bias.grad)
    assert form.weight.grad.count_nonzero() > 0


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("name", PRUNED)
def test_zeros_stay_zero(name, optimizer, rng):
    layer = LAYERS[name]()
    model = train_form_(nn.Sequential(copy.deepcopy(layer)))
    zeros = zeros_of(model)
    assert sum(int(mask.sum()) for mask in zeros.values()) >= 0.45 * layer.weight.numel()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = input_of(layer, rng)
    target = torch.randn(model(x).shape, generator=rng)
    steps(model, optimizer(model.parameters()), lambda: (model(x).float() - target).square().mean(), 20)
    assert holds(model, zeros)
    assert not any(torch.equal(p, start[n]) for n, p in model.named_parameters())
    compressed_form_(model)
    assert (model[0].weight[gone_from(layer)] == 0).all()
    if isinstance(layer, SparseLinear):
        assert model[0].pattern == Pattern.of("2:4")
        assert torch.equal(model[0].weight_bitmask, layer.weight_bitmask)


def test_a_mask_stops_gradients_that_are_not_finite():
    form = train_form_(QuantLinear.from_linear(linear(True)))
    form(torch.ones(1, K)).mul(torch.inf).sum().backward()
    assert (form.weight.grad[~form.mask] == 0).all()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_what_counts_as_pruned(scheme):
    def masked(zeros: float, **options) -> bool:
        layer = linear()
        layer.weight.data[:, : round(zeros * K)] = 0
        return train_form_(QuantLinear.from_linear(layer, scheme), **options).mask is not None

    assert not masked(0)
    assert masked(0.5)
    assert masked(0.2) == (scheme == "w8a8")
    assert not masked(0.5, mask_from=0.8)
    assert masked(0.2, mask_from=0.15)
    assert not masked(1)
    unpruned = nn.Sequential(nn.Linear(8, 8), linear())
    nn.init.zeros_(unpruned[0].weight)
    lk.quantize_(unpruned, scheme, include=["1"])
    assert type(train_form_(unpruned)[0]) is nn.Linear


@pytest.mark.parametrize("name", LAYERS)
def test_as_torch_modules(name, rng):
    layer = LAYERS[name]()
    x = input_of(layer, rng)
    form = train_form_(copy.deepcopy(layer))
    with torch.no_grad():
        next(form.parameters()).mul_(1.3)
        want = form(x)
        fresh = train_form_(copy.deepcopy(layer))
        fresh.load_state_dict(form.state_dict())
        for other in (copy.deepcopy(form), pickle.loads(pickle.dumps(form)), fresh):
            assert torch.equal(other(x), want)
            assert same_bits(compressed_form_(other), compressed_form_(copy.deepcopy(form)))


def test_masters_keep_their_dtype_and_autocast_rounds_only_the_input(rng):
    model = train_form_(nn.Sequential(QuantEmbedding(40, K), QuantLinear.from_linear(linear(), "w4a16"))).bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.arange(4)).dtype == torch.bfloat16
    x = torch.randn(3, K, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        got = model[1](x)
    assert torch.equal(got, model[1](x.bfloat16()))


@pytest.mark.parametrize("name", SCHEMES)
def test_what_training_leaves_alone_keeps_its_grid(name):
    layer = QuantLinear.from_linear(linear(), SCHEMES[name])
    frozen = QuantLinear.from_linear(nn.Linear(8, K), SCHEMES[name])
    model = train_form_(nn.Sequential(copy.deepcopy(frozen), copy.deepcopy(layer)))
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[1].weight[4, 20] += 0.9  # the largest of its group
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    steps(model, optimizer, lambda: model(torch.ones(1, 8)).sum(), 2)
    compressed_form_(model)
    assert same_bits(model[0], frozen)
    size = layer.scheme.group_size if layer.scheme.group_size != -1 else K
    group = torch.zeros(N, K, dtype=torch.bool)
    group[4, 20 // size * size : (20 // size + 1) * size] = True
    assert torch.equal(model[1].weight[~group], layer.weight[~group])
    moved = model[1].weight_scale != layer.weight_scale
    # 0.9 is within 127 steps of 0.01: a row that shares the step keeps it.
    assert moved.nonzero().tolist() == ([] if layer.scheme.step else [[4, 20 // size]])
    # Half a step, also where the grid ends below the largest value, and eight steps of a scale rounded to bf16.
    step = float(model[1].weight_scale[4, 20 // size])
    assert abs(float(model[1].weight[4, 20] - layer.weight[4, 20]) - 0.9) <= step * (0.5 + 2.0**-8 * 8)


# rows_of


@pytest.mark.parametrize("name", [*LINEAR, "pruned linear", "dense"])
def test_rows_are_those_of_the_whole_layer(name, rng):
    layer = {**LAYERS, "dense": linear}[name]()
    form = layer if name == "dense" else train_form_(copy.deepcopy(layer))
    form.weight.requires_grad_(name != "w8a8")
    moved = copy.deepcopy(form)
    with torch.no_grad():
        next(moved.parameters()).add_(0.1 * torch.randn(N, K, generator=rng))
    for whole in (form, moved):
        parts = [rows_of(whole, begin, end) for begin, end in ((0, 10), (10, 11), (11, N))]
        x = input_of(layer, rng)
        got, want = torch.cat([part(x) for part in parts], -1), whole(x)
        assert close(got, want, K * torch.finfo(x.dtype).eps)
        assert all(
            p.requires_grad == q.requires_grad for p, q in zip(parts[0].parameters(), whole.parameters(), strict=True)
        )
        if name == "dense":
            continue
        compressed = [compressed_form_(part) for part in parts]
        whole_weight = compressed_form_(copy.deepcopy(whole)).weight
        assert torch.equal(torch.cat([part.weight for part in compressed]), whole_weight)


def test_rows_that_do_not_exist():
    form = train_form_(QuantLinear.from_linear(linear()))
    for begin, end in ((-1, 3), (4, 4), (0, N + 1)):
        with pytest.raises(ValueError, match=f"rows_of: the range is {begin} to {end}; allowed: at least one of 0 to"):
            rows_of(form, begin, end)
    with pytest.raises(ValueError, match=r"rows_of: module is Conv2d; allowed: Linear, .*TrainLinear"):
        rows_of(nn.Conv2d(1, 1, 1), 0, 1)


# Models


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip


def problem(make, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs of four classes, each around a center of its own."""
    shape = (20,) if make is mlp else (1, 10, 10)
    kinds = torch.randint(0, 4, (256,), generator=generator)
    centers = torch.randn(4, *shape, generator=generator)
    return centers[kinds] + torch.randn(256, *shape, generator=generator), kinds


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
@pytest.mark.parametrize("make", [mlp, cnn])
def test_a_compressed_model_learns(make, scheme, tmp_path, rng):
    torch.manual_seed(0)
    x, kinds = problem(make, rng)
    compressed = LeptonModel(make().eval()).compress(
        Pruning(0.5, pattern="2:4"), Quantization(scheme), Compression("huffman")
    )
    if make is cnn and scheme == "w8a8":
        compressed.model[3] = SparseConv2d.from_conv(compressed.model[3], "2:4", scheme="w8a8")
    before = {name: tensor.clone() for name, tensor in compressed.model.state_dict().items()}
    model = compressed.trainable().train()
    zeros = zeros_of(model)
    assert len(zeros) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in make().modules())
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = steps(model, optimizer, lambda: nn.functional.cross_entropy(model(x), kinds), 30)
    assert losses[-1] < 0.3 * losses[0]
    assert holds(model, zeros)
    assert all(torch.equal(before[name], tensor) for name, tensor in compressed.model.state_dict().items())

    again = compressed.retrained(model)
    assert model.training
    assert again.report().steps[-1] == "trained"
    assert again.report().codec == "huffman"
    assert again.report().bytes_after == sum(t.nbytes for t in again.model.state_dict().values())
    assert [type(module) for module in again.model.modules()] == [type(m) for m in compressed.model.modules()]
    model.eval()
    with torch.inference_mode():
        # A value on a rounding boundary of a layer's grid may fall to its other side.
        assert close(again(x), model(x), 2e-3)
        agree = (again(x).argmax(1) == model(x).argmax(1)).float().mean()
        assert agree >= 0.99
        accuracy = (again(x).argmax(1) == kinds).float().mean()
        assert accuracy > (compressed(x).argmax(1) == kinds).float().mean() + 0.2

    again.save(tmp_path / "a.safetensors")
    loaded = CompressedModel.load(tmp_path / "a.safetensors", make().eval())
    with torch.inference_mode():
        assert torch.equal(loaded(x), again(x))
    assert same_bits(loaded.model, again.model)
    assert loaded.retrained(loaded.trainable()).report().steps == ["trained"]


@pytest.fixture(scope="module")
def bert(bert_config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(bert_config).eval()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_a_fused_transformer_trains_and_is_fused_again(bert, scheme):
    ids = torch.arange(3 * 21).view(3, 21) % 100
    compressed = LeptonModel(bert).compress(Pruning(0.5, pattern="2:4"), Quantization(scheme))
    assert compressed.report().fusion.rows
    model = compressed.trainable()
    zeros = zeros_of(model)
    with torch.inference_mode():
        assert close(model(ids).logits, compressed(ids).logits, 3e-3)
        same = compressed.retrained(model)
        assert same_bits(same.model, compressed.model)
        assert torch.equal(same(ids).logits, compressed(ids).logits)
    assert same.model.bert.encoder.layer[0].attention.self.query._shared is not None

    labels = torch.tensor([0, 1, 1])
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-3)
    losses = steps(model, optimizer, lambda: model(ids, labels=labels).loss, 8)
    assert min(losses[4:]) < losses[0]
    assert len(zeros) == 14
    assert holds(model, zeros)
    assert all(p.grad is not None for p in model.parameters())
    again = compressed.retrained(model)
    assert not again.model.training
    with torch.inference_mode():
        assert close(again(ids).logits, model.eval()(ids).logits, 5e-3)
        assert not torch.equal(again(ids).logits, compressed(ids).logits)


def test_a_layer_at_two_places_stays_one():
    layer = linear()
    layer.weight.data = layer.weight.data[:, :N].contiguous()
    layer.in_features = N
    model = nn.Sequential(layer, nn.Tanh(), layer)
    lk.quantize_(model, "w8a8")
    train_form_(model)
    assert model[0] is model[2]
    assert len(list(model.parameters())) == 2
    compressed_form_(model)
    assert model[0] is model[2]
    assert type(model[0]) is QuantLinear


def test_what_shares_a_pruned_weight_is_masked_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30, bias=False))
    model[2].weight = model[0].weight
    lk.prune_(model, 0.5)
    want = copy.deepcopy(model)
    train_form_(model)
    assert [type(m) for m in model] == [MaskedEmbedding, MaskedLinear, MaskedLinear]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    steps(model, optimizer, lambda: model(torch.arange(30)).square().mean(), 5)
    compressed_form_(model)
    assert [type(m) for m in model] == [nn.Embedding, nn.Linear, nn.Linear]
    assert model[2].weight is model[0].weight
    assert not torch.equal(model[0].weight, want[0].weight)
    assert torch.equal(model[0].weight == 0, want[0].weight == 0)


def test_attention_reads_the_masked_projection(rng):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    compressed = LeptonModel(model).compress(Pruning(0.5), Quantization("w8a8"))
    form = compressed.trainable()
    projection = form.self_attn.out_proj
    assert type(projection) is MaskedProjection
    x = torch.randn(2, 5, 32, generator=rng)
    optimizer = torch.optim.SGD(form.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    steps(form, optimizer, lambda: form(x).square().mean(), 5)
    again = compressed.retrained(form)
    assert type(again.model.self_attn.out_proj) is type(model.self_attn.out_proj)
    before = compressed.model.self_attn.out_proj.weight
    assert torch.equal(again.model.self_attn.out_proj.weight == 0, before == 0)
    assert not torch.equal(again.model.self_attn.out_proj.weight, before)
    with torch.inference_mode():
        assert close(again.model.eval()(x), form.eval()(x), 2e-3)


# Errors


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Reversed(QuantLSTM):
    def forward(self, input, hx=None):
        return super().forward(input.flip(0), hx)


def test_errors_name_the_layer_and_leave_the_model_alone():
    recurrent = nn.Sequential(linear(), Reversed(N, 8))
    lk.quantize_(recurrent, "w8a8")
    with pytest.raises(ValueError, match=r"train_form_: layer '1' is Reversed; allowed: QuantLinear, .* QuantLSTM"):
        train_form_(recurrent)
    assert [type(m) for m in recurrent] == [QuantLinear, Reversed]
    assert type(recurrent[1].ih_l0) is QuantLinear

    subclass = nn.Sequential(linear(True), Doubled(N, N))
    lk.prune_(subclass, 0.5)
    with pytest.raises(
        ValueError, match=r"train_form_: layer '1' is Doubled with 50% zeros to be kept; allowed: nn.Linear"
    ):
        train_form_(subclass)
    assert [type(m) for m in subclass] == [nn.Linear, Doubled]
    with pytest.raises(ValueError, match="train_form_: nothing to train in Sequential; allowed: a compressed model"):
        train_form_(subclass, mask_from=0.9)
    for mask_from in (0, 1.5, -1):
        with pytest.raises(ValueError, match=f"train_form_: mask_from is {mask_from}; allowed: 0 < mask_from <= 1"):
            train_form_(subclass, mask_from=mask_from)
    with pytest.raises(ValueError, match="compressed_form_: nothing to compress in Sequential"):
        compressed_form_(subclass)


def test_a_weight_that_diverged_is_refused_before_anything_changes():
    model = train_form_(nn.Sequential(linear(True), QuantLinear.from_linear(linear())))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight holds NaN or infinity"):
        compressed_form_(model)
    assert [type(m) for m in model] == [MaskedLinear, TrainLinear]


def test_retrained_takes_what_trainable_gave():
    compressed = LeptonModel(mlp().eval()).compress(Quantization("w8a8"))
    wrapped = nn.ModuleDict({"module": compressed.trainable()})
    with pytest.raises(ValueError, match=r"retrained: module differs from the model in \['0.bias'"):
        compressed.retrained(wrapped)
