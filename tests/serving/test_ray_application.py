"""The application of a RayService, without a cluster."""

import asyncio
import importlib

import pytest
from lepton_ai.serving import kuberay
from lepton_ai.serving.profile import ReplicaProfile
from lepton_ai.serving.ray_application import HttpReplica
from lepton_ai.serving.ray_engine import Reply
from lepton_ai.serving.replica import Startup
from lepton_ai.serving.workload import InImage, Workload
from ray.serve.schema import ServeDeploySchema
from starlette.requests import Request


@pytest.mark.parametrize("most", [1, 4])
def test_ray_takes_the_configuration_and_finds_the_application(most):
    profile = ReplicaProfile(500 << 20, 1, 0.01, 6.0)
    workload = Workload("small", "lepton:1", InImage("/a/small"), "a" * 64, profile, replicas=1, max_replicas=most)
    (told,) = ServeDeploySchema.model_validate(kuberay.serve_config(workload)).applications
    module, name = told.import_path.split(":")
    application = getattr(importlib.import_module(module), name)(told.args)
    deployment = application._bound_deployment
    assert [deployment.name] == [given.name for given in told.deployments]
    spec, most_together, _ = deployment.init_args
    assert (spec["path"], spec["threads"], spec["tokenizer"]) == ("/a/small", 1, None)
    assert told.deployments[0].max_ongoing_requests == 2 * most_together


def test_a_replica_answers_http():
    class Echo(HttpReplica):
        def __init__(self) -> None:
            pass  # no model: Ray batches only inside of a cluster

        async def answer(self, body: bytes) -> Reply:
            return Reply(418, body, 0.0, 0.5, 1, "echo", Startup(0, 0, 0, 0, 0, 1))

    async def receive() -> dict:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    response = asyncio.run(Echo()(Request({"type": "http", "method": "POST", "headers": []}, receive)))
    assert (response.status_code, response.body, response.media_type) == (418, b"{}", "application/json")
