"""A model split over processes computes, learns and is saved as it would be in one."""

import copy

import pytest
import torch
import torch.distributed as dist
from layers import make_layers, make_linear, make_mlp, make_sparse, same
from lepton_ai.distributed import ModelParallel
from lepton_ai.distributed.pipeline_parallel import balanced, cut
from lepton_ai.distributed.slicing import shares
from lepton_ai.distributed.tensor_parallel import ColumnParallel, RowParallel
from lepton_ai.distributed.whole_state import gather_state, load_state
from processes import run
from torch import nn
from torch.nn import functional

import lepton_kernels as lk
from lepton_kernels.nn import QuantLinear, SparseLinear

SHAPES = [(1, 2, 2), (5, 7, 3), (3, 33, 65), (17, 64, 130), (2, 19, 1001)]  # m, n, k; uneven shares


def sum_bound(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """How far two orders of the k + 1 terms of a float32 sum may lie apart."""
    magnitude = x.abs() @ linear.weight.abs().T + (0 if linear.bias is None else linear.bias.abs())
    return 2 * (linear.in_features + 1) * torch.finfo(torch.float32).eps * magnitude


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """A few steps of training apart in the order of float sums."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# Plans, without processes


class OneProcess:
    """What ModelParallel asks a mesh before it changes anything."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __getitem__(self, name: str) -> "OneProcess":
        return self

    def size(self) -> int:
        return self._size


def test_arguments_are_checked():
    for argument in ("tensor", "pipeline", "microbatches"):
        with pytest.raises(ValueError, match=f"ModelParallel: {argument} is 0; allowed: 1 or more"):
            ModelParallel(**{argument: 0})
    with pytest.raises(ValueError, match="allowed: 'column', 'column-split', 'row'"):
        ModelParallel(2, plan={"*": "diagonal"})
    for size in (1, 3, 0):
        with pytest.raises(ValueError, match=rf"world_size is {size}; allowed: a multiple of 2 \(tensor 2"):
            ModelParallel(tensor=2).mesh(size)
    with pytest.raises(ValueError, match="the mesh has 3 in 'tensor'; allowed: 2"):
        ModelParallel(2).split_(nn.Sequential(nn.Linear(2, 2)), OneProcess(3))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"9": "column"}, "plan holds '9', which matches no layer; layers here: 0, 2, 3"),
        ({"1": "column"}, "matches no layer"),  # there, but no linear layer
        ({"*": "column", "0": "row"}, "plan has 0 as 'column' and 'row'"),
        ({"3": "row"}, r"3 \(QuantLinear\) is 'row': its scheme is w4a16"),
        ({"4": "row"}, "its activation is 'gelu'"),
        ({"5": "row"}, "sparse quantized product has no partial sums"),
        ({"6": "column"}, "it has 1 outputs; allowed: at least 2"),
        ({"8": "column"}, "its weight is tied to another layer's"),
    ],
)
def test_plans_are_checked_before_anything_changes(plan: dict[str, str], message: str, rng: torch.Generator):
    linear = make_linear(8, 8, rng)
    model = nn.Sequential(
        linear,
        nn.ReLU(),
        make_linear(8, 8, rng),
        QuantLinear.from_linear(linear, "w4a16"),
        QuantLinear.from_linear(linear, "w8a8", activation="gelu"),
        make_sparse(8, 8, rng, "w8a8"),
        nn.Linear(8, 1),
        nn.Embedding(8, 1),
        nn.Linear(1, 8),
    )
    model[7].weight = model[8].weight
    before = list(model)
    with pytest.raises(ValueError, match=message):
        ModelParallel(2, plan=plan).split_(model, OneProcess(2))
    assert all(a is b for a, b in zip(model, before, strict=True))
    assert ModelParallel(1, plan={"0": "column"}).split_(model, OneProcess(1)) is model


def test_a_model_with_nothing_to_split_is_refused():
    for model in (nn.Sequential(nn.ReLU()), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 1))):
        with pytest.raises(ValueError, match="nothing to split in"):
            ModelParallel(2).split_(model, OneProcess(2))


def test_stages_are_balanced_by_bytes(rng: torch.Generator):
    assert balanced([1, 1, 1, 9], 2) == [range(0, 3), range(3, 4)]
    assert balanced([0, 0, 0], 3) == [range(0, 1), range(1, 2), range(2, 3)]
    sizes = torch.randint(0, 50, (9,), generator=rng).tolist()
    for stages in (1, 2, 4, 9):
        ranges = balanced(sizes, stages)
        assert [i for part in ranges for i in part] == list(range(9))
        assert all(ranges)
        limit = max(sum(sizes[i] for i in part) for part in ranges)
        filled, needed = 0, 1  # greedily, a smaller limit takes more stages, if a size fits it at all
        for size in sizes:
            filled, needed = (filled + size, needed) if filled + size < limit else (size, needed + 1)
        assert needed > stages or max(sizes) >= limit or limit == 0
    quantized = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), QuantLinear(64, 64), nn.Linear(64, 64))
    assert [next(iter(part.state_dict())) for part in cut(quantized, 2)] == ["0.weight", "3.weight"]


