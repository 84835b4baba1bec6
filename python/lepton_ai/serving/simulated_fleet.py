"""SimulatedFleet: nodes that start, serve from one queue, fail and end, with what they did and cost."""

import heapq
import math
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lepton_ai.cost import cost_per_million
from lepton_ai.serving.autoscaler import Autoscaler, LoadSample

_UPDATE_SHARE = 0.05  # of the nodes, replaced at a time by a rolling update


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

    @classmethod
    def parse(cls, text: str) -> "NodeKind":
        """From NAME:COUNT:SPEED:PRICE:STARTUP, as the command line has it. Raises ValueError for anything else."""
        try:
            name, count, speed, price, startup = text.split(":")
            values = int(count), float(speed), float(price), float(startup)
        except ValueError as error:
            raise ValueError(f"--node is {text!r}; allowed: NAME:COUNT:SPEED:PRICE:STARTUP") from error
        return cls(name, *values)


@dataclass(frozen=True)
class FleetResult:
    """What became of the requests and what it cost. Latencies from arrival to answer, in seconds; NaN without any.

    refused: the queue was full. retried: sent again, as their node died. unfinished: still waiting at the end.
    served_by: requests by kind of node. replica_hours, price: of all nodes, from the order to start until their last
    answer. flips: how often the number of replicas that was asked for turned from growing to shrinking or back. least,
    most: replicas asked for, in multiples of a node of speed 1.
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
    served_by: dict[str, int]
    replica_hours: float
    price: float
    price_per_million: float
    flips: int
    least: int
    most: int


class LatencyHistogram:
    """Counts of latencies in bins 0.5 % wide, from a microsecond up."""

    _LEAST, _WIDTH = 1e-6, math.log(1.005)

    def __init__(self) -> None:
        self._counts = np.zeros(int(math.log(1e12) / self._WIDTH), np.int64)

    def _bins(self, seconds: Sequence[float]) -> np.ndarray:
        # fmax: nothing is less than the first bin.
        return (np.log(np.fmax(seconds, self._LEAST) / self._LEAST) / self._WIDTH).astype(np.int64)

    def add(self, seconds: Sequence[float]) -> None:
        """Counts these."""
        self._counts += np.bincount(self._bins(seconds), minlength=len(self._counts))

    def remove(self, seconds: float) -> None:
        """Takes back one that was counted."""
        self._counts[self._bins([seconds])] -= 1

    def __len__(self) -> int:
        return int(self._counts.sum())

    def quantile(self, share: float) -> float:
        """The middle of the bin that holds it; NaN where nothing was counted."""
        if not len(self):
            return math.nan
        found = int(np.searchsorted(self._counts.cumsum(), share * len(self)))
        return self._LEAST * math.exp(self._WIDTH * (found + 0.5))


@dataclass
class _Node:
    kind: NodeKind
    since: float
    ready_at: float
    generation: int
    leaving: bool = False


# When a node becomes free, its number, and of its request the arrival and the service time at speed 1 (0: none).
_Busy = tuple[float, int, float, float]


class SimulatedFleet:
    """As many nodes as a scaler asks for (without one: `replicas`), counted in nodes of speed 1, all ready at time 0.

    failures: share of the nodes that die in an hour. queue_limit: requests that may wait.
    """

    def __init__(
        self, kinds: Sequence[NodeKind], replicas: int, scaler: Autoscaler | None, queue_limit: int, failures: float,
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self.replicas = replicas
        self._kinds = sorted(kinds, key=lambda kind: kind.price_per_hour / kind.speed)
        self._scaler, self._queue_limit, self._failures, self._rng = scaler, queue_limit, failures, rng
        self._starting: dict[int, _Node] = {}
        self._nodes: dict[int, _Node] = {}  # that are ready
        self._busy: list[_Busy] = []  # a heap
        self._idle: dict[str, deque[tuple[float, int]]] = {kind.name: deque() for kind in self._kinds}  # since, number
        self._queue: deque[tuple[float, float]] = deque()  # arrival, service time at speed 1
        self._draining: list[float] = []  # when the last answers of drained nodes come
        self._generation = self._numbered = 0
        # Of the last step, for the scaler.
        self._arrivals = self._completions = self._in_flight = 0
        self._service: float | None = None
        # Of all steps.
        self._latencies = LatencyHistogram()
        self._requests = self._refused = self._retried = self._flips = self._direction = 0
        self._wait = 0.0
        self._served_by: Counter[str] = Counter({kind.name: 0 for kind in kinds})
        self._seconds = {kind.name: 0.0 for kind in kinds}
        self._grow(0.0)
        for node in self._starting.values():
            node.ready_at = 0.0
        # A fast node may be worth more than was missing; a scaler begins with what there is.
        self.replicas = self._least = self._most = int(self._capacity())

    # Nodes

    def _capacity(self) -> float:
        """Nodes of speed 1 that those which stay are worth, the starting ones too."""
        ready = sum(node.kind.speed for node in self._nodes.values() if not node.leaving)
        return ready + sum(node.kind.speed for node in self._starting.values())

    def _spare(self, kind: NodeKind) -> int:
        return kind.count - sum(node.kind is kind for node in (*self._nodes.values(), *self._starting.values()))

    def _next_kind(self, missing: float) -> NodeKind | None:
        """What to start: the cheapest for as much of its speed as is missing."""
        spare = [kind for kind in self._kinds if self._spare(kind) > 0]
        return min(spare, key=lambda kind: kind.price_per_hour / min(kind.speed, missing), default=None)

    def _start(self, kind: NodeKind, now: float) -> None:
        self._numbered += 1
        self._starting[self._numbered] = _Node(kind, now, now + kind.startup_seconds, self._generation)

    def _grow(self, now: float) -> None:
        missing = self.replicas - self._capacity()
        while missing > 1e-9 and (kind := self._next_kind(missing)) is not None:
            self._start(kind, now)
            missing -= kind.speed

    def _shrink(self, now: float) -> None:
        """Ends nodes that are too many: those that still start, then the dearest for their speed, idle ones first."""
        surplus = self._capacity() - self.replicas
        if surplus < min(kind.speed for kind in self._kinds):
            return
        for number, node in sorted(self._starting.items(), key=lambda item: -item[1].ready_at):
            if node.kind.speed <= surplus:
                surplus -= node.kind.speed
                self._pay(self._starting.pop(number), now)
        free = {number: since for idle in self._idle.values() for since, number in idle}
        free.update((number, finish) for finish, number, _, _ in self._busy)
        drained = []
        for number in sorted(free, key=lambda n: (-self._kinds.index(self._nodes[n].kind), free[n])):
            node = self._nodes[number]
            if node.kind.speed <= surplus and not node.leaving:
                surplus -= node.kind.speed
                drained.append(number)
        self._drain(drained, now)

    def _drain(self, numbers: Collection[int], now: float) -> None:
        """Ends nodes after the request that they serve."""
        finishes = {number: finish for finish, number, _, _ in self._busy}
        for number in numbers:
            finish = finishes.get(number, now)
            if finish > now:
                self._draining.append(finish)
            self._pay(self._nodes[number], max(now, finish))
        self._remove(numbers)

    def _remove(self, numbers: Collection[int]) -> None:
        for number in numbers:
            del self._nodes[number]
        self._busy = [entry for entry in self._busy if entry[1] in self._nodes]
        heapq.heapify(self._busy)
        for idle in self._idle.values():
            kept = [entry for entry in idle if entry[1] in self._nodes]
            idle.clear()
            idle.extend(kept)

    def _pay(self, node: _Node, until: float) -> None:
        self._seconds[node.kind.name] += until - node.since

    # What happens at a sample

    def advance(self, now: float, seconds: float, update: bool) -> None:
        """At the begin of a step of so many seconds: deaths, the scaler's decision, nodes that start and end.

        update: begin to replace all nodes.
        """
        self._draining = [finish for finish in self._draining if finish > now]
        if self._failures:
            self._fail(now, seconds)
        if self._scaler is not None:
            self._decide(self._scaler, now)
        self._generation += update
        self._replace(now)
        self._grow(now)
        self._shrink(now)
        for number in [number for number, node in self._starting.items() if node.ready_at < now + seconds]:
            node = self._nodes[number] = self._starting.pop(number)
            # It counts as busy until it is ready, within the step.
            heapq.heappush(self._busy, (node.ready_at, number, 0.0, 0.0))

    def _fail(self, now: float, seconds: float) -> None:
        """Each node dies with the chance of these seconds; the requests they served go back to the queue's head."""
        numbers = [*self._nodes, *self._starting]
        died = self._rng.random(len(numbers)) < -math.expm1(-self._failures * seconds / 3600)
        dead = {number for number, gone in zip(numbers, died, strict=True) if gone}
        if not dead:
            return
        cut = [entry for entry in self._busy if entry[1] in dead and entry[0] > now and entry[3] > 0]
        for finish, number, arrival, work in sorted(cut, key=lambda entry: entry[2], reverse=True):
            kind = self._nodes[number].kind
            self._latencies.remove(finish - arrival)
            self._wait -= finish - work / kind.speed - arrival
            self._served_by[kind.name] -= 1
            self._queue.appendleft((arrival, work))
        self._retried += len(cut)
        self._in_flight -= len(cut)
        for number in dead:
            self._pay(self._nodes[number] if number in self._nodes else self._starting.pop(number), now)
        self._remove(dead & self._nodes.keys())

    def _decide(self, scaler: Autoscaler, now: float) -> None:
        upcoming = self._next_kind(1.0)
        decision = scaler.desired(
            LoadSample(
                time=now,
                ready=int(sum(node.kind.speed for node in self._nodes.values())),
                starting=int(sum(node.kind.speed for node in self._starting.values())),
                waiting=len(self._queue),
                in_flight=self._in_flight,
                arrivals=self._arrivals,
                completions=self._completions,
                service_seconds=self._service,
                startup_seconds=upcoming.startup_seconds if upcoming else 0.0,
            )
        )
        if decision.replicas != self.replicas:
            direction = 1 if decision.replicas > self.replicas else -1
            self._flips += self._direction == -direction
            self._direction = direction
        self.replicas = decision.replicas
        self._least, self._most = min(self._least, self.replicas), max(self._most, self.replicas)

    def _replace(self, now: float) -> None:
        """Goes on with an update, some nodes at a time: new ones start first where there are any, then old ones end."""
        leaving = [number for number, node in self._nodes.items() if node.leaving]
        if leaving and self._starting:
            return
        self._drain(leaving, now)
        old = [number for number, node in self._nodes.items() if node.generation < self._generation]
        for number in old[: math.ceil(_UPDATE_SHARE * len(self._nodes))]:
            node = self._nodes[number]
            if self._spare(node.kind) > 0:
                node.leaving = True
            else:  # its own place is the only one
                self._drain([number], now)
            self._start(node.kind, now)

    # Requests

    def serve(self, arrivals: list[float], works: list[float], begin: float, end: float) -> None:
        """Begins what waits and what arrives in a step, as far as nodes get free in it; the rest waits or is refused.

        arrivals: in order. works: their service times at speed 1.
        """
        heappush, heappop, heapreplace = heapq.heappush, heapq.heappop, heapq.heapreplace
        busy = self._busy
        kinds = [(self._idle[kind.name], kind.speed) for kind in self._kinds]
        home = {number: (self._idle[node.kind.name], 1 / node.kind.speed) for number, node in self._nodes.items()}
        starts: list[float] = []
        latencies: list[float] = []
        servers: list[int] = []
        left: deque[tuple[float, float]] = deque()
        waited = worked = 0.0
        refused = begun = 0  # begun: how many of `starts` lie before the arrival that is looked at
        pairs: Iterable[tuple[float, float]]
        for admitted, pairs in ((True, self._queue), (False, zip(arrivals, works, strict=True))):
            for arrival, work in pairs:
                time = begin if admitted else arrival
                while busy and busy[0][0] <= time:
                    since, number, _, _ = heappop(busy)
                    home[number][0].append((since, number))
                # The one that was idle longest for its speed: so each gets requests about in proportion.
                longest, chosen = -math.inf, None
                for idle, speed in kinds:
                    if idle and (time - idle[0][0]) * speed > longest:
                        longest, chosen = (time - idle[0][0]) * speed, idle
                if chosen is not None:
                    number = chosen.popleft()[1]
                    finish = time + work * home[number][1]
                    heappush(busy, (finish, number, arrival, work))
                    start = time
                else:
                    if not admitted:
                        while begun < len(starts) and starts[begun] <= arrival:
                            begun += 1
                        if len(starts) - begun + len(left) >= self._queue_limit:
                            refused += 1
                            continue
                    if not busy or busy[0][0] >= end:
                        left.append((arrival, work))
                        continue
                    start, number, _, _ = busy[0]
                    finish = start + work * home[number][1]
                    heapreplace(busy, (finish, number, arrival, work))
                starts.append(start)
                latencies.append(finish - arrival)
                servers.append(number)
                waited += start - arrival
                worked += work
        self._queue = left
        self._refused += refused
        self._requests += len(arrivals)
        self._wait += waited
        self._latencies.add(latencies)
        for number, count in Counter(servers).items():
            self._served_by[self._nodes[number].kind.name] += count
        self._arrivals = len(arrivals)
        self._service = worked / len(starts) if starts else None
        running = sum(finish > end for finish, *_ in busy) + sum(finish > end for finish in self._draining)
        self._completions = len(starts) + self._in_flight - running
        self._in_flight = running

    def result(self, now: float) -> FleetResult:
        """What was done until now, when all is over."""
        for node in (*self._nodes.values(), *self._starting.values()):
            self._pay(node, now)
        served = len(self._latencies)
        prices = {kind.name: kind.price_per_hour for kind in self._kinds}
        each = [cost_per_million(s / served, prices[name]) if served else math.nan for name, s in self._seconds.items()]
        return FleetResult(
            requests=self._requests,
            served=served,
            refused=self._refused,
            retried=self._retried,
            unfinished=len(self._queue),
            p50=self._latencies.quantile(0.5),
            p95=self._latencies.quantile(0.95),
            p99=self._latencies.quantile(0.99),
            mean_wait=self._wait / served if served else math.nan,
            served_by=dict(self._served_by),
            replica_hours=sum(self._seconds.values()) / 3600,
            price=sum(s / 3600 * prices[name] for name, s in self._seconds.items()),
            price_per_million=sum(each),
            flips=self._flips,
            least=self._least,
            most=self._most,
        )
