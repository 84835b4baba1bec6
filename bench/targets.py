"""What the quantized GEMM aims for, as data: each target says in words what it asks, of which rows, and how it scores.

A row is one of our schemes in one case. Its limit is the least time the machine allows: the larger of weight bytes /
read bandwidth of where the weights are, and 2 m n k / peak; efficiency = limit / time. Its peers are the full layers of
the same case whose weights have as many bits or more.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gemm_shapes import MINILM


@dataclass(frozen=True)
class Peer:
    seconds: float
    error: float
    scheme: str  # "dense" or one of ours
    group: int  # weights along k that share a scale; -1: all
    library: str


@dataclass(frozen=True)
class Row:
    case: str
    scheme: str
    group: int
    n: int
    k: int
    m: int
    dtype: str
    cold: bool
    threads: int
    seconds: float
    limit_seconds: float
    weights_in: str  # "L2", "cache" (the last level) or "memory"
    weight_bytes: int
    error: float
    peers: dict[str, Peer]
    seconds_before: float | None  # of the case with one row of X less

    @property
    def title(self) -> str:
        return f"{self.scheme} {self.case}, {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def efficiency(self) -> float:
        return self.limit_seconds / self.seconds

    def faster(self, among: Callable[[Peer], bool] = lambda peer: True) -> float | None:
        """Time of the fastest such peer / ours; None without one."""
        times = [peer.seconds for peer in self.peers.values() if among(peer)]
        return min(times) / self.seconds if times else None

    @property
    def best_peer_efficiency(self) -> float:
        ratio = self.faster()
        return 1.0 if ratio is None else self.efficiency / ratio

    @property
    def more_exact(self) -> float | None:
        """The smallest relative error of a peer of the same scheme and group / ours."""
        same = (self.scheme, self.group)
        errors = [peer.error for peer in self.peers.values() if (peer.scheme, peer.group) == same]
        return min(errors) / self.error if errors else None

    @property
    def row_cost_drop(self) -> float | None:
        """Time a row of X with one row less / the same here: below 1 where the last row costs more than the others."""
        return None if self.seconds_before is None else self.seconds_before / (self.m - 1) / (self.seconds / self.m)


@dataclass(frozen=True)
class Target:
    text: str
    of: Callable[[Row], bool]
    score: Callable[[Row], float | None]  # None: nothing to compare with, the target does not apply
    least: float


def _dense(peer: Peer) -> bool:
    return peer.scheme == "dense"


def _torch_dense(peer: Peer) -> bool:
    return _dense(peer) and peer.library == "torch"


def _efficiency(row: Row) -> float:
    return row.efficiency


TARGETS = [
    Target("never slower than torch's fastest float path", lambda r: True, lambda r: r.faster(_torch_dense), 1.0),
    Target("never behind a peer with as many bits a weight or more", lambda r: True, lambda r: r.faster(), 1.0),
    Target(
        ">= 1.1 x the best peer, where that peer is below 0.8 of the limit",
        lambda r: r.best_peer_efficiency < 0.8, lambda r: r.faster(), 1.1,
    ),
    Target("M = 1, weights in the last-level cache: efficiency >= 0.90",
           lambda r: r.m == 1 and r.weights_in == "cache", _efficiency, 0.90),
    Target("M = 1, weights from DRAM: efficiency >= 0.93",
           lambda r: r.m == 1 and r.weights_in == "memory", _efficiency, 0.93),
    Target("M = 2..8: efficiency >= 0.78", lambda r: 2 <= r.m <= 8, _efficiency, 0.78),
    Target("M = 16..32: efficiency >= 0.85", lambda r: 16 <= r.m <= 32, _efficiency, 0.85),
    Target("M = 17, 33: a row costs no more than with M - 1 rows (no step up at a tile)",
           lambda r: r.m in (17, 33), lambda r: r.row_cost_drop, 1.0),
    Target("M >= 64, int8 activations: efficiency >= 0.88",
           lambda r: r.m >= 64 and r.scheme.endswith("a8"), _efficiency, 0.88),
    Target("M >= 64, float activations: >= 0.85 of the fastest float peak",
           lambda r: r.m >= 64 and r.scheme.endswith("a16"), _efficiency, 0.85),
    Target("M >= 64, float activations: never slower than the best dense product of any library",
           lambda r: r.m >= 64 and r.scheme.endswith("a16"), lambda r: r.faster(_dense), 1.0),
    Target("MiniLM's shapes, M = 128 and 4096: >= 1.25 x the best peer",
           lambda r: (r.n, r.k) in MINILM and r.m in (128, 4096), lambda r: r.faster(), 1.25),
    Target("MiniLM's shapes, M = 1: >= 1.0 x the best peer",
           lambda r: (r.n, r.k) in MINILM and r.m == 1, lambda r: r.faster(), 1.0),
    Target("relative error no larger than the best peer's of the same scheme and group",
           lambda r: True, lambda r: r.more_exact, 1.0),
]  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """The scores of the rows a target applies to."""

    target: Target
    scores: list[tuple[float, Row]]

    @property
    def passed(self) -> int:
        return sum(score >= self.target.least for score, _ in self.scores)

    @property
    def worst(self) -> tuple[float, Row] | None:
        return min(self.scores, key=lambda scored: scored[0], default=None)


def judge(rows: list[Row]) -> list[Verdict]:
    verdicts = []
    for target in TARGETS:
        scores = [(target.score(row), row) for row in rows if target.of(row)]
        verdicts.append(Verdict(target, [(score, row) for score, row in scores if score is not None]))
    return verdicts
