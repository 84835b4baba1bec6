"""The local engine follows its load: out under it, in after it, and no request lost on the way."""

import asyncio
import time

from lepton_ai.serving.autoscaler import ScalingPolicy
from lepton_ai.serving.autoscaling import autoscale, sample
from lepton_ai.serving.engine import Engine, Load
from net import body


def test_samples_are_differences():
    before = Load(1, 0, 0, 0, arrivals=10, completions=8, work=0.5, startup=3.0)
    now = Load(2, 1, 4, 3, arrivals=30, completions=18, work=3.0, startup=3.5)
    found = sample(before, now, 7.0)
    assert (found.time, found.ready, found.starting, found.waiting, found.in_flight) == (7.0, 2, 1, 4, 3)
    assert (found.arrivals, found.completions, found.service_seconds, found.startup_seconds) == (20, 10, 0.25, 3.5)
    assert sample(now, now, 8.0).service_seconds is None


def test_replicas_come_under_load_and_go_after_it(spec):
    async def scenario() -> None:
        policy = ScalingPolicy(1, 2, target_latency=0.2, scale_out_after=1.0, scale_in_after=3.0)
        async with Engine(spec, 1, max_batch=1) as engine:
            scaling = asyncio.create_task(autoscale(engine, policy, every=0.25))
            statuses = []

            async def client() -> None:
                while engine.ready < 2 and time.perf_counter() < stop:
                    statuses.append((await engine.infer(body(2000))).status)  # a second of work

            stop = time.perf_counter() + 60
            await asyncio.gather(*(client() for _ in range(3)))
            assert engine.ready == 2
            assert set(statuses) == {200}
            stop = time.perf_counter() + 60
            while engine.wanted == 2 and time.perf_counter() < stop:
                assert (await engine.infer(body(1))).status == 200
                await asyncio.sleep(0.05)
            assert engine.wanted == 1
            assert engine.metrics.registry.get_sample_value("lepton_scalings_total", {"direction": "out"}) == 1
            assert engine.metrics.registry.get_sample_value("lepton_scalings_total", {"direction": "in"}) == 1
            scaling.cancel()

    asyncio.run(scenario())
