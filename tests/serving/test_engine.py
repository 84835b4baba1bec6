"""The local engine: no request is lost when replicas die, come, go and are replaced."""

import asyncio
import json
import os
import signal
import time

import pytest
import torch
from lepton_ai.serving.engine import Engine, OverloadedError, ReplicaError
from lepton_ai.serving.replica import ReplicaSpec
from net import body, row


def vectors(answer) -> torch.Tensor:
    assert answer.status == 200, answer
    return torch.tensor(json.loads(answer.body)["vectors"])


def pids(engine: Engine) -> set[int]:
    return {replica.process.pid for replica in engine.replicas if replica.state == "ready"}


async def until(holds) -> None:
    stop = time.perf_counter() + 60
    while not holds():
        assert time.perf_counter() < stop
        await asyncio.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_nothing_is_lost_while_replicas_die_and_their_number_changes(spec, compressed):
    async def scenario() -> None:
        async with Engine(spec, 2, max_batch=4) as engine:
            assert engine.ready == 2
            with torch.inference_mode():
                want = compressed(torch.tensor([row(v) for v in range(40)]))
            answers = await asyncio.gather(*(engine.infer(body(v)) for v in range(40)))
            assert torch.allclose(torch.cat([vectors(a) for a in answers]), want, atol=1e-6)
            assert all(a.queued >= 0 and a.model > 0 for a in answers)
            assert sum(replica.served for replica in engine.replicas) == 40
            assert all(replica.served for replica in engine.replicas)

            before = pids(engine)
            work = [asyncio.create_task(engine.infer(body(2000 if v < 2 else v))) for v in range(30)]
            await asyncio.sleep(0.3)  # both are at work on what takes a second
            assert all(replica.has for replica in engine.replicas)
            os.kill(min(before), signal.SIGKILL)
            answers = await asyncio.gather(*work)
            assert torch.allclose(torch.cat([vectors(a) for a in answers[2:]]), want[2:30], atol=1e-6)
            assert len(answers) == 30
            assert engine.metrics.registry.get_sample_value("lepton_retries_total") >= 1
            assert engine.metrics.registry.get_sample_value("lepton_replica_restarts_total") == 1
            await until(lambda: engine.ready == 2)
            assert len(pids(engine) & before) == 1

            work = [asyncio.create_task(engine.infer(body(v))) for v in range(40)]
            engine.scale(1)
            assert len(await asyncio.gather(*work)) == 40
            await until(lambda: len(engine.replicas) == 1)
            old = pids(engine)
            work = [asyncio.create_task(engine.restart_all())]
            while not work[0].done():
                vectors(await engine.infer(body(3)))
            await asyncio.sleep(0.2)
            assert engine.ready == 1
            assert not pids(engine) & old
            last = pids(engine)
        assert all(gone(pid) for pid in before | old | last)

    asyncio.run(scenario())


def test_a_request_that_kills_its_replicas_is_given_up_and_the_others_are_not(spec):
    async def scenario() -> None:
        async with Engine(spec, 1, max_attempts=2) as engine:
            deadly, *others = await asyncio.gather(
                engine.infer(body(1000)), *(engine.infer(body(v)) for v in range(5))
            )  # fmt: skip
            assert deadly.status == 503
            assert "2 replicas died" in json.loads(deadly.body)["error"]
            assert [answer.status for answer in others] == [200] * 5

    asyncio.run(scenario())


def test_full_queues_deadlines_and_closing(spec):
    async def scenario() -> None:
        async with Engine(spec, 1, max_waiting=3, max_waiting_bytes=1000, timeout=0.5, max_batch=1) as engine:
            slow = [asyncio.create_task(engine.infer(body(2000))) for _ in range(2)]
            await asyncio.sleep(0.1)
            with pytest.raises(OverloadedError, match="1 requests wait"):
                await engine.infer(b"x" * 1000)
            more = [asyncio.create_task(engine.infer(body(1))) for _ in range(2)]
            await asyncio.sleep(0.1)
            with pytest.raises(OverloadedError, match="3 requests wait"):
                await engine.infer(body(1))
            assert [answer.status for answer in await asyncio.gather(*slow, *more)] == [504] * 4
            start = time.perf_counter()
        assert time.perf_counter() - start < 10
        with pytest.raises(OverloadedError, match="closing"):
            await engine.infer(body(1))

    asyncio.run(scenario())


def test_closing_answers_what_it_has(spec):
    async def scenario() -> None:
        engine = Engine(spec, 1)
        await engine.start()
        work = [asyncio.create_task(engine.infer(body(2000))), asyncio.create_task(engine.infer(body(1)))]
        await asyncio.sleep(0.1)
        await engine.close()
        assert [answer.status for answer in await asyncio.gather(*work)] == [200, 200]

    asyncio.run(scenario())


def test_a_replica_that_can_not_start_says_why(spec, tmp_path):
    async def scenario(wrong: ReplicaSpec, text: str) -> None:
        with pytest.raises(ReplicaError, match=text):
            await Engine(wrong, 2).start()

    (tmp_path / "broken").write_bytes(b"no model")
    asyncio.run(scenario(ReplicaSpec(str(tmp_path / "broken"), spec.architecture), "CorruptDataError"))
    asyncio.run(scenario(ReplicaSpec(spec.path, spec.architecture), "warm_up is None and the model is none of tokens"))
    asyncio.run(scenario(ReplicaSpec(spec.path, spec.architecture, warm_up="{}"), "warm-up request was answered 400"))


@pytest.mark.parametrize("name", ["replicas", "max_waiting", "max_batch", "max_attempts", "max_waiting_bytes"])
def test_numbers_that_are_not_allowed(spec, name):
    with pytest.raises(ValueError, match=f"Engine: {name} is 0; allowed: 1 or more"):
        Engine(spec, **{name: 0})
    with pytest.raises(ValueError, match="timeout is 0; allowed: a finite number above 0"):
        Engine(spec, timeout=0)
