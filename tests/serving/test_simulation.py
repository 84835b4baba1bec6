"""The simulation against exact queueing formulas, and what its fleets do."""

import json
import math

import numpy as np
import pytest
from lepton_ai.cli import app
from lepton_ai.serving.autoscaler import ScalingPolicy
from lepton_ai.serving.loads import burst, diurnal, recorded_seconds, steady, step
from lepton_ai.serving.queueing import erlang_c, mean_wait
from lepton_ai.serving.simulated_fleet import LatencyHistogram, NodeKind
from lepton_ai.serving.simulation import simulate
from typer.testing import CliRunner

EXPONENTIAL = -np.log1p(-(np.arange(20000) + 0.5) / 20000)  # times of mean 1


def fixed_fleet(load: float, nodes: int, service, requests: int, queue_limit: int = 10**9):
    """The result of `nodes` nodes at a load in Erlang; service: times of mean 1."""
    policy = ScalingPolicy(nodes, nodes, target_latency=1.0)
    kinds = [NodeKind("node", nodes, price_per_hour=1.0)]
    result = simulate(
        steady(load), requests / load, kinds, service, policy,
        seed=0, queue_limit=queue_limit, step=requests / load / 200,
    )  # fmt: skip
    return result.scaled


# What is left of chance after 300 000 requests grows with the queues' memory.
@pytest.mark.parametrize(("load", "nodes", "error"), [(0.5, 1, 0.03), (0.8, 1, 0.06), (4.0, 5, 0.06), (45.0, 50, 0.15)])
def test_waits_of_exponential_service(load, nodes, error):
    """M/M/1 and M/M/c: Erlang C."""
    found = fixed_fleet(load, nodes, EXPONENTIAL, 300_000)
    assert found.served + found.unfinished == found.requests
    assert found.mean_wait == pytest.approx(mean_wait(load, nodes), rel=error)


def test_quantiles_of_exponential_service():
    """M/M/1: latencies are exponential, of mean 1 / (1 - load)."""
    found = fixed_fleet(0.6, 1, EXPONENTIAL, 300_000)
    for quantile, value in ((0.5, found.p50), (0.95, found.p95), (0.99, found.p99)):
        assert value == pytest.approx(-math.log(1 - quantile) / 0.4, rel=0.05)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_waits_of_constant_service(load):
    """M/D/1: half the wait of M/M/1."""
    found = fixed_fleet(load, 1, [1.0], 300_000)
    assert found.mean_wait == pytest.approx(load / (2 * (1 - load)), rel=0.05)


def test_waits_of_two_kinds_of_requests():
    """M/G/1, by Pollaczek and Khinchine: load E[S²] / (2 (1 - load))."""
    service = [0.5] * 9 + [5.5]
    found = fixed_fleet(0.7, 1, service, 300_000)
    assert found.mean_wait == pytest.approx(0.7 * np.mean(np.square(service)) / (2 * 0.3), rel=0.08)


def test_a_bounded_queue_refuses_as_erlang_says():
    """M/M/c/K: the share refused is the chance of a full system, by the balance of births and deaths."""
    load, nodes, limit = 4.5, 4, 6
    found = fixed_fleet(load, nodes, EXPONENTIAL, 200_000, queue_limit=limit)
    weights = [1.0]
    for n in range(1, nodes + limit + 1):
        weights.append(weights[-1] * load / min(n, nodes))
    assert found.refused / found.requests == pytest.approx(weights[-1] / sum(weights), rel=0.05)
    assert found.served + found.refused + found.unfinished == found.requests


def test_full_size_waits():
    """450 of 500 nodes busy at 10 000 requests a second: by Erlang C one in 144 waits, and none long."""
    policy = ScalingPolicy(500, 500, target_latency=1.0)
    found = simulate(steady(10_000), 20, [NodeKind("node", 500)], 0.0475 * EXPONENTIAL, policy).scaled
    assert found.mean_wait / 0.0475 == pytest.approx(mean_wait(475, 500), rel=0.5)
    assert erlang_c(475, 500) < 0.3


def test_load_is_shared_by_speed_and_price_chooses_nodes():
    kinds = [
        NodeKind("cpu", 30, 1.0, price_per_hour=0.1),
        NodeKind("gpu", 5, 4.0, price_per_hour=0.3),
        NodeKind("dear", 10, 1.0, price_per_hour=0.5),
    ]
    policy = ScalingPolicy(40, 40, target_latency=1.0)
    found = simulate(steady(400), 200, kinds, [0.05], policy).scaled
    # All 5 gpus are cheaper for their speed than cpus, 20 cpus make it 40, and half of the nodes are idle.
    assert found.served_by["dear"] == 0
    assert found.served_by["gpu"] / found.served_by["cpu"] == pytest.approx(5 * 4 / 20, rel=0.1)
    assert found.price == pytest.approx((5 * 0.3 + 20 * 0.1) * 200 / 3600, rel=0.01)
    assert found.price_per_million == pytest.approx(1e6 * found.price / found.served)
    assert found.replica_hours == pytest.approx(25 * 200 / 3600, rel=0.01)


