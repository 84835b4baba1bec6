"""The command `lepton`: a thin layer over lepton_ai and lepton_kernels. Exit codes: 0 fine, 1 a problem was found in
the data, 2 wrong arguments. torch is imported by the commands that need it: it takes seconds."""

import dataclasses
import json
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

import lepton_kernels as lk
from lepton_ai import packing
from lepton_kernels import codec as codecs
from lepton_kernels.model_file import CODECS, ModelFile

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Prune, quantize and entropy-code models, and look at what came out. No command needs a network.",
)  # fmt: skip
# Where output goes to a file or a pipe, tables are as wide as they need to be.
console = Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=200)
Price = Annotated[
    float | None, typer.Option("--price", min=0.0, help="What an hour of this machine costs; with --measure.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
File = Annotated[Path, typer.Argument(help="A .safetensors file, ours or not.", exists=True, dir_okay=False)]


@contextmanager
def _errors() -> Iterator[None]:
    """Damaged data: exit 1. Wrong arguments and unreadable files: exit 2. One line each, no traceback."""
    try:
        yield
    except codecs.CorruptDataError as error:
        typer.echo(f"lepton: damaged: {error}", err=True)
        raise typer.Exit(1) from error
    except (ValueError, TypeError, OSError, ImportError, AttributeError) as error:
        typer.echo(f"lepton: {error}", err=True)
        raise typer.Exit(2) from error


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))


def _bytes(n: float) -> str:
    return f"{n / 1e6:,.2f} MB" if n >= 1e5 else f"{n:,.0f} B"


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, which kernel serves what, and how to fix what is wrong."""
    from lepton_ai.doctor import diagnose

    found = diagnose()
    if as_json:
        _print_json(found)
        return
    table = Table(show_header=False, box=None)
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in found["caches"].items())
    quota = f", quota {found['cpu_quota']:g}" if found["cpu_quota"] else ""
    for name, value in [
        ("lepton", found["lepton"]),
        ("python, torch", f"{found['python']}, {found['torch']}"),
        ("processor", found["cpu"]),
        ("level", f"{found['isa']} (machine: {found['isa_of_machine']})"),
        ("caches", caches),
        ("threads", f"{found['threads']} on {found['processors']} processors{quota}"),
        ("GPU", found["gpu"] or "none"),
        ("triton", found["triton"] or "not installed"),
        *found["kernels"].items(),
    ]:
        table.add_row(name, str(value))
    console.print(table)
    for item in found["problems"]:
        console.print(f"problem: {item['problem']}", style="yellow")
        console.print(f"fix:     {item['fix']}", style="green")
    if not found["problems"]:
        console.print("no problems found", style="green")


def _texts(model: str, sentences: Path | None, option: str) -> list[dict[str, Any]]:
    """Inputs for the model of a Hugging Face folder."""
    from lepton_ai.calibration import texts

    if not Path(model).is_dir():
        raise ValueError(f"{option}: model is {model!r}; allowed: a Hugging Face folder, for its tokenizer")
    return texts(model, sentences.read_text().splitlines() if sentences else None)


Model = Annotated[str, typer.Argument(help="A Hugging Face folder, 'package.module:name' or 'file.py:name'.")]
# What a recipe says in place of these options of compress.
_REPLACED = ("scheme", "codec", "prune", "pattern", "method", "group_size", "step", "embeddings", "exclude")


@app.command()
def compress(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    scheme: Annotated[
        str, typer.Option(help="w8a8, w8a16, w4a8, w4a16, w5, w6 or w7 for w8 (coarser, smaller), or none.")
    ] = "w8a8",
    codec: Annotated[str, typer.Option(help=f"The file's codec: {', '.join(CODECS)}.")] = "huffman",
    prune: Annotated[float, typer.Option(help="Share of the weights to set to zero first.")] = 0.0,
    pattern: Annotated[
        str, typer.Option(help="Of the zeros: unstructured, N:M (2:4) or blocks (16x4).")
    ] = "unstructured",
    method: Annotated[str, typer.Option(help="To choose them: magnitude, wanda or sparsegpt.")] = "magnitude",
    calibration: Annotated[
        Path | None,
        typer.Option(help="Texts for wanda, sparsegpt and --measure, one a line. Default: a hundred that come along."),
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale, at 4 bits.")] = None,
    step: Annotated[
        float,
        typer.Option(help="Least distance of two weights, at 5 to 8 bits, in a layer's RMS: 0.1 for small files."),
    ] = 0.0,
    embeddings: Annotated[bool, typer.Option(help="Quantize embedding tables to int8 rows as well.")] = True,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers to leave alone: a name or a glob.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time it beside the original, and compare outputs.")
    ] = False,
    price: Price = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what became of each layer, and why.")] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="What lepton tune wrote, in place of all options above that change the model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prune, quantize and entropy-code a model into one safetensors file."""
    from lepton_ai.compression import Compression, Pruning, Quantization, Recipe
    from lepton_ai.cost import cost_per_million
    from lepton_ai.model import LeptonModel

    with _errors():
        kept = tuple(exclude or ())
        by_input = prune and method != "magnitude"
        if price is not None and not measure:
            raise ValueError(f"price is {price:g} without --measure; allowed: both, to price what was measured")
        if price is not None:
            cost_per_million(0.0, price)  # a price that is not finite is told before anything is written
        inputs = None
        if by_input or measure:
            inputs = _texts(model, calibration, f"method is {method}" if by_input else "--measure")
        steps: list[Any] = [
            Pruning(prune, pattern, method, inputs, exclude=kept) if prune else None,
            Quantization(scheme, group_size, embeddings, exclude=kept, step=step) if scheme != "none" else None,
            Compression(codec),
        ]
        if recipe is not None:
            sources = {name: context.get_parameter_source(name) for name in _REPLACED}
            given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
            if given:
                raise ValueError(f"--recipe is given with {', '.join(given)}; allowed: the recipe says all of these")
            steps = [Recipe.load(recipe)]
        if not output.parent.is_dir():
            raise ValueError(f"output is {output}: there is no folder {output.parent}")
        original = LeptonModel(model)
        compressed = original.compress(*steps, inplace=not measure)
        compressed.save(output)
        if measure and inputs:
            compressed.measure(original, inputs, price_per_hour=price)
    report = compressed.report()
    if as_json:
        layers = {"layers": [dataclasses.asdict(row) for row in compressed.explain().rows]} if explain else {}
        _print_json({**report.as_dict(), **layers, "output": str(output)})
        return
    typer.echo(str(compressed.explain() if explain else report))
    if explain and report.measured is not None:
        typer.echo(str(report.measured))
    typer.echo(f"wrote {output}")


