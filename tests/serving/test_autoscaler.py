"""The scaling policy: bounds for any samples, calm under steady load, quick where the load changes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lepton_ai.serving.arrival_rate import ArrivalRate
from lepton_ai.serving.autoscaler import MOST_PATIENCE, Autoscaler, LoadSample, ScalingPolicy
from lepton_ai.serving.queueing import erlang_c, mean_wait, servers_for

POLICY = ScalingPolicy(1, 2000, target_latency=1.0)


def sample(time: float, **changes) -> LoadSample:
    values = {"ready": 1, "starting": 0, "waiting": 0, "in_flight": 1, "arrivals": 0, "completions": 0}
    return LoadSample(**{"time": time, **values, "service_seconds": None, "startup_seconds": 10.0, **changes})


class Fleet:
    """Replicas that do what the autoscaler says, in steps of a second: Poisson arrivals, work that flows."""

    def __init__(self, policy: ScalingPolicy, ready: int, service: float, startup: float, seed: int) -> None:
        self.autoscaler, self.ready, self.service, self.startup = Autoscaler(policy), ready, service, startup
        self.random = np.random.default_rng(seed)
        self.waiting, self.starting, self.asked = 0, [], [ready]
        self.time = 0.0
        self.autoscaler.desired(sample(0.0, ready=ready, in_flight=0))

    def run(self, rate: float, seconds: int, burstiness: int = 1) -> list[int]:
        """So many seconds at a rate, requests in groups of `burstiness`; the replicas asked for after each."""
        for _ in range(seconds):
            self.time += 1
            self.ready += sum(ready <= self.time for ready in self.starting)
            self.starting = [ready for ready in self.starting if ready > self.time]
            arrivals = burstiness * int(self.random.poisson(rate / burstiness))
            done = min(self.waiting + arrivals, int(self.random.poisson(self.ready / self.service)))
            self.waiting += arrivals - done
            took = float(self.random.gamma(done, self.service / done)) if done else None
            replicas = self.autoscaler.desired(
                sample(
                    self.time, ready=self.ready, starting=len(self.starting), waiting=self.waiting, arrivals=arrivals,
                    completions=done, service_seconds=took, in_flight=self.ready, startup_seconds=self.startup,
                )
            ).replicas  # fmt: skip
            missing = replicas - self.ready - len(self.starting)
            self.starting += [self.time + self.startup] * max(0, missing)
            ended = min(max(0, -missing), len(self.starting))
            self.starting = self.starting[: len(self.starting) - ended]
            self.ready -= max(0, -missing) - ended
            self.asked.append(replicas)
        return self.asked[-seconds:]


def flips(asked: list[int]) -> int:
    steps = [b - a for a, b in itertools.pairwise(asked) if a != b]
    return sum(a * b < 0 for a, b in itertools.pairwise(steps))


def numbers(most: int) -> st.SearchStrategy[int]:
    return st.integers(0, most) | st.integers(0, 10)


SAMPLES = st.lists(
    st.tuples(
        st.floats(1e-3, 1e4), numbers(10**6), numbers(10**6), numbers(10**9), numbers(10**9), numbers(10**12),
        numbers(10**12), st.none() | st.floats(0, 1e6), st.floats(0, 1e5),
    ),
    min_size=1, max_size=40,
)  # fmt: skip
POLICIES = st.builds(
    lambda low, more, **rest: ScalingPolicy(low, max(1, low + more), **rest),
    numbers(500), numbers(500), target_latency=st.floats(1e-6, 1e6), latency_quantile=st.floats(0.01, 0.9999),
    target_utilization=st.floats(0.01, 1), scale_out_after=st.floats(0, 1e3), scale_in_after=st.floats(0, 1e3),
    max_growth=st.floats(1.001, 100), tolerance=st.floats(0, 10), drain_seconds=st.floats(1e-3, 1e6),
    idle_after=st.floats(1e-3, 1e6),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(POLICIES, SAMPLES)
def test_bounds_and_growth_hold_for_any_samples(policy, samples):
    autoscaler, time, before = Autoscaler(policy), 0.0, None
    for span, ready, starting, waiting, in_flight, arrivals, completions, service, startup in samples:
        time += span
        decision = autoscaler.desired(
            LoadSample(time, ready, starting, waiting, in_flight, arrivals, completions, service, startup)
        )
        assert policy.min_replicas <= decision.replicas <= policy.max_replicas
        assert decision.reason
        if before is not None and decision.replicas > before:
            there = ready + starting
            assert decision.replicas <= max(there + 1, there * policy.max_growth)
        before = decision.replicas


LOADS = st.floats(-2, 2).map(lambda exponent: 10**exponent)
SERVICES = st.floats(-2.5, 1).map(lambda exponent: 10**exponent)
TARGETS = st.floats(-0.5, 1.5).map(lambda exponent: 10**exponent)  # over service times


# Examples are the same at each run: arrivals are random, and about one run in a thousand may turn by their nature.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(LOADS, SERVICES, TARGETS, st.floats(0, 60), st.integers(0, 10**6))
def test_five_minutes_of_steady_load_turn_nothing(load, service, target, startup, seed):
    policy = ScalingPolicy(1, 2000, target_latency=target * service)
    fleet = Fleet(policy, policy.replicas_for(load, service), service, startup, seed)
    fleet.run(load / service, 300)
    assert flips(fleet.asked) == 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(LOADS, SERVICES, TARGETS, st.floats(0, 60), st.integers(0, 10**6))
def test_a_fleet_that_starts_far_too_small_turns_once_at_most(load, service, target, startup, seed):
    """Once: what had piled up was worked off."""
    fleet = Fleet(ScalingPolicy(1, 2000, target_latency=target * service), 1, service, startup, seed)
    fleet.run(load / service, 300)
    assert flips(fleet.asked) <= 1


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.floats(20, 500), st.floats(0.1, 1), st.floats(1.5, 10), st.integers(2, 10), st.integers(0, 10**6))
def test_arrivals_in_groups_turn_nothing(rate, service, target, group, seed):
    policy = ScalingPolicy(1, 2000, target_latency=target * service)
    fleet = Fleet(policy, policy.replicas_for(rate * service, service), service, 10.0, seed)
    fleet.run(rate, 300, group)
    assert flips(fleet.asked) == 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.floats(20, 500), st.floats(0.05, 0.5), st.floats(1.5, 10), st.floats(3, 10), st.floats(0, 20),
    st.integers(0, 10**6),
)  # fmt: skip
def test_a_step_is_answered_in_time(rate, service, target, factor, startup, seed):
    policy = ScalingPolicy(1, 10000, target_latency=target * service)
    before, after = (policy.replicas_for(load * service, service) for load in (rate, factor * rate))
    fleet = Fleet(policy, before, service, startup, seed)
    fleet.run(rate, 60)
    up = fleet.run(factor * rate, 180)
    assert max(up[:10]) > before
    assert max(up[:30]) >= 0.8 * after
    down = fleet.run(rate, 60)
    assert down[14] < up[-1]
    assert down[-1] <= 1.3 * before + 1


def test_starting_replicas_count():
    """While they start, what waits asks for no more of them: only the first decision is new."""
    autoscaler = Autoscaler(ScalingPolicy(1, 100, target_latency=1.0))
    asked = [
        autoscaler.desired(
            sample(float(t), ready=1, starting=0 if t < 6 else 12, waiting=5 * t, arrivals=100, completions=10,
                   service_seconds=0.1, startup_seconds=60.0)
        ).replicas
        for t in range(30)
    ]  # fmt: skip
    assert asked[:3] == [1, 1, 1]
    assert max(asked) == asked[-1]
    assert 10 <= asked[-1] <= 16


def test_from_and_to_nothing():
    autoscaler = Autoscaler(ScalingPolicy(0, 10, target_latency=1.0, idle_after=60.0))
    idle = {"ready": 0, "in_flight": 0}
    assert autoscaler.desired(sample(0.0, **idle)).replicas == 0
    assert autoscaler.desired(sample(1.0, **idle, arrivals=1, waiting=1)).replicas == 1
    served = sample(2.0, completions=1, service_seconds=0.2, in_flight=0)
    assert autoscaler.desired(served).replicas == 1
    asked = {t: autoscaler.desired(sample(float(t), in_flight=0)).replicas for t in range(3, 100)}
    assert asked[60] == 1
    assert asked[72] == 0


def test_growth_is_in_steps_of_what_is_there():
    autoscaler = Autoscaler(ScalingPolicy(1, 1000, target_latency=1.0, max_growth=3.0))
    there, asked = 2, []
    for t in range(10):
        decision = autoscaler.desired(sample(float(t), ready=there, arrivals=4000, completions=20, service_seconds=0.1))
        asked.append(there := decision.replicas)
    assert asked[3:7] == [6, 18, 54, 162]
    stuck = Autoscaler(ScalingPolicy(1, 1000, target_latency=1.0))
    for t in range(10):
        decision = stuck.desired(sample(float(t), ready=2, arrivals=4000, completions=20, service_seconds=0.1))
    assert decision.replicas == 4
    assert "2 are there" in decision.reason


def test_scaling_in_too_early_makes_patient():
    policy = ScalingPolicy(1, 1000, target_latency=1.0)
    fleet = Fleet(policy, policy.replicas_for(20, 0.1), 0.1, 1.0, 0)
    fleet.run(200, 30)
    waits = []
    for _ in range(6):
        top = fleet.run(1000, 20)[-1]
        fleet.run(200, 1)
        waits.append(1)
        while fleet.asked[-1] >= top and waits[-1] < 400:
            waits[-1] += 1
            fleet.run(200, 1)
    assert waits[0] <= 15
    assert waits == sorted(waits)
    assert 4 * waits[0] < waits[-1] <= MOST_PATIENCE + 10


def test_a_rise_is_followed_ahead():
    """With replicas that take half a minute to start, those for the load of then are asked for now."""
    policy = ScalingPolicy(1, 1000, target_latency=1.0)
    fleet = Fleet(policy, policy.replicas_for(100, 0.1), 0.1, 30.0, 0)
    asked = []
    for t in range(120):
        asked += fleet.run(1000 + 3 * t, 1)
    now = [policy.replicas_for((1000 + 3 * t) * 0.1, 0.1) for t in range(120)]
    assert sum(a > n for a, n in zip(asked[40:], now[40:], strict=True)) > 40
    assert asked[-1] <= policy.replicas_for((1000 + 3 * 160) * 0.1, 0.1)
    assert flips(fleet.asked) == 0


def test_requests_that_take_longer_are_seen_though_they_are_few():
    policy = ScalingPolicy(1, 1000, target_latency=20.0)
    fleet = Fleet(policy, policy.replicas_for(10, 1.0), 1.0, 5.0, 0)
    before = fleet.run(10, 300)[-1]
    fleet.service = 3.0
    assert fleet.run(10, 40)[-1] > 1.5 * before


def test_samples_and_policies_that_do_not_fit():
    autoscaler = Autoscaler(POLICY)
    autoscaler.desired(sample(5.0))
    with pytest.raises(ValueError, match=r"Autoscaler.desired: time is 5.0; allowed: later than the last one's, 5.0"):
        autoscaler.desired(sample(5.0))
    with pytest.raises(ValueError, match="LoadSample: waiting is -1; allowed: a finite number, 0 or more"):
        sample(1.0, waiting=-1)
    with pytest.raises(ValueError, match="LoadSample: service_seconds is nan"):
        sample(1.0, service_seconds=math.nan)
    for name, value in (
        ("min_replicas", -1), ("max_replicas", 0), ("max_replicas", 2), ("target_latency", 0.0),
        ("target_latency", math.inf), ("latency_quantile", 1.0), ("target_utilization", 1.1), ("scale_out_after", -1),
        ("scale_in_after", math.nan), ("max_growth", 1.0), ("tolerance", -0.1), ("drain_seconds", 0), ("idle_after", 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"ScalingPolicy: {name} is {value}; allowed: "):
            ScalingPolicy(**{"min_replicas": 3, "max_replicas": 5, "target_latency": 1.0, name: value})


# Formulas


@pytest.mark.parametrize(("load", "servers"), [(0.0, 1), (0.5, 1), (1.0, 2), (8.0, 10), (19.5, 20)])
def test_erlang_c_is_its_sum(load, servers):
    top = load**servers / math.factorial(servers) / (1 - load / servers)
    assert erlang_c(load, servers) == pytest.approx(
        top / (top + sum(load**n / math.factorial(n) for n in range(servers)))
    )


def test_known_waits():
    assert erlang_c(1.0, 2) == pytest.approx(1 / 3)
    assert mean_wait(0.8, 1) == pytest.approx(4.0)
    assert mean_wait(2.0, 2) == math.inf
    assert erlang_c(3.0, 2) == 1.0
    with pytest.raises(ValueError, match="erlang_c: load is -1; allowed"):
        erlang_c(-1, 2)
    with pytest.raises(ValueError, match="erlang_c: servers is 0; allowed"):
        erlang_c(1, 0)


@settings(max_examples=200, deadline=None)
@given(st.floats(0.01, 300), st.floats(0, 5), st.floats(0.001, 0.5), st.floats(0.3, 1))
def test_servers_are_the_fewest_that_do(load, wait, share, utilization):
    def does(servers: int) -> bool:
        late = erlang_c(load, servers) * math.exp(-(servers - load) * wait) if servers > load else 1.0
        return late <= share * (1 + 1e-9) and servers * utilization >= load

    servers = servers_for(load, wait=wait, share=share, utilization=utilization, most=10**6)
    assert does(servers)
    assert servers == 1 or not does(servers - 1) or late_is_close(load, servers - 1, wait, share)


def late_is_close(load: float, servers: int, wait: float, share: float) -> bool:
    return erlang_c(load, servers) * math.exp(-(servers - load) * wait) == pytest.approx(share, rel=1e-6)


def test_large_loads_are_staffed_by_the_square_root():
    """No waiting time allowed and a fixed share that waits: load + beta sqrt(load), one beta for all loads."""
    betas = [
        (servers_for(load, wait=0.0, share=0.1, utilization=1.0, most=10**6) - load) / math.sqrt(load)
        for load in (400.0, 2500.0, 10000.0)
    ]
    assert max(betas) - min(betas) < 0.05
    assert betas[-1] == pytest.approx(1.42, abs=0.03)  # where Halfin and Whitt's chance to wait is 0.1
    assert servers_for(0.0, wait=0.0, share=0.1, utilization=1.0, most=5) == 0
    assert servers_for(50.0, wait=0.0, share=0.1, utilization=1.0, most=5) == 5


# Rates


@pytest.mark.parametrize(("rate", "factor", "within"), [(10, 10, 1), (1000, 1.2, 4), (1000, 0.8, 4), (5, 0, 10)])
def test_a_change_is_seen_and_what_was_before_is_forgotten(rate, factor, within):
    random, arrivals = np.random.default_rng(0), ArrivalRate()
    for _ in range(200):
        found = arrivals.add(1.0, int(random.poisson(rate)))
    assert found.seconds == pytest.approx(200)
    assert found.per_second == pytest.approx(rate, rel=0.1)
    assert found.dispersion < 1.3
    for _ in range(within):
        found = arrivals.add(1.0, int(random.poisson(rate * factor)))
    assert found.seconds <= within
    assert found.per_second == pytest.approx(rate * factor, rel=0.3)


def test_steady_arrivals_are_one_window():
    """An hour in groups of seven, of which ten minutes are remembered."""
    random, arrivals = np.random.default_rng(1), ArrivalRate()
    for _ in range(3600):
        found = arrivals.add(1.0, 7 * int(random.poisson(100)))
    assert 590 < found.seconds <= 601
    assert found.per_second == pytest.approx(700, rel=0.02)
    assert found.dispersion == pytest.approx(7, rel=0.3)
    assert found.growth == 0


def test_short_spans_are_added_up():
    arrivals = ArrivalRate()
    for _ in range(100):
        found = arrivals.add(0.01, 1)
    assert (found.requests, found.seconds) == (pytest.approx(100), pytest.approx(1.0))
    assert arrivals.add(0.3, 0).per_second < 100


def test_a_trend_is_told_from_noise():
    random, arrivals = np.random.default_rng(2), ArrivalRate()
    for t in range(20):
        found = arrivals.add(1.0, int(random.poisson(1000 + 10 * t)))
    assert 1 < found.growth < 10
