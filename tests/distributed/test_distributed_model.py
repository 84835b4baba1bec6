"""LeptonDistributedModel: training alone, over workers and under torchrun; checkpoints; inference."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from lepton_ai import LeptonDistributedModel, LeptonModel, ResourceManager
from lepton_ai.compression import Compression, Pruning, Quantization
from lepton_ai.distributed import DataPartitioner, ModelParallel, SynchronousUpdate, checkpoint
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from lepton_kernels.nn import QuantLinear

sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def dataset(samples: int = 200) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 16, generator=generator)
    return TensorDataset(x, (x @ torch.randn(16, 4, generator=generator)).argmax(1))


def weights(model) -> dict[str, torch.Tensor]:
    return (model if isinstance(model, nn.Module) else model.model).state_dict()


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(data=None, **settings):
    model = LeptonDistributedModel(mlp(), DataPartitioner(data or dataset(), batch_size=32))
    report = model.train(nn.functional.cross_entropy, sgd, **settings)
    return model, report


def by_hand(data, batch_size, epochs) -> nn.Module:
    """The plain loop, in one process."""
    model, part = mlp(), DataPartitioner(data, batch_size=batch_size).bind(0, 1)
    optimizer = sgd(model.parameters())
    for _ in range(epochs):
        for x, y in part:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_alone_it_is_the_plain_loop():
    model, report = trained(epochs=3)
    expected = by_hand(dataset(), 32, 3)
    assert equal(weights(model.model), expected.state_dict())
    assert (report.steps, report.samples, report.workers) == (21, 600, 1)
    assert report.losses[2] < report.losses[0]
    x = torch.randn(5, 16)
    assert torch.equal(model.inference(x), expected.eval()(x))


def test_training_goes_on_where_it_ended():
    both, _ = trained(epochs=2)
    model = LeptonDistributedModel(mlp(), DataPartitioner(dataset(), batch_size=32))
    plain = functools.partial(torch.optim.SGD, lr=0.05)
    model.train(nn.functional.cross_entropy, plain)
    model.train(nn.functional.cross_entropy, plain)
    assert model.partitioner.epoch == 2
    twice = LeptonDistributedModel(mlp(), DataPartitioner(dataset(), batch_size=32))
    twice.train(nn.functional.cross_entropy, plain, epochs=2)
    assert equal(weights(model.model), weights(twice.model))
    assert not equal(weights(model.model), weights(both.model))


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path):
    whole, _ = trained(epochs=3)
    _, first = trained(epochs=3, steps=10, checkpoint=tmp_path, checkpoint_every=4)
    assert first.steps == 10
    assert [path.name for path in tmp_path.iterdir()] == ["step-8"]
    (tmp_path / "part-12").mkdir()  # what a stop in the middle of a checkpoint leaves
    resumed, second = trained(epochs=3, checkpoint=tmp_path, checkpoint_every=4)
    assert second.steps == 13
    assert equal(weights(resumed.model), weights(whole.model))


def test_a_checkpoint_of_another_split_is_refused(tmp_path):
    trained(steps=4, checkpoint=tmp_path, checkpoint_every=4)
    model, part = mlp(), DataPartitioner(dataset(), batch_size=32)
    state = checkpoint.State(
        model, sgd(model.parameters()), part, SynchronousUpdate(), 0, checkpoint.Layout(1, 1, 2, "0.1")
    )
    with pytest.raises(ValueError, match="is of 1 pipeline and 1 tensor ranks; allowed: 1 and 2, as this job has"):
        checkpoint.resume(tmp_path, state)
    assert state.step == part.position == 0


def test_bad_arguments(tmp_path):
    model = LeptonDistributedModel(mlp(), DataPartitioner(dataset()))
    for name in ("epochs", "steps", "checkpoint_every"):
        with pytest.raises(ValueError, match=f"train: {name} is 0; allowed: 1 or more"):
            model.train(nn.functional.cross_entropy, **{name: 0})
    with pytest.raises(ValueError, match="the partitioner is None"):
        LeptonDistributedModel(mlp()).train(nn.functional.cross_entropy)
    bad = LeptonDistributedModel(mlp(), DataPartitioner(dataset().tensors[0]))
    with pytest.raises(ValueError, match="a batch is Tensor; allowed: a tuple or list"):
        bad.train(nn.functional.cross_entropy)


def loss_over(module: nn.Module) -> torch.Tensor:
    x, y = dataset().tensors
    return nn.functional.cross_entropy(module(x), y)


def test_a_metric_before_and_after():
    compressed = LeptonModel(mlp().train()).compress(Quantization("w8a8"))
    seen = []

    def evaluate(module):
        seen.append((type(module[0]), module.training, torch.is_inference_mode_enabled()))
        return loss_over(module)

    job = LeptonDistributedModel(compressed, DataPartitioner(dataset(), batch_size=32))
    report = job.train(nn.functional.cross_entropy, sgd, evaluate=evaluate)
    assert seen == [(QuantLinear, False, True)] * 2
    assert job.model.model.training
    with torch.inference_mode():
        assert report.metric_before == float(loss_over(compressed.model.eval()))
        assert report.metric_after == float(loss_over(job.model.model.eval()))
    assert report.metric_after < report.metric_before
    assert f"evaluated: {report.metric_before:.5g} before, {report.metric_after:.5g} after" in str(report)


def test_no_metric_and_a_bad_one():
    _, report = trained()
    assert report.metric_before is None
    assert report.metric_after is None
    assert "evaluated" not in str(report)
    with pytest.raises(TypeError, match="train: evaluate gave 'good'; allowed: a number"):
        trained(evaluate=lambda module: "good")


def test_mappings_become_keywords():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x, y):
            return nn.functional.cross_entropy(self.layer(x), y)

    data = [{"x": x, "y": y} for x, y in dataset(50)]
    model = LeptonDistributedModel(Model(), DataPartitioner(data, batch_size=10))
    report = model.train(lambda loss, batch: loss, sgd, epochs=2)
    assert report.losses[1] < report.losses[0]


@pytest.mark.slow
def test_the_program_of_the_documentation(tmp_path):
    """Compressed, trained by two tensor-parallel workers, compressed again, saved, loaded."""
    compressed = LeptonModel(mlp()).compress(
        Pruning(sparsity=0.5, pattern="2:4"), Quantization("w8a8"), Compression("huffman")
    )
    before = weights(compressed)
    model = LeptonDistributedModel(
        compressed, DataPartitioner(dataset(), batch_size=32), SynchronousUpdate("int8"), ModelParallel(tensor=2)
    )
    model.configure(ResourceManager(min_workers=1, max_workers=4))
    report = model.train(nn.functional.cross_entropy, optimizer=sgd, epochs=4)
    assert report.workers % 2 == 0
    assert report.losses[-1] < report.losses[0]
    x = torch.randn(7, 16)
    y = model.inference(x)
    model.model.save(tmp_path / "model.safetensors")
    loaded = type(model.model).load(tmp_path / "model.safetensors", mlp())
    assert torch.equal(loaded.model.eval()(x), y)
    after = weights(model.model)
    assert after.keys() == before.keys()
    assert not equal(after, before)


class Deadly(Dataset):
    """Kills the process that reads its n-th sample, once."""

    def __init__(self, n: int, flag: Path) -> None:
        self.data, self.n, self.flag = dataset(), n, flag

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        if index == self.n and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.data[index]


def over_workers(data, compression, **settings):
    model = LeptonDistributedModel(
        mlp(), DataPartitioner(data, batch_size=16), SynchronousUpdate(compression, automatic=False)
    )
    model.configure(ResourceManager(2, 2))
    report = model.train(nn.functional.cross_entropy, sgd, epochs=3, **settings)
    assert report.workers == 2
    return weights(model.model)


@pytest.mark.slow
def test_two_workers_train_as_one(tmp_path):
    """The mean of two halves' gradients is the gradient of the whole batch, but for rounding."""
    alone, report = trained(epochs=3)
    start = weights(mlp())
    for compression, bound in (("fp32", 1e-5), ("int8", 2e-2)):
        update = SynchronousUpdate(compression, automatic=False)
        model = LeptonDistributedModel(mlp(), DataPartitioner(dataset(), batch_size=16), update)
        both = model.configure(ResourceManager(2, 2)).train(nn.functional.cross_entropy, sgd, epochs=3)
        assert (both.steps, both.samples) == (report.steps, report.samples)
        moved = sum((w - start[name]).square().sum() for name, w in weights(alone.model).items()) ** 0.5
        apart = sum((w - weights(alone.model)[name]).square().sum() for name, w in weights(model.model).items()) ** 0.5
        assert apart < bound * moved, compression
        torch.testing.assert_close(both.losses, report.losses, rtol=bound, atol=0)


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(tmp_path):
    settings = {"epochs": 3, "checkpoint": tmp_path, "checkpoint_every": 5}
    model = LeptonDistributedModel(
        mlp(), DataPartitioner(dataset(), batch_size=16), SynchronousUpdate("int8", automatic=False)
    )
    model.configure(ResourceManager(2, 2)).train(nn.functional.cross_entropy, sgd, steps=10, **settings)
    first = weights(model.model)
    alone, report = trained(**settings)  # steps of 32 samples, too
    assert (report.steps, report.workers, report.samples) == (11, 1, 600 - 200 - 3 * 32)
    whole, _ = trained(epochs=3)
    apart = sum((w - weights(whole.model)[n]).square().sum() for n, w in weights(alone.model).items()) ** 0.5
    moved = sum((w - first[n]).square().sum() for n, w in weights(alone.model).items()) ** 0.5
    assert apart < 0.05 * moved


