"""Writes one machine's section of RESULTS.md: python bench/report.py BENCHMARK.json ROOF.json

The section stands between two marker lines that hold the CPU's name, and replaces that CPU's earlier one; all other
text, other machines' sections included, stays as it is.
"""

import json
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

import roof

RESULTS = Path(__file__).with_name("RESULTS.md")
INTRO = """# Results

Made by `make bench`, one section per CPU model: machines disagree about which kernel is fast. All contenders of a row
ran in one process, in turn; medians. "of limit": the time that the machine's limits (first table of the section) allow,
divided by ours: the larger of operations / peak and weight bytes / bandwidth. "best peer / ours" above 1: we are the
faster one.
"""
FLOAT_PEAKS = "fp32_gflops", "bf16_gflops", "fp16_gflops", "amx_bf16_gflops"


def limit_seconds(info: dict, limits: dict) -> float:
    """The least time a product can take here: its operations at the peak, or its weights at a cache's bandwidth."""
    integer = not info["table"].endswith("a16")
    names = ("int8_gops", "amx_int8_gops") if integer else FLOAT_PEAKS
    peak = max(limits[name][1] for name in names if limits[name])
    if "memory" in info["column"]:
        bandwidth = max(limits["dram_read_gb_s"][1], limits["dram_read_prefetch_gb_s"][1])
    elif info["weight_bytes"] < limits["threads"][1] * roof.cache_kib(2) * 1024:
        bandwidth = limits["l2_read_gb_s"][1]
    else:
        bandwidth = limits["llc_read_gb_s"][1]
    return max(info["ops"] / peak, info["weight_bytes"] / bandwidth) / 1e9


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]


def race_table(runs: list[dict], limits: dict) -> list[str]:
    """A row a race: ours, its share of the limit, the best peer's ratio, then all others (codec: speeds)."""
    names = list(dict.fromkeys(name for run in runs for name in run["medians"]))
    with_limit = "ops" in runs[0]
    codec = "bytes" in runs[0]

    def value(run: dict, name: str) -> str:
        if name not in run["medians"]:
            return ""
        if codec:
            return f"{run['bytes'] / run['medians'][name] / 1e9:.2f} ({run['ratios'][name]:.3f})"
        return milliseconds(run["medians"][name])

    rows = []
    for run in runs:
        ours = run["medians"][run["ours"]]
        label = " ".join([run["row"], run["column"]]).strip() + (f" ({run['entropy']:.2f} bits)" if codec else "")
        peers = {name: taken for name, taken in run["medians"].items() if not name.startswith("lepton")}
        best = f"{min(peers.values()) / ours:.2f}" if peers else ""
        share = [f"{limit_seconds(run, limits) / ours:.0%}"] if with_limit else []
        own, *others = names
        rows.append([label, value(run, own), *share, best, *(value(run, name) for name in others)])
    own, *others = names
    return markdown(["", f"**{own}**", *(["of limit"] if with_limit else []), "best peer / ours", *others], rows)


UNITS = {
    "gemm": "ms",
    "codec": "GB/s of original bytes (compressed / original size); order-0 entropy of bytes; 1 thread",
    "pipeline": "ms; MiniLM, 128 tokens",
    "prune": "ms",
    "recurrent": "ms; the whole sequence",
}


def section(benchmarks: dict, limits: dict) -> str:
    machine = benchmarks["machine_info"]["lepton"]
    tables = defaultdict(list)
    for run in benchmarks["benchmarks"]:
        info = run["extra_info"]
        tables[(info["table"], info["ours"])].append(info)
    lines = [
        f"## {machine['cpu']}",
        "",
        f"Level {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}, "
        f"{date.today()}. Command: `make bench`.",
        "",
        *markdown(
            ["limit (`bench/roof.py`)", "1 thread", f"{limits['threads'][1]} threads"],
            [
                [label, *([f"{x:.1f}" for x in limits[name]] if limits[name] else ["no instruction", ""])]
                for name, label in roof.LABELS.items()
            ],
        ),
        "",
        f"int8 by {limits['int8_instruction']}.",
    ]
    for (table, _), runs in sorted(tables.items()):
        lines += ["", f"### {table}: {UNITS[table.split()[0]]}", "", *race_table(runs, limits)]
    return "\n".join(lines)


def replace_section(text: str, cpu: str, body: str) -> str:
    begin, end = f"<!-- begin {cpu} -->", f"<!-- end {cpu} -->"
    block = f"{begin}\n{body}\n{end}\n"
    if begin in text:
        before, _, rest = text.partition(begin)
        return before + block + rest.partition(f"{end}\n")[2]
    return f"{text.rstrip()}\n\n{block}"


def main() -> None:
    benchmarks, limits = (json.loads(Path(path).read_text()) for path in sys.argv[1:])
    text = RESULTS.read_text() if RESULTS.exists() else INTRO
    body = section(benchmarks, limits)
    RESULTS.write_text(replace_section(text, benchmarks["machine_info"]["lepton"]["cpu"], body))
    print(body)


if __name__ == "__main__":
    main()
