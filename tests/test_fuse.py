"""lk.fuse_ and layers with an activation: a fused model computes what it did, and stays a torch module."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import lepton_kernels as lk
from lepton_kernels.nn import FusedFeedForward, FusedResidualNorm, QuantLinear
from lepton_kernels.nn.fused import FusedActivation, activation_name

ACTIVATIONS = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}
SCHEMES = ["w8a8", "w8a16", "w4a8", "w4a16"]


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    """Whether got is want to a relative error; both of one dtype and shape."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    error = (got.float() - want.float()).norm() / want.float().norm()
    return bool(error <= tolerance)


def mlp(activation: nn.Module, scheme: str = "w8a8") -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(70, 130), activation, nn.Linear(130, 33, bias=False)).eval()
    lk.quantize_(model, scheme)
    return model


@pytest.fixture(scope="module")
def bert_float(bert_config):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertModel(bert_config, add_pooling_layer=False).eval()
    for name, parameter in model.named_parameters():  # a fresh model's biases and layer norms are zeros and ones
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.1)
    return model


@pytest.fixture(params=SCHEMES)
def berts(bert_float, request):
    """(unfused, fused) of one scheme."""
    plain = copy.deepcopy(bert_float)
    lk.quantize_(plain, request.param)
    fused = copy.deepcopy(plain)
    lk.fuse_(fused)
    return plain, fused


IDS = torch.arange(3 * 21).view(3, 21) % 100


def hidden(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).last_hidden_state


# Sequences


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_in_a_sequence_becomes_the_layers_own(name, scheme, rng):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = mlp(ACTIVATIONS[name](), scheme)
        x = torch.randn(2, 9, 70, generator=rng).to(dtype)
        with torch.inference_mode():
            want = model(x)
            report = lk.fuse_(model)
            got = model(x)
        assert report.rows == [("0", f"linear + {name}", 1)]
        assert model[0].activation == name
        assert isinstance(model[1], FusedActivation)
        # A value on a rounding boundary of the second layer's grid may fall to its other side; half types round less.
        assert close(got, want, 2e-3 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps)


def test_an_activation_that_writes_in_place_is_recognized(rng):
    for module in (nn.ReLU(inplace=True), nn.SiLU(inplace=True)):
        model = mlp(module)
        x = torch.randn(5, 70, generator=rng)
        want = model(x)
        lk.fuse_(model)
        assert isinstance(model[1], FusedActivation)
        assert close(model(x), want, 2e-3)


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU6(), nn.Hardtanh(0, 50), nn.LeakyReLU(), nn.Tanh(), nn.Sigmoid(), nn.Softmax(-1), nn.PReLU(), nn.Dropout(),
     nn.Hardtanh(-50, 50), nn.Identity()],
    ids=str,
)  # fmt: skip
def test_what_is_no_activation_of_ours_stays(activation):
    model = mlp(activation)
    with pytest.raises(ValueError, match="fuse_: nothing to fuse in Sequential"):
        lk.fuse_(model)
    assert model[1] is activation
    assert model[0].activation == "none"


def test_the_probe_knows_all_names_and_ignores_torchs_defaults():
    functions = {**{name: make() for name, make in ACTIVATIONS.items()}, "none": nn.Identity()}
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            assert {name: activation_name(function) for name, function in functions.items()} == {
                n: n for n in functions
            }
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert activation_name(nn.functional.relu) == "relu"


def test_a_layer_that_stands_twice_in_a_sequence_keeps_its_activation_outside(rng):
    torch.manual_seed(0)
    layer, other = nn.Linear(40, 40), nn.Linear(40, 40)
    x = torch.randn(4, 40, generator=rng)
    for model in (nn.Sequential(layer, nn.ReLU(), layer), nn.Sequential(layer, other, layer, nn.ReLU())):
        model = copy.deepcopy(model)
        lk.quantize_(model, "w8a8")
        want = model(x)
        with pytest.raises(ValueError, match="the layer stands in several places"):
            lk.fuse_(model)
        assert torch.equal(model(x), want)


def test_a_layer_with_a_hook_is_left_alone(rng):
    model = mlp(nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(float(output.min())))
    with pytest.raises(ValueError, match="0: it has hooks"):
        lk.fuse_(model)
    model(torch.randn(3, 70, generator=rng))
    assert seen[0] < 0


# Siblings


