"""Training forms of recurrent layers: the kernel's bits, the straight-through gradient, and back to the same file."""

import copy
import functools
import pickle

import processes
import pytest
import torch
import torch.distributed as dist
from lepton_ai import CompressedModel, LeptonDistributedModel, LeptonModel
from lepton_ai.compression import Compression, Quantization
from lepton_ai.distributed import DataPartitioner, ModelParallel, SynchronousUpdate
from lepton_ai.distributed.tensor_parallel import ColumnParallel
from lepton_ai.distributed.train_loop import data_parallel
from lepton_ai.training import (
    TrainGRU,
    TrainGRUCell,
    TrainLinear,
    TrainLSTM,
    TrainLSTMCell,
    TrainRNNCell,
    compressed_form_,
    train_form_,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import TensorDataset

from lepton_kernels import reference
from lepton_kernels.nn import QuantLinear
from lepton_kernels.nn.quant_recurrent import from_float

K, HIDDEN, BATCH, STEPS = 11, 19, 5, 7
LAYERS = {nn.LSTM: TrainLSTM, nn.GRU: TrainGRU}
CELLS = {nn.LSTMCell: TrainLSTMCell, nn.GRUCell: TrainGRUCell, nn.RNNCell: TrainRNNCell}
OPTIONS = [
    {},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "batch_first": True, "bidirectional": True},
]


def made(kind: type, **options) -> nn.Module:
    torch.manual_seed(0)
    return from_float(kind(K, HIDDEN, **options))


def moved(layer: nn.Module, rng: torch.Generator) -> nn.Module:
    """A training form whose masters have left the grid that they came from."""
    form = train_form_(copy.deepcopy(layer))
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return form


def tensors(result) -> list[Tensor]:
    """All tensors of a layer's or a cell's result."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors(part)]


def calls(layer: nn.Module, rng: torch.Generator) -> list[tuple]:
    """Arguments of every kind that the layer takes: with states and without, unbatched and packed."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    if type(layer).__name__.endswith("Cell"):
        lstm, shapes = "LSTM" in type(layer).__name__, ((BATCH, HIDDEN), (HIDDEN,))
        states = [(draw(*s), draw(*s)) if lstm else draw(*s) for s in shapes]
        return [(draw(BATCH, K), states[0]), (draw(BATCH, K),), (draw(K), states[1])]
    lstm, rows = "LSTM" in type(layer).__name__, layer.num_layers * (2 if layer.bidirectional else 1)

    def states(*batch: int):
        return tuple(draw(rows, *batch, HIDDEN) for _ in range(2)) if lstm else draw(rows, *batch, HIDDEN)

    x = draw(BATCH, STEPS, K) if layer.batch_first else draw(STEPS, BATCH, K)
    packed = pack_sequence([draw(n, K) for n in (3, 6, 1, 6, 4)], enforce_sorted=False)
    return [(x,), (x, states(BATCH)), (draw(STEPS, K), states()), (packed,), (packed, states(5)), (x[:0],)][
        : None if layer.batch_first else 5
    ]