@pytest.fixture(scope="module")
def latencies() -> list[float]:
    return list(0.04 * np.random.default_rng(0).lognormal(-0.045, 0.3, 500))


CPUS = [NodeKind("cpu", 400, 1.0, price_per_hour=0.05, startup_seconds=10.0)]
POLICY = ScalingPolicy(1, 400, target_latency=0.2)


def test_a_step_is_served_after_the_start_of_nodes(latencies):
    found = simulate(step(200, 4, 60, 180), 300, CPUS, latencies, POLICY)
    by_time = {time: replicas for time, _, replicas in found.timeline}
    assert by_time[59] <= 15
    assert by_time[70] > 35
    assert by_time[195] < by_time[179]
    assert by_time[299] <= 15
    assert found.scaled.flips == 1
    assert found.scaled.price < 0.75 * found.fixed.price
    assert found.fixed.p99 < 0.1 < found.scaled.p99  # while nodes start, requests wait


def test_a_day_costs_less_than_its_peak_and_none_is_lost(latencies):
    found = simulate(diurnal(400, 0.2, 1200), 1200, CPUS, latencies, POLICY)
    assert found.scaled.refused == found.fixed.refused == 0
    assert found.scaled.requests == found.fixed.requests == found.fixed.served + found.fixed.unfinished
    assert found.scaled.price < 0.75 * found.fixed.price
    assert found.scaled.p99 < 0.2
    assert found.scaled.flips <= 1


def test_a_fleet_of_one_fast_node_turns_nothing(latencies):
    """It is worth more than is needed, and nothing smaller is to be had."""
    kinds = [NodeKind("gpu", 2, 4.0, price_per_hour=1.0)]
    found = simulate(steady(20), 120, kinds, latencies, ScalingPolicy(1, 8, target_latency=0.2))
    assert found.scaled.flips == 0
    assert found.scaled.replica_hours == pytest.approx(120 / 3600)


def test_failures_are_replaced_and_their_requests_sent_again(latencies):
    found = simulate(steady(1000), 240, CPUS, latencies, POLICY, failures=20.0)
    for fleet in (found.scaled, found.fixed):
        assert fleet.retried > 10
        assert fleet.served + fleet.unfinished == fleet.requests
        assert sum(fleet.served_by.values()) == fleet.served
        assert fleet.refused == 0
    assert found.scaled.flips == 0


@pytest.mark.parametrize("spare", [True, False])
def test_an_update_loses_nothing(latencies, spare):
    """With spare nodes new ones start before old ones end; without, in the place of those."""
    kinds = [NodeKind("cpu", 400 if spare else 50, price_per_hour=1.0, startup_seconds=5.0)]
    policy = ScalingPolicy(50, 50, target_latency=0.2)
    base = simulate(steady(800), 240, kinds, latencies, policy).scaled
    found = simulate(steady(800), 240, kinds, latencies, policy, updates=[30.0]).scaled
    assert (found.refused, found.unfinished) == (0, 0)
    assert found.served == found.requests == base.requests
    # Fifty nodes of five seconds' start each are paid beside the others.
    extra = found.replica_hours - base.replica_hours
    assert extra == pytest.approx(50 * 5 / 3600 if spare else 0, abs=0.02)


def test_an_update_keeps_the_kinds_of_nodes(latencies):
    kinds = [NodeKind("gpu", 5, 4.0, 0.1, 5.0), NodeKind("cpu", 100, 1.0, 0.1, 5.0)]
    policy = ScalingPolicy(40, 40, target_latency=0.2)
    base, found = (
        simulate(steady(600), 240, kinds, latencies, policy, updates=updates).scaled for updates in ((), (30.0,))
    )
    assert found.served_by["gpu"] == pytest.approx(base.served_by["gpu"], rel=0.03)
    assert found.price < 1.1 * base.price


def test_equal_seeds_give_equal_results(latencies):
    results = [
        simulate(burst(300, 3, 30, 5), 90, CPUS, latencies, POLICY, seed=seed, failures=5.0).as_dict()
        for seed in (3, 3, 4)
    ]
    assert results[0] == results[1]
    assert results[0] != results[2]
    json.dumps(results[0], allow_nan=False)


def test_a_fleet_that_starts_too_small_refuses_and_grows(latencies):
    found = simulate(steady(1000), 120, CPUS, latencies, POLICY, initial=1, queue_limit=100)
    assert found.scaled.refused > 1000
    assert found.timeline[0][2] == 1
    assert found.timeline[-1][2] >= 45
    assert found.fixed.refused == 0