class Attention(nn.Module):
    """The projections of an attention layer, concatenated: `other` is what key and value get, or None for x."""

    def __init__(self, k: int = 48, sizes: tuple[int, int, int] = (48, 48, 48), bias: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(k, n, bias=bias) for n in sizes)

    def forward(self, x, other=None):
        other = x if other is None else other
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(other)], -1)


def attentions(scheme: str = "w8a8", **options):
    torch.manual_seed(1)
    plain = Attention(**options)
    lk.quantize_(plain, scheme)
    fused = copy.deepcopy(plain)
    report = lk.fuse_(fused)
    assert [row[2] for row in report.rows] == [3]
    return plain, fused


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sizes", [(48, 48, 48), (64, 16, 16), (33, 7, 90)])
@pytest.mark.parametrize("bias", [True, False])
def test_siblings_of_one_input(scheme, sizes, bias, rng):
    plain, fused = attentions(scheme, sizes=sizes, bias=bias)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for m in (1, 5, 40):
            x = torch.randn(m, 48, generator=rng)
            with mode():
                # Float products of the avx2 level depend on what stands beside a column, by roundings.
                assert torch.equal(fused(x), plain(x)) if scheme.endswith("a8") else close(fused(x), plain(x), 1e-6)
    assert fused.q_proj._shared is not None
    assert fused(torch.empty(0, 48)).shape == (0, sum(sizes))


def test_siblings_may_differ_in_bits_and_steps_but_not_in_the_kernel(rng):
    torch.manual_seed(1)
    plain = Attention()
    for name, scheme, step in (("q_proj", "w8a8", 0.1), ("k_proj", "w6a8", 0.0), ("v_proj", "w8a8", 0.3)):
        lk.quantize_(plain, scheme, step=step, include=[name])
    fused = copy.deepcopy(plain)
    assert [row[2] for row in lk.fuse_(fused).rows] == [3]
    for m in (1, 40, 200):
        x = torch.randn(m, 48, generator=rng)
        with torch.inference_mode():
            assert torch.equal(fused(x), plain(x))
    assert fused.q_proj._shared is not None
    for schemes in (("w8a8", "w8a8", "w8a16"), ("w8a8", "w8a8", "w4a8")):
        other = Attention()
        for name, scheme in zip(("q_proj", "k_proj", "v_proj"), schemes, strict=True):
            lk.quantize_(other, scheme, include=[name])
        assert not lk.fuse_(other, optional=True).rows


def test_siblings_of_other_inputs_are_right_and_part(rng):
    plain, fused = attentions()
    with torch.inference_mode():
        for _ in range(4):
            x, other = torch.randn(5, 48, generator=rng), torch.randn(5, 48, generator=rng)
            assert torch.equal(fused(x, other), plain(x, other))
        assert fused.q_proj._shared is None
        assert fused.k_proj._shared is None
        assert torch.equal(fused(x), plain(x))


def test_a_change_of_the_input_between_siblings_is_seen(rng):
    plain, fused = attentions()
    x = torch.randn(5, 48, generator=rng)
    with torch.no_grad():
        got, want = [], []
        for model, outputs in ((fused, got), (plain, want)):
            y = x.clone()
            for layer in (model.q_proj, model.k_proj, model.v_proj):
                outputs.append(layer(y))
                y.mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_change_of_a_weight_is_seen(rng):
    plain, fused = attentions()
    x = torch.randn(5, 48, generator=rng)
    with torch.inference_mode():
        fused(x)
    for model in (plain, fused):
        model.k_proj.weight_packed.neg_()
        with torch.no_grad():
            model.v_proj.bias.add_(1)
    assert torch.equal(fused(x), plain(x))
    state = {name: torch.zeros_like(tensor) for name, tensor in plain.state_dict().items() if name.startswith("v_proj")}
    state["v_proj.weight_shape"] = plain.v_proj.weight_shape
    for model in (plain, fused):
        model.load_state_dict(state, strict=False)
    assert torch.equal(fused(x), plain(x))
    assert (fused(x)[:, 96:] == 0).all()


def test_weights_made_in_inference_mode_can_be_loaded_anew(rng):
    with torch.inference_mode():
        plain, fused = attentions()
        x = torch.randn(5, 48, generator=rng)
        fused(x)
        state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
        state["k_proj.weight_packed"].neg_()
        for model in (plain, fused):
            model.load_state_dict(state)
        assert torch.equal(fused(x), plain(x))


