"""Workload: what is to run on a cluster, where its pods find the model file, and how many there may be."""

import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lepton_ai.serving.profile import ReplicaProfile

MODELS = "/models"  # where a claim, or what was fetched, is mounted
SERVER_BYTES = 256 << 20  # of the process that speaks HTTP, beside the replica's
HEADROOM = 1.25  # of memory: requests that are longer than those of the profile, and the allocator's holes

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
_REFERENCE = re.compile(
    r"(?:[a-zA-Z0-9.-]+(?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*"  # registry, name
    r"(?::(?P<tag>[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}))?(?P<digest>@sha256:[0-9a-f]{64})?"
)
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def parse_memory(text: str) -> int:
    """Bytes of a quantity as Kubernetes writes it: 1500000000, 1500M, 1.5Gi. Raises ValueError for anything else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(Ki|Mi|Gi|k|M|G|)", text)
    if found is None or not float(found[1]):
        raise ValueError(f"memory is {text!r}; allowed: a number above 0 of bytes, or with k, M, G, Ki, Mi or Gi")
    return math.ceil(float(found[1]) * _UNITS[found[2]])


def _check_label(what: str, name: str) -> None:
    if not _LABEL.fullmatch(name):
        raise ValueError(f"{what} is {name!r}; allowed: a label of RFC 1123, 1 to 63 of a-z, 0-9 and inner -")


def _check_absolute(what: str, path: str) -> None:
    if not path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{what} is {path!r}; allowed: an absolute path without ..")


@dataclass(frozen=True)
class InImage:
    """The model file is part of the image, at an absolute path."""

    path: str

    def __post_init__(self) -> None:
        _check_absolute("path", self.path)


@dataclass(frozen=True)
class OnClaim:
    """The model file lies at `path` in a PersistentVolumeClaim of the pods' namespace, mounted at MODELS, read-only.

    With pods on several nodes the claim has to allow ReadOnlyMany or ReadWriteMany.
    """

    claim: str
    file: str

    def __post_init__(self) -> None:
        if len(self.claim) > 253 or not all(_LABEL.fullmatch(part) for part in self.claim.split(".")):
            raise ValueError(f"claim is {self.claim!r}; allowed: a subdomain of RFC 1123: labels with dots between")
        if not self.file or self.file.startswith("/") or ".." in self.file.split("/"):
            raise ValueError(f"path is {self.file!r}; allowed with a claim: a path in it, without .. and / in front")

    @property
    def path(self) -> str:
        """In the container."""
        return f"{MODELS}/{self.file}"


@dataclass(frozen=True)
class FromUrl:
    """The model file is fetched by each pod when it starts, and checked by its SHA-256; file_bytes: its size."""

    url: str
    file_bytes: int

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {self.url!r}; allowed: http://... or https://...")
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                f"url of {parts.hostname} holds a user or a password; allowed: none, all may read manifests"
            )

    @property
    def path(self) -> str:
        """In the container."""
        return f"{MODELS}/model.safetensors"


ModelSource = InImage | OnClaim | FromUrl


def model_source(file: Path, *, path: str | None, claim: str | None, url: str | None) -> ModelSource:
    """Where pods find `file`: at `path` in the image, at `path` (None: its name) on a claim, or at a URL.

    Raises ValueError where none of them is given, or two that do not go together.
    """
    given = [name for name, value in (("path", path), ("claim", claim), ("url", url)) if value is not None]
    if url is not None and given == ["url"]:
        return FromUrl(url, file.stat().st_size)
    if claim is not None and url is None:
        return OnClaim(claim, file.name if path is None else path)
    if path is not None and url is None:
        return InImage(path)
    raise ValueError(
        f"where the model file is: {' and '.join(given) or 'nothing'} given; allowed: path (in the image), claim "
        "(path: in it), or url"
    )


def sha256_of(file: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(file, "rb") as pieces:
        while piece := pieces.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def name_of(file: Path) -> str:
    """A name for the objects, from that of the file: small_model.safetensors gives small-model."""
    return re.sub("[^a-z0-9]+", "-", file.stem.lower()).strip("-")


@dataclass(frozen=True)
class PodMetric:
    """A metric that Kubernetes knows of each pod, by an adapter (prometheus-adapter), and its average to be kept."""

    name: str
    target: float

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", self.name):
            raise ValueError(f"metric is {self.name!r}; allowed: a name of Prometheus, letters, digits, _ and :")
        if not 1e-3 <= self.target < math.inf:
            raise ValueError(f"metric_target is {self.target}; allowed: a finite number, 0.001 or more")


@dataclass(frozen=True)
class Workload:
    """What is to run, and how many of it.

    name: of all objects. image: with a tag other than latest, or a digest. source: where pods find the model file.
    sha256: of that file, in hex; another one makes other pods. profile: what a replica takes. namespace: None for that
    of whoever applies. tokenizer: a folder as the container sees it. replicas to max_replicas: pods; equal numbers
    leave the autoscaler out. cpu_target: percent of the requested cores that the autoscaler keeps busy. metric: a
    second measure for it; the one that asks for more pods wins. port: of the container; the Service has 80.
    grace_seconds: for requests that a leaving pod still has. Raises ValueError for what is not allowed.
    """

    name: str
    image: str
    source: ModelSource
    sha256: str
    profile: ReplicaProfile
    namespace: str | None = None
    tokenizer: str | None = None
    replicas: int = 2
    max_replicas: int = 10
    cpu_target: int = 70
    metric: PodMetric | None = None
    port: int = 8000
    grace_seconds: int = 30

    def __post_init__(self) -> None:
        _check_label("name", self.name)
        if not self.name[0].isalpha():
            raise ValueError(f"name is {self.name!r}; allowed: a letter in front, or no Service can have it")
        if self.namespace is not None:
            _check_label("namespace", self.namespace)
        image = _REFERENCE.fullmatch(self.image)
        if image is None or not (image["digest"] or image["tag"]) or (image["tag"] == "latest" and not image["digest"]):
            raise ValueError(f"image is {self.image!r}; allowed: a name with a tag other than latest, or with a digest")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 is {self.sha256!r}; allowed: 64 hexadecimal digits")
        if self.tokenizer is not None:
            _check_absolute("tokenizer", self.tokenizer)
        for what, value, least, most in (
            ("replicas", self.replicas, 1, self.max_replicas),
            ("cpu_target", self.cpu_target, 1, 100),
            ("port", self.port, 1024, 65535),  # below, a user other than root can not listen
            ("grace_seconds", self.grace_seconds, 1, 3600),
        ):
            if not least <= value <= most:
                raise ValueError(f"{what} is {value}; allowed: {least} to {most}")

    def memory(self, beside: int = SERVER_BYTES) -> str:
        """Of a pod: the replica and what runs beside it, in bytes, with headroom."""
        return f"{math.ceil(HEADROOM * (self.profile.memory_bytes + beside) / 2**20)}Mi"
