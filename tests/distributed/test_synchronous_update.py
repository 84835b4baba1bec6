"""SynchronousUpdate: what two and three ranks average, send, keep and say."""

import pickle

import processes
import pytest
import torch
import torch.distributed as dist
from lepton_ai.distributed import SynchronousUpdate, compressed_mean
from lepton_ai.distributed.compressed_mean import CompressedMean, PeerError, shares_of
from lepton_ai.distributed.synchronous_update import ring_bytes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lepton_kernels import blockwise, reference


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"compression": "int3"}, "compression is 'int3'; allowed: fp32, bf16, fp16, int8, int4"),
        ({"timeout": 0}, "timeout is 0; allowed: seconds, more than 0"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        SynchronousUpdate(**arguments)


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 1000, 4096])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shares_are_whole_blocks_of_all_values(n, ranks):
    sizes = shares_of(n, ranks)
    assert len(sizes) == ranks
    assert sum(sizes) == n
    full = [size for size in sizes if size]
    assert all(size % blockwise.BLOCK == 0 for size in full[:-1])
    assert sizes == sorted(sizes, reverse=True)


def test_state_of_another_compression_is_refused():
    state = SynchronousUpdate("int8").state_dict()
    with pytest.raises(ValueError, match="compression is 'int8'; allowed: 'int4'"):
        SynchronousUpdate("int4").load_state_dict(state)


def test_it_pickles():
    update = pickle.loads(pickle.dumps(SynchronousUpdate("int4", error_feedback=False, timeout=7)))
    assert (update.compression, update.error_feedback, update.timeout) == ("int4", False, 7)


PIECE = 1024  # of which a rank owns so many values: several pieces in the larger buffers


def sizes_of(n, ranks):
    """The shares of all pieces, one after another."""
    step = PIECE * ranks
    return [size for begin in range(0, n, step) for size in shares_of(min(step, n - begin), ranks)]


def expected_mean(buffers, residuals, bits):
    """What compressed_mean.py says, by the reference: each rank's buffer, its owner's mean, quantized again."""
    n, ranks = buffers[0].numel(), len(buffers)
    out, begin = torch.empty(n), 0
    for size in sizes_of(n, ranks):
        part = slice(begin, begin + size)
        packed = [
            reference.quantize_blockwise(buffer[part], bits, None if lost is None else lost[part])[0]
            for buffer, lost in zip(buffers, residuals, strict=True)
        ]
        mean = reference.mean_blockwise(torch.stack(packed), size, bits)
        out[part] = reference.dequantize_blockwise(reference.quantize_blockwise(mean, bits)[0], size, bits)
        begin += size
    return out


def check_means() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    compressed_mean._PIECE = PIECE
    for bits in (8, 4):
        mean = CompressedMean(bits, None, 30)
        sizes = (1, 127, 128 * ranks, 1000, 5003, 1024 * ranks, 9000)
        generators = [torch.Generator().manual_seed(r) for r in range(ranks)]
        buffers = [[torch.randn(n, generator=g) for n in sizes] for g in generators]
        residuals = [[torch.randn(n, generator=g) / 100 for n in sizes] for g in generators]
        mine = [lost.clone() for lost in residuals[rank]]
        futures = [
            mean.start(buffer.clone(), lost if i % 2 else None)
            for i, (buffer, lost) in enumerate(zip(buffers[rank], mine, strict=True))
        ]
        sent = 0
        for i, (n, future) in enumerate(zip(sizes, futures, strict=True)):
            lost = [residuals[r][i] if i % 2 else None for r in range(ranks)]
            expected = expected_mean([buffers[r][i] for r in range(ranks)], lost, bits)
            assert torch.equal(future.wait(), expected), (bits, n)
            packed = [blockwise.packed_bytes(size, bits) for size in sizes_of(n, ranks)]
            own = sum(packed[rank::ranks])
            sent += sum(packed) - own + (ranks - 1) * own
        assert mean.bytes_sent == sent
        mean.close()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_compressed_means_are_those_of_the_reference(ranks):
    processes.run(check_means, ranks)