EVERY = [
    *((kind, options) for kind in LAYERS for options in OPTIONS),
    *((kind, options) for kind in CELLS for options in ({}, {"bias": False})),
    (nn.RNNCell, {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_the_form_gives_the_bits_of_the_kernel(kind, options, rng):
    layer = made(kind, **options)
    form = moved(layer, rng)
    assert type(form) is {**LAYERS, **CELLS}[kind]
    assert all(type(part) is TrainLinear for part in form.children())
    trained = compressed_form_(copy.deepcopy(form))
    assert type(trained) is type(layer)
    assert all(type(part) is QuantLinear for part in trained.children())
    for arguments in calls(layer, rng):
        got, want, before = (tensors(f(*arguments)) for f in (form, trained, layer))
        assert all(t.requires_grad for t in got)
        # Not within a tolerance: the form's forward pass is the kernel's.
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert not got[0].numel() or not torch.equal(got[0], before[0])
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(tensors(form(*arguments)), want, strict=True))


@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_there_and_back_is_the_identity(kind, options):
    layer = made(kind, **options)
    model = train_form_(nn.Sequential(copy.deepcopy(layer)))
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="nothing to train in Sequential"):
        train_form_(model)
    compressed_form_(model)
    assert repr(model[0]) == repr(layer)
    state = model[0].state_dict()
    assert list(state) == list(layer.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in layer.state_dict().items())


# The gradient


def rounded_through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


def product(form: nn.Module, name: str, x: Tensor) -> Tensor:
    """x W^T + b with both rounded, by the definition of w8a8; straight-through to x, W and b."""
    part = form.get_submodule(name)
    with torch.no_grad():
        scale = part.weight.abs().amax(1, keepdim=True) / 127
        rounded = torch.round(part.weight / scale).clamp(-127, 127) * scale
        q, x_scale, zero = reference.quantize_rows(x)
        rows = (q - zero[:, None]) * x_scale[:, None]
    return nn.functional.linear(rounded_through(x, rows), rounded_through(part.weight, rounded), part.bias)


def cell_by_definition(form: nn.Module, name: str, x: Tensor, states: list[Tensor]) -> list[Tensor]:
    """One step of any kind, from the formulas in torch's documentation."""
    a, b = product(form, f"ih{name}", x), product(form, f"hh{name}", states[0])
    if "LSTM" in type(form).__name__:
        i, f, g, o = (a + b).chunk(4, 1)
        c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
        return [torch.sigmoid(o) * torch.tanh(c), c]
    if "GRU" in type(form).__name__:
        r = torch.sigmoid(a[:, :HIDDEN] + b[:, :HIDDEN])
        z = torch.sigmoid(a[:, HIDDEN : 2 * HIDDEN] + b[:, HIDDEN : 2 * HIDDEN])
        return [(1 - z) * torch.tanh(a[:, 2 * HIDDEN :] + r * b[:, 2 * HIDDEN :]) + z * states[0]]
    return [torch.relu(a + b) if form.nonlinearity == "relu" else torch.tanh(a + b)]


def by_definition(form: nn.Module, x: Tensor, states: list[Tensor]) -> Tensor:
    """y [steps, batch, directions * hidden] of an LSTM or GRU, a step at a time."""
    for i, suffixes in enumerate(form._suffixes(layer) for layer in range(form.num_layers)):
        columns = []
        for d, suffix in enumerate(suffixes):
            now, out = [state[i * len(suffixes) + d] for state in states], [x[0]] * len(x)
            for t in range(len(x))[:: -1 if d else 1]:
                now = cell_by_definition(form, suffix, x[t], now)
                out[t] = now[0]
            columns.append(torch.stack(out))
        x = torch.cat(columns, -1)
    return x


def gradients(y: Tensor, seed: Tensor, form: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((y * seed).sum(), [*form.parameters(), *inputs]))


def agree(got: list[Tensor], want: list[Tensor], tolerance: float) -> bool:
    return all(float((a - b).norm()) <= tolerance * float(b.norm()) for a, b in zip(got, want, strict=True))


# Both sides round float32 sums of K or HIDDEN terms a step, of the same bytes; measured 3e-7 at most.
SUMS = 1e-5


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradient_is_straight_through(kind, options, rng):
    form = moved(made(kind, **options), rng)
    rows = form.num_layers * (2 if form.bidirectional else 1)
    x = torch.randn(STEPS, BATCH, K, generator=rng, requires_grad=True)
    states = [torch.randn(rows, BATCH, HIDDEN, generator=rng, requires_grad=True) for _ in range(2)]
    states = states if kind is nn.LSTM else states[:1]
    seed = torch.randn(STEPS, BATCH, HIDDEN * (2 if form.bidirectional else 1), generator=rng)
    y = form(x, tuple(states) if kind is nn.LSTM else states[0])[0]
    want = by_definition(form, x, states)
    assert float((y - want).detach().abs().max()) < SUMS  # no state of these fell to another side of its boundary
    assert agree(gradients(y, seed, form, [x, *states]), gradients(want, seed, form, [x, *states]), SUMS)


@pytest.mark.parametrize(("kind", "options"), [*((kind, {}) for kind in CELLS), (nn.RNNCell, {"nonlinearity": "relu"})])
def test_the_gradient_of_a_cell_is_straight_through(kind, options, rng):
    form = moved(made(kind, **options), rng)
    x = torch.randn(BATCH, K, generator=rng, requires_grad=True)
    states = [torch.randn(BATCH, HIDDEN, generator=rng, requires_grad=True) for _ in range(2)]
    states = states if kind is nn.LSTMCell else states[:1]
    got = torch.stack(tensors(form(x, tuple(states) if kind is nn.LSTMCell else states[0])))
    want = torch.stack(cell_by_definition(form, "", x, states))
    seed = torch.randn(got.shape, generator=rng)
    assert agree(gradients(got, seed, form, [x, *states]), gradients(want, seed, form, [x, *states]), SUMS)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_sequence_has_the_gradient_of_its_parts(kind, rng):
    form = moved(made(kind, num_layers=2, bidirectional=True), rng)
    sequences = [torch.randn(n, K, generator=rng) for n in (3, 6, 1, 6, 4)]
    y, ends = form(pack_sequence(sequences, enforce_sorted=False))
    alone = [form(sequence) for sequence in sequences]
    parts = nn.utils.rnn.unpack_sequence(y)
    assert all(torch.equal(part, one[0]) for part, one in zip(parts, alone, strict=True))
    seeds = [torch.randn(part.shape, generator=rng) for part in parts]

    def loss(outputs, states):
        return sum((a * b).sum() for a, b in zip(outputs, seeds, strict=True)) + sum(s.square().sum() for s in states)

    got = torch.autograd.grad(loss(parts, tensors(ends)), list(form.parameters()))
    lone = loss([one[0] for one in alone], [state for one in alone for state in tensors(one[1])])
    assert agree(got, torch.autograd.grad(lone, list(form.parameters())), SUMS)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradient_is_near_that_of_the_float_layer(kind, rng):
    layer = made(kind, num_layers=2, bidirectional=True)
    form, plain = train_form_(copy.deepcopy(layer)), layer.dequantize()
    x = torch.randn(STEPS, BATCH, K, generator=rng)
    seed = torch.randn(STEPS, BATCH, 2 * HIDDEN, generator=rng)
    got = {
        name: p for name, p in zip(dict(form.named_parameters()), gradients(form(x)[0], seed, form, []), strict=True)
    }
    for name, want in zip(dict(plain.named_parameters()), gradients(plain(x)[0], seed, plain, []), strict=True):
        value, part, suffix = name.split("_", 2)  # weight_ih_l0_reverse
        # Rounding of inputs and states to 255 steps; measured 0.0005 to 0.006.
        assert float((got[f"{part}_{suffix}.{value}"] - want).norm()) < 0.02 * float(want.norm())


# As modules


@pytest.mark.parametrize("kind", LAYERS)
def test_zeros_and_ungridded_masters(kind, rng):
    torch.manual_seed(0)
    plain = kind(K, HIDDEN)
    with torch.no_grad():
        plain.weight_hh_l0[:, ::2] = 0
    layer = from_float(plain)
    model = nn.Sequential(train_form_(copy.deepcopy(layer)))
    assert model[0].hh_l0.mask is not None
    assert model[0].ih_l0.mask is None
    x = torch.randn(STEPS, BATCH, K, generator=rng)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x)[0].square().sum().backward()
        optimizer.step()
    weights = model[0].dequantize()
    assert type(weights) is kind
    compressed_form_(model)
    assert (model[0].hh_l0.weight[:, ::2] == 0).all()
    assert torch.equal(model[0].hh_l0.weight, weights.weight_hh_l0)
    assert not torch.equal(model[0].hh_l0.weight, layer.hh_l0.weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_as_torch_modules(kind, rng):
    layer = made(kind, num_layers=2, dropout=0.5).train()
    form = moved(layer, rng)
    x = torch.randn(STEPS, BATCH, K, generator=rng)
    assert not torch.equal(form(x)[0], form(x)[0])
    torch.manual_seed(3)
    got = form(x)[0]
    torch.manual_seed(3)
    assert torch.equal(compressed_form_(copy.deepcopy(form))(x)[0], got)
    form.eval()
    want = form(x)[0]
    fresh = train_form_(copy.deepcopy(layer)).eval()
    fresh.load_state_dict(form.state_dict())
    for other in (copy.deepcopy(form), pickle.loads(pickle.dumps(form)), fresh, copy.deepcopy(form).half().float()):
        assert torch.equal(other(x)[0], want)
    half = form(x.bfloat16())[0]
    assert half.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(form(x)[0], want)
        assert torch.equal(form(x.bfloat16())[0], half)
    half.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in form.parameters())


