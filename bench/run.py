"""Measures one part of RESULTS.md and writes it: python bench/run.py PART [arguments of pytest]

PART: gemm, codec, pipeline, prune or recurrent. With arguments, and in a quick run, the report is printed and
RESULTS.md stays as it is. gemm: with one thread and with all, the machine's limits measured before and after. codec:
with the machine's level, then Huffman decoding with older ones.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import report
import roof

FOLDER = Path(__file__).parent
BUILD = FOLDER.parent / "build" / "bench"
OLD_LEVELS = ("ssse3", "generic")


def measure(part: str, threads: int, arguments: list[str], level: str = "") -> Path:
    path = BUILD / f"{part}-{level or threads}.json"
    settings = {"LEPTON_BENCH_THREADS": str(threads), **({"LEPTON_MAX_ISA": level} if level else {})}
    pytest = Path(sys.executable).with_name("pytest")
    subprocess.run(
        [pytest, FOLDER / f"bench_{part}.py", "-q", "--override-ini=python_files=bench_*.py",
         f"--benchmark-json={path}", "--benchmark-columns=median,iqr,rounds", *arguments],
        check=True, env={**os.environ, **settings},
    )  # fmt: skip
    return path


def limits(name: str) -> Path:
    path = BUILD / f"roof-{name}.json"
    path.write_text(json.dumps(roof.measure()))
    return path


def main() -> None:
    part, *arguments = sys.argv[1:]
    BUILD.mkdir(parents=True, exist_ok=True)
    threads = len(os.sched_getaffinity(0))
    if part == "gemm":
        before = limits("before")
        files = [measure(part, count, arguments) for count in sorted({1, threads})]
        files += [before, limits("after")]
    elif part == "codec":
        files = [measure(part, 1, arguments)]
        files += [measure(part, 1, ["-k", "huffman and decode", *arguments], level) for level in OLD_LEVELS]
    else:
        files = [measure(part, threads, arguments)]
    a_look = arguments or os.environ.get("LEPTON_BENCH_CASES") == "quick"
    report.write(part, files, None if a_look else report.RESULTS)


if __name__ == "__main__":
    main()
