"""Writes one part of one machine's section of RESULTS.md: python bench/report.py PART JSON... [--results FILE]

PART: one that bench/run.py has. JSON: files of pytest-benchmark and of roof.py, in any number; of a
limit measured more than once the best counts. A section stands between two marker lines that hold the CPU's name, a
part in it between two of its own; each replaces its predecessor, and all other text stays as it is. With --print
nothing is written.
"""

import argparse
import json
from collections import defaultdict
from datetime import date
from pathlib import Path

import report_codec
import report_gemm
import report_sparse
from tables import Run, markdown, milliseconds, runs_of

RESULTS = Path(__file__).with_name("RESULTS.md")
INTRO = """# Results

Made by `make bench`, one section per CPU model: machines disagree about which kernel is fast. All contenders of a case
ran in one process, in turn; medians. "of limit": the time that the machine's limits allow, divided by ours: the larger
of operations / peak and weight bytes / bandwidth. "best peer / ours" and "x best peer" above 1: we are the faster one.
"""
NOTES = {
    "codec": "GB/s of original bytes (compressed / original size); 1 thread. huff0 is zstd's Huffman coder, in C, with "
    "BMI2 where there is; ncompress is a process a call.",
    "pipeline": "ms; MiniLM, 128 tokens; cosine: between sentence embeddings and those of torch fp32. Without VNNI "
    "onnxruntime and torch sum int8 products in saturating 16 bits.",
    "prune": "ms.",
    "convolution": "ms; fp32 but for w8a8. Pruned layers and a network of them (bench/bench_convolution.py).",
    "recurrent": "ms; the whole sequence.",
    "sparse": "Y = X W^T, all of the same pruned weight; `dense`: all of it. The fastest dense float product of torch, "
    "onnxruntime and OpenVINO is what fp32 is held against. w4a16, torch's int4pack: groups of 128. Sparse matrices of "
    "torch and scipy get X turned.",
    "gemm": "Limits: the best of a measurement before and one after. Peers of a row: full layers whose weights have as "
    "many bits or more. `bf16`: X and Y are bf16, elsewhere fp32. `from memory`: the weights of each call from DRAM.",
}


def race_table(runs: list[Run]) -> list[str]:
    """A line a case: ours, the best peer's ratio, then all others; last the cosines that come with the contenders."""

    def value(run: Run, name: str) -> str:
        return milliseconds(run.medians[name]) if name in run.medians else ""

    own, *others = dict.fromkeys(name for run in runs for name in run.medians)
    rows = []
    for run in runs:
        peers = [taken for name, taken in run.medians.items() if not name.startswith("lepton")]
        best = f"{min(peers) / run.medians[own]:.2f}" if peers else ""
        rows.append([run.infos[own]["row"], value(run, own), best, *(value(run, name) for name in others)])
    infos = runs[0].infos
    for which in ("mean", "min"):
        if f"cosine_{which}" in infos[own]:
            first, *rest = (f"{infos[name][f'cosine_{which}']:.4f}" for name in (own, *others))
            rows.append([f"cosine, {which}", first, "", *rest])
    return markdown(["", f"**{own}**", "best peer / ours", *others], rows)


def race_tables(runs: list[Run]) -> list[str]:
    tables = defaultdict(list)
    for run in runs:
        tables[next(iter(run.infos.values()))["table"]].append(run)
    return [line for table, group in sorted(tables.items()) for line in ("", f"#### {table}", "", *race_table(group))]


def replace(text: str, title: str, body: str, where: str = "") -> str:
    """Text with body between title's markers: in place of what is there, or before the line `where`, or at the end."""
    begin, end = f"<!-- begin {title} -->", f"<!-- end {title} -->"
    block = f"{begin}\n{body}\n{end}\n"
    if begin in text:
        before, _, rest = text.partition(begin)
        return before + block + rest.partition(f"{end}\n")[2]
    if where:
        before, _, rest = text.partition(where)
        return f"{before.rstrip()}\n\n{block}\n{where}{rest}"
    return f"{text.rstrip()}\n\n{block}"


def part_body(part: str, files: list[dict], folder: Path) -> tuple[str, str]:
    """(the CPU's name, the part's text)."""
    measured = [content for content in files if "benchmarks" in content]
    machines = [content["machine_info"]["lepton"] for content in measured]
    machine = machines[0]
    for key in ("cpu", "commit"):
        if any(other[key] != machine[key] for other in machines):
            raise ValueError(f"report: the files differ in {key}: {[other[key] for other in machines]}")
    runs = [run for content in measured for run in runs_of(content)]
    by_level: dict[str, list[Run]] = defaultdict(list)
    for content in measured:
        by_level[content["machine_info"]["lepton"]["isa"]] += runs_of(content)
    threads = " and ".join(str(count) for count in sorted({other["threads"] for other in machines}))
    lines = [
        f"### {part}",
        "",
        f"Level {machine['isa']}, threads: {threads}, torch {machine['torch']}, commit {machine['commit']}, "
        f"{date.today()}. Command: `make bench-{part}`. {NOTES[part]}",
    ]
    if part == "gemm":
        limits = report_gemm.best_limits([content for content in files if "benchmarks" not in content])
        lines += ["", *report_gemm.body(by_level.pop(machine["isa"]), limits, folder, machine["cpu"])]
        for level, older in by_level.items():
            lines += ["", *report_gemm.level_table(level, older)]
    elif part == "sparse":
        lines += report_sparse.body(runs, folder, machine["cpu"])
    elif part == "codec":
        lines += report_codec.body(runs)
    else:
        lines += race_tables(runs)
    return machine["cpu"], "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=NOTES)
    parser.add_argument("json", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true")
    options = parser.parse_args()
    write(options.part, options.json, None if options.print else options.results)


def write(part: str, paths: list[Path], results: Path | None) -> None:
    """Prints the part made from these files and, if there is a `results`, replaces it there."""
    folder = paths[0].parent if results is None else results.parent
    cpu, body = part_body(part, [json.loads(path.read_text()) for path in paths], folder)
    print(body)
    if results is None:
        return
    text = results.read_text() if results.exists() else INTRO
    if f"<!-- begin {cpu} -->" not in text:
        text = replace(text, cpu, f"## {cpu}\n")
    results.write_text(replace(text, f"{cpu}: {part}", body, f"<!-- end {cpu} -->"))


if __name__ == "__main__":
    main()
