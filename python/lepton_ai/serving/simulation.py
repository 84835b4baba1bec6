"""simulate: a scaling policy on fleets and loads that no test machine has, beside a fleet sized for the peak.

Every request is an event: it arrives (Poisson, at the load's rate), waits in one queue for all replicas, first in first
out, and is served by the replica that has been free longest, for a time drawn from recorded ones, over the replica's
speed. Free replicas so get load in proportion to their speed (Atar, "Central limit theorem for a many-server queue with
random service rates", Annals of Applied Probability 18, 2008), and price decides which nodes run. A heap of the times
at which replicas become free makes this exact and quick: some 0.6 microseconds a request and fleet, so an hour of 10 000
requests a second (36 million) takes under a minute for both fleets.

What is approximated:
- Between two samples (`step` seconds) the rate of arrivals is constant, and nodes fail, are drained or begin to start
  only at samples. Those that start are ready at their own time.
- A node runs one replica, which serves one request at a time; it is found dead at the next sample, and its request
  is sent again. Draining nodes finish their request and do not fail meanwhile.
- Way, dispatch and measurement take no time, and service times do not depend on each other.
- Quantiles are of a histogram whose bins are 0.5 % wide.
"""

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lepton_ai.cost import cost_per_million
from lepton_ai.serving.autoscaler import Autoscaler, LoadSample, ScalingPolicy

Load = Callable[[float], float]  # requests a second at a time in seconds
QUANTILES = (0.5, 0.95, 0.99)
UPDATE_SHARE = 0.05  # of the nodes are replaced at a time by a rolling update
_LEAST_LATENCY, _BIN = 1e-6, math.log(1.005)
_BINS = int(math.log(1e12) / _BIN)


def steady(rate: float) -> Load:
    """Always `rate` requests a second."""
    return lambda time: rate


def diurnal(peak: float, low: float = 0.3, period: float = 86400.0) -> Load:
    """A sine from low * peak, at time 0, to peak and back in `period` seconds."""
    return lambda time: peak * (low + (1 - low) * (1 - math.cos(2 * math.pi * time / period)) / 2)


def step(rate: float, factor: float, begin: float, end: float = math.inf) -> Load:
    """rate, and factor * rate from second `begin` to `end`."""
    return lambda time: rate * factor if begin <= time < end else rate


def burst(rate: float, factor: float, every: float, lasting: float) -> Load:
    """rate, and factor * rate in the last `lasting` of every `every` seconds."""
    return lambda time: rate * factor if time % every >= every - lasting else rate


@dataclass(frozen=True)
class NodeKind:
    """Nodes that can be had: how many, how fast (recorded service times over it), an hour's price, time to start.

    Raises ValueError for values that do not fit.
    """

    name: str
    count: int
    speed: float = 1.0
    price_per_hour: float = 0.0
    startup_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("count", self.count >= 1, "1 or more"),
            ("speed", 0 < self.speed < math.inf, "a finite number over 0"),
            ("price_per_hour", 0 <= self.price_per_hour < math.inf, "a finite number, 0 or more"),
            ("startup_seconds", 0 <= self.startup_seconds < math.inf, "a finite number, 0 or more"),
        ):
            if not fits:
                raise ValueError(f"NodeKind {self.name}: {name} is {getattr(self, name)!r}; allowed: {allowed}")


@dataclass(frozen=True)
class FleetResult:
    """What became of the requests and what it cost. Latencies from arrival to answer, in seconds; NaN without any.

    refused: the queue was full. retried: sent again, as their node died. unfinished: still waiting at the end.
    replica_hours, price: of all nodes, from the order to start until the last answer. flips: how often the number of
    replicas that was asked for turned from growing to shrinking or back. most, least: replicas asked for, in multiples of
    a node of speed 1.
    """

    requests: int
    served: int
    refused: int
    retried: int
    unfinished: int
    p50: float
    p95: float
    p99: float
    mean_wait: float
    replica_hours: float
    price: float
    price_per_million: float
    flips: int
    least: int
    most: int


@dataclass(frozen=True)
class SimulationResult:
    """scaled: under the policy. fixed: as many nodes all the time as the policy would have at the load's peak."""

    scaled: FleetResult
    fixed: FleetResult
    seconds: float
    seed: int
    timeline: tuple[tuple[float, float, int], ...]  # of the scaled fleet, by sample: time, rate, replicas asked for

    def as_dict(self) -> dict[str, Any]:
        """Plain values without the timeline, for JSON, which has no NaN: it is None here."""
        out: dict[str, Any] = {"seconds": self.seconds, "seed": self.seed}
        for name, result in (("scaled", self.scaled), ("fixed", self.fixed)):
            values = dataclasses.asdict(result)
            out[name] = {key: None if value != value else value for key, value in values.items()}
        return out


