"""DataPartitioner: every sample once whatever world sizes serve an epoch, equal steps, weights, resuming, errors."""

import itertools
import json
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from lepton_ai.distributed import DataPartitioner
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset


class Recorded(Dataset):
    """The squares below size**2; remembers which were read."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        assert type(index) is int  # a tensor or numpy integer would surprise a dataset
        assert 0 <= index < self.size
        self.read.append(index)
        return index**2


class Fetched(Recorded):
    """Reads lists of indices alone."""

    def __getitem__(self, index: int) -> int:
        raise AssertionError("one by one")

    def __getitems__(self, indices: list[int]) -> list[int]:
        assert isinstance(indices, list)
        return [super(Fetched, self).__getitem__(index) for index in indices]


class Stream(IterableDataset):
    """The same squares, in order; has a length, as an IterableDataset may."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self):
        return iter([i**2 for i in range(self.size)])

    def __len__(self) -> int:
        return self.size


KINDS = {
    "shuffled": lambda size, *args, **options: DataPartitioner(Recorded(size), *args, **options),
    "in order": lambda size, *args, **options: DataPartitioner(Recorded(size), *args, shuffle=False, **options),
    "stream": lambda size, *args, **options: DataPartitioner(Stream(size), *args, **options),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def ranks(make, world_size: int, state: dict | None = None) -> list[DataPartitioner]:
    parts = [make(collate_fn=list).bind(rank, world_size) for rank in range(world_size)]
    for part in parts if state is not None else []:
        part.load_state_dict(state)
    return parts


def serve(parts: list[DataPartitioner], steps: int | None = None) -> list[int]:
    """What all ranks together get in so many steps, or in the rest of the epoch; every rank takes as many steps."""
    samples = []
    for batches in itertools.islice(zip(*parts, strict=True), steps):
        for part, batch in zip(parts, batches, strict=True):
            assert len(batch) >= 1
            assert part.state_dict() == parts[0].state_dict()
            samples += batch if part.weight else []
    return samples


def epoch_order(make) -> list[int]:
    return serve(ranks(make, 1))


@every_kind
@pytest.mark.parametrize("world_size", range(1, 6))
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_sample_once_in_an_order_without_the_world_size(make, world_size, drop_last):
    for size, batch_size in itertools.product(range(41), range(1, 5)):
        want = epoch_order(lambda size=size, **options: make(size, **options))
        assert sorted(want) == [i**2 for i in range(size)]
        if drop_last:
            want = want[: size - size % (world_size * batch_size)]
        parts = ranks(lambda s=size, b=batch_size, **options: make(s, b, drop_last=drop_last, **options), world_size)
        assert serve(parts) == want
        assert {(part.epoch, part.position) for part in parts} == {(1, 0)}


@pytest.mark.parametrize("drop_last", [False, True])
def test_len_counts_the_steps_of_a_whole_epoch(drop_last):
    for size, world_size, batch_size in itertools.product(range(14), (1, 2, 3), (1, 2, 5)):
        part = DataPartitioner(range(size), batch_size, drop_last=drop_last).bind(world_size - 1, world_size)
        steps = len(part)
        next(iter(part), None)
        assert len(part) == steps
        part.load_state_dict({**part.state_dict(), "epoch": 0, "position": 0})
        assert sum(1 for _ in part) == steps


@every_kind
def test_tail_is_dealt_evenly_and_a_rank_without_a_sample_repeats_the_last(make):
    for world_size, batch_size, tail in itertools.product(range(1, 6), range(1, 5), range(1, 20)):
        if tail > world_size * batch_size:
            continue
        parts = ranks(lambda t=tail, b=batch_size, **options: make(t, b, **options), world_size)
        (batches,) = zip(*parts, strict=True)
        sizes = [len(batch) if part.weight else 0 for part, batch in zip(parts, batches, strict=True)]
        assert sum(sizes) == tail
        assert max(sizes) - min(sizes) <= 1
        assert [part.weight for part in parts] == [size * world_size / tail for size in sizes]
        last = batches[min(tail, world_size) - 1][-1]
        assert all(batch == [last] for size, batch in zip(sizes, batches, strict=True) if not size)


@pytest.mark.parametrize(("size", "world_size", "batch_size"), [(7, 4, 1), (11, 3, 4), (5, 5, 3), (9, 2, 8)])
def test_weighted_gradients_average_to_that_of_the_step(rng, size, world_size, batch_size):
    x = torch.randn(size, 3, generator=rng, dtype=torch.float64)
    y = torch.randn(size, generator=rng, dtype=torch.float64)
    w = torch.randn(3, generator=rng, dtype=torch.float64, requires_grad=True)

    def gradient(x, y, weight=1.0):
        return torch.autograd.grad(weight * ((x @ w - y) ** 2).mean(), w)[0]

    def partitioner(batch_size):
        return DataPartitioner(TensorDataset(x, y), batch_size, seed=3)

    parts = [partitioner(batch_size).bind(rank, world_size) for rank in range(world_size)]
    steps = list(partitioner(batch_size * world_size).bind(0, 1))
    for batches, (step_x, step_y) in zip(zip(*parts, strict=True), steps, strict=True):
        got = sum(gradient(*batch, part.weight) for part, batch in zip(parts, batches, strict=True)) / world_size
        # A sum of the samples' gradients in another order, each rounded in four operations, then a mean.
        largest = max(gradient(step_x[i : i + 1], step_y[i : i + 1]).abs().max() for i in range(len(step_x)))
        bound = (len(step_x) + 4) * torch.finfo(torch.float64).eps * largest
        assert (got - gradient(step_x, step_y)).abs().max() <= bound


@every_kind
def test_resuming_after_every_step_with_any_world_size_covers_the_rest(make):
    size, batch_size = 23, 2
    order = epoch_order(lambda **options: make(size, **options))
    for world_size, next_world_size, next_batch_size in itertools.product((1, 2, 3), (1, 2, 4), (2, 3)):
        steps = -(-size // (world_size * batch_size))
        for step in range(steps + 1):
            parts = ranks(lambda **options: make(size, batch_size, **options), world_size)
            before = serve(parts, step)
            state = json.loads(json.dumps(parts[-1].state_dict()))
            resumed = ranks(lambda b=next_batch_size, **options: make(size, b, **options), next_world_size, state)
            assert state["position"] == len(before)
            assert before + serve(resumed) == order
            assert {(part.epoch, part.position) for part in resumed} == {(1, 0)}


def test_a_new_iterator_goes_on_behind_the_last_batch():
    part = DataPartitioner(range(6), 2, shuffle=False, collate_fn=list)
    assert next(iter(part)) == [0, 1]
    assert (part.epoch, part.position) == (0, 2)
    assert list(part) == [[2, 3], [4, 5]]
    assert (part.epoch, part.position) == (1, 0)
    for batch in part:
        if batch == [4, 5]:
            break
    assert (part.epoch, part.position) == (1, 6)
    assert list(part) == []
    assert (part.epoch, part.position) == (2, 0)


@pytest.mark.parametrize("kind", [Recorded, Fetched])
def test_resuming_a_map_style_dataset_reads_nothing_that_was_skipped(kind):
    order = [i**2 for i in next(iter(DataPartitioner(range(50), 50, seed=5, collate_fn=list)))]
    data = kind(50)
    part = DataPartitioner(data, 4, seed=5, collate_fn=list).bind(1, 2)
    part.load_state_dict({**part.state_dict(), "position": 40})
    assert list(part) == [order[44:48], order[49:]]
    assert [i**2 for i in data.read] == order[44:48] + order[49:]


def test_a_dataset_of_subsets_is_read_by_lists():
    part = DataPartitioner(Subset(Fetched(9), range(3, 9)), 6, shuffle=False, collate_fn=list)
    assert list(part) == [[i**2 for i in range(3, 9)]]


def test_order_is_torchs_permutation_of_the_documented_seed():
    # The first two outputs of SplitMix64 started at 1234567, as its authors' code gives them.
    for epoch, output in enumerate((6457827717110365317, 3203168211198807973)):
        want = torch.randperm(31, generator=torch.Generator().manual_seed(output >> 32)).tolist()
        part = DataPartitioner(range(31), 31, seed=1234567, collate_fn=list)
        part.epoch = epoch
        with torch.device("meta"):
            assert list(part) == [want]


def test_orders_repeat_for_a_seed_and_differ_between_seeds_and_epochs():
    def orders(seed: int) -> list[tuple[int, ...]]:
        part = DataPartitioner(range(40), 40, seed=seed, collate_fn=tuple)
        return [next(iter(part)) for part.epoch in range(4) for part.position in [0]]

    seeds = [0, 1, 2, -1, 2**32, 2**63]
    assert [orders(seed) for seed in seeds] == [orders(seed) for seed in seeds]
    assert len({order for seed in seeds for order in orders(seed)}) == 4 * len(seeds)


PHASE = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(list(KINDS)), st.integers(0, 60), st.integers(0, 2**64), st.lists(PHASE, min_size=1, max_size=8))
def test_random_schedules_of_world_sizes_see_every_sample_once(kind, size, seed, phases):
    """Each phase is another job: world size, batch size, and after how many steps it ends."""
    epochs = 2
    state, seen = None, []
    for world_size, batch_size, steps in itertools.cycle(phases):
        parts = ranks(lambda b=batch_size, **options: KINDS[kind](size, b, seed=seed, **options), world_size, state)
        seen += serve(parts, steps)
        state = parts[0].state_dict()
        if state["epoch"] == epochs:
            break
    whole = ranks(lambda **options: KINDS[kind](size, seed=seed, **options), 1)
    assert seen == [sample for _ in range(epochs) for sample in serve(whole)]


def test_default_collate_and_other_datasets():
    (batch,) = DataPartitioner(TensorDataset(torch.arange(6).view(3, 2)), 3, shuffle=False)
    assert torch.equal(batch[0], torch.arange(6).view(3, 2))
    assert [batch.tolist() for batch in DataPartitioner([5, 6, 7], 2, shuffle=False)] == [[5, 6], [7]]
    assert [batch.tolist() for batch in DataPartitioner(dict.fromkeys([5, 6, 7]).keys(), 2)] == [[5, 6], [7]]


@pytest.mark.parametrize("dataset", [[], Recorded(0), Fetched(0), Stream(0), TensorDataset(torch.empty(0, 3))])
def test_empty_datasets_have_no_steps(dataset):
    part = DataPartitioner(dataset).bind(1, 3)
    assert list(part) == []
    assert (part.epoch, part.position) == (1, 0)


@every_kind
def test_pickling_keeps_place_and_position(make):
    part = make(10, 2, collate_fn=list, seed=9).bind(1, 2)
    next(iter(part))
    again = pickle.loads(pickle.dumps(part))
    assert again.state_dict() == part.state_dict()
    assert list(again) == list(part)


def test_a_partitioner_moved_under_its_iterator_stops_it():
    def moved(change) -> None:
        part = DataPartitioner(range(20), 2).bind(0, 2)
        batches = iter(part)
        next(batches)
        change(part)
        with pytest.raises(RuntimeError, match="start a new iterator"):
            next(batches)

    moved(lambda part: part.bind(0, 3))
    moved(lambda part: part.load_state_dict({**part.state_dict(), "position": 0}))
    moved(lambda part: next(iter(part)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 11}, "length is 11; allowed: this partitioner's, 10"),
        ({"length": -1}, "length is -1; allowed: this partitioner's, 10"),
        ({"seed": 1}, "seed is 1; allowed: this partitioner's, 0"),
        ({"shuffle": 0}, "shuffle is 0; allowed: this partitioner's, 1"),
        ({"epoch": -1}, "epoch is -1; allowed: 0 or more"),
        ({"position": -1}, "position is -1; allowed: 0 or up to 10"),
        ({"position": 11}, "position is 11; allowed: 0 or up to 10"),
        ({"place": 1}, r"keys are \['epoch', 'length', 'place'"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(change, message):
    part = DataPartitioner(range(10), 2)
    next(iter(part))
    before = part.state_dict()
    assert {type(value) for value in before.values()} == {int}
    with pytest.raises(ValueError, match=message):
        part.load_state_dict({**before, "epoch": 3, "position": 7, **change})
    assert part.state_dict() == before
    with pytest.raises(ValueError, match="keys are"):
        part.load_state_dict({"epoch": 1})


def test_a_stream_shorter_than_the_position_is_an_error():
    part = DataPartitioner(Stream(10), 2)
    with pytest.raises(ValueError, match="position is -1; allowed: 0 or more"):
        part.load_state_dict({**part.state_dict(), "position": -1})
    part.load_state_dict({**part.state_dict(), "position": 11})
    with pytest.raises(ValueError, match="ended after 10 samples; allowed: at least 11"):
        next(iter(part))


def test_arguments_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="batch_size is 0; allowed: 1 or more"):
        DataPartitioner([1], 0)
    with pytest.raises(ValueError, match="shuffle is True and dataset a stream, Stream"):
        DataPartitioner(Stream(3), shuffle=True)
    with pytest.raises(TypeError, match="of a stream, Stream, has no length"):
        len(DataPartitioner(Stream(3)))
    for dataset in (Dataset(), 7, iter([1]), (i for i in range(3))):
        with pytest.raises(TypeError, match=f"dataset is {type(dataset).__name__}; allowed: "):
            DataPartitioner(dataset)
    for place in ((2, 2), (-1, 2), (0, 0), (None, 2), (0, None)):
        with pytest.raises(ValueError, match=r"bind: rank is .*allowed: 0 <= rank < world_size, or None for both"):
            DataPartitioner([1]).bind(*place)


def gloo_rank(rank: int, store: str, order: list[int], bound: DataPartitioner, unbound: DataPartitioner) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        own = 2 * rank
        want = [(order[own : own + 2], 1.0), (order[own + 4 : own + 6], 1.0), (order[8:], 2.0 * (rank == 0))]
        for part in (bound.bind(), unbound):
            assert len(part) == 3
            assert [(batch, part.weight) for batch in part] == want
        states = [None, None]
        dist.all_gather_object(states, bound.state_dict())
        assert states == [{"epoch": 1, "position": 0, "seed": 4, "shuffle": 1, "length": 9}] * 2
    finally:
        dist.destroy_process_group()


def test_processes_of_a_group_find_their_ranks_and_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (order,) = DataPartitioner(range(9), 9, seed=4, collate_fn=list)
    parts = [DataPartitioner(range(9), 2, seed=4, collate_fn=list) for _ in range(2)]
    mp.spawn(gloo_rank, args=(str(tmp_path / "store"), order, *parts), nprocs=2, daemon=True)
