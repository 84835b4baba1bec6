"""Autoscaler: how many replicas a load needs, now and when those that are started now are ready.

Pure logic: no clock, no threads, no input or output. Who drives it (an engine, a simulation) measures a LoadSample
every second or so, asks desired(), and starts or drains replicas until there are as many, ready and starting.

What it rests on:
- A fleet is the smallest that by Erlang C keeps waits short and replicas no busier than they should be
  (lepton_ai.serving.queueing). Its load is arrivals a second times the seconds that one takes (Little's law).
- What waits has to be worked off beside what arrives, and is no measure of the load. Scaling on queue lengths alone
  makes fleets swing: new replicas shorten the queues, which takes them away again (ray-project/ray#18925).
- Rates are means since the load last changed (lepton_ai.serving.arrival_rate), so they get the more exact the longer
  it is steady. A rise is followed for as long as a replica takes to start.
- Hysteresis: out when even the least that the figures allow needs more replicas, in when the most that they allow needs
  fewer, and when that has lasted: out to the least need of that time, in to the greatest (the stabilization window of
  Kubernetes' HorizontalPodAutoscaler; ray-project/ray#46497). That what is slow to start is better kept for a while is
  from Gandhi et al., "AutoScale: dynamic, robust capacity management for multi-tier data centers", ACM TOCS 30, 2012.
- Damping: a scale-out soon after a scale-in shows that this was too early, and doubles the time that the next one has
  to wait (as routers suppress routes that flap, RFC 2439).
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lepton_ai.serving.arrival_rate import ArrivalRate, Rate
from lepton_ai.serving.queueing import servers_for

MOST_PATIENCE = 300.0  # seconds that damping lets scaling in wait, at most
# Standard deviations that a rate and a mean time may be off. Starting late costs more than ending late.
_BELOW, _ABOVE = 2.5, 3.0
_LEAST_ANSWERS = 30  # before which too little is known to scale in
_SOON = 10.0  # a scale-out within so many times the patience after a scale-in came soon
# Service times are remembered for 4000 requests, but 10 seconds at least and 300 at most. That requests take longer
# than before is told from those of 10 seconds.
_MEMORY_REQUESTS, _LEAST_MEMORY, _MOST_MEMORY = 4000.0, 10.0, 300.0


@dataclass(frozen=True)
class ScalingPolicy:
    """What an Autoscaler may do and has to reach.

    min_replicas, max_replicas: bounds that hold whatever happens; min_replicas 0 lets an idle fleet end.
    target_latency: seconds from arrival to answer that a share `latency_quantile` of the requests should stay within,
    as far as waiting for a replica goes (service is taken at its mean). target_utilization: share of the time that
    replicas may be busy. scale_out_after, scale_in_after: seconds that a load must last before replicas are started or
    drained for it. max_growth: times as many replicas, ready and starting, as one decision may ask for (at least one
    more). tolerance: share by which the load must have fallen below what the fleet is for before any is drained.
    drain_seconds: within which what waits should be worked off. idle_after: seconds without a request after which none
    is expected. Raises ValueError for values that do not fit.
    """

    min_replicas: int
    max_replicas: int
    target_latency: float
    latency_quantile: float = 0.99
    target_utilization: float = 0.8
    scale_out_after: float = 3.0
    scale_in_after: float = 10.0
    max_growth: float = 2.0
    tolerance: float = 0.1
    drain_seconds: float = 60.0
    idle_after: float = 300.0

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("min_replicas", self.min_replicas >= 0, "0 or more"),
            ("max_replicas", self.max_replicas >= max(1, self.min_replicas), "1 or more, and min_replicas or more"),
            ("target_latency", 0 < self.target_latency < math.inf, "a finite number of seconds over 0"),
            ("latency_quantile", 0 < self.latency_quantile < 1, "over 0 and under 1"),
            ("target_utilization", 0 < self.target_utilization <= 1, "over 0, at most 1"),
            ("scale_out_after", 0 <= self.scale_out_after < math.inf, "a finite number of seconds, 0 or more"),
            ("scale_in_after", 0 <= self.scale_in_after < math.inf, "a finite number of seconds, 0 or more"),
            ("max_growth", 1 < self.max_growth < math.inf, "a finite number over 1"),
            ("tolerance", 0 <= self.tolerance < math.inf, "a finite number, 0 or more"),
            ("drain_seconds", self.drain_seconds > 0, "a number of seconds over 0"),
            ("idle_after", self.idle_after > 0, "a number of seconds over 0"),
        ):
            if not fits:
                raise ValueError(f"ScalingPolicy: {name} is {getattr(self, name)!r}; allowed: {allowed}")

    def clamped(self, replicas: int) -> int:
        """replicas, within the bounds."""
        return min(max(replicas, self.min_replicas), self.max_replicas)

    def replicas_for(self, load: float, service_seconds: float) -> int:
        """The fewest replicas, within the bounds, that serve `load` Erlang of requests of that length as this asks for.

        Where target_latency is shorter than a request takes, so that nothing can reach it, a share latency_quantile of
        them should not wait at all.
        """
        wait = max(0.0, self.target_latency / service_seconds - 1) if service_seconds > 0 else math.inf
        return self.clamped(
            servers_for(
                load, wait=wait, share=1 - self.latency_quantile, utilization=self.target_utilization,
                most=self.max_replicas,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class LoadSample:
    """What was measured. Times in seconds, by a clock that never goes back.

    ready, starting: replicas that take requests, and that will. waiting, in_flight: requests without and with a
    replica. arrivals (refused ones too), completions: since the last sample. service_seconds: of a replica, for a
    request (for a batch of 8 in 0.4 s: 0.05), the mean of these completions; None without any. startup_seconds: until
    a replica that is started now is ready. Raises ValueError for values that are negative or not finite.
    """

    time: float
    ready: int
    starting: int
    waiting: int
    in_flight: int
    arrivals: int
    completions: int
    service_seconds: float | None
    startup_seconds: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None and name == "service_seconds":
                continue
            if not (0 <= value < math.inf or (name == "time" and math.isfinite(value))):
                raise ValueError(f"LoadSample: {name} is {value!r}; allowed: a finite number, 0 or more")


@dataclass(frozen=True)
class Decision:
    """replicas: how many there should be, ready and starting ones together. reason: why, in words."""

    replicas: int
    reason: str


class _MeanTime:
    """The mean of times, older ones counting less, with bounds.

    The logarithm of a mean of n exponential times has a deviation of 1 / √n, whatever the times are.
    """

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0.0

    def add(self, seconds: float, count: int, keep: float) -> None:
        """So many of that mean; what was known counts `keep` times."""
        self._total = keep * self._total + count * seconds
        self._count = keep * self._count + count

    @property
    def mean(self) -> float:
        """0 without any."""
        return self._total / self._count if self._count else 0.0

    def off(self, deviations: float) -> float:
        """The mean, so many standard deviations off."""
        return self.mean * math.exp(deviations / math.sqrt(max(self._count, 1.0)))


class Autoscaler:
    """Follows one fleet, from sample to sample; for a fleet of unequal replicas, count in multiples of the smallest."""

    def __init__(self, policy: ScalingPolicy) -> None:
        self.policy = policy
        self._rate, self._now = ArrivalRate(), Rate(0.0, 0.0, 0.0, 1.0, 0.0)
        self._service, self._recent_service = _MeanTime(), _MeanTime()
        self._answers = 0
        self._needs: deque[tuple[float, int, int]] = deque()  # time, least and greatest need
        self._since = self._last = self._busy_at = -math.inf
        self._replicas = policy.min_replicas
        self._scaled_in: float | None = None  # when, if that was the last change
        self._patience = policy.scale_in_after

    def desired(self, sample: LoadSample) -> Decision:
        """How many replicas there should be. Raises ValueError where a sample is not later than the one before."""
        if sample.time <= self._last:
            raise ValueError(
                f"Autoscaler.desired: time is {sample.time}; allowed: later than the last one's, {self._last}"
            )
        if self._last == -math.inf:
            self._since = self._last = self._busy_at = sample.time
            self._replicas = self.policy.clamped(sample.ready + sample.starting)
            return Decision(self._replicas, "the first sample: what there is, within the bounds")
        self._learn(sample)
        self._last = sample.time
        least, greatest = self._need(sample)
        self._needs.append((sample.time, least, greatest))
        while self._needs[0][0] < sample.time - max(self._patience, self.policy.scale_out_after):
            self._needs.popleft()
        # What waits for the first replica has waited long enough.
        lasting_least = self._over(self.policy.scale_out_after, min, 1) if self._replicas else least
        lasting_greatest = self._over(self._patience, max, 2)
        if lasting_least is not None and lasting_least > self._replicas:
            there = sample.ready + sample.starting
            cap = max(there + 1, int(there * self.policy.max_growth))
            replicas = max(self._replicas, min(lasting_least, self.policy.clamped(cap)))
            if replicas > self._replicas:
                return self._scale_out(replicas, lasting_least, sample)
            return Decision(
                replicas, f"{self._figures(sample)}; {there} are there, so not yet the {lasting_least} needed"
            )
        if lasting_greatest is not None and lasting_greatest < self._replicas:
            before, self._replicas = self._replicas, lasting_greatest
            self._scaled_in = sample.time
            return Decision(
                self._replicas,
                f"{self._figures(sample)}; for {self._patience:g} s no more were needed than {lasting_greatest} of "
                f"{before}",
            )
        return Decision(self._replicas, f"{self._figures(sample)}; {least} to {greatest} are needed")

    def _scale_out(self, replicas: int, needed: int, sample: LoadSample) -> Decision:
        if self._scaled_in is not None:
            soon = sample.time - self._scaled_in < _SOON * self._patience
            most = max(MOST_PATIENCE, self.policy.scale_in_after)
            self._patience = min(2 * self._patience, most) if soon else self.policy.scale_in_after
            self._scaled_in = None
        before, self._replicas = self._replicas, replicas
        step = f", {needed} in steps" if replicas < needed else ""
        return Decision(replicas, f"{self._figures(sample)}; more than {before} are needed{step}")

    def _learn(self, sample: LoadSample) -> None:
        span = sample.time - self._last
        self._now = self._rate.add(span, sample.arrivals)
        self._answers += sample.completions
        if sample.service_seconds is not None:
            aged = max(sample.completions / _MEMORY_REQUESTS, span / _MOST_MEMORY)
            recent = span / _LEAST_MEMORY
            self._service.add(sample.service_seconds, sample.completions, math.exp(-min(aged, recent)))
            self._recent_service.add(sample.service_seconds, sample.completions, math.exp(-recent))

    def _need(self, sample: LoadSample) -> tuple[int, int]:
        """The least and the greatest number of replicas that what is known by now allows, within the bounds."""
        policy = self.policy
        idle = not (sample.waiting or sample.in_flight or sample.arrivals)
        busy = policy.clamped(0 if idle else 1)
        if not idle:
            self._busy_at = sample.time
        elif sample.time - self._busy_at >= policy.idle_after:
            return busy, busy
        if self._service.mean == 0:  # nothing was answered yet: there is nothing to tell a number from
            return busy, max(busy, self._replicas)
        rate = self._now
        low, high = rate.bounds(_BELOW, _ABOVE)
        high = max(high, rate.per_second * (1 + policy.tolerance))
        rise = rate.rise(sample.startup_seconds)
        queue = sample.waiting / policy.drain_seconds
        surely = self._recent_service.off(-_BELOW)
        least, greatest = (
            max(
                busy,
                policy.replicas_for((arrivals + rise) * seconds, seconds),
                math.ceil(min((arrivals + queue) * seconds, policy.max_replicas)),
            )
            for arrivals, seconds in (
                (low, max(surely, self._service.off(-_BELOW))),
                (high, max(surely, self._service.off(_ABOVE))),
            )
        )
        return least, greatest if self._answers >= _LEAST_ANSWERS else max(greatest, self._replicas)

    def _over(self, seconds: float, pick: Callable[..., int], column: int) -> int | None:
        """The least or greatest need of the last seconds; None where samples do not reach back so far."""
        start = self._last - seconds
        if self._since > start:
            return None
        return pick(entry[column] for entry in self._needs if entry[0] >= start)

    def _figures(self, sample: LoadSample) -> str:
        rate, service = self._now, self._service.mean
        took = f"of {1e3 * service:.4g} ms" if service else "none answered yet"
        return f"{rate.per_second:.4g} requests/s {took}, steady for {rate.seconds:.4g} s; {sample.waiting} wait"