@pytest.mark.slow
def test_a_killed_worker_resumes_to_the_same_bits(tmp_path):
    undisturbed = over_workers(dataset(), "int8")
    deadly = Deadly(77, tmp_path / "killed")
    resumed = over_workers(deadly, "int8", checkpoint=tmp_path / "steps", checkpoint_every=5)
    assert deadly.flag.exists()
    assert equal(resumed, undisturbed)


SCRIPT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    from torch import nn
    from test_distributed_model import Deadly, dataset, loss_over, mlp, sgd
    from lepton_ai import LeptonDistributedModel
    from lepton_ai.distributed import DataPartitioner, SynchronousUpdate

    flag, folder, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    data = Deadly(77, flag)
    update = SynchronousUpdate("int8", automatic=False)
    model = LeptonDistributedModel(mlp(), DataPartitioner(data, batch_size=16), update)
    report = model.train(
        nn.functional.cross_entropy, sgd, epochs=3, checkpoint=folder, checkpoint_every=5, evaluate=loss_over
    )
    assert report.metric_after < report.metric_before
    x = torch.arange(80.0).reshape(5, 16) / 80
    torch.save((model.model.state_dict(), model.inference(x)), f"{{out}}.{{torch.initial_seed()}}")
    torch.save((model.model.state_dict(), model.inference(x)), out)
