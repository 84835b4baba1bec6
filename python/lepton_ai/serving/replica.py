"""A replica: a process of its own that loads a model file, warms up, and answers what it is sent until told to stop.

    python -m lepton_ai.serving.replica DESCRIPTOR SPECIFICATION

DESCRIPTOR: of the Unix socket to the server (frames.py). SPECIFICATION: ReplicaSpec as JSON. The first message says how
long the start took; then for each message with requests there is one with answers, in order, and the seconds that the
model was at work. Nothing else may be written to the socket. When the server is gone, so is the replica.
"""

import json
import os
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lepton_ai.serving.frames import packed, read_blocking

_READ_AT_ONCE = 16 << 20


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica serves, and how.

    path: a model file. architecture: what open_model takes, where the file does not hold it. tokenizer: a Hugging Face
    folder. warm_up: the body of the request that it answers before it counts as ready; None makes one for a model of
    tokens. threads, cores: that it may use; cores () leaves them to the system.
    """

    path: str
    architecture: str | None = None
    tokenizer: str | None = None
    warm_up: str | None = None
    threads: int = 1
    cores: tuple[int, ...] = ()
    max_tokens: int = 512
    max_samples: int = 256
    batch: int = 32

    def as_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Startup:
    """Seconds of a replica's start: the interpreter and its imports, reading the file, decoding it, building the model,
    the first request; and the bytes of memory that it took at most."""

    imports: float
    fetch: float
    decode: float
    build: float
    warm_up: float
    peak_memory: int

    @classmethod
    def of_json(cls, text: bytes) -> "Startup":
        """What a replica's first message says."""
        return cls(**json.loads(text))

    @property
    def total(self) -> float:
        """Seconds until it was ready."""
        return self.imports + self.fetch + self.decode + self.build + self.warm_up


def _fetch(path: str) -> None:
    """Reads the file once, so that what follows finds it in memory: a slow disk or network is told from decoding."""
    with Path(path).open("rb", buffering=0) as file:
        while file.read(_READ_AT_ONCE):
            pass


def _warm_up_request(spec: ReplicaSpec, model: Any) -> bytes:
    if spec.warm_up is not None:
        return spec.warm_up.encode()
    if spec.tokenizer is not None:
        return json.dumps({"texts": ["A sentence to warm up with."]}).encode()
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is None:
        raise ValueError(
            "warm_up is None and the model is none of tokens; allowed: the body of a request, to warm up with"
        )
    ids = [[i % vocabulary for i in range(16)]]
    return json.dumps({"inputs": {"input_ids": ids, "attention_mask": [[1] * 16]}}).encode()


def start(spec: ReplicaSpec, began: float) -> tuple[Any, Startup]:
    """The service, warm, and what it took; began: time.time() when the process was asked for."""
    import torch

    from lepton_ai.model import CompressedModel
    from lepton_ai.resources import peak_memory
    from lepton_ai.serving.service import OK, Service
    from lepton_ai.sources import open_model

    torch.set_num_threads(spec.threads)
    tokenizer = None
    if spec.tokenizer is not None:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(spec.tokenizer, local_files_only=True)
    imported = time.time()
    _fetch(spec.path)
    fetched = time.time()
    architecture = None if spec.architecture is None else open_model(spec.architecture)
    own = time.time() - fetched
    loaded = CompressedModel.load(spec.path, architecture)
    seconds = loaded.report().load_seconds
    service = Service(
        loaded.model, tokenizer, max_tokens=spec.max_tokens, max_samples=spec.max_samples, batch=spec.batch
    )
    before = time.time()
    ((status, answer),) = service.answers([_warm_up_request(spec, loaded.model)])
    if status != OK:
        raise ValueError(f"the warm-up request was answered {status}: {answer.decode()}")
    took = time.time() - before
    startup = Startup(
        imported - began, fetched - imported, seconds["decode"], own + seconds["build"], took, peak_memory()
    )
    return service, startup


def main() -> None:
    """The process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to the server, which lets replicas finish
    link = socket.socket(fileno=int(sys.argv[1]))
    values = json.loads(sys.argv[2])
    began = values.pop("began")
    spec = ReplicaSpec(**{**values, "cores": tuple(values["cores"])})
    if spec.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec.cores)
    try:
        service, startup = start(spec, began)
    except Exception as error:
        link.sendall(packed([(1, f"{type(error).__name__}: {error}".encode())]))
        raise SystemExit(1) from error
    link.sendall(packed([(0, json.dumps(asdict(startup)).encode())]))
    with link.makefile("rb") as requests:
        while (parts := read_blocking(requests)) is not None:
            before = time.perf_counter()
            answers = service.answers([body for _, body in parts])
            seconds = time.perf_counter() - before
            link.sendall(packed([*answers, (0, repr(seconds).encode())]))


if __name__ == "__main__":
    main()
