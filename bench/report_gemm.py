"""The GEMM part of RESULTS.md: limits, targets, a table of ours for each scheme, all times, and a plot."""

import re
from collections import defaultdict
from pathlib import Path

import roof
from gemm_shapes import LLM
from tables import Run, markdown, milliseconds
from targets import TARGETS, Peer, Row, Verdict, judge

FLOAT_PEAKS = "fp32_gflops", "bf16_gflops", "fp16_gflops", "amx_bf16_gflops"
INT8_PEAKS = "int8_gops", "amx_int8_gops"
BANDWIDTHS = {
    "memory": tuple(name for name in roof.LABELS if name.startswith("dram_read")),
    "cache": ("llc_read_gb_s",),
    "L2": ("l2_read_gb_s",),
}


def best_limits(measured: list[dict]) -> dict:
    """Each limit's best; what is not a figure (threads, an instruction) is the same in all."""
    best = dict(measured[0])
    for name in roof.LABELS:
        if best[name]:
            best[name] = [max(values) for values in zip(*(limits[name] for limits in measured), strict=True)]
    return best


def limits_table(limits: dict) -> list[str]:
    rows = [
        [label, *([f"{x:.1f}" for x in limits[name]] if limits[name] else ["no instruction", ""])]
        for name, label in roof.LABELS.items()
    ]
    header = ["limit (`bench/roof.py`)", "1 thread", f"{limits['threads'][1]} threads"]
    return [*markdown(header, rows), "", f"int8 by {limits['int8_instruction']}."]


def fastest(names: tuple[str, ...], limits: dict, threads: int) -> float:
    """The best of these limits for so many threads, in units a second."""
    column = limits["threads"].index(threads)
    return 1e9 * max(limits[name][column] for name in names if limits[name])


def weights_in(weight_bytes: int, cold: bool, threads: int) -> str:
    """The level that holds the weights when a call begins."""
    if cold or weight_bytes > roof.cache_kib(3) * 1024:
        return "memory"
    return "L2" if weight_bytes < threads * roof.cache_kib(2) * 1024 else "cache"


def rows_of(runs: list[Run], limits: dict) -> list[Row]:
    """A row for each of our schemes in each run, by number of threads."""
    rows: list[Row] = []

    def key(info: dict, m: int, threads: int) -> tuple:
        return info["scheme"], info["n"], info["k"], m, info["dtype"], info["cold"], threads

    seconds = {
        key(info, info["m"], run.threads): run.medians[name]
        for run in runs
        for name, info in run.infos.items()
        if info["library"] == "lepton"
    }
    for run in runs:
        for name, info in run.infos.items():
            if info["library"] != "lepton":
                continue
            place = weights_in(info["weight_bytes"], info["cold"], run.threads)
            peak = fastest(INT8_PEAKS if info["scheme"].endswith("a8") else FLOAT_PEAKS, limits, run.threads)
            bandwidth = fastest(BANDWIDTHS[place], limits, run.threads)
            peers = {
                peer: Peer(run.medians[peer], other["error"], other["scheme"], other["group"], other["library"])
                for peer, other in run.infos.items()
                if other["library"] != "lepton" and other["full"] and other["bits"] >= info["bits"]
            }
            rows.append(Row(
                run.case, info["scheme"], info["group"], info["n"], info["k"], info["m"], info["dtype"], info["cold"],
                run.threads,
                run.medians[name], max(2 * info["m"] * info["n"] * info["k"] / peak, info["weight_bytes"] / bandwidth),
                place, info["weight_bytes"], info["error"], peers, seconds.get(key(info, info["m"] - 1, run.threads)),
            ))  # fmt: skip
    return rows


def targets_table(verdicts: list[Verdict]) -> list[str]:
    lines = []
    for number, verdict in enumerate(verdicts, 1):
        count = f"{verdict.passed} of {len(verdict.scores)}"
        mark = "" if verdict.worst is None else "pass" if verdict.passed == len(verdict.scores) else "**fail**"
        worst = "" if verdict.worst is None else f"{verdict.worst[0]:.2f}: {verdict.worst[1].title}"
        lines.append([str(number), verdict.target.text, mark, count, worst])
    return markdown(["", "target", "", "rows that pass", "worst row"], lines)


def failures(row: Row) -> str:
    """The numbers of the targets that a row misses, or "pass"."""
    missed = []
    for number, target in enumerate(TARGETS, 1):
        score = target.score(row) if target.of(row) else None
        if score is not None and score < target.least:
            missed.append(str(number))
    return "**fail** " + " ".join(missed) if missed else "pass"


