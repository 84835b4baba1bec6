"""quantize_, QuantLinear and QuantEmbedding as torch modules: saving, copying, compiling, selecting, refusing."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lepton_kernels as lk
from lepton_kernels import _ops, reference

SCHEMES = ["w8a8", "w8a16", "w4a8", "w4a16", "w6a8"]


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(200, 96), nn.GELU(), nn.Linear(96, 50, bias=False)).eval()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_replaces_every_linear_and_reports(scheme):
    model = small_model()
    x = torch.randn(5, 200)
    want = model(x)
    report = lk.quantize_(model, scheme)
    assert [row.name for row in report.rows] == ["0", "2"]
    assert all(row.kernel and not row.skipped and 0 < row.relative_error < 0.15 for row in report.rows)
    assert report.bytes_after < report.bytes_before / (5.5 if scheme.startswith("w4") else 3.5)
    error = (model(x) - want).norm() / want.norm()
    assert error < (0.2 if scheme.startswith("w4") else 0.03)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_output_is_near_the_dequantized_layer(scheme):
    layer = lk.nn.QuantLinear.from_linear(nn.Linear(130, 40), scheme)
    x = torch.randn(2, 3, 130)
    want = layer.dequantize()(x)
    assert (layer(x) - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("scheme", SCHEMES)
def test_save_load_copy_pickle_give_the_same_bits(scheme):
    layer = lk.nn.QuantLinear.from_linear(nn.Linear(70, 33), scheme)
    x = torch.randn(4, 70)
    want = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    empty = lk.nn.QuantLinear(70, 33, scheme=scheme)
    empty(x)  # tiles made before loading must not survive it
    empty.load_state_dict(state)
    meta = lk.nn.QuantLinear(70, 33, scheme=scheme, device="meta")
    meta.load_state_dict(state, assign=True)
    for other in (empty, meta, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)


def test_changing_the_dtype_changes_no_stored_bit():
    layer = lk.nn.QuantLinear.from_linear(nn.Linear(70, 33), "w4a16")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.half().float().to(torch.bfloat16)
    for name, value in layer.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_in_and_out_up_to_the_largest_half(dtype, scheme):
    layer = lk.nn.QuantLinear.from_linear(nn.Linear(64, 32), scheme)
    x = (torch.rand(3, 64) * 2 - 1).to(dtype)
    x[0, 0] = 6e4
    y = layer(x)
    assert y.dtype == dtype
    assert y.isfinite().all()
    want = x.double() @ layer.weight.double().T
    assert (y.double() - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_chooses_the_dtype_as_for_linear(scheme):
    linear = nn.Linear(64, 32)
    layer = lk.nn.QuantLinear.from_linear(linear, scheme)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == linear(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_to_the_input_is_the_dequantized_layers(scheme):
    layer = lk.nn.QuantLinear.from_linear(nn.Linear(64, 32), scheme)
    x = torch.randn(3, 64, requires_grad=True)
    upstream = torch.randn(3, 32)
    (layer(x) * upstream).sum().backward()
    assert torch.allclose(x.grad, upstream @ layer.weight, atol=1e-4)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_export_keeps_one_operator(scheme):
    model = small_model()
    lk.quantize_(model, scheme)
    x = torch.randn(5, 200)
    exported = torch.export.export(model, (x,))
    assert sum("lepton" in str(node.target) for node in exported.graph.nodes) == 2
    assert torch.equal(exported.module()(x), model(x))


def test_compile_without_a_graph_break():
    model = small_model()
    lk.quantize_(model, "w8a8")
    x = torch.randn(5, 200)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_operators_satisfy_torchs_checks():
    x = torch.randn(3, 40, requires_grad=True)
    weight = torch.randint(-127, 128, (20, 40), dtype=torch.int8)
    torch.library.opcheck(_ops.gemm_int8, (x, weight, torch.rand(20, 1), torch.randn(20), True))
    packed = reference.pack_int4(torch.randint(-8, 8, (20, 40), dtype=torch.int8))
    torch.library.opcheck(_ops.gemm_int4, (x, packed, torch.rand(20, 3).bfloat16(), None, None, 16, False))


def test_embedding_only_where_named():
    model = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 8))
    index = torch.randint(0, 100, (4, 7))
    want = model(index)
    lk.quantize_(model, "w8a8", include=[nn.Embedding, nn.Linear])
    assert isinstance(model[0], lk.nn.QuantEmbedding)
    assert (model(index) - want).norm() / want.norm() < 0.03


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_bits_are_a_grid_and_the_error_a_half_step_of_it(bits, tmp_path):
    model = nn.Sequential(nn.Embedding(100, 33), nn.Linear(33, 17)).eval()
    before = [part.weight.detach().clone() for part in model]
    report = lk.quantize_(model, f"w{bits}a16", include=[nn.Embedding, nn.Linear])
    assert [row.scheme for row in report.rows] == [f"int{bits}", f"w{bits}a16"]
    limit = 2 ** (bits - 1) - 1
    for part, weight in zip(model, before, strict=True):
        assert part.weight_packed.abs().amax(1).eq(limit).all()
        half_step = weight.abs().amax(1, keepdim=True) / limit / 2
        assert ((part.weight - weight).abs() <= half_step * (1 + 1e-5)).all()
    lk.save(model, tmp_path / "a.safetensors")
    fresh = lk.load(tmp_path / "a.safetensors", model=nn.Sequential(nn.Embedding(100, 33), nn.Linear(33, 17)).eval())
    assert (fresh[0].weight_bits, fresh[1].scheme.weight_bits) == (bits, bits)
    index = torch.randint(0, 100, (4, 7))
    assert torch.equal(fresh(index), model(index))


@pytest.mark.parametrize("scheme", ["w8a8", "w6a16"])
def test_rows_share_a_step_and_the_file_is_smaller(scheme, tmp_path):
    def fresh() -> nn.Module:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Embedding(300, 65), nn.Linear(65, 130)).eval()
        with torch.no_grad():
            for part in model:  # rows of which some need a coarser grid than the step, and one of zeros
                part.weight.normal_().mul_(torch.linspace(0.0, 4.0, len(part.weight))[:, None])
        return model

    plain, coarse = fresh(), fresh()
    before = [part.weight.detach().clone() for part in coarse]
    lk.quantize_(plain, scheme, include=[nn.Embedding, nn.Linear])
    lk.quantize_(coarse, scheme, step=0.1, include=[nn.Embedding, nn.Linear])
    limit = lk.QuantScheme.of(scheme).limit
    for part, weight in zip(coarse, before, strict=True):
        step = 0.1 * weight.square().mean().sqrt()
        least = (weight.abs().amax(1, keepdim=True) / limit).clamp(min=step)
        torch.testing.assert_close(part.weight_scale, least)
        assert ((part.weight - weight).abs() <= part.weight_scale / 2 * (1 + 1e-5)).all()
    for name, model in (("plain", plain), ("coarse", coarse)):
        lk.save(model, tmp_path / name)
    assert (tmp_path / "coarse").stat().st_size < (tmp_path / "plain").stat().st_size
    loaded = lk.load(tmp_path / "coarse", model=fresh())
    assert (loaded[0].step, loaded[1].scheme) == (coarse[0].step, coarse[1].scheme)
    assert loaded[0].step > 0
    index = torch.randint(0, 300, (4, 7))
    assert torch.equal(loaded(index), coarse(index))


def test_bad_steps_are_refused():
    model = nn.Sequential(nn.Linear(32, 16), nn.LSTM(8, 8))
    for step in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"step is .* with w8a8; allowed: a finite number, 0 or more"):
            lk.quantize_(model, "w8a8", step=step)
        with pytest.raises(ValueError, match=r"QuantScheme: step is .*; allowed: a finite number"):
            lk.QuantScheme(step=step)
    with pytest.raises(ValueError, match=r"step is 0.1 with w4a16; allowed: 0 at 4 bits"):
        lk.quantize_(model, "w4a16", step=0.1)
    with pytest.raises(ValueError, match=r"QuantScheme: step is 0.1 with 4 bits"):
        lk.QuantScheme(4, 32, step=0.1)
    with pytest.raises(ValueError, match=r"step is 0.1 and the scheme's own 0.2"):
        lk.quantize_(model, lk.QuantScheme(step=0.2), step=0.1)
    report = lk.quantize_(model, "w8a8", step=0.1, include=[nn.Linear, nn.LSTM])
    assert [row.skipped for row in report.rows] == [None, "recurrent layers have a scale for each row; step is 0.1"]


@pytest.mark.parametrize("scheme", ["w3a8", "w9a8", "w8a4", "w6", "int8"])
def test_unknown_schemes_are_refused(scheme):
    with pytest.raises(ValueError, match=r"scheme is .*; allowed: 'w8a8'"):
        lk.QuantScheme.of(scheme)


def test_selection_errors_name_what_matches_nothing():
    with pytest.raises(ValueError, match="exclude holds 'lm_head'"):
        lk.quantize_(small_model(), exclude=["lm_head"])
    with pytest.raises(ValueError, match="nothing to quantize"):
        lk.quantize_(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="strict=True"):
        lk.quantize_(small_model(), exclude=["2"], strict=True)
    report = lk.quantize_(model := small_model(), exclude=["2"])
    assert report.rows[1].skipped == "excluded"
    assert isinstance(model[2], nn.Linear)


def test_transformer_encoder_still_runs_and_attention_is_left_alone():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        want = layer(x)
        report = lk.quantize_(layer, "w8a8")
        assert [row.name for row in report.rows if row.skipped] == ["self_attn.out_proj"]
        assert (layer(x) - want).norm() / want.norm() < 0.03


def test_tied_weights_are_skipped_and_nan_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="tied"):
        lk.quantize_(model)
    bad = nn.Linear(16, 16)
    bad.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        lk.nn.QuantLinear.from_linear(bad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lk.QuantScheme.of("w3a8"), "scheme is 'w3a8'; allowed"),
        (lambda: lk.QuantScheme(4, group_size=20), "group_size is 20; allowed: a multiple of 16"),
        (lambda: lk.nn.QuantLinear(8, 4)(torch.randn(2, 9)), r"x has shape \(2, 9\); allowed: \[..., 8\]"),
        (lambda: lk.nn.QuantLinear(8, 4)(torch.zeros(2, 8, dtype=torch.int32)), "x has dtype torch.int32; allowed"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_import_prints_nothing_and_needs_no_torch(run_python):
    out = run_python("import sys, lepton_kernels; from lepton_kernels._runtime import C; print('torch' in sys.modules)")
    assert out == "False\n"


def test_a_forked_child_can_multiply(run_python):
    program = """
