"""The Ray engine: replicas of a model in a Ray cluster, placed, scaled, watched and replaced by Ray Serve.

The server (http.py) runs outside of the replicas and asks them through a handle, not through Ray's own proxy: what a
replica or node had when it died is asked of another one, since inference changes nothing.
"""

import asyncio
import contextlib
import logging
import math
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.exceptions import BackPressureError, RayServeException

from lepton_ai.serving.engine import TIMED_OUT, UNAVAILABLE, Answer, OverloadedError, ReplicaError, check_limits
from lepton_ai.serving.metrics import Metrics
from lepton_ai.serving.ray_cluster import quiet
from lepton_ai.serving.replica import ReplicaSpec, Startup, start
from lepton_ai.serving.service import FAILED, failure

_PAUSE = 0.1  # seconds before a request is asked again, twice as many the next time: Ray says by then who is dead
_LOOK_EVERY = 0.5  # seconds between two looks at the cluster
_LOOK_SECONDS = 10.0  # that one may take
_LEAVE_SECONDS = 30.0  # that the replicas may take to go
_DEPLOYMENT = "Replica"
_SURGE_PERCENT = 20  # of the replicas, rounded up, that a rolling update adds: as many as it replaces at a time
# What does not answer for 15 seconds (three health checks) is killed, not waited for: what it has is then asked of
# another one before the request's time is over.
_CONTROLLER = {"runtime_env": {"env_vars": {"RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1"}}}
_STATES = {"RUNNING": "ready", "STARTING": "starting", "STOPPING": "draining"}


@dataclass(frozen=True)
class Reply:
    """A replica's answer to a request.

    waited, took: seconds in the replica's queue, and of the model for the batch. batch: its requests, 0 in all replies
    to a batch but the first. replica, startup: who answered, and what its start took.
    """

    status: int
    body: bytes
    waited: float
    took: float
    batch: int
    replica: str
    startup: Startup


class Replica:
    """What runs in the cluster: one replica. answer takes requests one by one, which come to the model together."""

    def __init__(self, values: dict[str, Any], max_batch: int, patience: float) -> None:
        began = time.time()
        try:
            self._service, self._startup = start(ReplicaSpec(**{**values, "cores": tuple(values["cores"])}), began)
        except Exception as error:
            raise ReplicaError(f"{type(error).__name__}: {error}") from error
        self._name = serve.get_replica_context().replica_id.unique_id
        self._patience, self._at_work_since = patience, math.inf
        self._batched = serve.batch(max_batch_size=max_batch, batch_wait_timeout_s=0.0)(self._answers)

    async def answer(self, body: bytes) -> Reply:
        """The answer to a request (service.py)."""
        return await self._batched((body, time.perf_counter()))  # type: ignore[no-any-return]

    async def check_health(self) -> None:
        """Ray asks this: an error, three times, is the replica's end."""
        if time.perf_counter() - self._at_work_since > self._patience:
            raise RuntimeError(f"the model has been at work on a batch for more than {self._patience:g} s")

    async def _answers(self, requests: list[tuple[bytes, float]]) -> list[Reply]:
        self._at_work_since = before = time.perf_counter()
        try:
            answers = await asyncio.to_thread(self._service.answers, [body for body, _ in requests])
        finally:
            self._at_work_since = math.inf
        took = time.perf_counter() - before
        return [
            Reply(status, body, before - arrived, took, 0 if i else len(requests), self._name, self._startup)
            for i, ((status, body), (_, arrived)) in enumerate(zip(answers, requests, strict=True))
        ]


@dataclass
class _Seen:
    """A replica as the server knows it: state as in engine.Replica; the rest is what its answers said."""

    number: int
    state: str = "starting"
    pid: int | None = None
    node: str | None = None  # Ray's id of it
    startup: Startup | None = None
    seconds: float = 0.0
    served: int = 0


