"""Measures one part of RESULTS.md and writes it: python bench/run.py PART [arguments of pytest]

PART: gemm, sparse, convolution, codec, pipeline, prune or recurrent. With arguments, and in a quick run, the report is
printed and RESULTS.md stays as it is. gemm: with one thread and with all, the machine's limits measured before and
after; then the quick cases with older levels, beside torch held to the same one. codec: with the machine's level, then
Huffman decoding with older ones.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import report
import roof

import lepton_kernels as lk

FOLDER = Path(__file__).parent
BUILD = FOLDER.parent / "build" / "bench"
OLD_LEVELS = ("ssse3", "generic")
# What holds torch to a level: its own kernels, oneDNN and MKL (COMPATIBLE: SSE2, the one setting that AMD gets too).
TORCH_LEVELS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "generic": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


def measure(part: str, threads: int, arguments: list[str], level: str = "", **settings: str) -> Path:
    path = BUILD / f"{part}-{level or threads}.json"
    settings = {"LEPTON_BENCH_THREADS": str(threads), **({"LEPTON_MAX_ISA": level} if level else {}), **settings}
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
        for level, settings in TORCH_LEVELS.items():
            if level != lk.backends()["isa"] and not arguments:
                files.append(measure(part, 1, arguments, level, LEPTON_BENCH_CASES="quick", **settings))
    elif part == "codec":
        files = [measure(part, 1, arguments)]
        files += [measure(part, 1, ["-k", "huffman and decode", *arguments], level) for level in OLD_LEVELS]
    else:
        files = [measure(part, threads, arguments)]
    a_look = arguments or os.environ.get("LEPTON_BENCH_CASES") == "quick"
    report.write(part, files, None if a_look else report.RESULTS)


if __name__ == "__main__":
    main()