def test_models_that_have_no_stages_are_refused():
    shared = nn.Linear(4, 4)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[0].weight = tied[1].weight
    for model, message in [
        (nn.Linear(4, 4), "model is Linear; allowed: nn.Sequential"),
        (nn.Sequential(nn.Linear(4, 4)), "model has 1 children; allowed: at least 2"),
        (nn.Sequential(shared, shared), "model holds a module twice"),
        (tied, "1.weight is shared with another stage"),
    ]:
        with pytest.raises(ValueError, match=message):
            cut(model, 2)


# Two processes


def split_layers(mesh) -> None:
    """Column and row against the layer in one process: all bits where sums are of integers."""
    rng = torch.Generator().manual_seed(7)
    column, pair = ModelParallel(2), ModelParallel(2, plan={"0": "column-split", "1": "row"})
    exact = [
        lambda linear: QuantLinear.from_linear(linear, "w8a8"),
        lambda linear: QuantLinear.from_linear(linear, "w8a8", activation="relu"),
        lambda linear: QuantLinear.from_linear(linear, "w4a16"),
        lambda linear: QuantLinear.from_linear(linear, lk.QuantScheme.of("w4a8", 16), activation="silu"),
        lambda linear: SparseLinear.from_linear(linear, scheme="w8a8"),
    ]
    for m, n, k in SHAPES:
        for number, make in enumerate(exact):
            linear = make_linear(n, k, rng, bias=bool(m % 2))
            layer = make(linear)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = (torch.randn(2, m, k, generator=rng) + 0.5).to(dtype)
                split = column.split_(nn.Sequential(copy.deepcopy(layer)), mesh)
                assert torch.equal(split(x), layer(x)), (m, n, k, dtype, number)
                if number > 1:
                    continue
                model = nn.Sequential(QuantLinear.from_linear(make_linear(k, 5, rng)), layer)
                x = torch.randn(m, 5, generator=rng).to(dtype)
                split = pair.split_(copy.deepcopy(model), mesh)
                assert isinstance(split[1], RowParallel)
                assert torch.equal(split(x), model(x)), (m, n, k, dtype, number)


def row_sums_of_odd_rows(mesh) -> None:
    """Rows of zeros, of one sign, with NaN and infinity, and no rows, whose columns lie in different processes."""
    rng = torch.Generator().manual_seed(8)
    layer = QuantLinear.from_linear(make_linear(6, 8, rng))
    split = RowParallel(layer, mesh.get_group("tensor"))
    x = torch.randn(7, 8, generator=rng)
    x[0], x[1], x[2] = 0, x[1].abs() + 1, -x[2].abs() - 1
    x[3, 1], x[4, 6], x[5, 0] = torch.nan, torch.inf, -torch.inf
    x[6, :4], x[6, 4:] = 1e-39, 1e30
    mine = slice(4 * mesh.get_local_rank("tensor"), 4 * mesh.get_local_rank("tensor") + 4)
    torch.testing.assert_close(split(x[:, mine]), layer(x), rtol=0, atol=0, equal_nan=True)
    assert split(x[:0, mine]).shape == (0, 6)
    with pytest.raises(ValueError, match=r"x has shape \(7, 8\); allowed: \[..., 4\]"):
        split(x)
    x = torch.randn(3, 8, generator=rng, requires_grad=True)
    part = x.detach()[:, mine].clone().requires_grad_()
    layer(x).square().sum().backward()
    split(part).square().sum().backward()
    close(part.grad, x.grad[:, mine])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(split(part), layer(x))


def float_layers(mesh) -> None:
    """Forward and backward of float layers."""
    rng = torch.Generator().manual_seed(9)
    for m, n, k in SHAPES:
        linear = make_linear(n, k, rng)
        split = ModelParallel(2).split_(nn.Sequential(copy.deepcopy(linear)), mesh)
        x = torch.randn(m, k, generator=rng)
        assert ((split(x) - linear(x)).abs() <= sum_bound(x, linear)).all()
        model = nn.Sequential(make_linear(k, 5, rng), nn.GELU(), linear)
        split = ModelParallel(2, plan={"0": "column-split", "2": "row"}).split_(copy.deepcopy(model), mesh)
        ours, theirs = (torch.randn(m, 5, generator=rng).requires_grad_() for _ in range(2))
        ours.data.copy_(theirs.data)
        close(split(ours), model(theirs))
        split(ours).square().mean().backward()
        model(theirs).square().mean().backward()
        close(ours.grad, theirs.grad)
        begin, end = shares(k, 2)[dist.get_rank()]
        close(split[0].shard.weight.grad, model[0].weight.grad[begin:end])
        close(split[2].shard.weight.grad, model[2].weight.grad[:, begin:end])
        close(split[2].bias.grad, model[2].bias.grad)
    sparse = nn.Sequential(make_sparse(12, 5, rng), make_sparse(7, 12, rng))
    split = ModelParallel(2, plan={"0": "column-split", "1": "row"}).split_(copy.deepcopy(sparse), mesh)
    x = torch.randn(4, 5, generator=rng)
    close(split(x), sparse(x))