@dataclass
class _Node:
    kind: NodeKind
    since: float
    ready_at: float
    generation: int
    leaving: bool = False


# When a replica is or becomes free, its node's number, and of its last request the arrival and the service time at speed 1.
_Entry = tuple[float, int, float, float]


class _Fleet:
    """Nodes, their queue, and what they did."""

    def __init__(
        self, kinds: Sequence[NodeKind], replicas: int, scaler: Autoscaler | None, queue_limit: int, failures: float,
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self.kinds = sorted(kinds, key=lambda kind: kind.price_per_hour / kind.speed)
        self.scaler, self.queue_limit, self.failures, self.rng = scaler, queue_limit, failures, rng
        self.replicas = self.least = self.most = replicas
        self.nodes: dict[int, _Node] = {}
        self.free: list[_Entry] = []  # a heap, of the nodes that are ready
        self.starting: dict[int, _Node] = {}
        self.queue: deque[tuple[float, float]] = deque()  # arrival, service time at speed 1
        self.draining: list[float] = []  # when their last answers come
        self.seconds = dict.fromkeys((kind.name for kind in kinds), 0.0)
        self.histogram = np.zeros(_BINS, np.int64)
        self.refused = self.retried = self.flips = self.direction = self.generation = self.numbered = 0
        self.wait = 0.0
        self.requests = self.completions = self.arrivals = 0
        self.work: float | None = None  # mean service time at speed 1 of the requests begun in the last step
        self._in_flight = 0
        self._grow(0.0)
        for number, node in list(self.starting.items()):
            node.ready_at = 0.0
            self._ready(number)

    def capacity(self) -> float:
        """Nodes of speed 1 that those which stay are worth, the starting ones too."""
        ready = sum(node.kind.speed for node in self.nodes.values() if not node.leaving)
        return ready + sum(node.kind.speed for node in self.starting.values())

    def _spare(self, kind: NodeKind) -> int:
        used = sum(node.kind is kind for nodes in (self.nodes, self.starting) for node in nodes.values())
        return kind.count - used

    def _next(self, missing: float) -> NodeKind | None:
        """The kind to start: the cheapest for its speed, or at the end the cheapest that does."""
        spare = [kind for kind in self.kinds if self._spare(kind) > 0]
        if not spare or spare[0].speed <= missing:
            return spare[0] if spare else None
        enough = [kind for kind in spare if kind.speed >= missing]
        return min(enough, key=lambda kind: kind.price_per_hour)

    def _start(self, kind: NodeKind, now: float) -> None:
        self.numbered += 1
        self.starting[self.numbered] = _Node(kind, now, now + kind.startup_seconds, self.generation)

    def _grow(self, now: float) -> None:
        missing = self.replicas - self.capacity()
        while missing > 1e-9 and (kind := self._next(missing)) is not None:
            self._start(kind, now)
            missing -= kind.speed

    def _ready(self, number: int) -> None:
        node = self.nodes[number] = self.starting.pop(number)
        heapq.heappush(self.free, (node.ready_at, number, 0.0, 0.0))

    def _shrink(self, now: float) -> None:
        """Ends the nodes that are too many: those that still start, then the dearest for their speed, idle ones first."""
        surplus = self.capacity() - self.replicas
        for number, node in sorted(self.starting.items(), key=lambda item: -item[1].ready_at):
            if node.kind.speed <= surplus:
                surplus -= node.kind.speed
                self._pay(self.starting.pop(number), now)
        if surplus < min(kind.speed for kind in self.kinds):
            return
        drained = set()
        for entry in sorted(self.free, key=lambda e: (-self.kinds.index(self.nodes[e[1]].kind), e[0])):
            node = self.nodes[entry[1]]
            if node.kind.speed <= surplus and not node.leaving:
                surplus -= node.kind.speed
                drained.add(entry[1])
        self._drain(drained, now)

    def _drain(self, numbers: set[int], now: float) -> None:
        for finish, number, *_ in self.free:
            if number in numbers:
                self._pay(self.nodes.pop(number), max(now, finish))
                if finish > now:
                    self.draining.append(finish)
        self.free = [entry for entry in self.free if entry[1] not in numbers]
        heapq.heapify(self.free)

    def _pay(self, node: _Node, until: float) -> None:
        self.seconds[node.kind.name] += until - node.since

    def _fail(self, now: float, seconds: float) -> None:
        """Each node dies with the chance that `failures` an hour gives; requests in service go back to the queue's head."""
        numbers = [*self.nodes, *self.starting]
        dead = self.rng.random(len(numbers)) < -math.expm1(-self.failures * seconds / 3600)
        gone = {number for number, died in zip(numbers, dead, strict=True) if died}
        if not gone:
            return
        for number in gone & self.starting.keys():
            self._pay(self.starting.pop(number), now)
        cut = sorted((entry for entry in self.free if entry[1] in gone and entry[0] > now and entry[3]), key=lambda e: e[2])
        for finish, number, arrival, work in reversed(cut):
            self.histogram[_bins(np.array([finish - arrival]))] -= 1
            self.wait -= finish - work / self.nodes[number].kind.speed - arrival
            self.queue.appendleft((arrival, work))
        self.retried += len(cut)
        self._in_flight -= len(cut)
        for number in gone & self.nodes.keys():
            self._pay(self.nodes.pop(number), now)
        self.free = [entry for entry in self.free if entry[1] not in gone]
        heapq.heapify(self.free)

    def _update(self, now: float) -> None:
        """Goes on replacing nodes of an older generation, some at a time: the new ones first, where there is room."""
        leaving = {number for number, node in self.nodes.items() if node.leaving}
        if leaving:
            if self.starting:
                return
            self._drain(leaving, now)
        old = [number for number, node in self.nodes.items() if node.generation < self.generation]
        for number in old[: max(1, math.ceil(UPDATE_SHARE * len(self.nodes)))]:
            node = self.nodes[number]
            if self._spare(node.kind) > 0:
                node.leaving = True
                self._start(node.kind, now)
            else:
                self._drain({number}, now)  # its place is taken by the next start

    def advance(self, now: float, seconds: float, update: bool) -> None:
        """What happens at a sample: deaths, nodes that are ready, the decision, an update."""
        self.draining = [finish for finish in self.draining if finish > now]
        if self.failures:
            self._fail(now, seconds)
        if self.scaler is not None:
            self._decide(self.scaler, now)
        self.generation += update
        self._update(now)
        self._grow(now)
        self._shrink(now)
        # One that gets ready within the step takes no request before it is.
        for number in [n for n, node in self.starting.items() if node.ready_at < now + seconds]:
            self._ready(number)

    def _decide(self, scaler: Autoscaler, now: float) -> None:
        upcoming = self._next(1.0)
        sample = LoadSample(
            time=now,
            ready=int(sum(node.kind.speed for node in self.nodes.values())),
            starting=int(sum(node.kind.speed for node in self.starting.values())),
            waiting=len(self.queue),
            in_flight=self._in_flight,
            arrivals=self.arrivals,
            completions=self.completions,
            service_seconds=self.work,
            startup_seconds=upcoming.startup_seconds if upcoming else 0.0,
        )
        change = scaler.desired(sample).replicas - self.replicas
        if change:
            direction = 1 if change > 0 else -1
            self.flips += self.direction == -direction
            self.direction = direction
        self.replicas += change
        self.least, self.most = min(self.least, self.replicas), max(self.most, self.replicas)

    def serve(self, arrivals: list[float], works: list[float], end: float) -> None:
        """Begins to serve what waits and what arrives, as far as it begins before `end`; the rest waits or is refused."""
        free = self.free or [(math.inf, 0, 0.0, 0.0)]
        pace = {number: 1 / node.kind.speed for number, node in self.nodes.items()}
        starts: list[float] = []
        latencies: list[float] = []
        left: deque[tuple[float, float]] = deque()
        heapreplace = heapq.heapreplace
        waited = worked = 0.0
        refused = begun = 0  # begun: how many of `starts` lie before the arrival that is looked at
        for admitted, pairs in ((True, self.queue), (False, zip(arrivals, works, strict=True))):
            for arrival, work in pairs:
                start, number, _, _ = free[0]
                if start < arrival:
                    start = arrival
                elif not admitted:
                    while begun < len(starts) and starts[begun] <= arrival:
                        begun += 1
                    if len(starts) - begun + len(left) >= self.queue_limit:
                        refused += 1
                        continue
                if start >= end:
                    left.append((arrival, work))
                    continue
                finish = start + work * pace[number]
                heapreplace(free, (finish, number, arrival, work))
                starts.append(start)
                latencies.append(finish - arrival)
                waited += start - arrival
                worked += work
        self.queue = left
        self.refused += refused
        self.requests += len(arrivals)
        self.arrivals = len(arrivals)
        self.wait += waited
        self.work = worked / len(starts) if starts else None
        self.histogram += np.bincount(_bins(np.array(latencies)), minlength=_BINS)
        running = sum(entry[0] > end for entry in self.free) + sum(finish > end for finish in self.draining)
        self.completions = max(0, len(starts) + self._in_flight - running)
        self._in_flight = running

    def result(self, now: float) -> FleetResult:
        for node in (*self.nodes.values(), *self.starting.values()):
            self._pay(node, now)
        served = int(self.histogram.sum())
        below = self.histogram.cumsum()
        quantiles = [
            _LEAST_LATENCY * math.exp(_BIN * (int(np.searchsorted(below, q * served)) + 0.5)) if served else math.nan
            for q in QUANTILES
        ]
        prices = {kind.name: kind.price_per_hour for kind in self.kinds}
        each = [cost_per_million(s / served, prices[name]) if served else math.nan for name, s in self.seconds.items()]
        return FleetResult(
            self.requests, served, self.refused, self.retried, len(self.queue), *quantiles,
            self.wait / served if served else math.nan, sum(self.seconds.values()) / 3600,
            sum(s / 3600 * prices[name] for name, s in self.seconds.items()), sum(each), self.flips, self.least, self.most,
        )  # fmt: skip


def _bins(latencies: np.ndarray) -> np.ndarray:
    return (np.log(np.maximum(latencies, _LEAST_LATENCY) / _LEAST_LATENCY) / _BIN).astype(np.int64)


def simulate(
    load: Load,
    seconds: float,
    kinds: Sequence[NodeKind],
    service_seconds: Sequence[float],
    policy: ScalingPolicy,
    *,
    seed: int = 0,
    failures: float = 0.0,
    updates: Sequence[float] = (),
    queue_limit: int = 10_000,
    step: float = 1.0,
) -> SimulationResult:
    """Runs the same requests against a fleet that the policy scales and one sized for the peak of the load.

    service_seconds: recorded times of single requests on a node of speed 1, drawn from at random. policy: its replicas
    are nodes of speed 1, and a faster node counts as several. Both fleets begin with what the load needs (the fixed one:
    at its peak), ready. failures: share of the nodes that die in an hour; they are replaced. updates: when all nodes are
    replaced, some at a time. queue_limit: requests that may wait, others are refused. step: seconds between samples.
    Raises ValueError for values that do not fit, or nodes that are worth less than the policy's max_replicas.
    """
    works = np.asarray(service_seconds, dtype=np.float64)
    if works.ndim != 1 or not len(works) or not (np.isfinite(works).all() and (works > 0).all()):
        raise ValueError("simulate: service_seconds is empty or has other values; allowed: finite seconds over 0")
    for name, fits, value, allowed in (
        ("seconds", step <= seconds < math.inf, seconds, f"a finite number, step ({step:g}) or more"),
        ("step", 0 < step < math.inf, step, "a finite number over 0"),
        ("failures", 0 <= failures < math.inf, failures, "a finite number, 0 or more"),
        ("queue_limit", queue_limit >= 1, queue_limit, "1 or more"),
        ("kinds", len({kind.name for kind in kinds}) == len(kinds) > 0, kinds, "one or more, with names of their own"),
    ):
        if not fits:
            raise ValueError(f"simulate: {name} is {value!r}; allowed: {allowed}")
    worth = sum(kind.count * kind.speed for kind in kinds)
    if worth < policy.max_replicas:
        raise ValueError(
            f"simulate: kinds are worth {worth:g} replicas of speed 1; allowed: max_replicas ({policy.max_replicas}) or "
            "more"
        )
    begins = np.arange(round(seconds / step)) * step
    rates = [load(begin + step / 2) for begin in begins]
    if not all(0 <= rate < math.inf for rate in rates):
        raise ValueError("simulate: load gives a rate that is negative or not finite; allowed: 0 or more")
    mean = float(works.mean())
    first, peak = (policy.replicas_for(rate * mean, mean) for rate in (rates[0], max(rates)))
    arrivals_rng, *fleet_rngs = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3))
    scaled = _Fleet(kinds, first, Autoscaler(policy), queue_limit, failures, fleet_rngs[0])
    fixed = _Fleet(kinds, peak, None, queue_limit, failures, fleet_rngs[1])
    timeline = []
    for begin, rate in zip(begins.tolist(), rates, strict=True):
        count = arrivals_rng.poisson(rate * step)
        arrivals = (begin + step * np.sort(arrivals_rng.random(count))).tolist()
        drawn = works[arrivals_rng.integers(len(works), size=count)].tolist()
        update = any(begin <= time < begin + step for time in updates)
        for fleet in (scaled, fixed):
            fleet.advance(begin, step, update)
            fleet.serve(arrivals, drawn, begin + step)
        timeline.append((begin, rate, scaled.replicas))
    end = len(begins) * step
    return SimulationResult(scaled.result(end), fixed.result(end), end, seed, tuple(timeline))