def test_one_layer_at_two_places_of_a_group_does_not_share(rng):
    torch.manual_seed(0)
    model = Attention()
    model.v_proj = model.k_proj
    lk.quantize_(model, "w8a8")
    with pytest.raises(ValueError, match="nothing to fuse"):
        lk.fuse_(model)


def test_a_shallow_copy_of_a_sibling_computes_its_own_product(rng):
    plain, fused = attentions()
    x = torch.randn(5, 48, generator=rng)
    assert torch.equal(copy.copy(fused.k_proj)(x), plain.k_proj(x))


def test_threads_that_call_one_model_at_once(berts, rng):
    _, fused = berts
    same = torch.randn(4, 48, generator=rng)
    plain_attention, fused_attention = attentions()
    with torch.inference_mode():
        inputs = [(IDS + i) % 100 for i in range(4)]
        wants = [hidden(fused, ids) for ids in inputs]
        same_want = plain_attention(same)
    fused = copy.deepcopy(fused)  # without tiles: they are made on first use, by all threads
    wrong = []

    def work(i: int) -> None:
        try:
            with torch.inference_mode():
                for _ in range(30):
                    if not torch.equal(hidden(fused, inputs[i]), wants[i]):
                        wrong.append(f"model, thread {i}")
                    if not torch.equal(fused_attention(same), same_want):
                        wrong.append(f"one tensor, thread {i}")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


# Blocks


def test_bert_is_fused_and_computes_what_it_did(berts):
    plain, fused = berts
    layer = fused.encoder.layer[1]
    assert isinstance(layer.attention.output, FusedResidualNorm)
    assert isinstance(layer.output, FusedFeedForward)
    assert layer.attention.self.query._shared is not None
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            for ids in (IDS, IDS[:1, :3], IDS[:1, :1]):
                assert close(hidden(fused, ids), hidden(plain, ids), 3e-3)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_the_report_names_every_part(bert_float):
    model = copy.deepcopy(bert_float)
    lk.quantize_(model, "w8a8")
    report = lk.fuse_(model)
    assert not report.skipped
    assert len(report.rows) == 6
    kinds = {what: layers for _, what, layers in report.rows}
    assert kinds == {"linear + residual + layer norm": 1, "feed-forward + residual + layer norm": 2,
                     "query + key + value of one input": 3}  # fmt: skip
    assert all(model.get_submodule(name) for name, _, _ in report.rows)
    assert str(report).count("\n") == 6


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "quick_gelu"])
def test_other_activations_of_bert(activation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
                                     intermediate_size=150, hidden_act=activation)  # fmt: skip
    plain = transformers.BertModel(config, add_pooling_layer=False).eval()
    lk.quantize_(plain, "w8a8")
    fused = copy.deepcopy(plain)
    report = lk.fuse_(fused)
    known = activation != "quick_gelu"
    # Of an activation that we do not have, the half without it is fused all the same.
    assert type(fused.encoder.layer[0].output) is (FusedFeedForward if known else FusedResidualNorm)
    assert bool(report.skipped) != known
    with torch.inference_mode():
        assert close(hidden(fused), hidden(plain), 3e-3)


def test_half_types(bert_float):
    for dtype in (torch.bfloat16, torch.float16):
        plain = copy.deepcopy(bert_float).to(dtype)
        lk.quantize_(plain, "w8a8")
        fused = copy.deepcopy(plain)
        lk.fuse_(fused)
        assert isinstance(fused.encoder.layer[0].output, FusedFeedForward)
        with torch.inference_mode():
            assert close(hidden(fused), hidden(plain), 16 * torch.finfo(dtype).eps)


