"""Chaos: a server of this machine under load, whose replicas are killed, frozen, taken away and replaced; and what the
clients saw of it.

The server is `lepton serve` as a process of its own, on the loopback address and a port that the system picks; nothing
else is ever talked to, and no process but its replicas gets a signal. With Ray the replicas are in a cluster that is
started here for the run (ray_cluster.py), never in one that is there. Events come at times that a seed fixes, one after
the other, in the middle part of the run; at the end all is stopped.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

KINDS = ("kill", "freeze", "scale", "update", "node")
ENGINES = ("local", "ray")
_REFUSED = 503
# Relative distance of an answer to the first one to the same request: in another batch floats round otherwise, and then
# some of the quantized activations. Another request's answer is some 1 away.
_CLOSE_ENOUGH = 0.1
_CALM_SHARE = 0.2  # of the run before the first event and after the last one
_WINDOW = 1.0  # seconds of answers that a p99 is of
_SPARE_NODES = 1  # beyond one for each replica: a rolling update needs it, and what was on a node that died
_NODE_PAUSE = 5.0  # seconds from a node's death until another one comes
_VICTIM_SECONDS = 60.0  # that it may take until there is a replica to kill


@dataclass(frozen=True)
class ChaosPlan:
    """What is done: seconds of load by `clients`, each sending its next request when it has its answer; how many
    replicas are killed (SIGKILL) and frozen (SIGSTOP), how often one is added and taken away, how often all are
    replaced, and, with engine "ray", how many nodes of the cluster die. slow: seconds from which an answer counts as
    slow. Raises ValueError for numbers that make no plan.
    """

    seconds: float = 60.0
    clients: int = 8
    replicas: int = 2
    kill: int = 10
    freeze: int = 0
    scale: int = 1
    update: int = 1
    node: int = 0
    slow: float = 5.0
    seed: int = 0
    engine: str = "local"

    def __post_init__(self) -> None:
        if not 5 <= self.seconds <= 3600:
            raise ValueError(f"ChaosPlan: seconds is {self.seconds:g}; allowed: 5 to 3600")
        for name, most in (("clients", 1000), ("replicas", 64)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"ChaosPlan: {name} is {getattr(self, name)}; allowed: 1 to {most}")
        for name in KINDS:
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"ChaosPlan: {name} is {getattr(self, name)}; allowed: 0 to 100")
        if self.engine not in ENGINES:
            raise ValueError(f"ChaosPlan: engine is {self.engine!r}; allowed: {', '.join(ENGINES)}")
        if self.node and self.engine == "local":
            raise ValueError(f"ChaosPlan: node is {self.node} with engine 'local', which has no nodes; allowed: 0")

    def events(self) -> list[tuple[float, str]]:
        """(seconds from the start, kind), by time."""
        kinds = [kind for kind in KINDS for _ in range(getattr(self, kind))]
        source = random.Random(self.seed)
        source.shuffle(kinds)
        first, last = _CALM_SHARE * self.seconds, (1 - _CALM_SHARE) * self.seconds
        return sorted((source.uniform(first, last), kind) for kind in kinds)


@dataclass
class ChaosReport:
    """What the clients saw.

    lost: requests without an answer, or with one that says the server failed. refused: told to come back later, and
    sent again. wrong: answers other than the first to the same request. p99_calm: seconds, before the first event.
    recovery: of each event (kind, seconds from which on, until the next event, the p99 of every second was no more than
    twice that; None where the next event or the end came before).
    """

    plan: ChaosPlan
    answered: int = 0
    lost: list[str] = field(default_factory=list)
    refused: int = 0
    wrong: int = 0
    slow: int = 0
    p50: float = 0.0
    p99: float = 0.0
    p99_calm: float = 0.0
    overhead_p99: float | None = None
    restarts: int = 0
    recovery: list[tuple[str, float | None]] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        """Whether nothing was lost and nothing was wrong."""
        return not self.lost and not self.wrong

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "fine": self.fine}

    def __str__(self) -> str:
        worst = [seconds for _, seconds in self.recovery if seconds is not None]
        unrecovered = sum(seconds is None for _, seconds in self.recovery)
        overhead = "" if self.overhead_p99 is None else f", the server's own part p99 {1e3 * self.overhead_p99:.2f} ms"
        late = f"; {unrecovered} not before the next event" if unrecovered else ""
        lines = [
            f"{self.answered} answered, {len(self.lost)} lost, {self.wrong} wrong, {self.refused} refused and repeated",
            f"{self.restarts} replicas died and were replaced; {self.slow} answers took over {self.plan.slow:g} s",
            f"p50 {1e3 * self.p50:.1f}, p99 {1e3 * self.p99:.1f}, before the first event {1e3 * self.p99_calm:.1f} ms"
            + overhead,
            f"{len(self.recovery)} events; p99 back after at most {max(worst, default=0):.1f} s{late}",
        ]
        return "\n".join(lines + [f"lost: {text}" for text in self.lost[:5]])


@dataclass
class _Client:
    """All clients' records: (when it was sent, seconds) of each answer."""

    url: str
    bodies: Sequence[bytes]
    report: ChaosReport
    until: float
    answers: list[tuple[float, float]] = field(default_factory=list)
    first: dict[bytes, list[list[float]]] = field(default_factory=dict)

    async def run(self, number: int) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            turn = number
            while time.perf_counter() < self.until:
                await self._one(client, self.bodies[turn % len(self.bodies)])
                turn += 1

    async def _one(self, client: httpx.AsyncClient, body: bytes) -> None:
        sent = time.perf_counter()
        while True:
            try:
                answer = await client.post(f"{self.url}/infer", content=body)
            except httpx.HTTPError as error:
                self.report.lost.append(f"{type(error).__name__}: {error}")
                return
            if (
                answer.status_code != _REFUSED
                or "retry-after" not in answer.headers
                or time.perf_counter() > self.until
            ):
                break
            self.report.refused += 1
            await asyncio.sleep(0.1)
        seconds = time.perf_counter() - sent
        if answer.status_code != 200:
            self.report.lost.append(f"{answer.status_code}: {answer.text[:200]}")
            return
        self.report.answered += 1
        self.report.slow += seconds > self.report.plan.slow
        self.answers.append((sent, seconds))
        vectors = answer.json()["vectors"]
        known = self.first.setdefault(body, vectors)
        self.report.wrong += not _same(known, vectors)