import os, warnings, torch
import lepton_kernels as lk
layer = lk.nn.QuantLinear.from_linear(torch.nn.Linear(512, 512))
x = torch.randn(64, 512)
want = layer(x)
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    os._exit(0 if torch.equal(layer(x), want) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run_python(program) == "0\n"


@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_run_on_the_threads_of_torch_and_start_no_others(run_python, threads):
    program = f"""
import os, torch
import lepton_kernels as lk
torch.set_num_threads({threads})
layer = lk.nn.QuantLinear.from_linear(torch.nn.Linear(2048, 2048))
x = torch.randn(256, 2048)
x @ x.T + 1
before = len(os.listdir("/proc/self/task"))
layer(x)
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert run_python(program) == "0\n"


def test_affinity_limits_the_threads(run_python):
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert run_python(program + "from lepton_kernels._runtime import C; print(C.default_threads())") == "1\n"


def test_one_openmp_runtime_in_either_order(run_python):
    ours, theirs = "from lepton_kernels._runtime import C", "import torch"
    count = "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}))"
    for first, second in ((ours, theirs), (theirs, ours)):
        assert run_python(f"{first}\n{second}\n{count}") == "1\n"


def test_backends_names_what_serves_each_scheme():
    found = lk.backends()
    assert set(found["cpu"]) == {"w8a8", "w8a16", "w4a8", "w4a16"}
    assert all(kernel.endswith(f"[{found['isa']}]") for kernel in found["cpu"].values())


def test_quantize_dynamic_keeps_torchs_signature():
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    x = torch.randn(4, 32)
    quantized = lk.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(model[0]) is nn.Linear
    assert type(quantized[0]) is lk.nn.QuantLinear
    assert (quantized(x) - model(x)).norm() / model(x).norm() < 0.05
    assert lk.quantize_dynamic(model, inplace=True) is model
    with pytest.raises(ValueError, match=r"qconfig_spec holds .*Conv2d.*; allowed: nn.Linear, nn.Embedding, nn.LSTM"):
        lk.quantize_dynamic(model, {nn.Conv2d})
    with pytest.raises(ValueError, match=r"nothing to quantize in Sequential: it holds none of nn.LSTM"):
        lk.quantize_dynamic(model, {nn.LSTM})


def test_a_layer_that_stands_twice_in_one_parent(tmp_path):
    layer = nn.Linear(40, 40)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    skeleton = copy.deepcopy(model)
    lk.quantize_(model, "w8a8")
    assert type(model[0]) is lk.nn.QuantLinear
    assert model[2] is model[0]
    lk.save(model, tmp_path / "a.safetensors")
    lk.load(tmp_path / "a.safetensors", skeleton)
    x = torch.randn(3, 40)
    assert skeleton[2] is skeleton[0]
    assert torch.equal(skeleton(x), model(x))