def test_gradients_are_those_of_the_unfused_model(bert_float, rng):
    plain = copy.deepcopy(bert_float)
    lk.quantize_(plain, "w8a8")
    fused = copy.deepcopy(plain)
    lk.fuse_(fused)
    embedded = torch.randn(2, 7, 64, generator=rng)
    gradients = []
    for model in (plain, fused):
        x = embedded.clone().requires_grad_()
        (model(inputs_embeds=x).last_hidden_state ** 2).sum().backward()
        gradients.append({"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    assert gradients[0].keys() == gradients[1].keys()
    assert {"x", "encoder.layer.0.output.LayerNorm.weight", "encoder.layer.1.output.LayerNorm.bias"} <= gradients[
        0
    ].keys()
    for name, want in gradients[0].items():
        assert close(gradients[1][name], want, 1e-6), name


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_either_parameter_of_the_norm_can_be_trained_alone(bert_float, part, rng):
    model = copy.deepcopy(bert_float).requires_grad_(False)
    lk.quantize_(model, "w8a8")
    lk.fuse_(model)
    block = model.encoder.layer[0].attention.output
    getattr(block.LayerNorm, part).requires_grad_()
    block(torch.randn(3, 64, generator=rng), torch.randn(3, 64, generator=rng)).sum().backward()
    assert getattr(block.LayerNorm, part).grad.abs().sum() > 0


def test_training_mode_and_dropout(bert_float):
    model = copy.deepcopy(bert_float)
    lk.quantize_(model, "w8a8")
    late = copy.deepcopy(model).train()
    report = lk.fuse_(late)
    assert {reason for _, reason in report.skipped} == {"in training mode; call model.eval() first"}
    assert not any(isinstance(module, FusedResidualNorm) for module in late.modules())
    lk.fuse_(model)
    with torch.inference_mode():
        want = hidden(model)
        model.train()
        dropped = hidden(model)
        assert not close(dropped, want, 0.05)
        model.eval()
        assert torch.equal(hidden(model), want)
        for module in model.modules():  # dropout for an estimate of the uncertainty: these alone are put to training
            if isinstance(module, nn.Dropout):
                module.train()
        assert not close(hidden(model), want, 0.05)


def test_a_second_call_finds_nothing_and_changes_nothing(bert_float):
    model = copy.deepcopy(bert_float)
    lk.quantize_(model, "w8a8")
    lk.fuse_(model)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="nothing to fuse in BertModel"):
        lk.fuse_(model)
    assert dict(model.named_modules()) == before


class LookAlike(nn.Module):
    """BERT's names and types, another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = nn.Linear(40, 40), nn.Dropout(), nn.LayerNorm(40)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x))) + residual


class OneInput(LookAlike):
    def forward(self, x):
        return super().forward(x, x)


@pytest.mark.parametrize("kind", [LookAlike, OneInput])
def test_a_look_alike_with_another_formula_is_skipped(kind):
    model = nn.ModuleDict({"part": kind()}).eval()
    lk.quantize_(model, "w8a8")
    with pytest.raises(ValueError, match="part: it computes something else than LayerNorm"):
        lk.fuse_(model)
    assert type(model["part"]) is kind


def test_nothing_to_fuse():
    for model in (nn.Sequential(nn.Linear(8, 8), nn.ReLU()), QuantLinear(8, 8), nn.Identity()):
        with pytest.raises(
            ValueError, match=r"fuse_: nothing to fuse in .* allowed: a model with layers from quantize_"
        ):
            lk.fuse_(model)
        report = lk.fuse_(model, optional=True)
        assert (report.rows, report.skipped) == ([], [])


def test_a_part_that_was_replaced_is_not_passed_by(bert_float, rng):
    model = copy.deepcopy(bert_float)
    lk.quantize_(model, "w8a8")
    lk.fuse_(model)
    layer = model.encoder.layer[0]
    x = torch.randn(40, 64, generator=rng)
    with torch.inference_mode():
        layer.intermediate.dense = layer.intermediate.dense.dequantize()
        want = layer.feed_forward_chunk(x)
        nn.init.normal_(layer.intermediate.dense.weight)
        assert not close(layer.feed_forward_chunk(x), want, 0.05)


# As torch modules


def test_deepcopy_and_pickle(berts):
    _, fused = berts
    with torch.inference_mode():
        want = hidden(fused)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    for model in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(buffer, weights_only=False)):
        layer = model.encoder.layer[0]
        with torch.inference_mode():
            assert torch.equal(hidden(model), want)
        assert layer.attention.self.query._shared is not None
        assert layer.attention.self.query._shared is not fused.encoder.layer[0].attention.self.query._shared
        # A copy is a model of its own, also where a module uses another one's layer.
        for part in (layer.intermediate.dense, layer.attention.self.key):
            part.weight_packed.zero_()
            with torch.inference_mode():
                assert not torch.equal(hidden(model), want)
    with torch.inference_mode():
        assert torch.equal(hidden(fused), want)


def test_a_file_of_a_fused_model_fits_the_float_skeleton(berts, bert_float, tmp_path):
    plain, fused = berts
    lk.save(fused, tmp_path / "fused.safetensors")
    again = lk.load(tmp_path / "fused.safetensors", copy.deepcopy(bert_float))
    with torch.inference_mode():
        assert torch.equal(hidden(again), hidden(plain))
        lk.fuse_(again)
        assert torch.equal(hidden(again), hidden(fused))


def test_a_file_of_a_fused_sequence_fits_the_float_skeleton(tmp_path, rng):
    plain = mlp(nn.GELU())
    fused = copy.deepcopy(plain)
    lk.fuse_(fused)
    lk.save(fused, tmp_path / "a.safetensors")
    skeleton = nn.Sequential(nn.Linear(70, 130), nn.GELU(), nn.Linear(130, 33, bias=False)).eval()
    x = torch.randn(4, 70, generator=rng)
    assert torch.equal(lk.load(tmp_path / "a.safetensors", skeleton)(x), plain(x))


@pytest.mark.parametrize("saved_fused", [True, False])
def test_a_file_can_be_loaded_into_a_fused_model(bert_float, saved_fused, tmp_path, rng):
    torch.manual_seed(9)
    other = copy.deepcopy(bert_float)
    for parameter in other.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    models = [nn.ModuleList([model, nn.Sequential(nn.Linear(64, 90), nn.ReLU(), nn.Linear(90, 5))]) for model in
              (bert_float, other)]  # fmt: skip
    target, source = (copy.deepcopy(model).eval() for model in models)
    for model, scheme in ((target, "w8a8"), (source, "w4a16")):
        lk.quantize_(model, scheme)
    lk.fuse_(target)
    x = torch.randn(3, 64, generator=rng)
    with torch.inference_mode():
        hidden(target[0])
        target[1](x)
        want, want_tail = hidden(source[0]), source[1](x)
    for scheme_of_target in ("w8a8", "w4a16"):  # the file's layers are of another scheme, then of the same
        if scheme_of_target == "w4a16":
            for parameter in source.parameters():
                parameter.data.mul_(1.5)
            with torch.inference_mode():
                want, want_tail = hidden(source[0]), source[1](x)
        file = copy.deepcopy(source)
        if saved_fused:
            lk.fuse_(file)
        lk.save(file, tmp_path / "a.safetensors")
        lk.load(tmp_path / "a.safetensors", target)
        with torch.inference_mode():
            assert close(hidden(target[0]), want, 3e-3)
            assert close(target[1](x), want_tail, 1e-5)
        assert isinstance(target[0].encoder.layer[0].output, FusedFeedForward)


def test_a_layer_with_an_activation_of_its_own_does_not_go_where_one_was_fused(tmp_path):
    model = nn.Sequential(QuantLinear(70, 130, activation="relu"), nn.ReLU(), QuantLinear(130, 33, False))
    lk.save(model, tmp_path / "a.safetensors")
    target = mlp(nn.ReLU())
    lk.fuse_(target)
    with pytest.raises(ValueError, match=r"layer '0' is .*activation"):
        lk.load(tmp_path / "a.safetensors", target)


def test_state_dict_goes_in_and_out(berts):
    plain, fused = berts
    with torch.inference_mode():
        want = hidden(fused)
    state = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
    for tensor in fused.state_dict().values():
        tensor.zero_()
    fused.load_state_dict(state)
    plain.load_state_dict(state)
    with torch.inference_mode():
        assert torch.equal(hidden(fused), want)
        assert close(hidden(plain), want, 3e-3)


def test_meta_device(bert_float):
    model = copy.deepcopy(bert_float)
    lk.quantize_(model, "w8a8")
    lk.fuse_(model)
    with torch.inference_mode():
        want = hidden(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    positions = {name: buffer.clone() for name, buffer in model.named_buffers() if name not in state}
    model.to("meta")
    assert hidden(model, IDS.to("meta")).shape == (3, 21, 64)
    with pytest.raises(RuntimeError, match="meta"):
        model.encoder.layer[0].attention.self.query(torch.randn(4, 64))
    with pytest.raises(RuntimeError, match="meta"):
        model.encoder.layer[0].output(torch.randn(4, 64), torch.randn(4, 64))
    model.load_state_dict(state, assign=True)
    for name, buffer in positions.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer)
    with torch.inference_mode():
        assert torch.equal(hidden(model), want)


def test_blocks_on_the_meta_device_can_not_be_tried(bert_float):
    model = copy.deepcopy(bert_float)
    lk.quantize_(model, "w8a8")
    report = lk.fuse_(model.to("meta"))
    assert {reason for _, reason in report.skipped} == {"on the meta device, where it can not be tried"}
    assert {what for _, what, _ in report.rows} == {"query + key + value of one input"}


def test_compiled(bert_float, rng):
    model = mlp(nn.GELU())
    lk.fuse_(model)
    x = torch.randn(6, 70, generator=rng)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))
    attention = attentions()[1]
    x = torch.randn(6, 48, generator=rng)
    with torch.inference_mode():
        assert torch.equal(torch.compile(attention, fullgraph=True, backend="aot_eager")(x), attention(x))
    bert = copy.deepcopy(bert_float)
    lk.quantize_(bert, "w8a8")
    lk.fuse_(bert)
    layer = bert.encoder.layer[0]
    x = torch.randn(2, 9, 64, generator=rng)
    with torch.inference_mode():
        compiled = torch.compile(layer.feed_forward_chunk, fullgraph=True, backend="aot_eager")
        assert close(compiled(x), layer.feed_forward_chunk(x), 2e-3)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_compiled_layer_with_an_activation_and_its_gradient(scheme, rng):
    layer = QuantLinear.from_linear(nn.Linear(40, 50), scheme, activation="silu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for module in (layer, compiled):
        x = torch.randn(6, 40, generator=rng.manual_seed(1)).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        gradients.append((y.detach(), x.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert close(gradients[1][1], gradients[0][1], 1e-6)


def test_onnx_of_a_fused_model(tmp_path, rng):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = mlp(nn.GELU())
    lk.fuse_(model)
    x = torch.randn(4, 70, generator=rng)
    lk.onnx.export(model, (x,), tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert close(torch.from_numpy(y), model(x), 2e-3)


# QuantLinear(activation=)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_layer_with_an_activation(name, scheme, tmp_path, rng):
    linear = nn.Linear(64, 40)
    plain, layer = QuantLinear.from_linear(linear, scheme), QuantLinear.from_linear(linear, scheme, activation=name)
    x = torch.randn(9, 64, generator=rng)
    assert torch.allclose(layer(x), ACTIVATIONS[name]()(plain(x)), rtol=1e-5, atol=1e-6)
    assert f"activation={name}" in repr(layer)
    assert "activation" not in repr(plain)
    with pytest.raises(ValueError, match=f"activation is '{name}'; allowed: 'none'"):
        layer.dequantize()
    assert layer.state_dict().keys() == plain.state_dict().keys()
    lk.save(nn.Sequential(layer), tmp_path / "a.safetensors")
    again = lk.load(tmp_path / "a.safetensors", nn.Sequential(nn.Linear(64, 40)))
    assert again[0].activation == name
    assert torch.equal(again[0](x), layer(x))
    empty = QuantLinear(64, 40, scheme=scheme, activation=name)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


def test_an_unknown_activation():
    for make in (lambda: QuantLinear(4, 4, activation="tanh"),
                 lambda: QuantLinear.from_linear(nn.Linear(4, 4), activation="tanh")):  # fmt: skip
        with pytest.raises(ValueError, match="activation is 'tanh'; allowed: none, relu, silu, gelu, gelu_tanh"):
            make()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_gradient_through_an_activation(name, scheme, rng):
    """Beside autograd of the float composition; that of quantized activations is taken where those are."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = QuantLinear.from_linear(nn.Linear(64, 40), scheme, activation=name)
        layer.bias.requires_grad_()
        x = torch.randn(3, 9, 64, generator=rng).to(dtype).requires_grad_()
        grad = torch.randn(3, 9, 40, generator=rng).to(dtype)
        layer(x).backward(grad)
        layer.activation = "none"
        with torch.no_grad():
            before = layer(x)
        bias = layer.bias.detach().clone().requires_grad_()
        want_x = x.detach().clone().requires_grad_()
        # The value of the quantized product with the derivative of the float one.
        product = nn.functional.linear(want_x.float(), layer.weight, bias)
        y = before + (product - product.detach()).to(dtype)
        ACTIVATIONS[name]()(y).backward(grad)
        assert close(x.grad, want_x.grad, 1e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps)
        assert close(layer.bias.grad, bias.grad, 1e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps)