class RayEngine:
    """Serves `spec` by Ray Serve: at least `replicas`, at most max_replicas of them, as the load asks for.

    address: of the cluster, "auto" for the one that this machine is part of; None starts one on this machine, which
    ends with the engine. The file and the tokenizer's folder must be there under the same paths on every node. memory:
    bytes that Ray keeps for a replica. target_ongoing: requests that a replica has on average, waiting or at the model,
    above which Ray starts more of them. start_timeout: seconds until the replicas have to be ready. name: of the
    application in the cluster; a server takes over what one of the same name left. The rest is as in
    lepton_ai.serving.engine.Engine.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        replicas: int = 1,
        max_replicas: int | None = None,
        *,
        address: str | None = None,
        memory: int = 0,
        target_ongoing: float = 8.0,
        max_waiting: int = 1024,
        max_waiting_bytes: int = 64 << 20,
        max_batch: int = 32,
        timeout: float = 30.0,
        replica_timeout: float = 120.0,
        start_timeout: float = 120.0,
        max_attempts: int = 4,
        name: str = "lepton",
    ) -> None:
        check_limits(
            "RayEngine",
            dict(replicas=replicas, max_waiting=max_waiting, max_waiting_bytes=max_waiting_bytes, max_batch=max_batch,
                 max_attempts=max_attempts),
            dict(timeout=timeout, replica_timeout=replica_timeout, start_timeout=start_timeout,
                 target_ongoing=target_ongoing),
        )  # fmt: skip
        if max_replicas is not None and max_replicas < replicas:
            raise ValueError(
                f"RayEngine: max_replicas is {max_replicas}; allowed: None, or replicas ({replicas}) or more"
            )
        self._spec, self.wanted = replace(spec, cores=()), replicas
        self._most = replicas if max_replicas is None else max_replicas
        self._scales_itself = self._most > replicas
        self._address, self._memory, self._target = address, memory, target_ongoing
        self._max_waiting, self._max_bytes, self._max_batch = max_waiting, max_waiting_bytes, max_batch
        self._timeout, self._replica_timeout, self._start_timeout = timeout, replica_timeout, start_timeout
        self._max_attempts, self._name = max_attempts, name
        self.metrics = Metrics()
        self._handle: Any = None
        self._controller: Any = None
        self._closing = False
        self._asked: set[asyncio.Task[Answer]] = set()
        self._asked_bytes = 0
        self._alone = asyncio.Lock()
        self._version, self._updates = uuid.uuid4().hex, 0
        self._seen: dict[str, _Seen] = {}
        self._numbers = 0
        self._trouble = ""  # what Ray says is wrong with the application, or that nobody could be asked
        self._failed = False
        self._watch: asyncio.Task[None] | None = None
        self._changing: asyncio.Task[None] | None = None
        self._to_change = False
        self._telling = asyncio.Lock()  # one at a time tells Ray what is wanted
        self._connected = False

    async def __aenter__(self) -> "RayEngine":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Joins or starts the cluster and waits until the replicas are ready. Raises ReplicaError where they fail."""
        try:
            async with self._telling:
                await asyncio.to_thread(self._connect)
                _take_back(signal.SIGTERM)
                await asyncio.to_thread(self._deploy)
            self._watch = asyncio.create_task(self._look_on())
            await asyncio.wait_for(self._until(lambda: self.ready >= self.wanted or self._failed), self._start_timeout)
            if self._failed:
                raise ReplicaError(self._trouble)
        except asyncio.TimeoutError as error:
            raise ReplicaError(
                f"{self.ready} of {self.wanted} replicas are ready after {self._start_timeout:g} s; the cluster has "
                f"{ray.cluster_resources().get('CPU', 0):g} CPUs, a replica takes {self._spec.threads}. {self._trouble}"
            ) from error
        finally:
            if self.ready < self.wanted and not self._closing:
                await self.close(0.0)

    def _connect(self) -> None:
        # It warns of each slow answer and each dead replica, and asks others; what comes of it is in the metrics.
        logging.getLogger("ray").setLevel(logging.ERROR)
        if not ray.is_initialized():
            options: dict[str, Any] = {"address": self._address}
            if self._address is None:
                # What Ray counts as CPUs: as many as the replicas take, also in a rolling update. No more: it starts a
                # process for each.
                most = self._most + math.ceil(self._most * _SURGE_PERCENT / 100)
                cpus = max(os.cpu_count() or 1, most * self._spec.threads)
                quiet(os.environ)
                options = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
            try:
                ray.init(log_to_driver=False, configure_logging=False, **options)
            except (ConnectionError, RuntimeError) as error:
                raise ReplicaError(f"address is {self._address!r}: {error}") from error
            self._connected = True
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # Ray's own takes no level from above
        serve.start(proxy_location="Disabled", controller_options=_CONTROLLER)
        # Once: this call waits, and for a minute where the head is gone.
        self._controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)

    def _deploy(self) -> None:
        """Tells Ray what is wanted, and does not wait for it."""
        options: dict[str, Any] = {"num_cpus": self._spec.threads}
        if self._memory:
            options["memory"] = self._memory
        count: dict[str, Any] = {"num_replicas": self.wanted}
        if self._scales_itself:
            count = {
                "autoscaling_config": {
                    "min_replicas": self.wanted, "max_replicas": self._most, "initial_replicas": self.wanted,
                    "target_ongoing_requests": self._target, "upscale_delay_s": 2.0, "downscale_delay_s": 8.0,
                    "look_back_period_s": 4.0, "metrics_interval_s": 1.0,
                }
            }  # fmt: skip
        deployment = serve.deployment(
            name=_DEPLOYMENT, ray_actor_options=options, max_ongoing_requests=2 * self._max_batch,
            max_queued_requests=self._max_waiting, health_check_period_s=1.0, health_check_timeout_s=5.0,
            graceful_shutdown_wait_loop_s=0.2, graceful_shutdown_timeout_s=20.0, max_constructor_retry_count=2,
            max_surge_percent=_SURGE_PERCENT, rolling_update_percentage=_SURGE_PERCENT / 100, **count,
        )(Replica)  # fmt: skip
        # Without a version every call would replace all replicas, also one that changes their number alone.
        deployment = deployment.options(version=f"{self._version}-{self._updates}", _internal=True)
        application = deployment.bind(asdict(self._spec), self._max_batch, self._replica_timeout)
        target = serve.RunTarget(application, name=self._name, route_prefix=None)
        (self._handle,) = serve.run_many([target], wait_for_applications_running=False)

    @property
    def ready(self) -> int:
        """Replicas that answer requests."""
        return sum(seen.state == "ready" for seen in self._seen.values())

    @property
    def accepting(self) -> bool:
        """Whether infer takes requests that will be answered."""
        return not self._closing and self.ready > 0

    async def infer(self, body: bytes) -> Answer:
        """The answer to a request (service.py). Raises OverloadedError when it can not be queued."""
        if self._closing:
            raise OverloadedError("the server is closing")
        if self._asked_bytes + len(body) > self._max_bytes:
            raise OverloadedError(f"{len(self._asked)} requests wait ({self._asked_bytes:,} bytes)")
        start, task = time.perf_counter(), asyncio.create_task(self._infer(body))
        self._asked.add(task)
        self._asked_bytes += len(body)
        try:
            await asyncio.wait({task}, timeout=self._timeout)
        finally:
            self._asked.discard(task)
            self._asked_bytes -= len(body)
            timed_out = not task.done() and task.cancel()
        if timed_out:
            return Answer(*failure(TIMED_OUT, "no answer in time"), queued=time.perf_counter() - start)
        if task.cancelled():
            return Answer(*failure(UNAVAILABLE, "the server is closing"))
        return task.result()

    async def _infer(self, body: bytes) -> Answer:
        for attempt in range(self._max_attempts):
            if attempt:
                self.metrics.retries.inc()
                await asyncio.sleep(_PAUSE * 2**attempt)
            # From the third time on one after the other: what kills its replicas then takes no other of these with it.
            async with self._alone if attempt > 1 else contextlib.nullcontext():
                response = self._handle.answer.remote(body)
                try:
                    return self._answered(await response)
                except asyncio.CancelledError:
                    response.cancel()
                    raise
                except BackPressureError as error:
                    raise OverloadedError(f"{error.args[0]} requests wait") from error
                except RayTaskError as error:
                    return Answer(*failure(FAILED, f"the replica failed: {error.cause}"))
                except (RayError, RayServeException):  # it, or its node, died or can not be reached
                    continue
        return Answer(*failure(UNAVAILABLE, f"{self._max_attempts} replicas died with this request"))

    def _answered(self, reply: Reply) -> Answer:
        if reply.batch:
            self.metrics.batch.observe(reply.batch)
        if (seen := self._seen.get(reply.replica)) is not None:
            seen.startup = reply.startup
            seen.served += 1
            if reply.batch:
                seen.seconds = reply.took / reply.batch
        return Answer(reply.status, reply.body, reply.waited, reply.took)

    def scale(self, replicas: int) -> None:
        """Asks Ray for so many replicas, at least; returns at once. One that is to go finishes what it has."""
        if replicas < 1:
            raise ValueError(f"scale: replicas is {replicas}; allowed: 1 or more")
        self.wanted = replicas
        self._most = max(self._most, replicas) if self._scales_itself else replicas
        self._change()

    async def restart_all(self) -> None:
        """A rolling update by Ray: each new replica is ready before an old one goes, where the cluster has room for it.

        Where the new ones can not start the old ones stay, but none is replaced that dies until an update succeeds.
        """
        old = {name for name, seen in self._seen.items() if seen.state == "ready"}
        self._updates += 1
        await self._change()
        await self._until(lambda: self._failed or (self.ready >= self.wanted and not self._are_ready(old)))
        if self._failed and not self._closing:
            self.metrics.log(f"the update failed, the replicas of before go on: {self._trouble}")

    def _are_ready(self, names: set[str]) -> bool:
        return any(name in names and seen.state == "ready" for name, seen in self._seen.items())

    def _change(self) -> "asyncio.Task[None]":
        self._to_change = True
        if self._changing is None or self._changing.done():
            self._changing = asyncio.create_task(self._change_all())
        return self._changing

    async def _change_all(self) -> None:
        while self._to_change and not self._closing:
            self._to_change = False
            try:
                async with self._telling:
                    await asyncio.to_thread(self._deploy)
            except (RayError, RayServeException, RuntimeError) as error:
                self.metrics.log(f"the replicas could not be changed: {error}")
        await self._look()

    async def close(self, grace: float = 30.0) -> None:
        """Takes no more requests, answers those that it has within `grace` seconds, and takes the replicas away."""
        self._closing = True
        if self._asked:
            await asyncio.wait(self._asked, timeout=grace)
        for task in self._asked:
            task.cancel()
        if self._watch is not None:
            self._watch.cancel()
        with contextlib.suppress(asyncio.TimeoutError):  # a cluster that is gone does not answer
            await asyncio.wait_for(self._leave(), 2 * _LEAVE_SECONDS)

    async def _leave(self) -> None:
        async with self._telling:  # what is being told to Ray now would otherwise come after the end, and stay
            if ray.is_initialized():
                await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        if self._handle is not None and not (self._connected and self._address is None):
            with contextlib.suppress(RayError, RayServeException, RuntimeError):  # then it is gone already
                serve.delete(self._name, _blocking=False)
                until = time.perf_counter() + _LEAVE_SECONDS
                while self._name in serve.status().applications and time.perf_counter() < until:
                    time.sleep(0.1)
        if self._connected:
            ray.shutdown()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not (holds() or self._closing):
            if self._watch is not None and self._watch.done():
                self._watch.result()  # raises what ended it
            await asyncio.sleep(_LOOK_EVERY / 5)

    async def _look_on(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(_LOOK_EVERY)

    async def _look(self) -> None:
        """Asks Ray's controller what there is; where it does not answer, what was there counts as there."""
        try:
            details = await asyncio.wait_for(self._controller.get_serve_instance_details.remote(), _LOOK_SECONDS)
        except (RayError, asyncio.TimeoutError) as error:
            if not self._trouble:
                self.metrics.log(
                    f"Ray's controller does not answer ({type(error).__name__}); the replicas are asked as before"
                )
            self._trouble = f"Ray's controller does not answer: {type(error).__name__}"
            return
        application = details["applications"].get(self._name) or {"status": "", "message": "", "deployments": {}}
        deployment = application["deployments"].get(_DEPLOYMENT) or {"status": "", "message": "", "replicas": []}
        before = {name: seen.state for name, seen in self._seen.items()}
        known, self._seen = self._seen, {}
        for row in deployment["replicas"]:
            name, state = row["replica_id"], str(getattr(row["state"], "value", row["state"]))
            seen = known.get(name) or self._new()
            seen.state, seen.pid, seen.node = _STATES.get(state, state.lower()), row.get("pid"), row.get("node_id")
            self._seen[name] = seen
        self._count_dead(before, deployment.get("target_num_replicas", 0))
        self._failed = "DEPLOY_FAILED" in (application["status"], deployment["status"])
        self._trouble = _reason(deployment["message"] or application["message"])
        self.metrics.ready.set(self.ready)
        self.metrics.waiting.set(len(self._asked))

    def _count_dead(self, before: dict[str, str], target: int) -> None:
        """Of the replicas that were ready and are not any more, those beyond the ones that had to go.

        before: their states at the last look. target: how many there have to be.
        """
        ready = {name for name, seen in self._seen.items() if seen.state == "ready"}
        left = sum(state == "ready" and name not in ready for name, state in before.items())
        there = sum(state in ("ready", "starting") for state in before.values())
        for _ in range(left - max(0, there - target)):
            self.metrics.restarts.inc()
            self.metrics.log("a replica is gone; Ray starts another one")

    def _new(self) -> _Seen:
        self._numbers += 1
        return _Seen(self._numbers - 1)

    def startups(self) -> Sequence[tuple[int, Startup]]:
        """Of each replica that has answered, by number."""
        return [(seen.number, seen.startup) for seen in self._seen.values() if seen.startup is not None]

    def status(self) -> dict[str, Any]:
        """What the live page shows; waiting: with those at the model. What a replica is busy with Ray does not say."""
        return {
            "ready": self.ready, "wanted": self.wanted, "waiting": len(self._asked), "accepting": self.accepting,
            "trouble": self._trouble,
            "replicas": [
                {"number": seen.number, "state": seen.state, "busy": None, "served": seen.served,
                 "ms_a_request": 1e3 * seen.seconds, "pid": seen.pid, "node": seen.node,
                 "startup_s": seen.startup.total if seen.startup else None}
                for seen in self._seen.values()
            ],
            **self.metrics.summary(),
        }  # fmt: skip


def _take_back(number: signal.Signals) -> None:
    """Ray's library has put a handler before Python's that ends the process: no answers for those who wait."""
    handler = signal.getsignal(number)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


def _reason(message: str) -> str:
    """What a replica said that could not start, out of all that Ray tells of it; else all."""
    found = re.findall(r"ReplicaError: (.+)", message)
    return found[-1] if found else message
