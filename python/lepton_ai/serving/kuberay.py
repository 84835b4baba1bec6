"""Manifests for KubeRay: a RayService, on which Ray Serve runs replicas and decides how many there are.

A worker pod holds one replica. The image has Ray in it (examples/docker/Dockerfile with EXTRA=ray).
"""

import math
import re
from typing import Any

import yaml

from lepton_ai.serving.kubernetes import (
    SLACK_SECONDS,
    Manifest,
    container_security,
    init_containers,
    labels,
    metadata,
    pod_disruption_budget,
    pod_metadata,
    pod_security,
    probe,
    resources,
    spread,
    volumes,
)
from lepton_ai.serving.workload import Workload

APPLICATION = "lepton_ai.serving.ray_application:application"
DEPLOYMENT = "Lepton"  # Ray Serve's, in that application
RAY_BYTES = 1 << 30  # of Ray's own processes in a worker pod, beside the replica's
OBJECT_STORE_BYTES = 128 << 20  # requests and answers are small; the default is 30 % of the memory
HEAD_CORES, HEAD_MEMORY = 1, "4Gi"
ONGOING_REQUESTS = 2  # of a replica: one is computed, one waits
_OLDEST = (2, 60)  # of the extra `ray`; from 2.53 on KubeRay's probes need no wget in the image
_MOST_NAME = 47  # KubeRay makes longer names of it


def _check(workload: Workload, ray: str) -> None:
    version = re.fullmatch(r"(\d+)\.(\d+)\.\d+", ray)
    if version is None or (int(version[1]), int(version[2])) < _OLDEST:
        raise ValueError(f"ray is {ray!r}; allowed: a version, 2.60.0 or later")
    if len(workload.name) > _MOST_NAME:
        raise ValueError(f"name is {workload.name!r}; allowed with ray: up to {_MOST_NAME} characters")
    if workload.metric is not None:
        raise ValueError(f"metric is {workload.metric.name!r} with ray; allowed: none, Ray Serve counts requests")


def _labels(workload: Workload, component: str) -> dict[str, str]:
    return {**labels(workload), "app.kubernetes.io/component": component}


def serve_config(workload: Workload) -> Manifest:
    """What Ray Serve is told: the application, its arguments, and how many replicas of it there may be."""
    startup = math.ceil(workload.profile.startup_seconds)
    replica: dict[str, Any] = {
        "name": DEPLOYMENT,
        "max_ongoing_requests": 64,  # two batches
        "max_queued_requests": 1024,  # at each proxy; more are answered 503
        "graceful_shutdown_timeout_s": workload.grace_seconds,
        "ray_actor_options": {"num_cpus": workload.profile.cores},
    }
    if workload.replicas == workload.max_replicas:
        replica["num_replicas"] = workload.replicas
    else:
        replica["autoscaling_config"] = {
            "min_replicas": workload.replicas,
            "max_replicas": workload.max_replicas,
            "target_ongoing_requests": ONGOING_REQUESTS,
            "upscale_delay_s": max(5, startup),
            "downscale_delay_s": 300,
        }
    application = {
        "name": workload.name,
        "route_prefix": "/infer",
        "import_path": APPLICATION,
        "args": {
            "path": workload.source.path,
            "tokenizer": workload.tokenizer,
            "threads": workload.profile.cores,
        },
        "deployments": [replica],
    }
    # A request that took longer than the grace would be lost when its replica leaves.
    http = {"host": "0.0.0.0", "port": workload.port, "request_timeout_s": workload.grace_seconds}
    return {"http_options": http, "applications": [application]}


def _confined(mounts: list[Manifest]) -> Manifest:
    """What every container of Ray has: it writes to /tmp alone."""
    return {
        "env": [{"name": "HOME", "value": "/tmp"}],
        "securityContext": container_security(),
        "volumeMounts": mounts,
    }