def test_errors_are_those_of_the_quantized_layer():
    form = train_form_(made(nn.LSTM))
    x = torch.zeros(STEPS, BATCH, K)
    for call, error, message in (
        (lambda: form(x[..., 1:]), ValueError, r"TrainLSTM: input has shape \(7, 5, 10\); allowed"),
        (lambda: form(x.double()), ValueError, "TrainLSTM: input has dtype torch.float64; allowed: float32"),
        (lambda: form(x[:0]), ValueError, "TrainLSTM: input has no time step; allowed: one or more"),
        (lambda: form(x, (x, x)), ValueError, r"TrainLSTM: h_0 is .* \(7, 5, 11\).*; allowed: .*\(1, 5, 19\)"),
    ):
        with pytest.raises(error, match=message):
            call()
    with torch.no_grad():
        form.hh_l0.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight holds NaN or infinity"):
        compressed_form_(form)
    assert type(form) is TrainLSTM


# Models


class Classifier(nn.Module):
    """Which of four kinds a sequence [batch, steps, K] is."""

    def __init__(self, kind: type = nn.LSTM) -> None:
        super().__init__()
        self.recurrent = kind(K, HIDDEN, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0].mean(1))


def problem(samples: int = 128) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 4, (samples,), generator=generator)
    centers = torch.randn(4, STEPS, K, generator=generator)
    return TensorDataset(centers[kinds] + torch.randn(samples, STEPS, K, generator=generator), kinds)


