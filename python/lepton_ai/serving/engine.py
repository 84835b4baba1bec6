"""The local engine: replicas of a model as processes of this machine, fed from one bounded queue.

A replica that is free takes what waits, so each gets load as it has speed; of several that are free the fastest is
asked first. What a replica had when it died is asked of another: inference changes nothing, so asking twice is safe,
and each request is answered once. A replica that is to go finishes what it has.
"""

import asyncio
import contextlib
import math
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lepton_ai.serving.frames import packed, read
from lepton_ai.serving.metrics import Metrics
from lepton_ai.serving.replica import ReplicaSpec, Startup
from lepton_ai.serving.replica import __name__ as replica_module

TIMED_OUT, UNAVAILABLE = 504, 503
_SMOOTHING = 0.2  # of the newest measurement in a replica's seconds a request
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds before a replica that died is started again
_LEAVE_SECONDS = 10.0  # that a replica which was told to go may take


class OverloadedError(RuntimeError):
    """The queue is full, or the engine is closing."""


class ReplicaError(RuntimeError):
    """A replica could not start."""


@dataclass(frozen=True)
class Answer:
    """What came back: an HTTP status and JSON; seconds in the queue, and at the model with the others of its batch."""

    status: int
    body: bytes
    queued: float = 0.0
    model: float = 0.0


@dataclass(frozen=True)
class Load:
    """What an engine has to do and has done: replicas and requests now; arrivals (refused ones too), completions and
    the seconds that replicas spent on these, since its start; seconds that a replica's start takes.
    """

    ready: int
    starting: int
    waiting: int
    in_flight: int
    arrivals: int
    completions: int
    work: float
    startup: float


@dataclass(eq=False)
class _Request:
    body: bytes
    answer: "asyncio.Future[Answer]"
    arrived: float
    attempts: int = 0

    def finish(self, answer: Answer) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)


@dataclass(eq=False)
class Replica:
    """One process. state: "starting", "ready", "draining" (told to go) or "gone"."""

    number: int
    spec: ReplicaSpec
    state: str = "starting"
    startup: Startup | None = None
    seconds: float = 0.0  # of the model for a request, smoothed; 0 while nothing is known
    served: int = 0
    process: "asyncio.subprocess.Process | None" = None
    work: "asyncio.Future[list[_Request] | None] | None" = None  # what it waits for while it is free
    has: list[_Request] = field(default_factory=list)