def _same(a: list[list[float]], b: list[list[float]]) -> bool:
    if [len(row) for row in a] != [len(row) for row in b]:
        return False
    return all(
        sum((x - y) ** 2 for x, y in zip(r, s, strict=True)) <= _CLOSE_ENOUGH**2 * sum(x * x for x in r)
        for r, s in zip(a, b, strict=True)
    )


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) * percent // 100] if ordered else 0.0


def _recovery(at: float, answers: Sequence[tuple[float, float]], most: float, end: float) -> float | None:
    """Seconds after `at` from which on, until `end`, every window has answers and their p99 is at most `most`."""
    recovered: float | None = None
    begin = at
    while begin + _WINDOW <= end:
        window = [seconds for sent, seconds in answers if begin <= sent + seconds < begin + _WINDOW]
        good = window and _percentile(window, 99) <= most
        recovered = (begin - at if recovered is None else recovered) if good else None
        begin += _WINDOW / 4
    return recovered


async def _status(url: str) -> dict[str, Any]:
    async with httpx.AsyncClient(timeout=10) as client:
        return dict((await client.get(f"{url}/status")).json())


async def _victim(url: str, source: random.Random, spared: set[int]) -> dict[str, Any]:
    """A replica that is ready, as soon as there is one; none of `spared`, which had a signal and may be shown yet."""
    until = time.perf_counter() + _VICTIM_SECONDS
    while time.perf_counter() < until:
        rows = (await _status(url))["replicas"]
        if ready := [row for row in rows if row["state"] == "ready" and row["pid"] not in spared]:
            victim: dict[str, Any] = source.choice(ready)
            spared.add(victim["pid"])
            return victim
        await asyncio.sleep(0.2)
    raise ValueError(f"chaos: no replica was ready within {_VICTIM_SECONDS:g} s")


