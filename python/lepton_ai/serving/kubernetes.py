"""Manifests for Kubernetes 1.30 or later: a Deployment of `lepton serve`, its Service, HorizontalPodAutoscaler and
PodDisruptionBudget. A pod holds one replica on cores of its own, and Kubernetes decides how many there are.

All functions are pure: the same Workload gives the same dicts, and to_yaml the same text.
"""

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from lepton_ai.serving.profile import ReplicaProfile

Manifest = dict[str, Any]

MODELS = "/models"  # where a claim, or what was fetched, is mounted
USER = 10001  # of the images in examples/docker
SERVER_BYTES = 256 << 20  # of the process that speaks HTTP, beside the replica's
HEADROOM = 1.25  # of memory: requests that are longer than those of the profile, and the allocator's holes
STARTUP_MARGIN = 10  # a node may be so many times slower than the machine of the profile: a cold disk, busy cores
DRAIN_SECONDS = 5  # from the moment that a pod is leaving until all nodes send their requests elsewhere
SLACK_SECONDS = 5  # between the end of the server's own grace and the kill

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
_REFERENCE = re.compile(
    r"(?:[a-zA-Z0-9.-]+(?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::(?P<tag>\w[\w.-]{0,127}))?(?P<digest>@sha256:[0-9a-f]{64})?"
)
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def parse_memory(text: str) -> int:
    """Bytes of a quantity as Kubernetes writes it: 1500000000, 1500M, 1.5Gi. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|k|M|G|)", text)
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


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as pieces:
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


def labels(workload: Workload) -> dict[str, str]:
    """By which the pods are found."""
    return {"app.kubernetes.io/name": "lepton", "app.kubernetes.io/instance": workload.name}


def metadata(workload: Workload) -> Manifest:
    """Of every object."""
    out: Manifest = {"name": workload.name, "labels": labels(workload)}
    if workload.namespace is not None:
        out["namespace"] = workload.namespace
    return out


def container_security() -> Manifest:
    """What no container may do."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def pod_security() -> Manifest:
    """Of a pod whose processes are USER, and never root."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def resources(cores: int, memory: str) -> Manifest:
    """Requests that are the limits, and whole cores: the pod is Guaranteed, and may have cores of its own."""
    return {kind: {"cpu": str(cores), "memory": memory} for kind in ("requests", "limits")}


def volumes(workload: Workload) -> tuple[list[Manifest], list[Manifest]]:
    """The volumes of a pod, and where its main container mounts them: all that it can write to is /tmp."""
    held: list[Manifest] = [{"name": "tmp", "emptyDir": {}}]
    mounts: list[Manifest] = [{"name": "tmp", "mountPath": "/tmp"}]
    if isinstance(workload.source, OnClaim):
        claim = {"claimName": workload.source.claim, "readOnly": True}
        held.append({"name": "models", "persistentVolumeClaim": claim})
    elif isinstance(workload.source, FromUrl):
        size = math.ceil(workload.source.file_bytes / 2**20) + 1
        held.append({"name": "models", "emptyDir": {"sizeLimit": f"{size}Mi"}})
    if len(held) > 1:
        mounts.append({"name": "models", "mountPath": MODELS, "readOnly": True})
    return held, mounts


def init_containers(workload: Workload) -> list[Manifest]:
    """What has to end before a pod's main container starts."""
    source = workload.source
    if not isinstance(source, FromUrl):
        return []
    return [
        {
            "name": "fetch",
            "image": workload.image,
            "command": ["python", "-m", "lepton_ai.serving.fetch", source.url, source.path, workload.sha256],
            "resources": resources(workload.profile.cores, workload.memory()),  # as the main one's, which waits for it
            "securityContext": container_security(),
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [{"name": "models", "mountPath": MODELS}],
        }
    ]


def spread(selector: dict[str, str]) -> list[Manifest]:
    """Over nodes, where there are some: one that is lost takes few pods along."""
    return [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": selector},
        }
    ]


def probe(path: str, port: str, period: int, timeout: int, failures: int) -> Manifest:
    """An HTTP request every `period` seconds; port: its name. So many failures in a row count."""
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }


