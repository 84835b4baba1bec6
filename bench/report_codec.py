"""The codec's part of RESULTS.md: a table for each direction and level, and the targets."""

from collections import defaultdict
from dataclasses import dataclass

from tables import Run, markdown

OURS = "lepton huffman"


def speed(run: Run, name: str) -> float:
    """GB/s of original bytes."""
    return run.infos[name]["bytes"] / run.medians[name] / 1e9


def table(runs: list[Run]) -> list[str]:
    names = list(dict.fromkeys(name for run in runs for name in run.medians))
    rows = []
    for run in runs:
        cells = [
            f"{speed(run, name):.2f}" + (f" ({run.infos[name]['ratio']:.3f})" if name != "copy" else "")
            if name in run.medians
            else ""
            for name in names
        ]
        rows.append([next(iter(run.infos.values()))["row"], *cells])
    return markdown(["", *(f"**{name}**" if name.startswith("lepton") else name for name in names)], rows)


@dataclass
class Target:
    """`cases`: for each row what was reached and whether that is enough."""

    text: str
    cases: list[tuple[str, str, bool]]


def _times(runs: dict[str, Run], kinds: dict[str, float], peer: str, ours: str = OURS) -> list[tuple[str, str, bool]]:
    out = []
    for kind, wanted in kinds.items():
        if kind in runs and peer in runs[kind].medians:
            ratio = speed(runs[kind], ours) / speed(runs[kind], peer)
            out.append((kind, f"{ratio:.2f} of {wanted:g} x", ratio >= wanted))
    return out


def targets(tables: dict[str, list[Run]]) -> list[Target]:
    by_kind = {name: {next(iter(run.infos.values()))["row"]: run for run in runs} for name, runs in tables.items()}
    decode, encode = by_kind.get("huffman decode", {}), by_kind.get("huffman encode", {})
    all_kinds = list(decode)
    found = [
        Target(
            "Huffman decode, x huff0 X2",
            _times(
                decode,
                {"bf16 exponents": 4, "int4, a byte each": 3, "int8 per channel": 3.5, "int8, 80 % pruned": 7},
                "huff0 X2",
            ),
        ),
        Target("bf16 model, decode, x zipnn", _times(decode, {"bf16": 8}, "zipnn")),
        Target("Huffman encode, x huff0", _times(encode, dict.fromkeys(all_kinds, 2.5), "huff0 X2")),
        Target(
            "Huffman encode, GB/s",
            [(kind, f"{speed(run, OURS):.2f} of 2", speed(run, OURS) >= 2) for kind, run in encode.items()],
        ),
    ]
    sizes = []
    for kind, run in decode.items():
        info = run.infos[OURS]
        over, wanted = info["ratio64"] / info["ideal"] - 1, 0.03 if "pruned" in kind else 0.01
        sizes.append((kind, f"{over:+.2%} of {wanted:.0%}", over <= wanted))
    found.append(Target("size over order-0 entropy of the planes, chunks of 64 KiB", sizes))
    if "bf16" in decode and "zipnn" in decode["bf16"].medians:
        run = decode["bf16"]
        ratio = run.infos[OURS]["ratio"] / run.infos["zipnn"]["ratio"]
        found.append(Target("bf16 model, size, x zipnn's", [("bf16", f"{ratio:.4f} of 1.005", ratio <= 1.005)]))
        found.append(
            Target("bf16 model, decode, GB/s", [("bf16", f"{speed(run, OURS):.1f} of 7", speed(run, OURS) >= 7)])
        )
    for name, runs in by_kind.items():
        if name.startswith("huffman decode, level"):
            generic = name.endswith("generic")
            peer, wanted = ("huff0 X1", 0.6) if generic else ("huff0 X2", 1.2)
            found.append(Target(f"{name}, x {peer}", _times(runs, dict.fromkeys(runs, wanted), peer)))
    for direction, images in (("decode", 4.0), ("encode", 3.0)):
        runs = by_kind.get(f"lzw {direction}", {})
        for peer, ours, wanted in (
            ("libtiff", "lepton tiff", images),
            ("giflib", "lepton gif", images),
            ("ncompress", "lepton compress", 3.0),
        ):
            found.append(Target(f"LZW {direction}, x {peer}", _times(runs, dict.fromkeys(runs, wanted), peer, ours)))
    return [target for target in found if target.cases]


def body(runs: list[Run]) -> list[str]:
    tables = defaultdict(list)
    for run in runs:
        tables[next(iter(run.infos.values()))["table"]].append(run)
    lines = []
    for name, group in sorted(tables.items()):
        lines += ["", f"#### {name}", "", *table(group)]
    rows = []
    for number, target in enumerate(targets(tables), 1):
        passed = sum(ok for _, _, ok in target.cases)
        verdict = "pass" if passed == len(target.cases) else "**fail**"
        rows.append([str(number), target.text, verdict, f"{passed} of {len(target.cases)}",
                     "; ".join(f"{kind}: {reached}" for kind, reached, _ in target.cases)])  # fmt: skip
    return [
        *lines,
        "",
        "#### Targets of the codec",
        "",
        *markdown(["", "target", "", "pass", "reached, of what is asked"], rows),
    ]
