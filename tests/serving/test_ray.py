"""The Ray engine on a cluster of this machine: no request is lost when replicas and nodes die, come and go."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

pytest.importorskip("ray.serve", reason="not installed: pip install 'lepton-kernels[ray]'")

from lepton_ai.serving.engine import OverloadedError, ReplicaError
from lepton_ai.serving.ray_cluster import LocalCluster
from lepton_ai.serving.ray_engine import RayEngine, Reply
from lepton_ai.serving.replica import Startup
from net import body, row
from ray.exceptions import ActorDiedError

SECONDS = 60  # that a change may take on a busy machine


def pids(engine: RayEngine) -> set[int]:
    return {replica["pid"] for replica in engine.status()["replicas"] if replica["state"] == "ready"}


async def until(holds) -> None:
    stop = time.perf_counter() + SECONDS
    while not holds():
        assert time.perf_counter() < stop
        await asyncio.sleep(0.1)


class Load:
    """Clients that each send their next request when they have their answer; leaving the context checks all answers."""

    def __init__(self, engine: RayEngine, compressed) -> None:
        self.engine, self.answers, self.stopped = engine, [], False
        with torch.inference_mode():
            self.want = compressed(torch.tensor([row(v) for v in range(20)]))

    async def client(self, number: int) -> None:
        while not self.stopped:
            number = (number + 1) % 20
            self.answers.append((number, await self.engine.infer(body(number))))
            await asyncio.sleep(0.01)

    async def __aenter__(self) -> "Load":
        self.clients = [asyncio.create_task(self.client(number)) for number in range(4)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopped = True
        await asyncio.gather(*self.clients)
        for number, answer in self.answers:
            assert answer.status == 200, answer
            got = torch.tensor(json.loads(answer.body)["vectors"][0])
            assert torch.allclose(got, self.want[number], atol=1e-5)


@pytest.mark.slow
def test_nothing_is_lost_while_replicas_and_nodes_die_and_their_number_changes(spec, compressed, tmp_path):
    async def scenario() -> None:
        async with LocalCluster(nodes=3) as cluster:
            engine = RayEngine(spec, 2, address=cluster.address, start_timeout=SECONDS)
            async with engine:
                assert (engine.ready, engine.accepting) == (2, True)
                async with Load(engine, compressed) as load:
                    await until(lambda: len(engine.startups()) == 2)
                    before = pids(engine)
                    os.kill(min(before), signal.SIGKILL)
                    await until(lambda: engine.ready == 2 and min(before) not in pids(engine))
                    assert engine.status()["restarts"] == 1

                    before = pids(engine)
                    await cluster.kill_node(engine.status()["replicas"][0]["node"])
                    await until(lambda: engine.ready == 2 and len(before & pids(engine)) == 1)
                    await cluster.add_node()

                    engine.scale(3)
                    await until(lambda: engine.ready == 3)
                    engine.scale(2)
                    await until(lambda: engine.ready == 2)

                    before = pids(engine)
                    await asyncio.wait_for(engine.restart_all(), SECONDS)
                    assert engine.ready == 2
                    assert not pids(engine) & before
                assert len(load.answers) > 100
                for part in ("imports", "fetch", "decode", "build", "warm_up", "peak_memory"):
                    assert all(getattr(startup, part) > 0 for _, startup in engine.startups())

                slow = [asyncio.create_task(engine.infer(body(2000))) for _ in range(2)]
                await asyncio.sleep(0.3)
            assert [answer.status for answer in await asyncio.gather(*slow)] == [200, 200]  # closing waited for them
            with pytest.raises(OverloadedError, match="closing"):
                await engine.infer(body(1))

    asyncio.run(scenario())


@pytest.mark.slow
def test_bad_files_overload_and_deadlines(spec, tmp_path):
    (tmp_path / "broken").write_bytes(b"no model")
    shutil.copyfile(spec.path, tmp_path / "good")

    async def scenario() -> None:
        async with LocalCluster(nodes=2) as cluster:
            broken = RayEngine(replace(spec, path=str(tmp_path / "broken")), address=cluster.address, name="broken")
            with pytest.raises(ReplicaError, match=r"^CorruptDataError: .*broken"):
                await broken.start()
            large = RayEngine(spec, 3, address=cluster.address, start_timeout=3.0)
            with pytest.raises(ReplicaError, match="of 3 replicas are ready after 3 s; the cluster has 2 CPUs"):
                await large.start()
            options = {"max_batch": 1, "max_waiting": 2, "timeout": 1.5, "max_attempts": 2, "max_waiting_bytes": 5000}
            async with RayEngine(
                replace(spec, path=str(tmp_path / "good")), address=cluster.address, **options
            ) as engine:
                with pytest.raises(OverloadedError, match="0 requests wait"):
                    await engine.infer(b"x" * 5001)
                work = [asyncio.create_task(engine.infer(body(2000))) for _ in range(6)]
                answers = await asyncio.gather(*work, return_exceptions=True)
                refused = [answer for answer in answers if isinstance(answer, OverloadedError)]
                assert refused
                assert all("2 requests wait" in str(error) for error in refused)
                assert {answer.status for answer in answers if answer not in refused} == {200, 504}
                await asyncio.sleep(1)
                assert (await engine.infer(body(1))).status == 200

                (tmp_path / "good").write_bytes(b"no model any more")
                await asyncio.wait_for(engine.restart_all(), SECONDS)
                assert "CorruptDataError" in engine.status()["trouble"]
                assert (await engine.infer(body(1))).status == 200

    asyncio.run(scenario())


@pytest.mark.slow
def test_the_command_serves_with_a_cluster_of_its_own_and_finishes_what_it_has_on_sigterm(spec, tmp_path):
    (tmp_path / "warm.json").write_text(spec.warm_up)
    command = [str(Path(sys.executable).with_name("lepton")), "serve", spec.path, "--model", spec.architecture,
               "--warm-up", f"{tmp_path}/warm.json", "--port", "0", "--engine", "ray"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(
                re.search(r"at http://127.0.0.1:(\d+): 1 replicas, \d+ threads each", server.stdout.readline())[1]
            )

            async def scenario() -> None:
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                    assert (await client.post("/infer", content=body(1))).status_code == 200
                    assert (await client.get("/startup")).json()["replicas"][0]["total"] > 0
                    (replica,) = (await client.get("/status")).json()["replicas"]
                    assert (replica["state"], replica["served"]) == ("ready", 1)
                    slow = asyncio.create_task(client.post("/infer", content=body(2000)))
                    await asyncio.sleep(0.3)
                    server.send_signal(signal.SIGTERM)
                    assert (await slow).status_code == 200

            asyncio.run(scenario())
            assert server.wait(SECONDS) == 0
        finally:
            server.kill()


class Response:
    """What a handle gives: an answer to come, which can be called off."""

    def __init__(self) -> None:
        self.future, self.cancelled = asyncio.get_running_loop().create_future(), False

    def __await__(self):
        return self.future.__await__()

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """In place of Ray's: a request takes 20 ms; one that is deadly ends, after 10, with all that are there."""

    def __init__(self) -> None:
        self.answer, self.responses, self.there = self, [], []

    def remote(self, request: bytes) -> Response:
        response, loop = Response(), asyncio.get_running_loop()
        self.responses.append(response)
        if request != b"silent":
            self.there.append(response)
            loop.call_later(0.01, self.die) if request == b"deadly" else loop.call_later(0.02, self.end, response)
        return response

    def die(self) -> None:
        for response in self.there:
            response.future.set_exception(ActorDiedError())
        self.there = []

    def end(self, response: Response) -> None:
        if response in self.there:
            self.there.remove(response)
            response.future.set_result(Reply(200, b"", 0.0, 0.0, 1, "", Startup(0, 0, 0, 0, 0, 0)))