def check_limits(engine: str, counts: Mapping[str, int], amounts: Mapping[str, float]) -> None:
    """Raises ValueError for an engine's argument that is no count of 1 or more, or no finite amount above 0."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{engine}: {name} is {count}; allowed: 1 or more")
    for name, amount in amounts.items():
        if not 0 < amount < math.inf:
            raise ValueError(f"{engine}: {name} is {amount}; allowed: a finite number above 0")


class Engine:
    """Serves `spec` by `replicas` processes. Made inside a running event loop; use as `async with Engine(...)`.

    cores: those of each replica, dealt in turn; () leaves them to the system. max_waiting, max_waiting_bytes: of the
    queue, beyond which infer raises OverloadedError. max_batch: requests that a replica is given at once.
    timeout: seconds until a request is answered 504. replica_timeout: seconds that a replica may work on a batch, or on
    its start, before it counts as dead. max_attempts: replicas that a request is asked of before it is answered 503.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        replicas: int = 1,
        *,
        cores: Sequence[tuple[int, ...]] = (),
        max_waiting: int = 1024,
        max_waiting_bytes: int = 64 << 20,
        max_batch: int = 32,
        timeout: float = 30.0,
        replica_timeout: float = 120.0,
        max_attempts: int = 4,
    ) -> None:
        check_limits(
            "Engine",
            dict(replicas=replicas, max_waiting=max_waiting, max_waiting_bytes=max_waiting_bytes, max_batch=max_batch,
                 max_attempts=max_attempts),
            dict(timeout=timeout, replica_timeout=replica_timeout),
        )  # fmt: skip
        self._spec, self.wanted, self._cores = spec, replicas, list(cores)
        self._max_waiting, self._max_bytes, self._max_batch = max_waiting, max_waiting_bytes, max_batch
        self._timeout, self._replica_timeout, self._max_attempts = timeout, replica_timeout, max_attempts
        self.metrics = Metrics()
        self.replicas: list[Replica] = []
        self._waiting: deque[_Request] = deque()
        self._waiting_bytes = 0
        self._lives: set[asyncio.Task[None]] = set()
        self._numbers = 0
        self._closing = False
        self._changed = asyncio.Condition()
        self._start_error: ReplicaError | None = None
        self._arrivals, self._completions, self._work, self._startup = 0, 0, 0.0, 0.0

    async def __aenter__(self) -> "Engine":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Starts the replicas and waits until all are ready. Raises ReplicaError where one can not start."""
        self._fill()
        try:
            await self._until(lambda: self._start_error is not None or self.ready >= self.wanted)
        finally:
            if self._start_error is not None:
                await self.close(0.0)
        if self._start_error is not None:
            raise self._start_error

    @property
    def ready(self) -> int:
        """Replicas that answer requests."""
        return sum(replica.state == "ready" for replica in self.replicas)

    @property
    def accepting(self) -> bool:
        """Whether infer takes requests that will be answered."""
        return not self._closing and self.ready > 0

    async def infer(self, body: bytes) -> Answer:
        """The answer to a request (service.py). Raises OverloadedError when it can not be queued."""
        self._arrivals += 1
        if self._closing:
            raise OverloadedError("the server is closing")
        if len(self._waiting) >= self._max_waiting or self._waiting_bytes + len(body) > self._max_bytes:
            raise OverloadedError(f"{len(self._waiting)} requests wait ({self._waiting_bytes:,} bytes)")
        request = _Request(body, asyncio.get_running_loop().create_future(), time.perf_counter())
        self._push(request)
        self._pump()
        try:
            return await asyncio.wait_for(request.answer, self._timeout)
        except asyncio.TimeoutError:  # the future is cancelled with it: the request is skipped where it waits
            return Answer(TIMED_OUT, b'{"error": "no answer in time"}', time.perf_counter() - request.arrived)

    def scale(self, replicas: int) -> None:
        """Goes to so many replicas: starts more, or lets the slowest of those that are free finish and go."""
        if replicas < 1:
            raise ValueError(f"scale: replicas is {replicas}; allowed: 1 or more")
        self.wanted = replicas
        alive = [replica for replica in self.replicas if replica.state in ("starting", "ready")]
        # Those that start go first, then the free ones, then the slow ones.
        order = {"starting": 0, "ready": 1}
        alive.sort(key=lambda r: (order[r.state], bool(r.has), -r.seconds))
        for replica in alive[: max(0, len(alive) - replicas)]:
            self._release(replica)
        self._fill()

    async def restart_all(self) -> None:
        """A rolling update: replicas are replaced one by one, each new one ready before an old one goes."""
        for old in [replica for replica in self.replicas if replica.state == "ready"]:
            ready = self.ready
            self._spawn()
            await self._until(partial(self._has_or_closes, ready + 1))
            self._release(old)

    async def close(self, grace: float = 30.0) -> None:
        """Takes no more requests, answers those that it has within `grace` seconds, and ends the replicas."""
        self._closing = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._until(self._is_idle), grace)
        for request in self._waiting:
            request.finish(Answer(UNAVAILABLE, b'{"error": "the server is closing"}'))
        self._waiting.clear()
        for replica in list(self.replicas):
            self._release(replica)
        if self._lives:
            await asyncio.wait(self._lives)

    def load(self) -> Load:
        """What a scaling policy is decided on."""
        starting = sum(replica.state == "starting" for replica in self.replicas)
        in_flight = sum(len(replica.has) for replica in self.replicas)
        return Load(
            self.ready, starting, len(self._waiting), in_flight, self._arrivals, self._completions, self._work,
            self._startup,
        )  # fmt: skip

    def startups(self) -> Sequence[tuple[int, Startup]]:
        """Of each replica that is there, by number."""
        return [(replica.number, replica.startup) for replica in self.replicas if replica.startup is not None]

    def status(self) -> dict[str, Any]:
        """What the live page shows."""
        return {
            "ready": self.ready, "wanted": self.wanted, "waiting": len(self._waiting), "accepting": self.accepting,
            "replicas": [
                {"number": replica.number, "state": replica.state, "busy": len(replica.has), "served": replica.served,
                 "ms_a_request": 1e3 * replica.seconds, "pid": replica.process.pid if replica.process else None,
                 "startup_s": replica.startup.total if replica.startup else None}
                for replica in self.replicas
            ],
            **self.metrics.summary(),
        }  # fmt: skip

    async def _until(self, holds: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(holds)

    def _has_or_closes(self, ready: int) -> bool:
        return self.ready >= ready or self._closing

    def _is_idle(self) -> bool:
        return not self._waiting and not any(replica.has for replica in self.replicas)

    def _push(self, request: _Request, *, first: bool = False) -> None:
        (self._waiting.appendleft if first else self._waiting.append)(request)
        self._waiting_bytes += len(request.body)

    def _pop(self) -> _Request:
        request = self._waiting.popleft()
        self._waiting_bytes -= len(request.body)
        return request

    def _pump(self) -> None:
        """Gives what waits to replicas that are free, in even shares."""
        while self._waiting:
            free = [replica for replica in self.replicas if replica.work is not None and not replica.work.done()]
            if not free:
                break
            chosen = min(free, key=lambda replica: replica.seconds)
            share = min(self._max_batch, math.ceil(len(self._waiting) / len(free)))
            batch: list[_Request] = []
            while self._waiting and len(batch) < share:
                if batch and self._waiting[0].attempts:
                    break
                request = self._pop()
                if not request.answer.done():
                    batch.append(request)
                if request.attempts:
                    break  # alone: it may be what its replica died of
            if batch:
                assert chosen.work is not None
                chosen.has = batch
                chosen.work.set_result(batch)
        self.metrics.waiting.set(len(self._waiting))

    def _fill(self) -> None:
        """Starts replicas until there are as many as are wanted."""
        while not self._closing and self._alive() < self.wanted:
            self._spawn()

    def _alive(self) -> int:
        return sum(replica.state in ("starting", "ready") for replica in self.replicas)

    def _spawn(self) -> None:
        cores = self._cores[self._numbers % len(self._cores)] if self._cores else ()
        threads = len(cores) if cores else self._spec.threads
        replica = Replica(self._numbers, replace(self._spec, cores=cores, threads=threads))
        self._numbers += 1
        self.replicas.append(replica)
        life = asyncio.create_task(self._life(replica))
        self._lives.add(life)
        life.add_done_callback(self._lives.discard)

    def _release(self, replica: Replica) -> None:
        """Tells a replica to go once it has finished."""
        if replica.state == "starting" and replica.process is not None and replica.process.returncode is None:
            replica.process.kill()
        replica.state = "draining"
        if replica.work is not None and not replica.work.done():
            replica.work.set_result(None)

    async def _life(self, replica: Replica) -> None:
        """From a replica's start to its end, and, where that was not wanted, on to the start of the next one."""
        died = ""
        try:
            await self._serve(replica)
        except Exception as error:  # it has died, does not answer, or could not start
            died = str(error) or type(error).__name__
            if isinstance(error, ReplicaError) and not any(other.served for other in self.replicas):
                self._start_error = error
        finally:
            wanted, replica.state, replica.work = replica.state != "draining", "gone", None
            lost, replica.has = replica.has, []
            self.replicas.remove(replica)
        self._ask_again(lost)
        if replica.process is not None and replica.process.returncode is None:
            replica.process.kill()
            await replica.process.wait()
        if wanted and not self._closing and self._start_error is None:
            self.metrics.restarts.inc()
            self.metrics.log(f"replica {replica.number} is gone ({died}); another one starts")
            if replica.served == 0:
                await asyncio.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(self._numbers, 10)))
            self._fill()
        await self._notify()

    def _ask_again(self, lost: list[_Request]) -> None:
        for request in reversed(lost):
            request.attempts += 1
            if request.attempts >= self._max_attempts:
                text = f'{{"error": "{request.attempts} replicas died with this request"}}'
                request.finish(Answer(UNAVAILABLE, text.encode()))
            elif not request.answer.done():
                self.metrics.retries.inc()
                self._push(request, first=True)
        self._pump()

    async def _serve(self, replica: Replica) -> None:
        ours, theirs = socket.socketpair()
        values = replica.spec.as_json()[:-1] + f', "began": {time.time()!r}}}'
        try:
            replica.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", replica_module, str(theirs.fileno()), values, pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": str(replica.spec.threads)},
            )  # fmt: skip
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            ((failed, told),) = await asyncio.wait_for(read(reader), self._replica_timeout)
            if failed:
                raise ReplicaError(told.decode())
            replica.startup = Startup.of_json(told)
            self._startup = replica.startup.total
            if replica.state == "starting":
                replica.state = "ready"
            await self._notify()
            while replica.state == "ready":
                replica.work = asyncio.get_running_loop().create_future()
                self._pump()
                batch = await replica.work
                if batch is None:
                    break
                sent = time.perf_counter()
                writer.write(packed([(0, request.body) for request in batch]))
                await writer.drain()
                *answers, (_, took) = await asyncio.wait_for(read(reader), self._replica_timeout)
                self._done(replica, batch, answers, float(took), sent)
                if self._closing:
                    await self._notify()
        finally:
            writer.close()
        if replica.process is not None:
            await asyncio.wait_for(replica.process.wait(), _LEAVE_SECONDS)

    def _done(
        self, replica: Replica, batch: list[_Request], answers: list[tuple[int, bytes]], took: float, sent: float
    ) -> None:
        replica.has = []
        replica.served += len(batch)
        self._completions, self._work = self._completions + len(batch), self._work + took
        each = took / len(batch)
        replica.seconds = each if replica.seconds == 0 else replica.seconds + _SMOOTHING * (each - replica.seconds)
        self.metrics.batch.observe(len(batch))
        for request, (status, body) in zip(batch, answers, strict=True):
            request.finish(Answer(status, body, sent - request.arrived, took))

    async def _notify(self) -> None:
        self.metrics.ready.set(self.ready)
        async with self._changed:
            self._changed.notify_all()
