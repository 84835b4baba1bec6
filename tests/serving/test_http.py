"""The HTTP server: answers, what bad input gets, connections that say nothing, and the command line."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from lepton_ai.cli import app
from lepton_ai.serving.engine import Engine
from lepton_ai.serving.http import BoundedProtocol, serving
from net import body
from typer.testing import CliRunner


async def raw(port: int, data: bytes, *, more: float = 0.0) -> bytes:
    """What a client gets that writes `data` and, after `more` seconds, reads to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await writer.drain()
    await asyncio.sleep(more)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_answers_figures_and_bad_input(spec, monkeypatch):
    monkeypatch.setattr(BoundedProtocol, "head_seconds", 1.0)
    monkeypatch.setattr(BoundedProtocol, "max_connections", 60)

    async def scenario() -> None:
        engine = Engine(spec, 1)
        async with serving(engine, "127.0.0.1", 0, max_body=5000, body_seconds=1.0) as port:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                assert (await client.get("/health")).status_code == 200
                assert (await client.get("/ready")).status_code == 503
                assert (await client.get("/startup")).status_code == 503
                await engine.start()
                assert (await client.get("/ready")).json() == {"ready": True}
                (row,) = (await client.get("/startup")).json()["replicas"]
                parts = ("imports", "fetch", "decode", "build", "warm_up")
                assert row["total"] == pytest.approx(sum(row[name] for name in parts))
                assert row["warm_up"] > 0
                assert row["peak_memory"] > 1 << 20

                answer = await client.post("/infer", content=body(1, 2))
                assert (answer.status_code, len(answer.json()["vectors"])) == (200, 2)
                wrong = await client.post("/infer", content=b"nothing")
                assert (wrong.status_code, "no JSON" in wrong.json()["error"]) == (400, True)
                large = await client.post("/infer", content=b" " * 6000)
                assert (large.status_code, large.json()["error"]) == (413, "the body is too large; allowed: 5000 bytes")

                async def pieces():
                    for _ in range(10):
                        yield b" " * 1000

                assert (await client.post("/infer", content=pieces())).status_code == 413
                assert (await client.get("/infer")).status_code == 405
                assert (await client.get("/nothing")).status_code == 404

                head = b"POST /infer HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
                assert (await raw(port, head + b"{", more=1.3)).startswith(b"HTTP/1.1 408")
                assert (await raw(port, b"GET / HT\xff\xff\r\n\r\n")).startswith(b"HTTP/1.1 400")
                start = time.perf_counter()
                assert await raw(port, b"") == b""  # it says nothing
                assert await raw(port, b"GET /health HTTP/1.1\r\nhost: x\r\nslow: ") == b""
                assert time.perf_counter() - start < 5
                idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
                assert (await client.post("/infer", content=body(1))).status_code == 200  # on its own connection
                await asyncio.sleep(1.5)
                assert all([await reader.read() == b"" for reader, _ in idle])
                for _, writer in idle:
                    writer.close()

                text = (await client.get("/metrics")).text
                assert 'lepton_requests_total{status="200"} 2.0' in text
                assert 'lepton_requests_total{status="413"} 2.0' in text
                assert "lepton_replicas_ready 1.0" in text
                status = (await client.get("/status")).json()
                assert (status["ready"], status["answered"], status["accepting"]) == (1, 6, True)
                assert 0 <= status["overhead_p50_ms"] <= status["latency_p99_ms"]
                assert "<title>Lepton</title>" in (await client.get("/")).text
            await engine.close()

    asyncio.run(scenario())


def test_overload_is_said_with_when_to_come_back(spec):
    async def scenario() -> None:
        async with (
            Engine(spec, 1, max_waiting=1, max_batch=1) as engine,
            serving(engine, "127.0.0.1", 0) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
        ):
            work = [asyncio.create_task(client.post("/infer", content=body(2000))) for _ in range(5)]
            answers = await asyncio.gather(*work)
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200, 200, 503, 503, 503]
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert refused.headers["retry-after"] == "1"
        assert "overloaded: 1 requests wait" in refused.json()["error"]

    asyncio.run(scenario())


@contextmanager
def command(spec, folder: Path, *options: str):
    """`lepton serve` as a process; gives it, its port and the number of threads that it tells."""
    (folder / "warm.json").write_text(spec.warm_up)
    words = [str(Path(sys.executable).with_name("lepton")), "serve", spec.path, "--model", spec.architecture,
             "--warm-up", str(folder / "warm.json"), "--port", "0", *options]  # fmt: skip
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            found = re.search(r"at http://127.0.0.1:(\d+): 1 replicas, (\d+) threads each", server.stdout.readline())
            yield server, int(found[1]), int(found[2])
        finally:
            server.kill()


def test_the_command_serves_and_finishes_what_it_has_on_sigterm(spec, tmp_path):
    with command(spec, tmp_path) as (server, port, _):

        async def scenario() -> None:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                assert (await client.post("/infer", content=body(1))).status_code == 200
                slow = asyncio.create_task(client.post("/infer", content=body(2000)))
                await asyncio.sleep(0.3)
                server.send_signal(signal.SIGTERM)
                assert (await slow).status_code == 200

        asyncio.run(scenario())
        assert server.wait(20) == 0


def test_threads_of_the_command_have_no_cores_of_their_own(spec, tmp_path):
    with command(spec, tmp_path, "--threads", "1") as (server, port, threads):
        (replica,) = httpx.get(f"http://127.0.0.1:{port}/status", timeout=20).json()["replicas"]
        assert threads == 1
        assert os.sched_getaffinity(replica["pid"]) == os.sched_getaffinity(server.pid)


def test_the_command_says_why_it_can_not_serve(spec, tmp_path):
    (tmp_path / "broken").write_bytes(b"no model")
    lepton = str(Path(sys.executable).with_name("lepton"))
    done = subprocess.run(
        [lepton, "serve", str(tmp_path / "broken"), "--port", "0"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "CorruptDataError" in done.stderr
    assert json.dumps("Traceback") not in done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--engine", "slurm"], "--engine is 'slurm'; allowed: local, ray"),
        (["--replicas", "4", "--max-replicas", "3"], "--max-replicas is 3 with --replicas 4; allowed: as many or more"),
        (["--address", "auto"], "--address is auto with --engine local"),
    ],
)
def test_options_that_do_not_fit(spec, options, text):
    result = CliRunner().invoke(app, ["serve", spec.path, *options])
    assert (result.exit_code, text in result.output) == (2, True)
