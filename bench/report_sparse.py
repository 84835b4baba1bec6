"""The sparse part of RESULTS.md: a table by weight, how much faster than dense, the crossover plot, and the targets."""

import re
from pathlib import Path

import rivals_sparse
from gemm_shapes import LLM
from tables import Run, markdown, milliseconds

SPARSE_PEERS = ("torch CSR", "scipy CSR", "torch BSR", "DeepSparse")
# (pattern, sparsity): the least ratio of the dense contender's time to ours, by what is multiplied; issue's table.
FLOAT_128 = {0.7: 2.5, 0.8: 3.3, 0.9: 5.5, 0.95: 10.0}
INT8_128 = {0.7: 1.0, 0.8: 1.3, 0.9: 2.5, 0.95: 5.0}


def dense_float(run: Run) -> float:
    return min(run.medians[name] for name in rivals_sparse.DENSE if name in run.medians)


def ratios(run: Run) -> tuple[float, float, float]:
    """Of our float, w8a8 and w4a16 layers: how many times as fast as the fastest dense float, as our dense layer."""
    by_int8, by_int4 = (run.medians[f"dense {name}"] / run.medians[f"lepton {name}"] for name in ("w8a8", "w4a16"))
    return dense_float(run) / run.medians["lepton fp32"], by_int8, by_int4


def times_table(runs: list[Run]) -> list[str]:
    peers = [name for name in dict.fromkeys(n for run in runs for n in run.medians) if not name.startswith("lepton")]
    rows = []
    for run in runs:
        scored = zip(("fp32", "w8a8", "w4a16"), ratios(run), strict=True)
        rows.append([
            run.case,
            *(cell for name, by in scored for cell in (milliseconds(run.medians[f"lepton {name}"]), f"{by:.2f}")),
            *(milliseconds(run.medians[name]) if name in run.medians else "" for name in peers),
        ])  # fmt: skip
    ours = ["**fp32**", "x dense fp32", "**w8a8**", "x dense w8a8", "**w4a16**", "x dense w4a16"]
    return markdown(["ms", *ours, *peers], rows)


def scores(runs: list[Run]) -> list[tuple[str, list[tuple[float, float, str]]]]:
    """Each target: what it asks, and (score, least, case) of every case it applies to."""

    def info(run: Run) -> dict:
        return run.infos["lepton fp32"]

    def of(test, score, least) -> list[tuple[float, float, str]]:  # type: ignore[no-untyped-def]
        return [(score(run), least(info(run)), run.case) for run in runs if test(info(run))]

    def many(i: dict) -> bool:
        return i["pattern"] == "unstructured" and i["m"] >= 128

    def peers(run: Run) -> float:
        return min(run.medians[n] for n in SPARSE_PEERS if n in run.medians) / run.medians["lepton fp32"]

    one = lambda i: 1.0  # noqa: E731
    return [
        ("w8a8 never slower than our dense w8a8 (0.97: noise)",
         of(lambda i: True, lambda r: ratios(r)[1], lambda i: 0.97)),
        ("fp32, unstructured, M = 128 and 512: 2.5 / 3.3 / 5.5 / 10 x dense fp32 at 70 / 80 / 90 / 95 %",
         of(lambda i: many(i) and i["sparsity"] in FLOAT_128, lambda r: ratios(r)[0],
            lambda i: FLOAT_128[i["sparsity"]])),
        ("fp32, unstructured, M = 128 and 512, 50 %: faster than dense",
         of(lambda i: many(i) and i["sparsity"] == 0.5, lambda r: ratios(r)[0], one)),
        ("w8a8, unstructured, M = 128 and 512: 1.0 / 1.3 / 2.5 / 5 x dense w8a8 at 70 / 80 / 90 / 95 % (the target of "
         "Intel; Zen 4 has 1.8 / 2.6 / 5 / 9.5)",
         of(lambda i: many(i) and i["sparsity"] in INT8_128, lambda r: ratios(r)[1],
            lambda i: INT8_128[i["sparsity"]])),
        ("w8a8, 1x4, M = 128: 3.5 / 6.5 x dense w8a8 at 80 / 90 %",
         of(lambda i: i["pattern"] == "1x4" and i["m"] >= 128, lambda r: ratios(r)[1],
            lambda i: {0.8: 3.5, 0.9: 6.5}[i["sparsity"]])),
        ("w8a8, 16x4, M = 128: 0.85 / (1 - s) x dense w8a8",
         of(lambda i: i["pattern"] == "16x4" and i["m"] >= 128, lambda r: ratios(r)[1],
            lambda i: 0.85 / (1 - i["sparsity"]))),
        ("fp32, 16x1, M = 128, 80 %: 4.2 x dense fp32",
         of(lambda i: i["pattern"] == "16x1" and i["m"] >= 128 and i["sparsity"] == 0.8, lambda r: ratios(r)[0],
            lambda i: 4.2)),
        ("fp32, unstructured, M = 1: 2.8 / 6 / 11 x dense fp32 at 80 / 90 / 95 % (67 MB of floats: from memory)",
         of(lambda i: i["pattern"] == "unstructured" and i["m"] == 1 and i["sparsity"] >= 0.8, lambda r: ratios(r)[0],
            lambda i: {0.8: 2.8, 0.9: 6.0, 0.95: 11.0}[i["sparsity"]])),
        ("M = 16, 90 %: fp32 3 x dense fp32",
         of(lambda i: i["m"] == 16 and i["sparsity"] == 0.9, lambda r: ratios(r)[0], lambda i: 3.0)),
        ("M = 16, 90 %: w8a8 1.5 x dense w8a8",
         of(lambda i: i["m"] == 16 and i["sparsity"] == 0.9, lambda r: ratios(r)[1], lambda i: 1.5)),
        ("fp32 ahead of every sparse peer", of(lambda i: True, peers, one)),
        ("w4a16 never slower than our dense w4a16 (0.97: noise)",
         of(lambda i: True, lambda r: ratios(r)[2], lambda i: 0.97)),
    ]  # fmt: skip


