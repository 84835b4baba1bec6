"""The HTTP server: requests in, answers of an Engine out, and what one wants to know of it on the way.

POST /infer (service.py has the form), GET /health (the process lives), /ready (a replica has answered a warm request),
/startup (seconds of each replica's start), /metrics (Prometheus), /status (JSON), / (a live page).
"""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lepton_ai.serving.engine import UNAVAILABLE, Answer, OverloadedError
from lepton_ai.serving.metrics import Metrics
from lepton_ai.serving.replica import Startup
from lepton_ai.serving.service import failure

PAGE = Path(__file__).with_name("page.html")
TOO_SLOW, TOO_LARGE = 408, 413
# What is still to come of a body is not read.
_CLOSE = {"connection": "close"}
_HEADERS = {UNAVAILABLE: {"retry-after": "1"}, TOO_SLOW: _CLOSE, TOO_LARGE: _CLOSE}


class ServingEngine(Protocol):
    """What answers requests: lepton_ai.serving.engine.Engine, or ray_engine.RayEngine."""

    metrics: Metrics
    wanted: int

    @property
    def accepting(self) -> bool: ...
    async def start(self) -> None: ...
    async def infer(self, body: bytes) -> Answer: ...
    def scale(self, replicas: int) -> None: ...
    async def restart_all(self) -> None: ...
    async def close(self, grace: float = 30.0) -> None: ...
    def startups(self) -> Sequence[tuple[int, Startup]]: ...
    def status(self) -> dict[str, Any]: ...


class BodyTooLargeError(ValueError):
    """More bytes than a request may have."""


def _json(value: Any, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


async def _body(request: Request, most: int) -> bytes:
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise BodyTooLargeError(length)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise BodyTooLargeError(str(len(body)))
    return bytes(body)


def make_app(engine: ServingEngine, *, max_body: int = 1 << 20, body_seconds: float = 10.0) -> Starlette:
    """The ASGI application over an engine. max_body: bytes of a request; body_seconds: it may take to arrive."""

    def answered(status: int, body: bytes, start: float, overhead: float | None = None) -> Response:
        engine.metrics.answer(status, time.perf_counter() - start, overhead)
        return Response(body, status, _HEADERS.get(status), media_type="application/json")

    async def infer(request: Request) -> Response:
        start = time.perf_counter()
        try:
            body = await asyncio.wait_for(_body(request, max_body), body_seconds)
        except asyncio.TimeoutError:
            return answered(*failure(TOO_SLOW, f"the body took more than {body_seconds:g} s"), start)
        except BodyTooLargeError:
            return answered(*failure(TOO_LARGE, f"the body is too large; allowed: {max_body} bytes"), start)
        except ClientDisconnect:
            return answered(*failure(TOO_SLOW, "the client is gone"), start)
        arrived = time.perf_counter()
        try:
            answer = await engine.infer(body)
        except OverloadedError as error:
            return answered(*failure(UNAVAILABLE, f"overloaded: {error}"), start)
        spent = time.perf_counter() - arrived
        return answered(answer.status, answer.body, start, max(0.0, spent - answer.queued - answer.model))

    async def health(_: Request) -> Response:
        return _json({"alive": True})

    async def ready(_: Request) -> Response:
        return _json({"ready": engine.accepting}, 200 if engine.accepting else UNAVAILABLE)

    async def startup(_: Request) -> Response:
        rows = [{"number": number, **vars(took), "total": took.total} for number, took in engine.startups()]
        return _json({"replicas": rows}, 200 if rows else UNAVAILABLE)

    async def metrics(_: Request) -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def status(_: Request) -> Response:
        return _json(engine.status())

    async def page(_: Request) -> Response:
        return Response(PAGE.read_text(), media_type="text/html")

    routes = [Route("/infer", infer, methods=["POST"])]
    gets = {"/": page, "/health": health, "/ready": ready, "/startup": startup, "/metrics": metrics, "/status": status}
    routes += [Route(path, endpoint) for path, endpoint in gets.items()]
    return Starlette(routes=routes)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's, for clients that mean ill or have died: a connection that has not sent a request's head in time is
    closed, and so is one too many."""

    head_seconds = 10.0
    max_connections = 4096
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._expect_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Server(uvicorn.Server):
    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()  # run() has handlers of its own


@contextlib.asynccontextmanager
async def serving(engine: ServingEngine, host: str, port: int, **limits: Any) -> AsyncIterator[int]:
    """Inside, the engine is reachable at host:port, whose number it gives (of a free one for 0). limits: make_app's.

    Raises OSError where the port is taken.
    """
    config = uvicorn.Config(
        make_app(engine, **limits), host=host, port=port, http=BoundedProtocol, lifespan="off", log_level="warning",
        access_log=False, timeout_keep_alive=30, backlog=1024, ws="none",
    )  # fmt: skip
    bound = config.bind_socket()
    server = _Server(config)
    task = asyncio.create_task(server.serve([bound]))
    try:
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        bound.close()


async def run(
    engine: ServingEngine,
    host: str,
    port: int,
    grace: float,
    announce: Callable[[int], None],
    beside: Callable[[], Coroutine[Any, Any, None]] | None = None,
    **limits: Any,
) -> None:
    """Starts the engine and serves until SIGTERM or SIGINT; then answers what it has, in at most `grace` seconds.

    SIGHUP replaces the replicas one by one, SIGTTIN adds one and SIGTTOU takes one away, as gunicorn does.
    announce: is called with the port once requests are taken. beside: what runs from then until the end, such as
    autoscale.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    updates: set[asyncio.Task[None]] = set()

    def update() -> None:
        task = asyncio.create_task(engine.restart_all())
        updates.add(task)
        task.add_done_callback(updates.discard)

    handlers: dict[signal.Signals, Callable[[], None]] = {
        signal.SIGTERM: stop.set, signal.SIGINT: stop.set, signal.SIGHUP: update,
        signal.SIGTTIN: lambda: engine.scale(engine.wanted + 1),
        signal.SIGTTOU: lambda: engine.scale(max(1, engine.wanted - 1)),
    }  # fmt: skip
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    async with serving(engine, host, port, **limits) as bound:
        starting = asyncio.create_task(engine.start())
        waiting = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        tasks = [starting, waiting]
        if starting.done():
            await starting
            announce(bound)
            if beside is not None:
                tasks.append(asyncio.create_task(beside()))
            await asyncio.wait(tasks[1:], return_when=asyncio.FIRST_COMPLETED)
        await engine.close(grace)
        failed = [task.exception() for task in tasks if task.done() and not task.cancelled()]
        for task in tasks:
            task.cancel()
        for error in failed:
            if error is not None:
                raise error