def _template(workload: Workload, component: str, container: Manifest, pod: Manifest) -> Manifest:
    """A pod of Ray: what all of them have, and what `pod` adds."""
    held = {
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "containers": [container],
    }
    return {
        "metadata": {**pod_metadata(workload), "labels": _labels(workload, component)},
        "spec": {**held, **pod},
    }


def _head(workload: Workload) -> Manifest:
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": workload.port}
    container = {
        "name": "ray-head",
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "image": workload.image,
        "resources": resources(HEAD_CORES, HEAD_MEMORY),
        **_confined([{"name": "tmp", "mountPath": "/tmp"}]),
    }
    pod = {"volumes": [{"name": "tmp", "emptyDir": {}}]}
    # No replica beside Ray's own bookkeeping.
    return {"rayStartParams": {"num-cpus": "0"}, "template": _template(workload, "head", container, pod)}


def _workers(workload: Workload) -> Manifest:
    held, mounts = volumes(workload)
    container = {
        "name": "ray-worker",
        "ports": [{"name": "serve", "containerPort": workload.port}],
        "readinessProbe": probe("/-/healthz", "serve", 5, 2, 2),
        "image": workload.image,
        "resources": resources(workload.profile.cores, workload.memory(RAY_BYTES)),
        **_confined(mounts),
    }
    pod: Manifest = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": workload.grace_seconds + SLACK_SECONDS,
        "topologySpreadConstraints": spread(_labels(workload, "replica")),
        "volumes": held,
    }
    if first := init_containers(workload):
        pod["initContainers"] = first
    return {
        "groupName": "replicas",
        "replicas": workload.replicas,
        "minReplicas": workload.replicas,
        "maxReplicas": workload.max_replicas,
        "rayStartParams": {
            "num-cpus": str(workload.profile.cores),
            "object-store-memory": str(OBJECT_STORE_BYTES),
        },
        "template": _template(workload, "replica", container, pod),
    }


def ray_service(workload: Workload, ray: str) -> Manifest:
    """The cluster and the application on it. ray: the version of Ray that the image holds, 2.60.0 or later.

    A change of the cluster makes a new one beside the old one, which goes when the new one answers; a change of
    the application alone is done in place. Raises ValueError for other versions, a name that is too long for KubeRay,
    and a workload with a metric.
    """
    _check(workload, ray)
    cluster: Manifest = {
        "rayVersion": ray,
        # Without it whoever reaches the head's ports runs programs there. KubeRay makes the token.
        "authOptions": {"mode": "token"},
        "headGroupSpec": _head(workload),
        "workerGroupSpecs": [_workers(workload)],
    }
    if workload.replicas < workload.max_replicas:
        cluster["enableInTreeAutoscaling"] = True
        confined = _confined([{"name": "tmp", "mountPath": "/tmp"}])
        cluster["autoscalerOptions"] = {"idleTimeoutSeconds": 60, **confined}
    address = {
        "metadata": metadata(workload),
        "spec": {"ports": [{"name": "serve", "port": 80, "targetPort": workload.port}]},
    }
    spec = {
        "upgradeStrategy": {"type": "NewCluster"},
        "serveService": address,
        "serveConfigV2": yaml.safe_dump(serve_config(workload), sort_keys=False),
        "rayClusterConfig": cluster,
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": metadata(workload), "spec": spec}


def manifests(workload: Workload, ray: str) -> list[Manifest]:
    """All objects of a workload on Ray. A single replica has no budget: nothing could be drained."""
    objects = [ray_service(workload, ray)]
    if workload.replicas > 1:
        budget = pod_disruption_budget(workload)
        # Of pods whose owner has no scale subresource, Kubernetes counts those that are there, not those that are not.
        del budget["spec"]["maxUnavailable"]
        budget["spec"]["minAvailable"] = workload.replicas - 1
        budget["spec"]["selector"]["matchLabels"] = _labels(workload, "replica")
        objects.append(budget)
    return objects
