"""The scaling policy at sizes no test machine has: python bench/simulate.py [SCENARIO ...] [--seed N]

10 000 requests a second at the peak on up to 500 nodes of two kinds and prices, each scenario beside a fleet sized for
its peak; prints a table. All without arguments (some minutes), else those whose names begin so.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from lepton_ai.serving.autoscaler import ScalingPolicy
from lepton_ai.serving.loads import assumed_seconds, burst, diurnal, steady, step
from lepton_ai.serving.simulated_fleet import FleetResult, NodeKind
from lepton_ai.serving.simulation import simulate
from tables import markdown

PEAK = 10_000
KINDS = (
    NodeKind("cpu", 480, speed=1.0, price_per_hour=0.05, startup_seconds=20.0),
    NodeKind("gpu", 20, speed=4.0, price_per_hour=0.18, startup_seconds=45.0),
)
POLICY = ScalingPolicy(1, 560, target_latency=0.2)
# Load, minutes, and what else happens.
SCENARIOS: dict[str, tuple[Callable[[float], float], float, dict[str, Any]]] = {
    "steady": (steady(PEAK), 10, {}),
    "diurnal, a day in 20 minutes": (diurnal(PEAK, 0.3, 1200), 20, {}),
    "step x10 for 5 of 15 minutes": (step(PEAK / 10, 10, 300, 600), 15, {}),
    "burst x2.5, 10 s every minute": (burst(PEAK / 2.5, 2.5, 60, 10), 15, {}),
    "burst x2.5, 60 s every 5 minutes": (burst(PEAK / 2.5, 2.5, 300, 60), 15, {}),
    "failures, 1 % of nodes an hour": (steady(PEAK), 20, {"failures": 0.01}),
    "failures, 60 % of nodes an hour": (steady(PEAK), 10, {"failures": 0.6}),
    "rolling update": (steady(PEAK), 20, {"updates": (60.0,)}),
}
HEADER = ["scenario", "fleet", "requests", "lost", "sent again", "p50 ms", "p95 ms", "p99 ms", "replica hours", "price",
          "per million", "flips", "replicas"]  # fmt: skip


def row(name: str, fleet: str, found: FleetResult) -> list[str]:
    milliseconds = [f"{1e3 * value:,.0f}" for value in (found.p50, found.p95, found.p99)]
    lost = f"{found.refused:,} ({found.refused / found.requests:.2%})" if found.refused else "0"
    return [name, fleet, f"{found.requests:,}", lost, str(found.retried), *milliseconds, f"{found.replica_hours:.1f}",
            f"{found.price:.2f}", f"{found.price_per_million:.3f}", str(found.flips),
            f"{found.least} to {found.most}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="the begin of its name")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = []
    begin = time.process_time()
    for name, (load, minutes, happens) in SCENARIOS.items():
        if arguments.scenarios and not name.startswith(tuple(arguments.scenarios)):
            continue
        found = simulate(load, 60 * minutes, KINDS, assumed_seconds(), POLICY, seed=arguments.seed, **happens)
        rows += [row(name, "scaled", found.scaled), row("", "fixed", found.fixed)]
    print("\n".join(markdown(HEADER, rows)))
    print(f"seed {arguments.seed}, {time.process_time() - begin:.0f} s of processor time")


if __name__ == "__main__":
    main()