def _container(workload: Workload) -> Manifest:
    profile = workload.profile
    arguments = ["serve", workload.source.path]
    if workload.tokenizer is not None:
        arguments += ["--tokenizer", workload.tokenizer]
    arguments += ["--host", "0.0.0.0", "--port", str(workload.port), "--replicas", "1", "--max-replicas", "1"]
    arguments += ["--threads", str(profile.cores), "--grace", str(workload.grace_seconds)]
    start_period = 2
    start_failures = max(30, math.ceil(STARTUP_MARGIN * profile.startup_seconds / start_period))
    return {
        "name": "server",
        "image": workload.image,
        "command": ["lepton"],
        "args": arguments,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "ports": [{"name": "http", "containerPort": workload.port}],
        "startupProbe": probe("/ready", "http", start_period, 2, start_failures),
        "readinessProbe": probe("/ready", "http", 2, 2, 2),
        # Slow to judge: a restart loses what the pod is answering, and a busy pod is a late one.
        "livenessProbe": probe("/health", "http", 10, 5, 6),
        # The pod still answers while nodes learn that it is leaving; SIGTERM comes after that.
        "lifecycle": {"preStop": {"sleep": {"seconds": DRAIN_SECONDS}}},
        "resources": resources(profile.cores, workload.memory()),
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": volumes(workload)[1],
    }


def pod_metadata(workload: Workload) -> Manifest:
    """Of the pods: another model file makes other ones, so that applying the manifests rolls them."""
    return {"labels": labels(workload), "annotations": {"checksum/model": workload.sha256}}


def deployment(workload: Workload) -> Manifest:
    """The pods. A rolling update starts a new one first, and lets an old one go when the new one has answered."""
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "terminationGracePeriodSeconds": DRAIN_SECONDS + workload.grace_seconds + SLACK_SECONDS,
        "topologySpreadConstraints": spread(labels(workload)),
        "containers": [_container(workload)],
        "volumes": volumes(workload)[0],
    }
    if first := init_containers(workload):
        pod["initContainers"] = first
    template_metadata = pod_metadata(workload)
    template_metadata["annotations"].update(
        {"prometheus.io/scrape": "true", "prometheus.io/port": str(workload.port), "prometheus.io/path": "/metrics"}
    )
    spec: Manifest = {
        "selector": {"matchLabels": labels(workload)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        # Time to fetch an image is not among what the start-up probe allows.
        "progressDeadlineSeconds": 600 + math.ceil(STARTUP_MARGIN * workload.profile.startup_seconds),
        "template": {"metadata": template_metadata, "spec": pod},
    }
    if workload.replicas == workload.max_replicas:  # else the number is the autoscaler's, and applying may not reset it
        spec["replicas"] = workload.replicas
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata(workload), "spec": spec}


def service(workload: Workload) -> Manifest:
    """One address for the pods that are ready, port 80 inside the cluster."""
    spec = {
        "type": "ClusterIP",
        "selector": labels(workload),
        "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata(workload), "spec": spec}


def horizontal_pod_autoscaler(workload: Workload) -> Manifest:
    """Pods by load: at once when it rises, as fast as new ones become ready, and slowly when it falls."""
    utilization = {"type": "Utilization", "averageUtilization": workload.cpu_target}
    metrics: list[Manifest] = [{"type": "Resource", "resource": {"name": "cpu", "target": utilization}}]
    if workload.metric is not None:
        value = {"type": "AverageValue", "averageValue": f"{math.floor(1e3 * workload.metric.target)}m"}
        metrics.append({"type": "Pods", "pods": {"metric": {"name": workload.metric.name}, "target": value}})
    period = min(1800, max(15, math.ceil(2 * workload.profile.startup_seconds)))
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": workload.name},
        "minReplicas": workload.replicas,
        "maxReplicas": workload.max_replicas,
        "metrics": metrics,
        "behavior": {
            "scaleUp": {
                "stabilizationWindowSeconds": 0,
                "selectPolicy": "Max",
                # No second doubling before the pods of the first one count.
                "policies": [
                    {"type": "Percent", "value": 100, "periodSeconds": period},
                    {"type": "Pods", "value": 2, "periodSeconds": period},
                ],
            },
            "scaleDown": {
                "stabilizationWindowSeconds": 300,
                "selectPolicy": "Max",
                "policies": [
                    {"type": "Percent", "value": 10, "periodSeconds": 60},
                    {"type": "Pods", "value": 1, "periodSeconds": 60},
                ],
            },
        },
    }
    kind = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler"}
    return {**kind, "metadata": metadata(workload), "spec": spec}


def pod_disruption_budget(workload: Workload) -> Manifest:
    """A drained node takes one pod at a time; one that is not ready may always go."""
    spec = {
        "maxUnavailable": 1,
        "selector": {"matchLabels": labels(workload)},
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata(workload), "spec": spec}


def manifests(workload: Workload) -> list[Manifest]:
    """All objects of a workload; no autoscaler where max_replicas is replicas."""
    objects = [deployment(workload), service(workload), pod_disruption_budget(workload)]
    if workload.replicas < workload.max_replicas:
        objects.append(horizontal_pod_autoscaler(workload))
    return objects


class _Dumper(yaml.SafeDumper):
    """Several lines as a block."""


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _string)


def to_yaml(objects: Iterable[Manifest]) -> str:
    """One YAML stream, a document for each object, keys in the order that the functions above give them."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=120)