def states(mesh) -> None:
    """The state dict that went in comes out, and another one can be loaded."""
    rng = torch.Generator().manual_seed(10)
    model, other = (nn.Sequential(*make_layers(33, 70, rng), nn.BatchNorm1d(3)) for _ in range(2))
    split = ModelParallel(2).split_(copy.deepcopy(model), mesh)
    assert sum(isinstance(layer, ColumnParallel) for layer in split) == len(model) - 1
    assert same(gather_state(split, mesh), model.state_dict())
    for i in (7, 8, 10, 11):  # as many weights, elsewhere
        ours_state, theirs = model[i].state_dict(), other[i]
        theirs.weight_compressed = ours_state["weight_compressed"].roll(1)
        theirs.weight_bitmask = ours_state["weight_bitmask"].roll(1, 0)
    load_state(split, other.state_dict())
    assert same(gather_state(split, mesh), other.state_dict())
    x = torch.randn(2, 70, generator=rng)
    assert torch.equal(split[2](x), other[2](x))
    plan = {"0": "row", "1": "row", "2": "row", "7": "row"}
    rows = ModelParallel(2, plan=plan).split_(copy.deepcopy(model), mesh)
    assert same(gather_state(rows, mesh), model.state_dict())
    weight = rows[0].shard.weight
    load_state(rows, other.state_dict())
    assert rows[0].shard.weight is weight
    assert same(gather_state(rows, mesh), other.state_dict())
    for state in ({}, other.state_dict() | {"typo": x}):
        with pytest.raises(RuntimeError, match="load_state: names that the state lacks"):
            load_state(rows, state)


def training(mesh) -> None:
    """Five steps of Adam end at the weights of one process."""
    rng = torch.Generator().manual_seed(11)
    model = make_mlp(rng)
    for plan in (None, {"0": "column-split", "2": "row"}):
        alone, split = copy.deepcopy(model), copy.deepcopy(model)
        ModelParallel(2, plan=plan).split_(split, mesh)
        optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) for net in (alone, split)]
        for _ in range(5):
            x, target = torch.randn(8, 6, generator=rng), torch.randn(8, 3, generator=rng)
            for net, optimizer in zip((alone, split), optimizers, strict=True):
                optimizer.zero_grad()
                functional.mse_loss(net(x), target).backward()
                optimizer.step()
        for name, tensor in gather_state(split, mesh).items():
            torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=0, atol=1e-6)


