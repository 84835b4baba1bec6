"""Quantized LSTM, GRU and cells: the reference to the last bit, torch's float layers within a bound, every option."""

import contextlib
import copy
import hashlib
import io
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import lepton_kernels as lk
from lepton_kernels import _ops_recurrent, reference_recurrent
from lepton_kernels.nn.quant_recurrent import REPLACEMENTS, from_float

sys.path.insert(0, str(Path(__file__).parent))
from conftest import ISAS

LAYERS = [nn.LSTM, nn.GRU]
CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell]
# Outputs of layers with torch's initial weights and normal inputs; measured 0.004 to 0.012.
ERROR = 0.03


def relative_error(got, want) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def states_of(hx) -> tuple[torch.Tensor, ...]:
    return hx if isinstance(hx, tuple) else (hx,)


def as_hx(kind: type, states):
    return tuple(states) if kind is nn.LSTM else states[0]


def make(kind: type, *args, seed: int = 0, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    layer = kind(*args, **options).eval()
    return layer, from_float(layer).eval()


@contextlib.contextmanager
def one_thread():
    """Hundreds of small products wait for every thread each: for minutes where another process has one of two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_reference(layer, x, states, batch_sizes=None):
    """What a quantized layer should give, layer by layer, for time-first, batch-first or packed x."""
    directions = 2 if layer.bidirectional else 1
    cell = "lstm" if isinstance(layer, lk.nn.QuantLSTM) else "gru"
    ends = []
    for i in range(layer.num_layers):
        weights = [t for suffix in layer._suffixes(i) for t in layer._direction(suffix) if t is not None]
        h0, c0 = states[0][i * directions :][:directions], states[-1][i * directions :][:directions]
        with one_thread():
            x, *end = reference_recurrent.recurrent(
                cell, x, batch_sizes, h0, c0, weights, layer.bias, layer.batch_first and batch_sizes is None
            )
        ends.append(end[: len(states)])
    return x, tuple(torch.cat(parts) for parts in zip(*ends, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LAYERS), st.integers(1, 40), st.integers(1, 50), st.integers(1, 2), st.booleans(), st.booleans(),
    st.booleans(), st.integers(1, 20), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31),
)  # fmt: skip
def test_the_reference_bit_for_bit(kind, k, hidden, layers, bias, batch_first, both, batch, steps, threads, seed):
    layer = make(
        kind, k, hidden, layers, bias=bias, batch_first=batch_first, bidirectional=both, seed=seed
    )[1]  # fmt: skip
    shape = (layers * (2 if both else 1), batch, hidden)
    x = torch.randn(*((batch, steps) if batch_first else (steps, batch)), k)
    states = [torch.randn(shape) for _ in range(2 if kind is nn.LSTM else 1)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            y, hx = layer(x, as_hx(kind, states))
    finally:
        torch.set_num_threads(before)
    want, ends = by_reference(layer, x, states)
    assert torch.equal(y, want)
    assert all(torch.equal(a, b) for a, b in zip(states_of(hx), ends, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("hidden", "batch", "steps"),
    [(128, 32, 5), (128, 130, 3), (400, 9, 4), (264, 1, 9), (96, 2, 700)],  # the last one: more than one span of steps
)
def test_every_way_of_sharing_the_work_gives_the_reference(kind, hidden, batch, steps, both, threads):
    layer = make(kind, 24, hidden, bidirectional=both)[1]
    x = torch.randn(steps, batch, 24)
    zeros = torch.zeros(2 if both else 1, batch, hidden)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            y, hx = layer(x)
    finally:
        torch.set_num_threads(before)
    want, ends = by_reference(layer, x, [zeros] * len(states_of(hx)))
    assert torch.equal(y, want)
    assert all(torch.equal(a, b) for a, b in zip(states_of(hx), ends, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"num_layers": 2, "bias": False, "batch_first": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_close_to_torchs_float_layer(kind, dtype, options):
    layer, quantized = make(kind, 64, 128, **options)
    x = torch.randn(9, 5, 64).to(dtype)
    with torch.no_grad():
        want, want_hx = layer(x.float())
        y, hx = quantized(x)
    assert y.dtype is dtype
    assert y.shape == want.shape
    assert relative_error(y, want) < ERROR
    for got, end in zip(states_of(hx), states_of(want_hx), strict=True):
        assert got.dtype is dtype
        assert got.shape == end.shape
        assert relative_error(got, end) < ERROR


@pytest.mark.parametrize("kind", LAYERS)
def test_no_less_accurate_than_torchs_dynamic_quantization(kind):
    layer, quantized = make(kind, 128, 128)
    x = torch.randn(32, 8, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {kind})[0]
    with torch.no_grad():
        want = layer(x)[0]
        assert relative_error(quantized(x)[0], want) <= relative_error(theirs(x)[0], want)


def test_the_functions_are_exact_to_a_few_units_in_the_last_place():
    v = torch.cat([torch.linspace(-100, 100, 20001), torch.logspace(-20, 2, 1000), -torch.logspace(-20, 2, 1000)])
    exact = v.double()
    assert (reference_recurrent.sigmoid(v) - exact.sigmoid()).abs().max() < 2e-7
    got = reference_recurrent.tanh(v).double()
    assert ((got - exact.tanh()).abs() / exact.tanh().abs().clamp(min=1e-30)).max() < 3e-7
    got = reference_recurrent.sigmoid_tanh(v, v.flip(0)).double()
    assert (got - exact.sigmoid() * exact.flip(0).tanh()).abs().max() < 3e-7


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences(kind, both):
    layer, quantized = make(kind, 24, 40, 2, bidirectional=both)
    lengths = [3, 7, 1, 7, 4]  # not sorted: states are permuted on the way in and out
    sequences = [torch.randn(n, 24) for n in lengths]
    states = [torch.randn(4 if both else 2, 5, 40) for _ in range(2 if kind is nn.LSTM else 1)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    with torch.no_grad():
        want, want_hx = layer(packed, as_hx(kind, states))
        y, hx = quantized(packed, as_hx(kind, states))
        assert isinstance(y, PackedSequence)
        assert torch.equal(y.batch_sizes, want.batch_sizes)
        assert torch.equal(y.unsorted_indices, want.unsorted_indices)
        assert relative_error(y.data, want.data) < ERROR
        for got, end in zip(states_of(hx), states_of(want_hx), strict=True):
            assert relative_error(got, end) < ERROR
        # A sequence's results do not depend on those it is packed with.
        unpacked = nn.utils.rnn.unpack_sequence(y)
        for i, sequence in enumerate(sequences):
            alone, alone_hx = quantized(sequence, as_hx(kind, [state[:, i] for state in states]))
            assert torch.equal(alone, unpacked[i])
            assert all(torch.equal(a, b[:, i]) for a, b in zip(states_of(alone_hx), states_of(hx), strict=True))
        ordered = [state.index_select(1, packed.sorted_indices) for state in states]
        reference, _ = by_reference(quantized, packed.data, ordered, packed.batch_sizes)
        assert torch.equal(y.data, reference)
        padded = pack_padded_sequence(torch.randn(6, 3, 24), torch.tensor([6, 2, 1]))
        assert relative_error(quantized(padded)[0].data, layer(padded)[0].data) < ERROR


@pytest.mark.parametrize("kind", LAYERS)
def test_unbatched_empty_and_strided_inputs(kind):
    layer, quantized = make(kind, 24, 40, batch_first=True)
    x = torch.randn(6, 24)
    with torch.no_grad():
        y, hx = quantized(x)
        batched, batched_hx = quantized(x[None])
        assert torch.equal(y, batched[0])
        assert [s.shape for s in states_of(hx)] == [s.shape for s in states_of(layer(x)[1])]
        assert all(torch.equal(a, b[:, 0]) for a, b in zip(states_of(hx), states_of(batched_hx), strict=True))
        empty, empty_hx = quantized(torch.randn(0, 6, 24))
        assert empty.shape == (0, 6, 40)
        assert all(s.shape == (1, 0, 40) for s in states_of(empty_hx))
        wide = torch.randn(6, 3, 48)
        strided = wide.transpose(0, 1)[..., ::2]
        assert torch.equal(quantized(strided)[0], quantized(strided.contiguous())[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_between_layers_in_training_alone(kind):
    layer = make(kind, 24, 40, 2, dropout=0.5)[1]
    x = torch.randn(6, 3, 24)
    with torch.no_grad():
        assert torch.equal(layer(x)[0], layer(x)[0])
        layer.train()
        torch.manual_seed(1)
        first = layer(x)[0]
        torch.manual_seed(1)
        assert torch.equal(layer(x)[0], first)
        assert not torch.equal(layer(x)[0], first)


@pytest.mark.parametrize("kind", LAYERS)
def test_nan_stays_in_its_sequence(kind):
    layer = make(kind, 24, 40)[1]
    x = torch.randn(6, 3, 24)
    with torch.no_grad():
        clean = layer(x)[0]
        x[2, 1, 5] = torch.nan
        y = layer(x)[0]
    assert y[2:, 1].isnan().all()
    assert torch.equal(y[:, [0, 2]], clean[:, [0, 2]])
    assert torch.equal(y[:2, 1], clean[:2, 1])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, nonlinearity, bias):
    options = {"nonlinearity": nonlinearity} if kind is nn.RNNCell else {}
    cell, quantized = make(kind, 24, 40, bias, **options)
    x, h = torch.randn(5, 24), torch.randn(5, 40)
    hx = (h, torch.randn(5, 40)) if kind is nn.LSTMCell else h
    with torch.no_grad():
        for args in ((x, hx), (x,), (x[0], tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]), (x[0],)):
            want, got = states_of(cell(*args)), states_of(quantized(*args))
            assert [s.shape for s in got] == [s.shape for s in want]
            assert all(relative_error(a, b) < ERROR for a, b in zip(got, want, strict=True))
        again = from_float(quantized.dequantize())
        assert all(torch.equal(a, b) for a, b in zip(states_of(again(x, hx)), states_of(quantized(x, hx)), strict=True))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_state_dict_copies_and_pickles(kind):
    quantized = make(kind, 24, 40)[1]
    x = torch.randn(5, 3, 24) if kind in LAYERS else torch.randn(3, 24)
    suffix = "_l0" if kind in LAYERS else ""
    names = {f"{part}{suffix}.{name}" for part in ("ih", "hh") for name in
             ("weight_packed", "weight_scale", "weight_shape", "bias")}  # fmt: skip

    def results(layer):
        with torch.no_grad():
            return states_of(layer(x))[0]

    want = results(quantized)
    assert set(quantized.state_dict()) == names
    empty = type(quantized)(24, 40)
    empty.load_state_dict(quantized.state_dict())
    meta = type(quantized)(24, 40, device="meta")
    with pytest.raises(RuntimeError, match="the weights are on the meta device"):
        results(meta)
    meta.load_state_dict(quantized.state_dict(), assign=True)
    file = io.BytesIO()
    torch.save(quantized, file)
    file.seek(0)
    for other in (empty, meta, copy.deepcopy(quantized), torch.load(file, weights_only=False),
                  copy.deepcopy(quantized).half().float()):  # fmt: skip
        assert torch.equal(results(other), want)
    with torch.no_grad():
        bias = quantized.get_submodule(f"ih{suffix}").bias
        bias.add_(1.0)  # a change in place is seen
    assert not torch.equal(results(quantized), want)
    assert "scheme=w8a8" in repr(quantized)
    assert type(quantized.dequantize()) is kind


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.lstm = nn.LSTM(24, 40, 2, bidirectional=True, batch_first=True, dropout=0.1)
        self.gru = nn.GRU(80, 32)
        self.cell = nn.RNNCell(32, 16, nonlinearity="relu")
        self.head = nn.Linear(16, 5)

    def forward(self, index):
        self.lstm.flatten_parameters()
        y = self.gru(self.lstm(self.embedding(index))[0])[0]
        return self.head(self.cell(y[:, -1]))


def test_quantize_dynamic_save_and_load(tmp_path):
    torch.manual_seed(0)
    model, index = Tagger().eval(), torch.arange(12).view(3, 4)
    quantized = lk.quantize_dynamic(model, {nn.Linear, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell})
    assert [type(m).__name__ for m in quantized.children()] == [
        "Embedding", "QuantLSTM", "QuantGRU", "QuantRNNCell", "QuantLinear",
    ]  # fmt: skip
    assert type(model.lstm) is nn.LSTM
    assert repr(lk.quantize_dynamic(model)) == repr(quantized)
    only = lk.quantize_dynamic(model, {nn.LSTM})
    assert type(only.lstm) is lk.nn.QuantLSTM
    assert type(only.head) is nn.Linear
    with torch.no_grad():
        want = quantized(index)
        assert relative_error(want, model(index)) < 0.1
        lk.save(quantized, tmp_path / "tagger.safetensors")
        for target in (Tagger(), copy.deepcopy(quantized)):
            again = lk.load(tmp_path / "tagger.safetensors", target.eval())
            assert torch.equal(again(index), want)
    with torch.device("meta"):
        skeleton = Tagger()
    assert torch.equal(lk.load(tmp_path / "tagger.safetensors", skeleton.eval())(index), want)
    wrong = Tagger()
    wrong.lstm = nn.GRU(24, 40, 2, bidirectional=True, batch_first=True)
    with pytest.raises(ValueError, match=r"layer 'lstm' is an nn.LSTM in the file and GRU in the model"):
        lk.load(tmp_path / "tagger.safetensors", wrong)
    with pytest.raises(ValueError, match=r"onnx.export: lstm is a QuantLSTM; allowed: no recurrent layer"):
        lk.onnx.export(quantized, (index,), tmp_path / "tagger.onnx")


def test_quantize_takes_recurrent_layers_where_named():
    model = Tagger()
    assert [row.name for row in lk.quantize_(copy.deepcopy(model)).rows] == ["head"]  # nn.Linear alone by default
    report = lk.quantize_(model, include=[nn.LSTM, "gru"])
    assert [row.name for row in report.rows] == ["lstm", "gru"]
    assert all(row.kernel.startswith("recurrent[") and 0 < row.relative_error < 0.02 for row in report.rows)
    assert report.bytes_after < 0.35 * report.bytes_before
    assert type(model.head) is nn.Linear
    with pytest.raises(ValueError, match=r"recurrent layers have no w4a16 kernel; allowed: w8a8"):
        lk.quantize_(Tagger(), "w4a16", include=[nn.LSTM])
    with pytest.raises(ValueError, match=r"0 \(proj_size is 8; allowed: 0\)"):
        lk.quantize_(nn.Sequential(nn.LSTM(16, 32, proj_size=8)), include=[nn.LSTM])
    tied = nn.Sequential(nn.LSTM(16, 16), nn.LSTM(16, 16))
    tied[1].weight_hh_l0 = tied[0].weight_hh_l0
    with pytest.raises(ValueError, match="its weight is tied to another layer's"):
        lk.quantize_(tied, include=[nn.LSTM])


@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_and_exported(kind):
    layer = make(kind, 24, 40, 2, bidirectional=True)[1]
    x = torch.randn(6, 3, 24)
    with torch.no_grad():
        want = layer(x)[0]
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0], want)
        program = torch.export.export(layer, (x,))
        assert any("lepton.recurrent" in str(node.target) for node in program.graph.nodes)
        assert torch.equal(program.module()(x)[0], want)


def test_operator():
    layer = make(nn.LSTM, 24, 40)[1]
    weights = [t.detach() for t in layer._direction("_l0")]
    zeros = torch.zeros(1, 3, 40)
    args = ["lstm", torch.randn(5, 3, 24), None, zeros, zeros, weights, True, False]
    torch.library.opcheck(_ops_recurrent.recurrent, tuple(args))

    def changed(index, value):
        return _ops_recurrent.recurrent(*(value if i == index else arg for i, arg in enumerate(args)))

    for index, value, message in (
        (0, "elman", "cell is 'elman'; allowed: lstm, gru, rnn_tanh, rnn_relu"),
        (1, torch.randn(5, 3, 23), r"x has shape \(5, 3, 23\); allowed: a last dimension of 24"),
        (1, torch.randn(5, 3, 24).double(), r"x is torch.float64 .*; allowed: float32, 3-D"),
        (3, torch.zeros(1, 2, 40), r"h0 is .*\(1, 2, 40\)\); allowed: float32 \(1, 3, 40\)"),
        (4, None, "c0 is None with cell 'lstm'"),
        (5, weights[:5], "weights holds 5 tensors; allowed: 6 or 12"),
    ):
        with pytest.raises(ValueError, match=message):
            changed(index, value)
    rows = torch.randn(5, 24)
    for sizes in ([3, 3], [2, 3], [3, 2, 0], [4, 1]):
        with pytest.raises(ValueError, match=r"batch_sizes is|h0 has shape"):
            _ops_recurrent.recurrent("lstm", rows, torch.tensor(sizes), zeros, zeros, weights, True, False)


def test_backward_raises():
    layer = make(nn.GRU, 24, 40)[1]
    x = torch.randn(5, 3, 24, requires_grad=True)
    y = layer(x)[0]
    with torch.no_grad():
        assert torch.equal(y, layer(x)[0])
    with pytest.raises(RuntimeError, match=r"a quantized recurrent layer \(gru\) has no gradient"):
        y.sum().backward()


def test_bad_arguments_are_named():
    lstm = make(nn.LSTM, 24, 40)[1]
    x, h = torch.randn(5, 3, 24), torch.zeros(1, 3, 40)
    for call, error, message in (
        (
            lambda: lstm(torch.randn(5, 3, 25)),
            ValueError,
            r"input has shape \(5, 3, 25\); allowed: \[steps, batch, 24\]",
        ),
        (lambda: lstm(x.double()), ValueError, "input has dtype torch.float64; allowed: float32, bfloat16, float16"),
        (lambda: lstm([1, 2]), TypeError, "input is list; allowed: a tensor"),
        (lambda: lstm(torch.randn(0, 3, 24)), ValueError, "input has no time step; allowed: one or more"),
        (lambda: lstm(x, h), TypeError, r"hx is Tensor; allowed: \(h_0, c_0\) or None"),
        (lambda: lstm(x, (h, h[:, :2])), ValueError, r"c_0 is torch.float32 \(1, 2, 40\).*allowed: .*\(1, 3, 40\)"),
        (lambda: lstm(x, (h.half(), h)), ValueError, r"h_0 is torch.float16 .*; allowed: torch.float32"),
        (
            lambda: lstm(PackedSequence(torch.randn(5, 24), torch.tensor([3, 30]))),
            ValueError,
            r"batch_sizes is \[3, 30\]; allowed: positive, not rising, 5 in all",
        ),
        (
            lambda: lstm(PackedSequence(torch.randn(5, 24), torch.tensor([3, 2], dtype=torch.int32))),
            ValueError,
            r"batch_sizes is torch.int32 \(2,\) on cpu; allowed: int64 \[steps\]",
        ),
        (lambda: lk.nn.QuantLSTM(24, 40, proj_size=8), ValueError, "proj_size is 8; allowed: 0"),
        (lambda: lk.nn.QuantLSTM(24, 0), ValueError, "hidden_size is 0; allowed: 1 or more"),
        (lambda: lk.nn.QuantGRU(24, 40, num_layers=0), ValueError, "num_layers is 0; allowed: 1 or more"),
        (lambda: lk.nn.QuantGRU(24, 40, dropout=2), ValueError, "dropout is 2; allowed: 0 to 1"),
        (lambda: lk.nn.QuantRNNCell(24, 40, nonlinearity="gelu"), ValueError, "'gelu'; allowed: 'tanh', 'relu'"),
        (lambda: lk.nn.QuantLSTM.from_lstm(nn.GRU(2, 3)), TypeError, "got GRU; allowed: nn.LSTM"),
        (lambda: lk.nn.QuantLSTM.from_lstm(nn.LSTM(2, 3, proj_size=2)), ValueError, "proj_size is 2; allowed: 0"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_forked_child_can_call_it(run_python):
    program = """
import os, warnings, torch, lepton_kernels as lk
layer = lk.nn.QuantLSTM.from_lstm(torch.nn.LSTM(64, 256))
x = torch.randn(4, 16, 64)
with torch.no_grad():
    want = layer(x)[0]
    warnings.simplefilter("ignore")
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(layer(x)[0], want) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run_python(program) == "0\n"


def digest() -> str:
    """A hash of the results of every layer and cell on drawn inputs."""
    found = hashlib.sha256()
    torch.manual_seed(3)
    with torch.no_grad():
        for kind in REPLACEMENTS:
            for hidden in (40, 128):
                layer = from_float(kind(24, hidden))
                for scale in (1.0, 100.0):  # the second one saturates the gates
                    x = scale * (torch.randn(7, 9, 24) if kind in LAYERS else torch.randn(9, 24))
                    for tensor in states_of(layer(x)):
                        for part in states_of(tensor):
                            found.update(part.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("isa", ISAS)
def test_every_level_gives_the_same_bits(isa, run_python):
    folder = str(Path(__file__).parent)
    program = f"import sys; sys.path.insert(0, {folder!r}); import test_recurrent; print(test_recurrent.digest())"
    assert run_python(program, LEPTON_MAX_ISA=isa).strip() == digest()
