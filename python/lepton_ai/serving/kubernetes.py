"""Manifests for Kubernetes 1.30 or later: a Deployment of `lepton serve`, its Service, HorizontalPodAutoscaler and
PodDisruptionBudget. A pod holds one replica on cores of its own, and Kubernetes decides how many there are.

All functions are pure: the same Workload gives the same dicts, and to_yaml the same text.
"""

import math
from collections.abc import Iterable
from typing import Any

import yaml

from lepton_ai.serving.workload import MODELS, FromUrl, OnClaim, Workload

Manifest = dict[str, Any]

USER = 10001  # of the images in examples/docker
STARTUP_MARGIN = 10  # a node may be so many times slower than the machine of the profile: a cold disk, busy cores
DRAIN_SECONDS = 5  # from the moment that a pod is leaving until all nodes send their requests elsewhere
SLACK_SECONDS = 15  # between the end of the server's own grace and the kill: processes take up to ten to end


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
    arguments += ["--host", "0.0.0.0", "--port", str(workload.port), "--replicas", "1"]
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