@app.command()
def tune(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The recipe to write, YAML, for compress --recipe.")],
    budget: Annotated[
        str, typer.Option(help="What to keep: cosine, cosine_min or sqnr (dB), such as 'cosine>=0.99'.")
    ] = "cosine>=0.995",
    minimize: Annotated[str, typer.Option(help="size, latency or cost (of time, by --price).")] = "size",
    calibration: Annotated[
        Path | None, typer.Option(help="Texts to keep the budget on, one a line. Default: a hundred that come along.")
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help="For a model without a tokenizer: a list of its inputs, written by torch.save.", exists=True),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the call that is timed.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in each; with --inputs the first one is timed.")] = 128,
    plot: Annotated[Path | None, typer.Option(help="Draw the Pareto front into this file (.png, .svg).")] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="What an hour of this machine costs.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long each model that is made is timed.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Find what each layer should become so that a model is smallest, fastest or cheapest within a budget."""
    import torch

    from lepton_ai.measure import token_batch
    from lepton_ai.model import LeptonModel
    from lepton_ai.tuning import tune as tuned

    with _errors():
        for option, path in (("output", output), ("--plot", plot)):
            if path is not None and not path.parent.is_dir():
                raise ValueError(f"{option} is {path}: there is no folder {path.parent}")
        if inputs is not None and calibration is not None:
            raise ValueError(f"--inputs is {inputs} and --calibration {calibration}; allowed: one of them")
        try:
            items = _texts(model, calibration, "tune without --inputs") if inputs is None else torch.load(inputs)
        except pickle.UnpicklingError as error:
            raise ValueError(f"--inputs is {inputs}: {error}") from error
        original = LeptonModel(model)
        example = token_batch(original.model, batch, tokens) if inputs is None else None
        result = tuned(original, items, budget, minimize, example=example, price_per_hour=price, seconds=seconds)
        result.recipe.save(output)
        if plot is not None:
            result.plot(plot)
    if as_json:
        _print_json({**result.as_dict(), "output": str(output)})
        return
    typer.echo(str(result))
    typer.echo(f"wrote {output}")


@app.command()
def inspect(file: File, as_json: Json = False) -> None:
    """Each tensor's dtype, shape, codec, stored size, ratio and order-0 entropy."""
    with _errors():
        opened = ModelFile.open(file)
        rows = []
        for entry in opened.entries.values():
            layout = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}.get(entry.dtype, "bytes")
            entropy = codecs.entropy(opened.read(entry.name), layout)
            rows.append({**dataclasses.asdict(entry), "size": entry.size, "stored_size": entry.stored_size,
                         "ratio": entry.ratio, "entropy_bits_per_byte": entropy})  # fmt: skip
        beaten = [
            row["name"] for row in rows if row["codec"] == "lzw" and row["entropy_bits_per_byte"] / 8 < row["ratio"]
        ]
    size, stored = sum(row["size"] for row in rows), sum(row["stored_size"] for row in rows)
    if as_json:
        _print_json(
            {"file": str(file), "file_bytes": file.stat().st_size, "tensors": rows, "smaller_with_huffman": beaten}
        )
        return
    table = Table(title=str(file))
    for name, right in [("tensor", False), ("dtype", False), ("shape", True), ("codec", False), ("bytes", True),
                        ("stored", True), ("ratio", True), ("entropy/8", True)]:  # fmt: skip
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(
            row["name"], row["dtype"], "x".join(map(str, row["shape"])), row["codec"], f"{row['size']:,}",
            f"{row['stored_size']:,}", f"{row['ratio']:.3f}", f"{row['entropy_bits_per_byte'] / 8:.3f}",
        )  # fmt: skip
    table.add_section()
    table.add_row("total", "", "", "", f"{size:,}", f"{stored:,}", f"{stored / max(size, 1):.3f}", "")
    console.print(table)
    if beaten:
        console.print(f"{len(beaten)} tensors would be smaller with huffman than with lzw: {', '.join(beaten[:5])}")


