"""Metrics of a server, for Prometheus and for the live page."""

import logging
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LOG = logging.getLogger("lepton_ai.serving")
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_OVERHEAD = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
_RECENT = 2000  # requests whose figures the live page shows


class Metrics:
    """One server's; every one has a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("lepton_requests", "Requests answered, by HTTP status.", ["status"], registry=registry)
        self.seconds = Histogram(
            "lepton_request_seconds", "From a request's last byte to its answer.", buckets=_SECONDS, registry=registry
        )
        self.overhead = Histogram(
            "lepton_overhead_seconds", "The same without the wait for a free replica and the model's time.",
            buckets=_OVERHEAD, registry=registry,
        )  # fmt: skip
        self.batch = Histogram(
            "lepton_batch_requests", "Requests that a replica was given at once.",
            buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry,
        )  # fmt: skip
        self.waiting = Gauge("lepton_waiting", "Requests that wait for a replica.", registry=registry)
        self.ready = Gauge("lepton_replicas_ready", "Replicas that answer requests.", registry=registry)
        self.restarts = Counter("lepton_replica_restarts", "Replicas that died.", registry=registry)
        self.retries = Counter(
            "lepton_retries", "Requests asked of another replica after theirs died.", registry=registry
        )
        self.scalings = Counter(
            "lepton_scalings", "Times that the number of replicas was changed.", ["direction"], registry=registry
        )
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        self.answered = 0

    def answer(self, status: int, seconds: float, overhead: float | None) -> None:
        """Counts an answer; overhead: None where no replica was asked."""
        self.requests.labels(str(status)).inc()
        self.answered += 1
        if overhead is not None:
            self.seconds.observe(seconds)
            self.overhead.observe(overhead)
            self._recent.append((seconds, overhead))

    def scaled(self, by: int) -> None:
        """Counts a change of the number of replicas."""
        self.scalings.labels("out" if by > 0 else "in").inc()

    def log(self, text: str) -> None:
        """A line in the log."""
        _LOG.warning(text)

    def summary(self) -> dict[str, float]:
        """Of the last requests, in milliseconds, and how many there were in all."""
        restarts = self.registry.get_sample_value("lepton_replica_restarts_total") or 0.0
        out: dict[str, float] = {"answered": self.answered, "restarts": restarts}
        for name, values in zip(("latency", "overhead"), zip(*self._recent, strict=True), strict=False):
            ordered = sorted(values)
            for percent in (50, 99):
                out[f"{name}_p{percent}_ms"] = 1e3 * ordered[(len(ordered) - 1) * percent // 100]
        return out

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)