def compressed(kind: type = nn.LSTM) -> CompressedModel:
    torch.manual_seed(0)
    return LeptonModel(Classifier(kind).eval()).compress(
        Quantization("w8a8", include=[nn.Linear, kind]), Compression("huffman")
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_a_compressed_model_learns(kind, tmp_path):
    x, kinds = problem().tensors
    before = compressed(kind)
    job = LeptonDistributedModel(before, DataPartitioner(problem(), batch_size=32))
    adam = functools.partial(torch.optim.AdamW, lr=0.02)
    report = job.train(nn.functional.cross_entropy, adam, epochs=5)
    assert report.losses[-1] < 0.5 * report.losses[0]
    after = job.model
    assert type(after.model.recurrent) is type(before.model.recurrent)
    with torch.inference_mode():
        right = (after(x).argmax(1) == kinds).float().mean()
        assert right > (before(x).argmax(1) == kinds).float().mean() + 0.2
        after.save(tmp_path / "a.safetensors")
        loaded = CompressedModel.load(tmp_path / "a.safetensors", Classifier(kind).eval())
        assert torch.equal(loaded(x), after(x))
        # The head's product has float sums in training: a unit in the last place for each of its inputs.
        assert torch.allclose(after.trainable()(x), after(x), atol=2 * HIDDEN * 2.0**-23)
        assert torch.equal(after.retrained(after.trainable())(x), after(x))


def check_two_ranks() -> None:
    data, rank = problem(32), dist.get_rank()
    x, kinds = data.tensors
    form, alone = compressed().trainable(), compressed().trainable()
    nn.functional.cross_entropy(alone(x), kinds).backward()
    wrapped, half = data_parallel(form, dist.group.WORLD), slice(16 * rank, 16 * rank + 16)
    nn.functional.cross_entropy(wrapped(x[half]), kinds[half]).backward()
    assert agree([p.grad for p in form.parameters()], [p.grad for p in alone.parameters()], SUMS)

    model = LeptonDistributedModel(compressed(), DataPartitioner(data, batch_size=8), SynchronousUpdate("int8"))
    model.train(nn.functional.cross_entropy, functools.partial(torch.optim.SGD, lr=0.1))
    for tensor in model.model.model.state_dict().values():
        parts = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(parts, tensor)
        assert torch.equal(*parts)

    # Tensor-parallel: the recurrent layer, whose kernel reads whole weights, stays whole.
    parallel, plain = ModelParallel(tensor=2), compressed().model
    for part in (compressed().model, compressed().trainable()):
        split = parallel.split_(part, parallel.mesh())
        assert type(split.head) is ColumnParallel
        with torch.no_grad():
            assert torch.allclose(split(x), plain(x), atol=2 * HIDDEN * 2.0**-23)


@pytest.mark.slow
def test_over_two_processes():
    processes.run(check_two_ranks, 2)