def encoder(mesh) -> None:
    """A module of torch with a fused path that reads weights, and shared modules."""
    layer = nn.TransformerEncoderLayer(16, 2, 33, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(12)))
    split = ModelParallel(2).split_(copy.deepcopy(model), mesh)
    assert isinstance(split.layers[1].linear2, ColumnParallel)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(13))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.inference_mode():
        keep = ~padding[..., None]
        torch.testing.assert_close(
            split(x, src_key_padding_mask=padding) * keep, model(x, src_key_padding_mask=padding) * keep,
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    linear = nn.Linear(4, 4)
    shared = ModelParallel(2, plan={"2": "column"}).split_(nn.Sequential(linear, nn.ReLU(), linear), mesh)
    assert shared[0] is shared[2]
    assert list(gather_state(shared, mesh)) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def in_tensor_parallel() -> None:
    mesh = ModelParallel(tensor=2).mesh()
    assert mesh.mesh_dim_names == ("data", "pipeline", "tensor")
    for check in (split_layers, row_sums_of_odd_rows, float_layers, states, training, encoder):
        check(mesh)


def test_tensor_parallel():
    run(in_tensor_parallel, 2)


def pipeline_steps(mesh) -> None:
    rng = torch.Generator().manual_seed(14)
    model = make_mlp(rng)
    pipeline = ModelParallel(pipeline=2, microbatches=4).pipelined(copy.deepcopy(model), mesh)
    assert 0 < len(pipeline.stage) < len(model)
    for batch in (8, 8, 12):  # gradients add up over steps, as in torch
        x, target = torch.randn(batch, 6, generator=rng), torch.randn(batch, 3, generator=rng)
        loss = functional.mse_loss(model(x), target)
        loss.backward()
        assert pipeline.train_step(x, target, functional.mse_loss) == pytest.approx(loss.item(), rel=1e-6)
    parameters = dict(model.named_parameters())
    for name, parameter in pipeline.stage.named_parameters():
        close(parameter.grad, parameters[name].grad)
    for batch in (8, 7, 1):  # inference takes any batch
        x = torch.randn(batch, 6, generator=rng)
        close(pipeline.inference(x), model(x))
    for batch in (0, 6):
        with pytest.raises(ValueError, match=f"the batch is {batch}; allowed: a multiple of 4"):
            pipeline.train_step(torch.zeros(batch, 6), torch.zeros(batch, 3), functional.mse_loss)
    with pytest.raises(ValueError, match="3 targets for 4 inputs"):
        pipeline.train_step(torch.zeros(4, 6), torch.zeros(3, 3), functional.mse_loss)
    with pytest.raises(ValueError, match="inference: the batch is 0"):
        pipeline.inference(torch.zeros(0, 6))
    assert same(gather_state(pipeline.stage, mesh), model.state_dict())
    other = make_mlp(rng).state_dict()
    pipeline.load_state(other)
    assert same(gather_state(pipeline.stage, mesh), other)


def pipeline_keeps_statistics(mesh) -> None:
    """Finding the shapes leaves running statistics alone: they see the microbatches and nothing else."""
    rng = torch.Generator().manual_seed(15)
    model = nn.Sequential(make_linear(6, 6, rng), nn.BatchNorm1d(6), make_linear(6, 6, rng), nn.BatchNorm1d(6))
    pipeline = ModelParallel(pipeline=2, microbatches=2).pipelined(copy.deepcopy(model), mesh)
    x = torch.randn(8, 6, generator=rng)
    pipeline.train_step(x, x, functional.mse_loss)
    for part in x.chunk(2):
        model(part)
    state = model.state_dict()
    for name, buffer in pipeline.stage.named_buffers():
        close(buffer, state[name])


def pipeline_of_quantized_layers(mesh) -> None:
    rng = torch.Generator().manual_seed(16)
    model = make_mlp(rng)
    lk.quantize_(model)
    pipeline = ModelParallel(pipeline=2, microbatches=3).pipelined(copy.deepcopy(model), mesh)
    x = torch.randn(6, 6, generator=rng).to(torch.bfloat16)
    assert torch.equal(pipeline.inference(x), model(x))
    # Only the last stage learns: the first has nothing to send a gradient for.
    model = nn.Sequential(QuantLinear.from_linear(make_linear(40, 6, rng)), make_linear(2, 40, rng))
    pipeline = ModelParallel(pipeline=2, microbatches=2).pipelined(copy.deepcopy(model), mesh)
    x, target = torch.randn(4, 6, generator=rng), torch.randn(4, 2, generator=rng)
    functional.mse_loss(model(x), target).backward()
    pipeline.train_step(x, target, functional.mse_loss)
    if mesh.get_local_rank("pipeline") == 1:
        close(pipeline.stage[0].weight.grad, model[1].weight.grad)


def in_pipeline() -> None:
    mesh = ModelParallel(pipeline=2).mesh()
    for check in (pipeline_steps, pipeline_keeps_statistics, pipeline_of_quantized_layers):
        check(mesh)


def test_pipeline():
    run(in_pipeline, 2)


def in_both() -> None:
    rng = torch.Generator().manual_seed(17)
    model = make_mlp(rng)
    parallel = ModelParallel(tensor=2, pipeline=2, microbatches=2)
    mesh = parallel.mesh()
    pipeline = parallel.pipelined(parallel.split_(copy.deepcopy(model), mesh), mesh)
    x, target = torch.randn(4, 6, generator=rng), torch.randn(4, 3, generator=rng)
    loss = functional.mse_loss(model(x), target)
    loss.backward()
    assert pipeline.train_step(x, target, functional.mse_loss) == pytest.approx(loss.item(), rel=1e-6)
    optimizer, alone = torch.optim.SGD(pipeline.stage.parameters(), 0.1), torch.optim.SGD(model.parameters(), 0.1)
    optimizer.step()
    alone.step()
    state = gather_state(pipeline.stage, mesh)
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        close(state[name], tensor)
    close(pipeline.inference(x), model(x))


@pytest.mark.slow
def test_tensor_parallel_stages():
    run(in_both, 4)


def fail_in_one() -> None:
    if dist.get_rank() == 1:
        raise AssertionError("what went wrong")
    dist.barrier()


def test_a_failure_in_a_process_is_shown_here():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="what went wrong"):
        run(fail_in_one, 2)