def gradients_of(update: SynchronousUpdate, steps: int) -> list[torch.Tensor]:
    """The averaged gradients of a small network over some steps, without any optimizer."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 7)))
    update.attach(model)
    generator = torch.Generator().manual_seed(dist.get_rank())
    total = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(steps):
        model(torch.randn(8, 40, generator=generator)).square().mean().backward()
        for sum_of, p in zip(total, model.parameters(), strict=True):
            sum_of += p.grad
        model.zero_grad()
    update.detach()
    return total


def same_everywhere(tensors: list[torch.Tensor]) -> bool:
    flat = torch.cat([t.flatten() for t in tensors])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    return all(torch.equal(other, flat) for other in others)


def check_updates() -> None:
    steps = 20
    exact = gradients_of(SynchronousUpdate("fp32"), steps)
    norm = torch.cat([g.flatten() for g in exact]).norm()
    errors = {}
    for compression, feedback in (("bf16", True), ("fp16", True), ("int8", True), ("int4", True), ("int4", False)):
        update = SynchronousUpdate(compression, error_feedback=feedback, automatic=False)
        sums = gradients_of(update, steps)
        assert same_everywhere(sums), compression
        difference = torch.cat([(a - b).flatten() for a, b in zip(sums, exact, strict=True)])
        errors[compression, feedback] = float(difference.norm() / norm)
        stats = update.stats()
        assert (stats.steps, stats.active, stats.compression) == (steps, True, compression)
        fewer = {"bf16": 2, "fp16": 2, "int8": 3.8, "int4": 7.3}[compression]
        assert stats.bytes_fp32 >= 0.98 * fewer * stats.bytes_sent  # the last block of a share is not full
    assert errors["bf16", True] < 1e-2
    assert errors["fp16", True] < 1e-3
    assert errors["int8", True] < 1e-2
    # Feedback carries a step's rounding on, where without it all of them add up; the owners' second rounding stays.
    assert errors["int4", True] < 0.9 * errors["int4", False], errors


def check_resume() -> None:
    """A run in two parts, with the state in between, has the residuals of one in one part."""

    def residuals(update: SynchronousUpdate) -> dict[str, torch.Tensor]:
        return update.state_dict()["residuals"]

    whole = SynchronousUpdate("int8", automatic=False)
    gradients_of(whole, 3)
    first, second = SynchronousUpdate("int8", automatic=False), SynchronousUpdate("int8", automatic=False)
    gradients_of(first, 3)
    assert all(torch.equal(lost, residuals(whole)[name]) for name, lost in residuals(first).items())
    assert any(bool(lost.any()) for lost in residuals(first).values())
    second.load_state_dict(first.state_dict())
    assert residuals(second).keys() == residuals(first).keys()
    gradients_of(first, 2)
    gradients_of(second, 2)
    assert all(torch.equal(lost, residuals(first)[name]) for name, lost in residuals(second).items())


def check_decision() -> None:
    """Compression turns itself off where it is slower; every rank decides alike, and says what it saw."""
    update = SynchronousUpdate("int8")
    gradients_of(update, 1)
    stats = update.stats()
    assert stats.seconds_plain > 0
    assert stats.seconds_compressed > 0
    assert stats.active == (stats.seconds_compressed < 0.95 * stats.seconds_plain)
    assert same_everywhere([torch.tensor([float(stats.active), stats.seconds_plain])])
    assert stats.bytes_sent <= stats.bytes_fp32


def check_everything() -> None:
    check_updates()
    check_resume()
    check_decision()


@pytest.mark.slow
def test_ddp_with_every_compression():
    processes.run(check_everything, 2)


def check_missing() -> None:
    """Rank 1 does not take part: rank 0 says so."""
    mean = CompressedMean(8, None, 4)
    if dist.get_rank() == 0:
        future = mean.start(torch.ones(300), None)
        with pytest.raises(PeerError, match="rank 1 did not answer"):
            future.wait()
    mean.close()


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_named():
    processes.run(check_missing, 2)


def test_ring_bytes():
    assert ring_bytes(1000, 1) == 0
    assert ring_bytes(1000, 2) == 1000
    assert ring_bytes(900, 3) == 1200