"""


@pytest.mark.slow
def test_under_torchrun_a_killed_worker_resumes_to_the_same_bits(tmp_path):
    undisturbed = over_workers(dataset(), "int8")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent))))
    flag, out = tmp_path / "killed", tmp_path / "out.pt"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3",
         str(script), str(flag), str(tmp_path / "steps"), str(out)],
        check=True, timeout=200, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert flag.exists()
    state, y = torch.load(out)
    assert equal(state, undisturbed)
    expected = mlp()
    expected.load_state_dict(state)
    torch.testing.assert_close(y, expected.eval()(torch.arange(80.0).reshape(5, 16) / 80))


def check_inference() -> None:
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(3))
    compressed = LeptonModel(mlp()).compress(Quantization("w8a8"))
    expected = compressed.model.eval()(x)
    for parallel in (ModelParallel(), ModelParallel(tensor=2)):
        model = LeptonDistributedModel(compressed, parallel=parallel)
        assert torch.equal(model.inference(x), expected)
        assert torch.equal(model.inference(x[:1]), expected[:1])
    staged = LeptonDistributedModel(mlp(), parallel=ModelParallel(pipeline=2))
    torch.testing.assert_close(staged.inference(x[:4]), mlp().eval()(x[:4]))


def check_pipeline_training() -> None:
    data = dataset(64)
    expected = by_hand(data, 16, 2).state_dict()
    staged = LeptonDistributedModel(
        mlp(), DataPartitioner(data, batch_size=16), parallel=ModelParallel(pipeline=2, microbatches=4)
    )
    staged.train(nn.functional.cross_entropy, sgd, epochs=2)
    for name, weight in weights(staged.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


def check_metric() -> None:
    """Rank 0's number is everyone's."""
    job = LeptonDistributedModel(mlp(), DataPartitioner(dataset(64), batch_size=16))
    report = job.train(nn.functional.cross_entropy, sgd, evaluate=lambda module: 0.25 + dist.get_rank())
    assert (report.metric_before, report.metric_after) == (0.25, 0.25)


def check_ranks() -> None:
    check_metric()
    check_inference()
    check_pipeline_training()


@pytest.mark.slow
def test_ranks_of_a_launcher():
    processes.run(check_ranks, 2)
