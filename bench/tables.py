"""What the reports share: a case as read from pytest-benchmark's file, and cells of a table."""

from dataclasses import dataclass, field


@dataclass
class Run:
    """One case: medians in seconds and infos of its contenders, ours first."""

    case: str
    threads: int
    medians: dict[str, float] = field(default_factory=dict)
    infos: dict[str, dict] = field(default_factory=dict)


def runs_of(benchmarks: dict) -> list[Run]:
    runs: dict[str, Run] = {}
    for entry in benchmarks["benchmarks"]:
        run = runs.setdefault(entry["group"], Run(entry["group"], benchmarks["machine_info"]["lepton"]["threads"]))
        run.medians[entry["name"]] = entry["stats"]["median"]
        run.infos[entry["name"]] = entry["extra_info"]
    return list(runs.values())


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
