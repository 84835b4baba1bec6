"""The command `lepton`: a thin layer over lepton_ai and lepton_kernels. Exit codes: 0 fine, 1 a problem was found in
the data, 2 wrong arguments. torch is imported by the commands that need it: it takes seconds."""

import dataclasses
import json
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
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
            given = [name for name in _REPLACED if _is_given(context, name)]
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


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _loaded(path: Path) -> Any:
    """What torch.save wrote: a list of tensors, or of structures of them."""
    import torch

    try:
        items = torch.load(path)
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"--inputs is {path}: {error or type(error).__name__}; allowed: what torch.save wrote"
        ) from error
    if not isinstance(items, list):
        raise ValueError(f"--inputs is {path} with {type(items).__name__}; allowed: a list of model inputs")
    return items


@app.command()
def tune(
    context: typer.Context,
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
    from lepton_ai.measure import token_batch
    from lepton_ai.model import LeptonModel
    from lepton_ai.tuning import tune as tuned
    from lepton_ai.tuning.result import check_plot

    with _errors():
        for option, path in (("output", output), ("--plot", plot)):
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise ValueError(f"{option} is {path}; allowed: a file in a folder that there is")
        if plot is not None:
            check_plot(plot)
        if inputs is not None and calibration is not None:
            raise ValueError(f"--inputs is {inputs} and --calibration {calibration}; allowed: one of them")
        given = [name for name in ("batch", "tokens") if _is_given(context, name)]
        if inputs is not None and given:
            raise ValueError(f"--inputs is given with {', '.join(given)}; allowed: the first of the inputs is timed")
        items = _texts(model, calibration, "tune without --inputs") if inputs is None else _loaded(inputs)
        original = LeptonModel(model)
        example = token_batch(original.model, batch, tokens) if inputs is None else None
        result = tuned(original, items, budget, minimize, example=example, price_per_hour=price, seconds=seconds)
        if as_json:
            _print_json({**result.as_dict(), "output": str(output)})
        else:
            typer.echo(str(result))
        result.recipe.save(output)
        if plot is not None:
            result.plot(plot)
    if not as_json:
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
def serve(
    file: Annotated[Path, typer.Argument(help="A model file that lepton compress wrote.", exists=True, dir_okay=False)],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A Hugging Face folder: requests may be texts.", exists=True, file_okay=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The architecture, where the file does not hold it: 'package.module:name'.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: on all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: any that is free.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that answer, on cores of their own.")] = 1,
    warm_up: Annotated[
        Path | None, typer.Option(help="A request's body to warm up with, where none can be made.", exists=True)
    ] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes that a request may have.")] = 1 << 20,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are answered 503.")] = 1024,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until a request is answered 504.")] = 30.0,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds to finish in after SIGTERM.")] = 30.0,
    engine: Annotated[str, typer.Option(help="local: processes of this machine; ray: a Ray cluster.")] = "local",
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="As many as the load asks for, from --replicas up to so many.")
    ] = None,
    target_latency: Annotated[
        float, typer.Option(min=0.001, help="Seconds that 99 of 100 requests should wait and take; local engine.")
    ] = 0.5,
    address: Annotated[
        str | None, typer.Option(help="With ray: of the cluster; auto: the one here. Default: one of its own.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of a replica; with ray: its CPUs. Given, they have no cores of their own: the system deals them, as "
            "it has to in a container with a limit. Default: a share of this machine, 1 in another cluster.",
        ),
    ] = None,
) -> None:
    """Serve a model file over HTTP: POST /infer, a live page at /, Prometheus at /metrics."""
    with _errors():
        if model is not None and ":" in model and (code := Path(model.rpartition(":")[0])).is_file():
            model = f"{code.resolve()}:{model.rpartition(':')[2]}"  # replicas may be in another folder
        if engine not in ("local", "ray"):
            raise ValueError(f"--engine is {engine!r}; allowed: local, ray")
        if address is not None and engine == "local":
            raise ValueError(f"--address is {address} with --engine local; allowed: with --engine ray")
        most = replicas if max_replicas is None else max_replicas
        if most < replicas:
            raise ValueError(f"--max-replicas is {most} with --replicas {replicas}; allowed: as many or more")
        try:
            from lepton_ai.serving.autoscaler import ScalingPolicy
            from lepton_ai.serving.autoscaling import autoscale
            from lepton_ai.serving.engine import Engine, ReplicaError
            from lepton_ai.serving.http import ServingEngine, run

            if engine == "ray":
                from lepton_ai.serving.ray_engine import RayEngine
        except ImportError as error:
            extra = "ray" if engine == "ray" else "serve"
            raise ImportError(f"serve needs {error.name}: pip install 'lepton-kernels[{extra}]'") from error
        import asyncio

        from lepton_ai.resources import ResourceManager, usable_cores
        from lepton_ai.serving.replica import ReplicaSpec

        size = file.stat().st_size
        placement = ResourceManager(most, most).place(size) if engine == "local" else None
        cores = placement.cores if placement is not None and threads is None else ()
        if placement is not None:
            threads = placement.threads if threads is None else threads
        elif threads is None:
            threads = 1 if address else max(1, len(usable_cores()) // (max_replicas or replicas))
        spec = ReplicaSpec(
            str(file.resolve()), model, str(tokenizer.resolve()) if tokenizer else None,
            warm_up.read_text() if warm_up else None, threads,
        )  # fmt: skip

        def make_engine() -> ServingEngine:
            if placement is not None:
                return Engine(spec, replicas, cores=cores, max_waiting=max_waiting, timeout=timeout)
            return RayEngine(
                spec, replicas, max_replicas, address=address, memory=size, max_waiting=max_waiting, timeout=timeout
            )

        async def serving() -> None:
            def announce(bound: int) -> None:
                typer.echo(f"{file} at http://{host}:{bound}: {replicas} replicas, {threads} threads each")

            made, beside = make_engine(), None
            if isinstance(made, Engine) and most > replicas:
                beside = partial(autoscale, made, ScalingPolicy(replicas, most, target_latency))
            await run(made, host, port, grace, announce, beside, max_body=max_body)

        try:
            asyncio.run(serving())
        except ReplicaError as error:
            raise ValueError(str(error)) from error


@app.command()
def chaos(
    file: Annotated[Path, typer.Argument(help="A model file that lepton compress wrote.", exists=True, dir_okay=False)],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A Hugging Face folder: requests are texts.", exists=True, file_okay=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="The architecture, as in serve.")] = None,
    warm_up: Annotated[
        Path | None, typer.Option(help="The request's body that is sent, where it is not of texts.", exists=True)
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long, 5 to 3600.")] = 60.0,
    clients: Annotated[int, typer.Option(help="Clients that each wait for their answer.")] = 8,
    replicas: Annotated[int, typer.Option(help="Processes that answer.")] = 2,
    kill: Annotated[int, typer.Option(help="Replicas that are killed.")] = 10,
    freeze: Annotated[int, typer.Option(help="Replicas that are stopped in their tracks.")] = 0,
    scale: Annotated[int, typer.Option(help="How often a replica is added and taken away.")] = 1,
    update: Annotated[int, typer.Option(help="How often all replicas are replaced.")] = 1,
    node: Annotated[int, typer.Option(help="Nodes that die, with --engine ray.")] = 0,
    engine: Annotated[str, typer.Option(help="local, or ray: a cluster on this machine, made for the run.")] = "local",
    seed: Annotated[int, typer.Option(help="Of the events and their times.")] = 0,
    as_json: Json = False,
) -> None:
    """Kill, freeze, scale and update a server of this machine under load; exit code 1 where a request was lost."""
    import asyncio

    with _errors():
        try:
            from lepton_ai.serving import chaos as chaotic

            if engine == "ray":
                import ray  # noqa: F401 - before a server is started that needs it
        except ImportError as error:
            extra = "ray" if engine == "ray" else "serve"
            raise ImportError(f"chaos needs {error.name}: pip install 'lepton-kernels[{extra}]'") from error
        from lepton_ai.calibration import SENTENCES

        plan = chaotic.ChaosPlan(
            seconds, clients, replicas, kill, freeze, scale, update, node, seed=seed, engine=engine
        )
        if (tokenizer is None) == (warm_up is None):
            raise ValueError("--tokenizer and --warm-up: allowed: one of them, to make requests of")
        options = [str(file)]
        for name, value in (("--tokenizer", tokenizer), ("--model", model), ("--warm-up", warm_up)):
            options += [] if value is None else [name, str(value)]
        bodies = [warm_up.read_bytes()] if warm_up else chaotic.texts_of(SENTENCES.read_text().splitlines())
        watch = None if as_json else lambda line: typer.echo(line, err=True)
        report = asyncio.run(chaotic.chaos(options, bodies, plan, watch))
    if as_json:
        _print_json(report.as_dict())
    else:
        typer.echo(str(report))
    if not report.fine:
        raise typer.Exit(1)


@app.command()
def deploy(
    file: File,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write NAME.yaml to.", file_okay=False)],
    image: Annotated[str, typer.Option(help="The image that holds Lepton: a tag other than latest, or a digest.")],
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="Write manifests for Kubernetes.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(help="A RayService for KubeRay instead of a Deployment; this version of Ray is in the image."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of all objects. Default: by FILE's name.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Default: that of whoever applies.")] = None,
    path: Annotated[
        str | None, typer.Option(help="Where FILE is in the image (/...), or in the claim (default: its name).")
    ] = None,
    claim: Annotated[str | None, typer.Option(help="The PersistentVolumeClaim that holds FILE.")] = None,
    url: Annotated[str | None, typer.Option(help="Where each pod fetches FILE: http or https.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Its folder as the container sees it; a claim is mounted at /models.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="The fewest pods.")] = 2,
    max_replicas: Annotated[int, typer.Option(help="The most; as many as --replicas: no autoscaler.")] = 10,
    cpu_target: Annotated[int, typer.Option(help="Percent of the cores that the autoscaler keeps busy.")] = 70,
    metric: Annotated[
        str | None,
        typer.Option(help="A Prometheus metric of each pod to scale by as well, such as lepton_requests_per_second."),
    ] = None,
    metric_target: Annotated[
        float | None,
        typer.Option(help="Its average a pod. Default: the requests a second that keep it busy for --cpu-target."),
    ] = None,
    port: Annotated[int, typer.Option(help="Of the container; the Service has 80.")] = 8000,
    grace: Annotated[int, typer.Option(help="Seconds that a leaving pod has to answer what it was asked.")] = 30,
    memory: Annotated[
        str | None,
        typer.Option(help="What a replica's process takes at most, such as 800Mi. With --cores nothing is measured."),
    ] = None,
    cores: Annotated[int | None, typer.Option(help="Of a replica. Default: all of this machine.")] = None,
    request_seconds: Annotated[float | None, typer.Option(help="Of one request; with --memory.")] = None,
    startup_seconds: Annotated[float | None, typer.Option(help="Until it is ready; with --memory (60).")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of the largest call, where it is measured.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens of each, likewise.")] = 128,
) -> None:
    """Write manifests that run a model file on Kubernetes, with the resources that a replica took here."""
    from lepton_ai.serving import kuberay, workload
    from lepton_ai.serving import kubernetes as k8s
    from lepton_ai.serving.profile import ReplicaProfile, profile

    with _errors():
        if not kubernetes:
            raise ValueError("deploy: nowhere to; allowed: --kubernetes")
        if metric_target is not None and metric is None:
            raise ValueError(f"metric_target is {metric_target:g} without --metric; allowed: both")
        if memory is not None and cores is None:
            raise ValueError(f"memory is {memory} without --cores; allowed: both, --cores alone, or neither")
        for option, seconds in (("request_seconds", request_seconds), ("startup_seconds", startup_seconds)):
            if seconds is not None and memory is None:
                raise ValueError(f"{option} is {seconds:g} without --memory; allowed: both, else it is measured")
        if metric is not None and memory is not None and metric_target is None and request_seconds is None:
            raise ValueError(f"metric is {metric} where nothing is measured; allowed: with --metric-target")
        source = workload.model_source(file, path=path, claim=claim, url=url)
        if memory is not None and cores is not None:
            taken = ReplicaProfile(
                workload.parse_memory(memory), cores, 1.0 if request_seconds is None else request_seconds,
                60.0 if startup_seconds is None else startup_seconds,
            )  # fmt: skip
        else:
            taken = profile(file, cores=cores, batch=batch, tokens=tokens)
        busy = cpu_target / 100 / taken.seconds_per_request if metric_target is None else metric_target
        asked = workload.Workload(
            workload.name_of(file) if name is None else name, image, source, workload.sha256_of(file), taken,
            namespace=namespace, tokenizer=tokenizer, replicas=replicas, max_replicas=max_replicas,
            cpu_target=cpu_target, metric=None if metric is None else workload.PodMetric(metric, busy), port=port,
            grace_seconds=grace,
        )  # fmt: skip
        objects = k8s.manifests(asked) if ray is None else kuberay.manifests(asked, ray)
        output.mkdir(parents=True, exist_ok=True)
        target = output / f"{asked.name}.yaml"
        target.write_text(k8s.to_yaml(objects))
    typer.echo(f"a replica takes {taken}")
    typer.echo(f"wrote {target}: {', '.join(manifest['kind'] for manifest in objects)}")


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