@app.command()
def verify(file: File, as_json: Json = False) -> None:
    """Read, check and decode every tensor; exit code 1 names the first damaged one."""
    with _errors():
        entries = lk.verify(file)
    unchecked = [entry.name for entry in entries if entry.codec == "none" and entry.checksum is None]
    if as_json:
        _print_json({"file": str(file), "ok": True, "tensors": len(entries), "without_checksum": unchecked})
        return
    note = f"; {len(unchecked)} of them have no checksum (not written by lepton)" if unchecked else ""
    typer.echo(f"{file}: {len(entries)} tensors are whole{note}")


Input = Annotated[str, typer.Argument(help="The file; - for standard input.")]
Output = Annotated[
    str | None, typer.Option("-o", "--output", help="Where to write; - for standard output. Default: by FILE's name.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; as many as there are processors.")]


def _path(name: str) -> Path | None:
    return None if name == "-" else Path(name)


@contextmanager
def _progress(source: Path | None) -> Iterator[packing.Progress]:
    """A bar on a terminal's standard error, else nothing."""
    total = source.stat().st_size if source is not None and source.is_file() else None
    bar = Progress(
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)


@app.command()
def pack(
    file: Input,
    output: Output = None,
    codec: Annotated[str, typer.Option(help="huffman, or lzw for text and other repeated strings.")] = "huffman",
    layout: Annotated[str, typer.Option(help="bytes, bf16, fp16, fp32, nibbles; auto picks by samples.")] = "auto",
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Compress any file or pipe, losslessly; FILE.lptn by default. The file stays."""
    with _errors():
        source = _path(file)
        target = _path(output) if output is not None else packing.packed_name(source) if source else None
        with (
            packing.reading(source) as raw,
            packing.writing(target, force, raw) as coded,
            _progress(source) as progress,
        ):
            report = packing.pack(raw, coded, codec, layout, threads, progress)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(report), "ratio": report.ratio}, indent=2), err=target is None)
    else:
        typer.echo(f"{target or 'standard output'}: {report}", err=True)


@app.command()
def unpack(file: Input, output: Output = None, threads: Threads = None, force: Force = False) -> None:
    """Restore what `lepton pack` compressed; exit code 1 if it is damaged."""
    with _errors():
        source = _path(file)
        target = _path(output) if output is not None else packing.unpacked_name(source) if source else None
        with (
            packing.reading(source) as coded,
            packing.writing(target, force, coded) as raw,
            _progress(None) as progress,
        ):
            written = packing.unpack(coded, raw, threads, progress)
    typer.echo(f"{target or 'standard output'}: {written:,} bytes", err=True)


@app.command()
def bench(
    file: File,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes to time; several allowed.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 128,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to measure each figure.")] = 2.0,
    as_json: Json = False,
) -> None:
    """How fast a file decodes and loads, and how fast the model in it runs (a Hugging Face model)."""
    from lepton_ai.measure import bench_file

    with _errors():
        figures = bench_file(file, tuple(batch or (1, 32)), tokens, seconds)
    if as_json:
        _print_json(figures)
        return
    table = Table(show_header=False, box=None)
    for name, value in figures.items():
        if isinstance(value, list):  # single latencies, for --json
            continue
        shown = _bytes(value) if name.endswith("bytes") else f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown)
    console.print(table)


@app.command()
def simulate(
    load: Annotated[str, typer.Option(help="steady, diurnal, step or burst: how requests come.")] = "steady",
    rate: Annotated[float, typer.Option(min=0.0, help="Requests a second, outside of steps and bursts.")] = 100.0,
    factor: Annotated[
        float, typer.Option(min=0.0, help="Times the rate in the middle third (step), ten seconds a minute (burst).")
    ] = 3.0,
    minutes: Annotated[float, typer.Option(help="How long; diurnal: one day in so many, to --rate and back.")] = 10.0,
    node: Annotated[
        list[str] | None,
        typer.Option(help="NAME:COUNT:SPEED:PRICE:STARTUP: nodes to be had, price an hour, seconds; several allowed."),
    ] = None,
    latencies: Annotated[
        Path | None,
        typer.Option(
            help="Recorded service times at speed 1: seconds, one a line, or what lepton bench --json printed. "
            "Default: log-normal, mean 40 ms.", exists=True, dir_okay=False,
        ),
    ] = None,
    target_latency: Annotated[float, typer.Option(help="Seconds that 99 % of the answers should stay within.")] = 0.2,
    utilization: Annotated[float, typer.Option(help="Share of the time that nodes should be busy.")] = 0.8,
    least: Annotated[int, typer.Option("--min", help="Replicas, in nodes of speed 1, at least.")] = 1,
    most: Annotated[int | None, typer.Option("--max", help="And at most. Default: what the nodes are worth.")] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait; others are refused.")] = 10_000,
    failures: Annotated[float, typer.Option(help="Share of the nodes that die in an hour.")] = 0.0,
    update: Annotated[float | None, typer.Option(help="Minute at which all nodes begin to be replaced.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """What scaling with the load would cost and how long requests would take, beside a fleet sized for the peak."""
    from lepton_ai.serving import loads
    from lepton_ai.serving.autoscaler import ScalingPolicy
    from lepton_ai.serving.simulated_fleet import NodeKind
    from lepton_ai.serving.simulation import simulate as simulated

    seconds = 60 * minutes
    with _errors():
        shapes = {
            "steady": loads.steady(rate),
            "diurnal": loads.diurnal(rate, period=seconds),
            "step": loads.step(rate, factor, seconds / 3, 2 * seconds / 3),
            "burst": loads.burst(rate, factor, 60, 10),
        }
        if load not in shapes:
            raise ValueError(f"--load is {load!r}; allowed: {', '.join(shapes)}")
        kinds = [NodeKind.parse(text) for text in node or ("node:1000:1:1:20",)]
        worth = int(sum(kind.count * kind.speed for kind in kinds))
        policy = ScalingPolicy(
            least, worth if most is None else most, target_latency=target_latency, target_utilization=utilization
        )
        times = loads.recorded_seconds(latencies) if latencies else loads.assumed_seconds()
        result = simulated(
            shapes[load], seconds, kinds, times, policy, seed=seed, failures=failures,
            updates=() if update is None else (60 * update,), queue_limit=queue,
        )  # fmt: skip
    found = result.as_dict()
    if as_json:
        _print_json(found)
        return
    table = Table(title=f"{load}, {minutes:g} minutes, seed {seed}")
    table.add_column("")
    for name in ("scaled", "fixed"):
        table.add_column(name, justify="right")
    for name, value in found["scaled"].items():
        cells = (value, found["fixed"][name])
        table.add_row(name.replace("_", " "), *(f"{c:,.4g}" if isinstance(c, float) else str(c) for c in cells))
    console.print(table)


def main() -> None:
    """Runs the command line."""
    app(prog_name="lepton")