def ours_table(rows: list[Row]) -> list[str]:
    cells = []
    for row in rows:
        best = min(row.peers, key=lambda name: row.peers[name].seconds, default=None)
        peer = [best, milliseconds(row.peers[best].seconds), f"{row.faster():.2f}"] if best else ["", "", ""]
        cells.append([
            row.case, row.weights_in, milliseconds(row.seconds), f"{row.weight_bytes / row.seconds / 1e9:.3g}",
            f"{2 * row.m * row.n * row.k / row.seconds / 1e9:.4g}", f"{row.efficiency:.0%}", *peer, f"{row.error:.2g}",
            "" if row.more_exact is None else f"{row.more_exact:.2f}", failures(row),
        ])  # fmt: skip
    return markdown(
        ["case", "weights in", "ms", "GB/s of weights", "GOPS", "of limit", "best peer", "its ms", "x best peer",
         "error", "best peer's error / ours", "targets"],
        cells,
    )  # fmt: skip


def times_tables(runs: list[Run]) -> list[str]:
    """All times: a table for each shape and number of threads, a line for each contender."""
    tables = defaultdict(list)
    for run in runs:
        info = next(iter(run.infos.values()))
        tables[(info["n"], info["k"], run.threads)].append(run)
    lines = []
    for (n, k, threads), group in tables.items():
        names = list(dict.fromkeys(name for run in group for name in run.medians))
        cells = [
            [name, *(milliseconds(run.medians[name]) if name in run.medians else "" for run in group)]
            for name in names
        ]  # fmt: skip
        columns = [run.case.partition(" ")[2] for run in group]
        lines += ["", f"{n} x {k}, threads: {threads}", "", *markdown(["ms", *columns], cells)]
    return lines


def plot(rows: list[Row], folder: Path, cpu: str) -> list[str]:
    """Writes a picture of the efficiency over M at 4096 x 4096; returns the lines that show it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lepton"
    from matplotlib import pyplot

    warm = [row for row in rows if (row.n, row.k) == LLM and not row.cold and row.dtype == "fp32"]
    schemes = list(dict.fromkeys(row.scheme for row in warm))
    threads = sorted({row.threads for row in warm})
    if not warm:
        return []
    figure, axes = pyplot.subplots(
        len(threads), len(schemes), figsize=(3.4 * len(schemes), 2.6 * len(threads)), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for line, count in zip(axes, threads, strict=True):
        for axis, scheme in zip(line, schemes, strict=True):
            own = [row for row in warm if (row.scheme, row.threads) == (scheme, count)]
            m = [row.m for row in own]
            axis.plot(m, [row.efficiency for row in own], "o-", label=f"lepton {scheme}")
            axis.plot(m, [row.best_peer_efficiency for row in own], "x--", color="gray", label="best peer")
            axis.set(title=f"{scheme}, threads: {count}", xscale="log", ylim=(0, 1.1))
            axis.axhline(1, color="black", linewidth=0.5)
            axis.legend(fontsize="small")
    figure.supxlabel("M (4096 x 4096)")
    figure.supylabel("limit / time")
    name = "-".join(re.findall("[a-z0-9]+", cpu.lower())) + "-gemm.svg"
    (folder / "plots").mkdir(exist_ok=True)
    figure.savefig(folder / "plots" / name, metadata={"Date": None})
    pyplot.close(figure)
    return ["", f"![efficiency over M](plots/{name})"]


def level_table(level: str, runs: list[Run]) -> list[str]:
    """Ours at an older level, a line a case, and how many times as fast it is as torch's fastest floats there."""
    names = [name for name, info in runs[0].infos.items() if info["library"] == "lepton"]
    rows, passed, count = [], 0, 0
    for run in runs:
        dense = {name: taken for name, taken in run.medians.items() if name not in names}
        best = min(dense, key=dense.__getitem__)
        ratios = [dense[best] / run.medians[name] for name in names]
        passed, count = passed + sum(ratio >= 1 for ratio in ratios), count + len(ratios)
        cells = [f"{milliseconds(run.medians[name])} ({ratio:.2f})" for name, ratio in zip(names, ratios, strict=True)]
        rows.append([run.case, *cells, milliseconds(dense[best]), best])
    return [
        f"#### Level {level} beside torch's floats at that level, threads: {runs[0].threads}", "",
        *markdown(["ms (x torch)", *(name.removeprefix("lepton ") for name in names), "torch", "by"], rows), "",
        f"Never slower than torch's fastest float path: {passed} of {count}.",
    ]  # fmt: skip


def body(runs: list[Run], limits: dict, folder: Path, cpu: str) -> list[str]:
    """The lines of the part; pictures go to folder/plots."""
    rows = rows_of(runs, limits)
    lines = limits_table(limits)
    for scheme in dict.fromkeys(row.scheme for row in rows):
        for threads in dict.fromkeys(row.threads for row in rows):
            lines += ["", f"#### {scheme}, threads: {threads}", ""]
            lines += ours_table([row for row in rows if (row.scheme, row.threads) == (scheme, threads)])
    lines += ["", "#### All times", *times_tables(runs)]
    lines += plot(rows, folder, cpu)
    return [*lines, "", "#### Targets", "", *targets_table(judge(rows))]
