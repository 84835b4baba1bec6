"""Sharded training (SynchronousUpdate(shard=...)): the weights of DistributedDataParallel from half of the memory."""

import functools
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from lepton_ai import LeptonDistributedModel, LeptonModel
from lepton_ai.compression import Compression, Pruning, Quantization
from lepton_ai.distributed import DataPartitioner, ModelParallel, SynchronousUpdate, checkpoint
from lepton_ai.distributed.sharding import blocks_of
from lepton_ai.model import CompressedModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

adamw = functools.partial(torch.optim.AdamW, lr=3e-3)
sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)  # Adam makes steps of gradients that are mere rounding
WORDS, WIDTH, CLASSES = 31, 24, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 47), nn.GELU(), nn.Linear(47, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.layers(x)


class Encoder(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.statistics = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.statistics(x.mean(1)))


def dataset() -> TensorDataset:
    ids = torch.randint(0, WORDS, (96, 7), generator=torch.Generator().manual_seed(1))
    return TensorDataset(ids, ids[:, 0] % CLASSES)


def distributed(model, compression="fp32", shard=False, batch_size=8, **parallel) -> LeptonDistributedModel:
    update = SynchronousUpdate(compression, shard=shard, automatic=False)
    return LeptonDistributedModel(
        model, DataPartitioner(dataset(), batch_size=batch_size), update, ModelParallel(**parallel)
    )


def trained(model, compression="fp32", shard=False, *, parallel=None, optimizer=adamw, **settings):
    job = distributed(model, compression, shard, **(parallel or {}))
    report = job.train(nn.functional.cross_entropy, optimizer, **{"epochs": 2, **settings})
    return job, report


def state_of(job: LeptonDistributedModel) -> dict[str, Tensor]:
    model = job.model
    return (model if isinstance(model, nn.Module) else model.model).state_dict()


def loss_over(module: nn.Module) -> Tensor:
    ids, classes = dataset().tensors
    return nn.functional.cross_entropy(module(ids), classes)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def all_ranks_have(state: dict[str, Tensor]) -> bool:
    flat = torch.cat([tensor.flatten().double() for tensor in state.values()])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    return all(torch.equal(flat, other) for other in others)


# Blocks


def test_blocks_are_what_is_repeated():
    model = Encoder()
    assert blocks_of(model, True) == list(model.blocks)
    assert blocks_of(model, Block) == list(reversed(model.blocks))
    inner = [block.layers[i] for block in model.blocks for i in (0, 2)]  # not an attention's projection
    assert set(blocks_of(model, (nn.Linear,))) == {*inner, model.head}
    both = blocks_of(model, lambda module: isinstance(module, (Block, nn.LayerNorm)))
    assert all(both.index(block.norm) < both.index(block) for block in model.blocks)
    layer = nn.Linear(3, 3)
    assert blocks_of(nn.Sequential(layer, nn.ReLU(), layer), True) == []
    assert blocks_of(nn.Sequential(layer, nn.ReLU(), nn.Linear(3, 3), nn.ReLU()), True)[0] is layer
    with pytest.raises(ValueError, match=r"shard is .*Conv2d.*, which chooses no module with parameters of Encoder"):
        blocks_of(model, nn.Conv2d)
    with pytest.raises(ValueError, match="allowed: True, or a choice among none, as it has no such module"):
        blocks_of(layer, lambda module: True)


@pytest.mark.parametrize(
    ("compression", "shard", "text"),
    [
        ("int8", True, "compression is 'int8' with shard; allowed with shard: fp32, bf16, fp16"),
        ("int4", nn.Linear, "compression is 'int4' with shard; allowed with shard: fp32, bf16, fp16"),
        ("fp32", "blocks", "shard is 'blocks'; allowed: True, False, a module type, a tuple of them or a function"),
        ("fp32", (), r"shard is \(\); allowed"),
    ],
)
def test_bad_arguments(compression, shard, text):
    with pytest.raises(ValueError, match=text):
        SynchronousUpdate(compression, shard=shard)


def test_in_one_process_shard_changes_nothing():
    (plain, report), (sharded, same) = trained(Encoder()), trained(Encoder(), "bf16", True)
    assert equal(state_of(plain), state_of(sharded))
    assert report.losses == same.losses


# Two ranks


class Watched:
    """Makes AdamW, and keeps it."""

    def __init__(self) -> None:
        self.made: list[torch.optim.Optimizer] = []

    def __call__(self, parameters):
        self.made.append(adamw(parameters))
        return self.made[-1]


def check_halves() -> None:
    """A rank holds half of the parameters and of Adam's moments, where plain data parallelism holds all."""
    held = {}
    for shard in (False, True):
        watched = Watched()
        trained(Encoder(), shard=shard, optimizer=watched)
        parameters = [p for group in watched.made[0].param_groups for p in group["params"]]
        assert all(isinstance(p, DTensor) == shard for p in parameters)
        moments = [t for p in parameters for t in watched.made[0].state[p].values() if t.ndim]
        held[shard] = [sum((t.to_local() if shard else t).nbytes for t in tensors) for tensors in (parameters, moments)]
    for sharded, whole in zip(held[True], held[False], strict=True):
        assert 0.45 * whole < sharded < 0.55 * whole


def check_equal_to_ddp() -> None:
    start = Encoder().state_dict()
    plain, report = trained(Encoder(), optimizer=sgd)
    values = sum(p.numel() for p in Encoder().parameters())
    moved = sum((w - start[name]).float().square().sum() for name, w in state_of(plain).items()) ** 0.5
    for compression, shard, bound in (
        ("fp32", True, 1e-4),
        ("fp32", nn.Linear, 1e-4),
        ("bf16", True, 0.05),
        ("fp16", True, 0.05),
    ):
        # Data rank 0's weights count, as with DDP.
        sharded, same = trained(Encoder(seed=dist.get_rank()), compression, shard, optimizer=sgd)
        state = state_of(sharded)
        assert all_ranks_have(state)
        apart = sum((w - state[name]).float().square().sum() for name, w in state_of(plain).items()) ** 0.5
        assert apart < bound * moved, (compression, shard, float(apart / moved))
        torch.testing.assert_close(same.losses, report.losses, rtol=bound, atol=0)
        assert not any(isinstance(tensor, DTensor) for tensor in state.values())
        stats = same.update
        assert (stats.compression, stats.active, stats.steps) == (compression, compression != "fp32", same.steps)
        size = 4 if compression == "fp32" else 2
        exact = same.steps * values  # half of each gradient; odd first dimensions are padded
        assert exact * size / 2 <= stats.bytes_sent < 1.05 * exact * size / 2
        assert exact * 4 <= stats.bytes_fp32 < 1.05 * exact * 4
        assert exact * 4 / 2 < stats.bytes_parameters < 1.05 * exact * 4
        assert f"sharded parameters: {stats.bytes_parameters} bytes sent" in str(same)
    x = dataset().tensors[0]
    whole = Encoder()
    whole.load_state_dict(state)
    torch.testing.assert_close(sharded.inference(x), whole.eval()(x))


def check_frozen() -> None:
    """What does not train is sharded, too, whatever its dtype, and stays."""
    model = Encoder()
    model.blocks.requires_grad_(False).bfloat16()
    model.embedding.bfloat16()
    model.embedding.requires_grad_(False)
    model.statistics.bfloat16()
    model.statistics.requires_grad_(False)
    model.head = nn.Sequential(Widened(), nn.Linear(WIDTH, CLASSES))
    (plain, report), (sharded, same) = (trained(model, shard=shard, optimizer=sgd) for shard in (False, True))
    torch.testing.assert_close(same.losses, report.losses, rtol=1e-4, atol=0)
    for name, tensor in state_of(sharded).items():
        if name.startswith("head"):
            torch.testing.assert_close(tensor, state_of(plain)[name], rtol=1e-3, atol=1e-4)
            assert not torch.equal(tensor, model.state_dict()[name])
        elif name in dict(model.named_parameters()):
            assert torch.equal(tensor, model.state_dict()[name])


class Widened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def check_compressed(folder: Path) -> None:
    """The training form shards; what comes back is compressed, saved and loaded."""
    compressed = LeptonModel(Encoder().eval()).compress(
        Pruning(0.5, pattern="2:4"), Quantization("w8a8", embeddings=True), Compression("huffman")
    )
    zeros = {
        name: w == 0 for name, w in compressed.trainable().state_dict().items() if name.endswith("out_proj.weight")
    }
    assert len(zeros) == 3
    plain, report = trained(compressed)
    sharded, same = trained(compressed, shard=True, evaluate=loss_over)
    assert same.metric_after < same.metric_before
    torch.testing.assert_close(same.losses, report.losses, rtol=1e-3, atol=0)
    assert same.losses[1] < same.losses[0]
    state = state_of(sharded)
    assert all_ranks_have(state)
    assert not equal(state, compressed.model.state_dict())
    assert state.keys() == state_of(plain).keys()
    assert all(torch.equal(state[name] == 0, zero) for name, zero in zeros.items())
    x = dataset().tensors[0]
    y = sharded.inference(x)
    if dist.get_rank() == 0:
        sharded.model.save(folder / "model.safetensors")
        loaded = CompressedModel.load(folder / "model.safetensors", Encoder().eval())
        with torch.inference_mode():
            assert torch.equal(loaded(x), y)


def check_resume(folder: Path) -> None:
    """Bit for bit; and it is left stopped for others to go on."""
    whole, in_one = trained(Encoder(), shard=True)
    trained(Encoder(), shard=True, steps=5, checkpoint=folder / "again", checkpoint_every=4)
    resumed, report = trained(Encoder(), shard=True, checkpoint=folder / "again", checkpoint_every=4)
    assert report.steps == 12 - 4
    assert equal(state_of(resumed), state_of(whole))
    trained(Encoder(), shard=True, steps=4, checkpoint=folder / "stopped", checkpoint_every=4)
    # A checkpoint knows nothing of the shards: plain data parallelism goes on, too.
    state = resumed_state(folder / "stopped", ranks=2)
    assert state.step == 4
    trained(Encoder(), steps=4, checkpoint=folder / "plain", checkpoint_every=4)
    of_plain, report = trained(Encoder(seed=5), shard=True, checkpoint=folder / "plain")
    assert report.steps == 12 - 4
    assert all_ranks_have(state_of(of_plain))
    torch.testing.assert_close(report.losses[1], in_one.losses[1], rtol=0.05, atol=0)
    at_four, _ = trained(Encoder(), shard=True, steps=4)
    assert equal(state.model.state_dict(), state_of(at_four))
    if dist.get_rank() == 0:
        torch.save(state_of(at_four), folder / "at-four.pt")


def resumed_state(folder: Path, ranks: int) -> checkpoint.State:
    model, part = Encoder(seed=3), DataPartitioner(dataset(), batch_size=8)
    layout = checkpoint.Layout(ranks, 1, 1, "0.0")
    state = checkpoint.State(model, adamw(model.parameters()), part, SynchronousUpdate(), 0, layout)
    checkpoint.resume(folder, state)
    return state


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
        self.layers[1].weight = self.layers[0].weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(ids.float())[:, :CLASSES]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.temperature = nn.Linear(7, CLASSES), nn.Parameter(torch.tensor(1.0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(ids.float()) * self.temperature


def check_errors() -> None:
    mixed = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, CLASSES).bfloat16())
    for model, shard, text in (
        (Tied(), True, "shard with layers.1.weight, which is tied to a parameter of another block; allowed"),
        (Scaled(), True, "shard with temperature, a scalar; allowed"),
        (mixed, nn.Conv2d, "chooses no module"),
        (
            nn.Sequential(mixed),
            nn.Sequential,
            "shard with 0.1.weight, torch.bfloat16 in a block with torch.float32; allowed",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            trained(model, shard=shard)
    state = state_of(trained(Tied(), shard=lambda module: isinstance(module, nn.Sequential))[0])
    assert torch.equal(state["layers.0.weight"], state["layers.1.weight"])


def check_pair(folder: Path) -> None:
    check_halves()
    check_equal_to_ddp()
    check_frozen()
    check_compressed(folder)
    check_resume(folder)
    check_errors()


def check_three_go_on(folder: Path) -> None:
    whole, report = trained(Encoder(), shard=True, checkpoint=folder / "stopped", checkpoint_every=100)
    assert report.samples == 192 - 4 * 16
    assert all_ranks_have(state_of(whole))
    assert report.losses[1] < report.losses[0]


@pytest.mark.slow
def test_sharded_ranks(tmp_path):
    processes.run(check_pair, 2, tmp_path)
    # In one process, then in three: from the checkpoint of two.
    state = resumed_state(tmp_path / "stopped", ranks=1)
    assert state.step == 4
    assert equal(state.model.state_dict(), torch.load(tmp_path / "at-four.pt"))
    moments = [t for of in state.optimizer.state.values() for name, t in of.items() if name == "exp_avg"]
    assert len(moments) == len(list(state.model.parameters()))
    assert all(bool(moment.any()) for moment in moments)
    processes.run(check_three_go_on, 3, tmp_path)


def check_with_tensor_parallel() -> None:
    """A mesh of two data and two tensor ranks: slices of layers are sharded."""
    plain, report = trained(Encoder(), optimizer=sgd, parallel={"tensor": 2})
    sharded, same = trained(Encoder(), shard=True, optimizer=sgd, parallel={"tensor": 2})
    torch.testing.assert_close(same.losses, report.losses, rtol=1e-4, atol=0)
    state = state_of(sharded)
    assert all_ranks_have(state)
    for name, tensor in state_of(plain).items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"SynchronousUpdate\('fp32', shard=True\) with ModelParallel\(pipeline=2\)"):
        trained(nn.Sequential(Encoder(), nn.Linear(CLASSES, CLASSES)), shard=True, parallel={"pipeline": 2})


@pytest.mark.slow
def test_sharded_slices():
    processes.run(check_with_tensor_parallel, 4)
