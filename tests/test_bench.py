"""Reports: limits, targets and marks on made-up times, and parts of RESULTS.md that leave all else alone."""

import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
LIMITS = {
    "threads": [1, 2], "int8_instruction": "an instruction", "amx_int8_gops": None, "amx_bf16_gflops": None,
    "dram_read_gb_s": [10, 20], "dram_read_prefetch_gb_s": [12, 18],
    "dram_read_streams_gb_s": [11, 19], "dram_read_streams_prefetch_gb_s": [11, 19],
    "llc_read_gb_s": [30, 60],
    "l2_read_gb_s": [100, 200], "int8_gops": [800, 1600], "bf16_gflops": [100, 200], "fp16_gflops": None,
    "fp32_gflops": [200, 400],
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, with caches of 1 MiB (L2) and 32 MiB (L3)."""
    monkeypatch.syspath_prepend(BENCH)
    import report
    import report_gemm
    import roof
    import targets

    monkeypatch.setattr(roof, "cache_kib", {2: 1024, 3: 32768}.get)
    return {"report": report, "gemm": report_gemm, "targets": targets}


def entry(name: str, seconds: float, m: int, cold: bool = False, **info: object) -> dict:
    common = {"table": "gemm", "n": 4096, "k": 4096, "m": m, "dtype": "fp32", "cold": cold, "error": 0.01,
              "group": -1}  # fmt: skip
    group = f"4096x4096 M={m}" + " from memory" * cold
    return {"name": name, "group": group, "stats": {"median": seconds}, "extra_info": {**common, **info}}


def content(*entries: dict, threads: int = 2) -> dict:
    machine = {"cpu": "A processor", "isa": "avx2", "threads": threads, "torch": "2", "commit": "abc"}
    return {"machine_info": {"lepton": machine}, "benchmarks": list(entries)}


def lepton(seconds: float, m: int, scheme: str = "w8a8", cold: bool = False) -> dict:
    return entry(f"lepton {scheme}", seconds, m, cold, scheme=scheme, bits=int(scheme[1]), full=True, library="lepton",
                 weight_bytes=4096 * 4096 * int(scheme[1]) // 8)  # fmt: skip


def peer(name: str, seconds: float, m: int, bits: int, scheme: str, full: bool = True) -> dict:
    return entry(name, seconds, m, scheme=scheme, bits=bits, full=full, library=name.split()[0])


def rows(bench, *entries: dict, threads: int = 2) -> list:
    return bench["gemm"].rows_of(bench["report"].runs_of(content(*entries, threads=threads)), LIMITS)


@pytest.mark.parametrize(
    ("m", "scheme", "cold", "threads", "limit"),
    [
        (1, "w8a8", False, 2, 4096 * 4096 / 60e9),  # the last-level cache
        (1, "w8a8", True, 2, 4096 * 4096 / 20e9),  # memory: the better of two ways to read it
        (1, "w8a8", True, 1, 4096 * 4096 / 12e9),
        (1024, "w4a8", False, 2, 2 * 1024 * 4096 * 4096 / 1600e9),
        (1024, "w8a16", False, 1, 2 * 1024 * 4096 * 4096 / 200e9),  # the fastest float peak
    ],
)
def test_limit(bench, m: int, scheme: str, cold: bool, threads: int, limit: float) -> None:
    (row,) = rows(bench, lepton(1e-3, m, scheme, cold), threads=threads)
    assert row.limit_seconds == pytest.approx(limit)
    assert row.efficiency == pytest.approx(limit / 1e-3)


def test_peers_are_full_layers_of_as_many_bits(bench) -> None:
    others = [
        peer("torch fp32", 4e-3, 1, 32, "dense"), peer("onnxruntime 8 bit", 2e-3, 1, 8, "w8a8"),
        peer("OpenVINO u4", 1e-4, 1, 4, "w4a8"), peer("torch _int_mm", 1e-5, 1, 8, "w8a8", full=False),
    ]  # fmt: skip
    eight, four = rows(bench, lepton(1e-3, 1, "w8a8"), lepton(1e-3, 1, "w4a8"), *others)
    assert set(eight.peers) == {"torch fp32", "onnxruntime 8 bit"}
    assert set(four.peers) == {"torch fp32", "onnxruntime 8 bit", "OpenVINO u4"}
    assert eight.faster() == pytest.approx(2)
    assert four.faster() == pytest.approx(0.1)


def test_failing_rows_stay_visible(bench, tmp_path) -> None:
    files = [content(lepton(3e-4, 1), peer("onnxruntime 8 bit", 2e-4, 1, 8, "w8a8"), lepton(7e-4, 2)), LIMITS]
    _, body = bench["report"].part_body("gemm", files, tmp_path)
    assert "| 4096x4096 M=1 | cache | 0.3 |" in body
    lines = {line.split(" | ")[1]: line for line in body.splitlines() if line.count(" | ") == 4}
    behind = lines["never behind a peer with as many bits a weight or more"]
    assert "**fail** | 0 of 1 | 0.67: w8a8 4096x4096 M=1, 2 threads" in behind
    assert "pass | 1 of 1" in lines["M = 1, weights in the last-level cache: efficiency >= 0.90"]


def test_step_up_at_a_tile(bench, tmp_path) -> None:
    times = {1: 1e-4, 2: 9e-4, 16: 1e-3, 17: 1.2e-3, 32: 2e-3, 33: 2.05e-3, 34: 9e-3}  # 1.2 > 17 / 16
    files = [content(*(lepton(seconds, m) for m, seconds in times.items()), lepton(9e-3, 17, "w4a8")), LIMITS]
    _, body = bench["report"].part_body("gemm", files, tmp_path)
    (step,) = (line for line in body.splitlines() if "no step up at a tile" in line)
    assert "**fail** | 1 of 2 | 0.89: w8a8 4096x4096 M=17, 2 threads" in step
    for seconds, passed in ((1.06e-3, True), (1.07e-3, False)):  # the limit: 1.0625
        _, row = rows(bench, lepton(1e-3, 16), lepton(seconds, 17))
        assert (row.row_cost_drop >= 1) is passed


def test_each_sparse_layer_is_held_against_its_dense_one(bench, tmp_path) -> None:
    times = {"lepton fp32": 2e-3, "lepton w8a8": 1e-3, "lepton w4a16": 4e-3, "dense w8a8": 3e-3, "dense w4a16": 3.6e-3,
             "torch fp32": 5e-3, "onnxruntime fp32": 7e-3, "torch CSR": 9e-3}  # fmt: skip
    case = {"table": "sparse", "n": 64, "k": 64, "m": 128, "pattern": "unstructured", "sparsity": 0.6}
    entries = [{"name": name, "group": "a case", "stats": {"median": seconds}, "extra_info": case}
               for name, seconds in times.items()]  # fmt: skip
    _, body = bench["report"].part_body("sparse", [content(*entries)], tmp_path)
    assert "| a case | 2 | 2.50 | 1 | 3.00 | 4 | 0.90 | 3 | 3.6 | 5 | 7 | 9 |" in body
    targets = {line.split(" | ")[1]: line for line in body.splitlines() if line.count(" | ") == 4}
    assert "pass | 1 of 1" in targets["w8a8 never slower than our dense w8a8 (0.97: noise)"]
    assert "**fail** | 0 of 1" in targets["w4a16 never slower than our dense w4a16 (0.97: noise)"]


def test_best_limits(bench) -> None:
    slower = {**LIMITS, "llc_read_gb_s": [31, 50]}
    assert bench["gemm"].best_limits([LIMITS, slower])["llc_read_gb_s"] == [31, 60]


def test_parts_are_replaced_and_all_else_stays(bench, tmp_path, capsys) -> None:
    results, report = tmp_path / "RESULTS.md", bench["report"]
    results.write_text("# Results\n\n<!-- begin Another -->\n## Another\n<!-- end Another -->\n\nA note.\n")
    paths = [tmp_path / name for name in ("times.json", "limits.json")]
    for seconds in (3e-4, 4e-4):
        for path, data in zip(paths, (content(lepton(seconds, 1)), LIMITS), strict=True):
            path.write_text(json.dumps(data))
        report.write("gemm", paths, results)
    other = [content({**entry("lepton x", 1e-3, 1), "extra_info": {"table": "prune", "row": "a row"}})]
    paths[0].write_text(json.dumps(other[0]))
    report.write("prune", paths[:1], results)
    text = results.read_text()
    assert text.startswith("# Results\n\n<!-- begin Another -->\n## Another\n<!-- end Another -->\n\nA note.\n")
    assert text.count("<!-- begin A processor: gemm -->") == text.count("<!-- end A processor -->") == 1
    assert "| 0.4 |" in text
    assert "| 0.3 |" not in text
    assert text.index("A processor: gemm") < text.index("A processor: prune") < text.index("<!-- end A processor -->")
    assert (tmp_path / "plots" / "a-processor-gemm.svg").exists()
