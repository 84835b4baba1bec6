"""simulate: a scaling policy on fleets and loads that no test machine has, beside a fleet sized for the peak.

Every request is an event: it arrives (Poisson, at the load's rate), waits in one queue for all nodes, first in first
out, and takes a time drawn from recorded ones, over its node's speed. Of the idle nodes it goes to the one that has
been idle longest for its speed, so that each gets requests about in proportion to its speed; price decides which kinds
of nodes run. A heap of the times at which nodes become free makes this exact and quick enough for full size: about a
microsecond a request and fleet, so one to two minutes for an hour of 10 000 requests a second and both fleets.

What is approximated:
- Between two samples the rate of arrivals is constant, and nodes fail, are drained or are told to start only at
  samples. Those that start are ready at their own time.
- A node runs one replica, which serves one request at a time. That it died is known at the next sample, when the
  request that it served is sent again. Drained nodes finish theirs, do not fail meanwhile, and make room at once.
- Network, dispatch and measurement take no time, and service times do not depend on each other.
- Quantiles are of a histogram whose bins are 0.5 % wide.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lepton_ai.serving.autoscaler import Autoscaler, ScalingPolicy
from lepton_ai.serving.loads import Load
from lepton_ai.serving.simulated_fleet import FleetResult, NodeKind, SimulatedFleet


@dataclass(frozen=True)
class SimulationResult:
    """scaled: under the policy. fixed: as many nodes all the time as the policy would have at the load's peak."""

    scaled: FleetResult
    fixed: FleetResult
    seconds: float
    seed: int
    timeline: tuple[tuple[float, float, int], ...]  # of the scaled fleet, by sample: time, rate, replicas asked for

    def as_dict(self) -> dict[str, Any]:
        """Plain values without the timeline, for JSON, which has no NaN: it is None here."""
        out: dict[str, Any] = {"seconds": self.seconds, "seed": self.seed}
        for name, result in (("scaled", self.scaled), ("fixed", self.fixed)):
            values = dataclasses.asdict(result)
            out[name] = {key: None if value != value else value for key, value in values.items()}
        return out


def simulate(
    load: Load,
    seconds: float,
    kinds: Sequence[NodeKind],
    service_seconds: Sequence[float],
    policy: ScalingPolicy,
    *,
    seed: int = 0,
    failures: float = 0.0,
    updates: Sequence[float] = (),
    queue_limit: int = 10_000,
    initial: int | None = None,
    step: float = 1.0,
) -> SimulationResult:
    """Runs the same requests against a fleet that the policy scales and one sized for the peak of the load.

    service_seconds: recorded times of single requests on a node of speed 1, drawn from at random. policy: its replicas
    are nodes of speed 1, and a faster node counts as several. failures: share of the nodes that die in an hour; they
    are replaced. updates: seconds at which the replacement of all nodes begins, some at a time. queue_limit: requests
    that may wait; others are refused. initial: replicas of the scaled fleet at the begin, ready; None for what the load
    needs. step: seconds between samples.
    Raises ValueError for values that do not fit, or nodes that are worth less than the policy's max_replicas.
    """
    works = np.asarray(service_seconds, dtype=np.float64)
    if works.ndim != 1 or not len(works) or not (np.isfinite(works).all() and (works > 0).all()):
        raise ValueError("simulate: service_seconds is empty or has other values; allowed: finite seconds over 0")
    for name, fits, value, allowed in (
        ("seconds", step <= seconds < math.inf, seconds, f"a finite number, step ({step:g}) or more"),
        ("step", 0 < step < math.inf, step, "a finite number over 0"),
        ("failures", 0 <= failures < math.inf, failures, "a finite number, 0 or more"),
        ("queue_limit", queue_limit >= 1, queue_limit, "1 or more"),
        ("kinds", len({kind.name for kind in kinds}) == len(kinds) > 0, kinds, "one or more, with names of their own"),
    ):
        if not fits:
            raise ValueError(f"simulate: {name} is {value!r}; allowed: {allowed}")
    worth = sum(kind.count * kind.speed for kind in kinds)
    if worth < policy.max_replicas:
        raise ValueError(
            f"simulate: kinds are worth {worth:g} nodes of speed 1; allowed: max_replicas ({policy.max_replicas}) or "
            "more"
        )
    begins = np.arange(round(seconds / step)) * step
    rates = [load(begin + step / 2) for begin in begins]
    if not all(0 <= rate < math.inf for rate in rates):
        raise ValueError("simulate: load gives a rate that is negative or not finite; allowed: 0 or more")
    mean = float(works.mean())
    first, peak = (policy.replicas_for(rate * mean, mean) for rate in (rates[0], max(rates)))
    first = first if initial is None else policy.clamped(initial)
    arrivals_rng, *fleet_rngs = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3))
    scaled = SimulatedFleet(kinds, first, Autoscaler(policy), queue_limit, failures, fleet_rngs[0])
    fixed = SimulatedFleet(kinds, peak, None, queue_limit, failures, fleet_rngs[1])
    timeline = []
    for begin, rate in zip(begins.tolist(), rates, strict=True):
        count = arrivals_rng.poisson(rate * step)
        arrivals = (begin + step * np.sort(arrivals_rng.random(count))).tolist()
        drawn = works[arrivals_rng.integers(len(works), size=count)].tolist()
        update = any(begin <= time < begin + step for time in updates)
        for fleet in (scaled, fixed):
            fleet.advance(begin, step, update)
            fleet.serve(arrivals, drawn, begin, begin + step)
        timeline.append((begin, rate, scaled.replicas))
    end = len(begins) * step
    return SimulationResult(scaled.result(end), fixed.result(end), end, seed, tuple(timeline))