def test_what_kills_its_replicas_is_given_up_and_takes_no_other_request_with_it(spec):
    async def scenario() -> None:
        engine = RayEngine(spec)
        engine._handle = Handle()
        deadly, *others = await asyncio.gather(*(engine.infer(b"deadly" if i == 0 else b"") for i in range(10)))
        assert (deadly.status, deadly.body) == (503, b'{"error": "4 replicas died with this request"}')
        assert [answer.status for answer in others] == [200] * 9

    asyncio.run(scenario())


def test_what_nobody_waits_for_is_called_off(spec):
    async def scenario() -> None:
        engine = RayEngine(spec, timeout=0.1)
        engine._handle = Handle()
        assert (await engine.infer(b"silent")).status == 504
        gone = asyncio.create_task(engine.infer(b"silent"))
        await asyncio.sleep(0.02)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        closed = asyncio.create_task(engine.infer(b"silent"))
        await asyncio.sleep(0.02)
        await engine.close(0.0)
        assert ((await closed).status, (await closed).body) == (503, b'{"error": "the server is closing"}')
        await asyncio.sleep(0)
        assert [response.cancelled for response in engine._handle.responses] == [True] * 3

    asyncio.run(scenario())


def test_numbers_that_are_not_allowed(spec):
    with pytest.raises(ValueError, match="RayEngine: replicas is 0; allowed: 1 or more"):
        RayEngine(spec, 0)
    with pytest.raises(ValueError, match=r"max_replicas is 1; allowed: None, or replicas \(2\) or more"):
        RayEngine(spec, 2, 1)
    with pytest.raises(ValueError, match="timeout is inf; allowed: a finite number above 0"):
        RayEngine(spec, timeout=float("inf"))
    with pytest.raises(ValueError, match="LocalCluster: nodes is 0, cpus 1; allowed: 1 or more"):
        LocalCluster(0)
    with pytest.raises(ValueError, match="scale: replicas is 0; allowed: 1 or more"):
        RayEngine(spec).scale(0)
