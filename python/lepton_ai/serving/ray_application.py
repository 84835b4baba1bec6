"""The Ray Serve application of a RayService (kuberay.py): replicas behind Ray's own HTTP proxies, one on each node.

POST /infer is answered as by `lepton serve`, but a request whose replica dies is answered 500 and not asked again.
"""

from dataclasses import asdict
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from lepton_ai.serving.kuberay import DEPLOYMENT
from lepton_ai.serving.ray_engine import Replica
from lepton_ai.serving.replica import ReplicaSpec

MAX_BATCH = 32
PATIENCE = 120.0  # seconds that a batch may take before its replica counts as dead


class HttpReplica(Replica):
    """A replica that takes HTTP requests."""

    async def __call__(self, request: Request) -> Response:
        reply = await self.answer(await request.body())
        return Response(reply.body, reply.status, media_type="application/json")


def application(args: dict[str, Any]) -> serve.Application:
    """What Ray Serve builds from the file that KubeRay gives it. args: fields of ReplicaSpec; path is required."""
    return serve.deployment(name=DEPLOYMENT)(HttpReplica).bind(asdict(ReplicaSpec(**args)), MAX_BATCH, PATIENCE)
