"""The Ray engine: replicas of a model in a Ray cluster, placed, scaled, watched and replaced by Ray Serve.

The server (http.py) runs outside of the replicas and asks them through a handle, not through Ray's own proxy: what a
replica or node had when it died is asked of another one, since inference changes nothing.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from lepton_ai.serving.engine import TIMED_OUT, UNAVAILABLE, Answer, OverloadedError, ReplicaError
from lepton_ai.serving.metrics import Metrics
from lepton_ai.serving.replica import ReplicaSpec, Startup, start
from lepton_ai.serving.service import failure

_GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
_PAUSE = 0.1  # seconds before a request is asked again: what replaces the dead is told to the handle by then
_LOOK_EVERY = 0.5  # seconds between two looks at the cluster
_DEPLOYMENT = "Replica"


class Replica:
    """What runs in the cluster: one replica. answer takes requests one by one, which come to the model together."""

    def __init__(self, values: dict[str, Any], max_batch: int, update: int) -> None:
        began = time.time()
        self._service, self._startup = start(ReplicaSpec(**{**values, "cores": tuple(values["cores"])}), began)
        self._update = update  # another one is another version to Ray Serve, which then replaces the replicas
        self._batched = serve.batch(max_batch_size=max_batch, batch_wait_timeout_s=0.0)(self._answers)

    async def answer(self, body: bytes) -> tuple[int, bytes, float]:
        """The status, the JSON, and the seconds of the model for the batch."""
        return await self._batched(body)  # type: ignore[no-any-return]

    async def startup(self) -> dict[str, Any]:
        """What its start took."""
        return asdict(self._startup)

    async def _answers(self, bodies: list[bytes]) -> list[tuple[int, bytes, float]]:
        before = time.perf_counter()
        answers = await asyncio.to_thread(self._service.answers, bodies)
        took = time.perf_counter() - before
        return [(status, body, took) for status, body in answers]


class RayEngine:
    """Serves `spec` by Ray Serve: at least `replicas`, at most max_replicas of them, as the load asks for.

    address: of the cluster; None starts one on this machine, or joins the one that RAY_ADDRESS names. The file and the
    tokenizer's folder must be there under the same paths on every node. memory: bytes that Ray keeps for a replica.
    target_ongoing: requests that a replica has on average, above which Ray starts more of them. The rest is as in
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
        max_batch: int = 32,
        timeout: float = 30.0,
        max_attempts: int = 4,
        name: str = "lepton",
    ) -> None:
        most = replicas if max_replicas is None else max_replicas
        if not 1 <= replicas <= most:
            raise ValueError(
                f"RayEngine: replicas is {replicas}, max_replicas {max_replicas}; allowed: 1 or more, and no fewer"
            )
        self._spec, self.wanted, self._most = replace(spec, cores=()), replicas, most
        self._address, self._memory, self._target = address, memory, target_ongoing
        self._max_waiting, self._max_batch = max_waiting, max_batch
        self._timeout, self._max_attempts, self._name = timeout, max_attempts, name
        self.metrics = Metrics()
        self.ready = 0
        self._handle: Any = None
        self._closing = False
        self._in_flight = 0
        self._updates = 0
        self._states: dict[str, int] = {}
        self._startup: Startup | None = None
        self._watch: asyncio.Task[None] | None = None
        self._started_ray = False

    async def start(self) -> None:
        """Joins or starts the cluster and waits until the replicas are ready. Raises ReplicaError where they fail."""
        await asyncio.to_thread(self._start)
        self._startup = Startup(**await self._handle.startup.remote())
        await self._look()
        self._watch = asyncio.create_task(self._look_on())

    def _start(self) -> None:
        if not ray.is_initialized():
            ray.init(address=self._address, ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
            self._started_ray = True
        serve.start(proxy_location="Disabled")
        self._deploy()

    def _deploy(self) -> None:
        options: dict[str, Any] = {"num_cpus": self._spec.threads}
        if self._memory:
            options["memory"] = self._memory
        count: dict[str, Any] = {"num_replicas": self.wanted}
        if self._most > self.wanted:
            count = {
                "autoscaling_config": {
                    "min_replicas": self.wanted, "max_replicas": self._most, "initial_replicas": self.wanted,
                    "target_ongoing_requests": self._target, "upscale_delay_s": 5.0, "downscale_delay_s": 30.0,
                }
            }  # fmt: skip
        deployment = serve.deployment(
            name=_DEPLOYMENT, ray_actor_options=options, max_ongoing_requests=2 * self._max_batch,
            max_queued_requests=self._max_waiting, health_check_period_s=2.0, health_check_timeout_s=10.0,
            graceful_shutdown_wait_loop_s=0.2, graceful_shutdown_timeout_s=20.0, max_constructor_retry_count=2, **count,
        )(Replica)  # fmt: skip
        application = deployment.bind(asdict(self._spec), self._max_batch, self._updates)
        try:
            self._handle = serve.run(application, name=self._name, route_prefix=None)
        except RuntimeError as error:
            raise ReplicaError(self._why(error)) from error

    def _why(self, error: Exception) -> str:
        application = serve.status().applications.get(self._name)
        parts = [] if application is None else [application.message]
        parts += [] if application is None else [found.message for found in application.deployments.values()]
        return "\n".join(part for part in [*parts, str(error)] if part)

    @property
    def accepting(self) -> bool:
        """Whether infer takes requests that will be answered."""
        return not self._closing and self.ready > 0

    async def infer(self, body: bytes) -> Answer:
        """The answer to a request (service.py). Raises OverloadedError when it can not be queued."""
        if self._closing:
            raise OverloadedError("the server is closing")
        start, self._in_flight = time.perf_counter(), self._in_flight + 1
        try:
            return await asyncio.wait_for(self._infer(body, start), self._timeout)
        except asyncio.TimeoutError:
            return Answer(*failure(TIMED_OUT, "no answer in time"), queued=time.perf_counter() - start)
        finally:
            self._in_flight -= 1

    async def _infer(self, body: bytes, start: float) -> Answer:
        for attempt in range(self._max_attempts):
            if attempt:
                self.metrics.retries.inc()
                await asyncio.sleep(_PAUSE * 2**attempt)
            try:
                status, answer, took = await self._handle.answer.remote(body)
            except BackPressureError as error:
                raise OverloadedError(str(error)) from error
            except _GONE:
                continue
            except RayTaskError as error:
                return Answer(*failure(500, f"the replica failed: {error.cause}"))
            # Ray's router and its messages are in what the request waited for.
            return Answer(status, answer, max(0.0, time.perf_counter() - start - took), took)
        return Answer(*failure(UNAVAILABLE, f"{self._max_attempts} replicas died with this request"))

    def scale(self, replicas: int) -> None:
        """Asks Ray for so many replicas; returns at once."""
        if replicas < 1:
            raise ValueError(f"scale: replicas is {replicas}; allowed: 1 or more")
        self.wanted, self._most = replicas, max(self._most, replicas)
        self._changing = asyncio.create_task(asyncio.to_thread(self._deploy))

    async def restart_all(self) -> None:
        """A rolling update by Ray: new replicas before the old ones go."""
        self._updates += 1
        await asyncio.to_thread(self._deploy)

    async def close(self, grace: float = 30.0) -> None:
        """Takes no more requests, answers those that it has within `grace` seconds, and takes the replicas away."""
        self._closing = True
        end = time.perf_counter() + grace
        while self._in_flight and time.perf_counter() < end:
            await asyncio.sleep(0.05)
        if self._watch is not None:
            self._watch.cancel()
        if ray.is_initialized():
            await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        serve.delete(self._name)
        if self._started_ray and self._address is None:
            serve.shutdown()
            ray.shutdown()

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            await self._look()

    async def _look(self) -> None:
        found = (await asyncio.to_thread(serve.status)).applications.get(self._name)
        deployment = None if found is None else found.deployments.get(_DEPLOYMENT)
        self._states = {} if deployment is None else {str(k): v for k, v in deployment.replica_states.items()}
        self.ready = self._states.get("RUNNING", 0)
        self.metrics.ready.set(self.ready)
        self.metrics.waiting.set(self._in_flight)

    def startups(self) -> Sequence[tuple[int, Startup]]:
        """Of one replica, by number."""
        return [] if self._startup is None else [(0, self._startup)]

    def status(self) -> dict[str, Any]:
        """What the live page shows; replicas of one state are one row."""
        return {
            "ready": self.ready, "wanted": self.wanted, "waiting": self._in_flight, "accepting": self.accepting,
            "replicas": [
                {"number": count, "state": state.lower(), "busy": None, "served": None, "ms_a_request": None,
                 "pid": None, "startup_s": None}
                for state, count in self._states.items()
            ],
            **self.metrics.summary(),
        }  # fmt: skip