def test_nothing_served_is_none_in_json(latencies):
    found = simulate(steady(0), 10, CPUS, latencies, ScalingPolicy(0, 5, target_latency=1.0)).as_dict()
    assert found["scaled"]["served"] == 0
    assert found["scaled"]["p99"] is None


def test_loads():
    assert [diurnal(100, 0.2, 100)(time) for time in (0, 50, 100)] == pytest.approx([20, 100, 20])
    assert [step(10, 3, 5, 8)(time) for time in (4, 5, 7.9, 8)] == [10, 30, 30, 10]
    assert [burst(10, 2, 60, 5)(time) for time in (54, 55, 59, 60, 115)] == [10, 20, 20, 10, 20]


def test_quantiles_are_of_what_was_added_and_not_removed():
    histogram = LatencyHistogram()
    assert math.isnan(histogram.quantile(0.5))
    histogram.add(np.linspace(0.001, 1, 1000))
    assert histogram.quantile(0.5) == pytest.approx(0.5, rel=0.006)
    for value in np.linspace(0.001, 1, 1000)[500:]:
        histogram.remove(value)
    assert len(histogram) == 500
    assert histogram.quantile(0.99) == pytest.approx(0.495, rel=0.006)


def test_what_does_not_fit(latencies):
    for changes, message in (
        ({"seconds": 0}, "simulate: seconds is 0; allowed: a finite number, step"),
        ({"failures": -1}, "simulate: failures is -1; allowed"),
        ({"queue_limit": 0}, "simulate: queue_limit is 0; allowed: 1 or more"),
        ({"step": 0.0}, "simulate: step is 0.0; allowed"),
        ({"kinds": []}, "simulate: kinds is .*; allowed: one or more"),
        ({"kinds": [NodeKind("a", 7)]}, r"kinds are worth 7 nodes of speed 1; allowed: max_replicas \(400\) or more"),
        ({"service_seconds": []}, "service_seconds is empty"),
        ({"service_seconds": [0.0]}, "service_seconds is empty or has other values"),
        ({"load": steady(-1)}, "load gives a rate that is negative"),
    ):
        arguments = {
            "load": steady(1), "seconds": 5, "kinds": CPUS, "service_seconds": latencies, "policy": POLICY, **changes
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            simulate(**arguments)
    for name, value in (("count", 0), ("speed", 0), ("price_per_hour", -1), ("startup_seconds", math.inf)):
        with pytest.raises(ValueError, match=f"NodeKind a: {name} is {value}; allowed"):
            NodeKind(**{"name": "a", "count": 1, name: value})


def test_recorded_times(tmp_path):
    file = tmp_path / "times"
    for text in ("0.1\n0.25\n", "[0.1, 0.25]", '{"latencies_s_batch_1": [0.1, 0.25], "threads": 2}'):
        file.write_text(text)
        assert recorded_seconds(file) == [0.1, 0.25]
    for text in ("", "0.1 -2", "0.1 fast", "[1, null]", '{"latency_ms_batch_1": 3}', "[0.1", "nan"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"times: .*allowed: .*seconds"):
            recorded_seconds(file)


def test_the_command_line(tmp_path):
    def lepton(*arguments):
        result = CliRunner().invoke(app, ["simulate", *map(str, arguments)])
        return result.exit_code, result.output

    file = tmp_path / "times"
    file.write_text("0.1\n0.2\n")
    options = "--rate", 50, "--minutes", 1, "--latencies", file, "--node", "cpu:40:1:0.1:5"
    code, text = lepton(*options, "--seed", 7, "--json")
    assert code == 0, text
    found = json.loads(text)
    assert found["seed"] == 7
    assert found["scaled"]["served"] == pytest.approx(3000, rel=0.1)
    assert 0.1 < found["scaled"]["p50"] < 0.25
    for load in ("diurnal", "step", "burst"):
        code, text = lepton(*options, "--load", load, "--factor", 2)
        assert code == 0, text
        assert "scaled" in text
        assert "fixed" in text
    for wrong, message in (
        (("--load", "weekly"), "--load is 'weekly'; allowed: steady, diurnal, step, burst"),
        (("--node", "cpu:40"), "--node is 'cpu:40'; allowed: NAME:COUNT:SPEED:PRICE:STARTUP"),
        (("--node", "cpu:a:1:1:1"), "--node is 'cpu:a:1:1:1'"),
        (("--failures", "-1"), "failures"),
        (("--utilization", "2"), "target_utilization is 2.0"),
    ):
        code, text = lepton(*options, *wrong)
        assert code == 2
        assert message in text