def targets_table(runs: list[Run]) -> list[str]:
    rows = []
    for number, (text, found) in enumerate(scores(runs), 1):
        passed = sum(score >= least for score, least, _ in found)
        mark = "" if not found else "pass" if passed == len(found) else "**fail**"
        worst = min(found, key=lambda s: s[0] / s[1], default=None)
        shown = f"{worst[0]:.2f} of {worst[1]:.2f}: {worst[2]}" if worst else ""
        rows.append([str(number), text, mark, f"{passed} of {len(found)}", shown])
    return markdown(["", "target", "", "rows that pass", "worst row"], rows)


def plot(runs: list[Run], folder: Path, cpu: str) -> list[str]:
    """Writes a picture of speed over dense against sparsity at 4096 x 4096, unstructured; the lines that show it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lepton"
    from matplotlib import pyplot

    infos = [(run, run.infos["lepton fp32"]) for run in runs]
    chosen = [(run, i) for run, i in infos if (i["n"], i["k"]) == LLM and i["pattern"] == "unstructured"]
    if not chosen:
        return []
    titles = "fp32 / dense fp32", "w8a8 / dense w8a8", "w4a16 / dense w4a16"
    figure, axes = pyplot.subplots(1, len(titles), figsize=(12, 3.2), sharex=True, layout="constrained")
    for which, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for m in sorted({i["m"] for _, i in chosen}):
            points = sorted((i["sparsity"], ratios(run)[which]) for run, i in chosen if i["m"] == m)
            axis.plot(*zip(*points, strict=True), "o-", label=f"M = {m}")
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set(title=title, yscale="log", xlabel="share of zeros")
        axis.legend(fontsize="small")
    axes[0].set_ylabel("times as fast")
    name = "-".join(re.findall("[a-z0-9]+", cpu.lower())) + "-sparse.svg"
    (folder / "plots").mkdir(exist_ok=True)
    figure.savefig(folder / "plots" / name, metadata={"Date": None})
    pyplot.close(figure)
    return ["", f"![times as fast as dense over sparsity](plots/{name})"]


def body(runs: list[Run], folder: Path, cpu: str) -> list[str]:
    """The lines of the part; a picture goes to folder/plots."""
    return ["", *times_table(runs), *plot(runs, folder, cpu), "", "#### Targets of the sparse layers", "",
            *targets_table(runs)]  # fmt: skip
