"""Autoscaling of the local engine: samples of its load, a decision on each, and as many replicas as that says."""

import asyncio
import logging
import time

from lepton_ai.serving.autoscaler import Autoscaler, LoadSample, ScalingPolicy
from lepton_ai.serving.engine import Engine, Load

_LOG = logging.getLogger("lepton_ai.serving")


def sample(before: Load, now: Load, at: float) -> LoadSample:
    """What happened between two looks at an engine; at: seconds of a clock that never goes back."""
    completions = now.completions - before.completions
    return LoadSample(
        time=at, ready=now.ready, starting=now.starting, waiting=now.waiting, in_flight=now.in_flight,
        arrivals=now.arrivals - before.arrivals, completions=completions,
        service_seconds=(now.work - before.work) / completions if completions else None, startup_seconds=now.startup,
    )  # fmt: skip


async def autoscale(engine: Engine, policy: ScalingPolicy, every: float = 1.0) -> None:
    """Scales the engine by the policy, looking at it `every` so many seconds, until it is cancelled."""
    scaler, before = Autoscaler(policy), engine.load()
    while True:
        await asyncio.sleep(every)
        now = engine.load()
        decision = scaler.desired(sample(before, now, time.monotonic()))
        before = now
        if decision.replicas != engine.wanted:
            _LOG.info("from %d to %d replicas: %s", engine.wanted, decision.replicas, decision.reason)
            engine.metrics.scaled(decision.replicas - engine.wanted)
            engine.scale(decision.replicas)