async def _event(kind: str, server: int, victim: dict[str, Any], cluster: Any) -> None:
    if kind == "node":
        await cluster.kill_node(victim["node"])
        await asyncio.sleep(_NODE_PAUSE)
        await cluster.add_node()
    elif kind == "update":
        os.kill(server, signal.SIGHUP)
    elif kind == "scale":
        os.kill(server, signal.SIGTTIN)
        await asyncio.sleep(2)
        os.kill(server, signal.SIGTTOU)
    else:
        with contextlib.suppress(ProcessLookupError):  # it has died since
            os.kill(victim["pid"], signal.SIGKILL if kind == "kill" else signal.SIGSTOP)


async def _serve(options: Sequence[str], replicas: int) -> tuple[asyncio.subprocess.Process, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lepton_ai", "serve", *options, "--host", "127.0.0.1", "--port", "0", "--replicas",
        str(replicas), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    while line := (await process.stdout.readline()).decode():
        if found := re.search(r"at (http://127\.0\.0\.1:\d+)", line):
            return process, found[1]
    raise ValueError(f"chaos: the server could not start; it ended with {await process.wait()}")


async def chaos(
    options: Sequence[str],
    bodies: Sequence[bytes],
    plan: ChaosPlan,
    watch: Callable[[str], None] | None = None,
) -> ChaosReport:
    """Runs the plan against `lepton serve` with these options; the clients send `bodies` in turn.

    watch: is told each event as it comes. Raises ValueError where the server does not start.
    """
    if plan.engine == "local":
        return await _chaos(options, bodies, plan, watch, None)
    from lepton_ai.serving.ray_cluster import LocalCluster

    async with LocalCluster(plan.replicas + _SPARE_NODES) as cluster:
        ray_options = ("--engine", "ray", "--address", cluster.address)
        return await _chaos([*options, *ray_options], bodies, plan, watch, cluster)


async def _chaos(
    options: Sequence[str],
    bodies: Sequence[bytes],
    plan: ChaosPlan,
    watch: Callable[[str], None] | None,
    cluster: Any,
) -> ChaosReport:
    server, url = await _serve(options, plan.replicas)
    report, source = ChaosReport(plan), random.Random(plan.seed)
    events: list[tuple[float, str]] = []
    spared: set[int] = set()
    try:
        start = time.perf_counter()
        clients = _Client(url, bodies, report, start + plan.seconds)
        load: list[Awaitable[None]] = [asyncio.create_task(clients.run(i)) for i in range(plan.clients)]
        for at, kind in plan.events():
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            victim = await _victim(url, source, spared) if kind in ("kill", "freeze", "node") else {}
            if watch is not None:
                watch(f"{time.perf_counter() - start:6.1f} s  {kind}")
            events.append((time.perf_counter(), kind))
            await _event(kind, server.pid, victim, cluster)
        await asyncio.gather(*load)
        status = await _status(url)
    finally:
        if server.returncode is None:
            server.terminate()
            await server.wait()
    seconds = [each for _, each in clients.answers]
    before = [each for sent, each in clients.answers if not events or sent + each < events[0][0]]
    report.p50, report.p99 = _percentile(seconds, 50), _percentile(seconds, 99)
    report.p99_calm = _percentile(before, 99)
    report.restarts = int(status["restarts"])
    overhead = status.get("overhead_p99_ms")
    report.overhead_p99 = None if overhead is None else overhead / 1e3
    ends = [*(at for at, _ in events[1:]), start + plan.seconds]
    report.recovery = [
        (kind, _recovery(at, clients.answers, 2 * report.p99_calm, end))
        for (at, kind), end in zip(events, ends, strict=True)
    ]
    return report


def texts_of(sentences: Sequence[str]) -> list[bytes]:
    """A request for each sentence."""
    return [json.dumps({"texts": [sentence]}).encode() for sentence in sentences]
