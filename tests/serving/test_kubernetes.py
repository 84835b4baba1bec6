"""Manifests: valid against the official schemas, the same for the same workload, and what each argument changes."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from lepton_ai.cli import app
from lepton_ai.serving import kuberay, kubernetes
from lepton_ai.serving.kubernetes import to_yaml
from lepton_ai.serving.profile import ReplicaProfile
from lepton_ai.serving.workload import FromUrl, InImage, OnClaim, PodMetric, Workload, parse_memory
from typer.testing import CliRunner

VERSIONS = sorted({v for v in kubernetes_validate.utils.all_versions() if int(v.split(".")[1]) >= 30})
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "rayservice-v1.json").read_text())
RAY = "2.60.0"
PROFILE = ReplicaProfile(800 << 20, 4, 0.02, 6.0)
WORKLOAD = Workload("minilm", "registry.example/lepton:0.1.0", InImage("/opt/minilm.safetensors"), "a" * 64, PROFILE)
FETCHED = FromUrl("https://models.example/minilm.safetensors", 21_100_000)
WORKLOADS = {
    "plain": WORKLOAD,
    "claim": dataclasses.replace(WORKLOAD, source=OnClaim("models", "encoders/minilm.safetensors"), namespace="prod"),
    "url": dataclasses.replace(WORKLOAD, source=FETCHED, tokenizer="/opt/tokenizer"),
    "fixed": dataclasses.replace(WORKLOAD, replicas=3, max_replicas=3),
    "one": dataclasses.replace(WORKLOAD, replicas=1, max_replicas=1),
}
METRIC = dataclasses.replace(WORKLOAD, metric=PodMetric("lepton_requests_per_second", 35.0))


def both(workload: Workload) -> list[dict]:
    return kubernetes.manifests(workload) + kuberay.manifests(workload, RAY)


def of_kind(objects: list[dict], kind: str) -> dict:
    (found,) = [manifest for manifest in objects if manifest["kind"] == kind]
    return found


def closed(schema: object) -> object:
    """A custom resource's schema that allows no other properties, as `kubectl --validate=strict` has it."""
    if isinstance(schema, list):
        return [closed(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        out.setdefault("additionalProperties", False)
    return out


def check(manifest: dict, version: str = VERSIONS[-1]) -> None:
    """Strictly: fields that are not in the schema are errors, and so is a kind without one."""
    if manifest["kind"] != "RayService":
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    jsonschema.Draft202012Validator(closed(SCHEMA)).validate(manifest)
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Service", **manifest["spec"]["serveService"]}, version, strict=True
    )
    cluster = manifest["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        template = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        kubernetes_validate.validate(template, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_is_valid_in_every_version(version):
    objects = [manifest for workload in WORKLOADS.values() for manifest in both(workload)]
    objects += kubernetes.manifests(METRIC)
    kinds = {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "RayService"}
    assert {manifest["kind"] for manifest in objects} == kinds
    for manifest in yaml.safe_load_all(to_yaml(objects)):
        check(manifest, version)


def places(value: object, place: tuple = ()) -> dict[tuple, str]:
    """The leaves of a manifest, as text, by where they are."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {at: leaf for key, child in items for at, leaf in places(child, (*place, key)).items()}
    return {place: repr(value)}


def containers(manifest: dict) -> list[dict]:
    """Every container of a manifest."""
    if isinstance(manifest, list):
        return [found for child in manifest for found in containers(child)]
    if not isinstance(manifest, dict):
        return []
    own = [c for key in ("containers", "initContainers") if isinstance(manifest.get(key), list) for c in manifest[key]]
    return own + [found for child in manifest.values() for found in containers(child)]


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_check_sees_what_is_wrong(name):
    for manifest in both(WORKLOADS[name]):
        check(manifest)
        with pytest.raises(jsonschema.ValidationError):
            check({**manifest, "spec": {**manifest["spec"], "replica": 1}})
        for container in containers(manifest)[:1]:
            container["imagePullpolicy"] = "Always"
            with pytest.raises(jsonschema.ValidationError):
                check(manifest)


@pytest.mark.parametrize("name", WORKLOADS)
def test_parts_fit_together(name):
    workload = WORKLOADS[name]
    plain = kubernetes.manifests(workload)
    pod = of_kind(plain, "Deployment")["spec"]["template"]
    for selector in (
        of_kind(plain, "Deployment")["spec"]["selector"]["matchLabels"],
        of_kind(plain, "Service")["spec"]["selector"],
        of_kind(plain, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        pod["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ):
        assert selector.items() <= pod["metadata"]["labels"].items()
    cluster = kuberay.ray_service(workload, RAY)["spec"]["rayClusterConfig"]
    templates = [pod, cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]]
    for template in templates:
        spec = template["spec"]
        held = {volume["name"] for volume in spec["volumes"]}
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        for container in spec["containers"] + spec.get("initContainers", []):
            assert {mount["name"] for mount in container["volumeMounts"]} <= held
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["image"] == workload.image
            assert container["resources"]["requests"] == container["resources"]["limits"]
            ports = {port["name"] for port in container.get("ports", [])}
            probes = [container[key] for key in container if key.endswith("Probe")]
            assert {probe["httpGet"]["port"] for probe in probes} <= ports
    assert (
        of_kind(plain, "Service")["spec"]["ports"][0]["targetPort"] == pod["spec"]["containers"][0]["ports"][0]["name"]
    )


def test_the_probes_ask_what_the_server_answers():
    (container,) = containers(of_kind(kubernetes.manifests(WORKLOAD), "Deployment"))
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}


@pytest.mark.parametrize("name", ["plain", "url"])
def test_the_container_runs_a_command_that_there_is(name, tmp_path):
    command = typer.main.get_command(app).commands["serve"]
    (server,) = of_kind(kubernetes.manifests(WORKLOADS[name]), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert server["command"] + server["args"][:1] == ["lepton", "serve"]
    file, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    file.touch()
    tokenizer.mkdir()
    here = {WORKLOADS[name].source.path: str(file), "/opt/tokenizer": str(tokenizer)}
    given = command.make_context("serve", [here.get(word, word) for word in server["args"][1:]]).params
    assert (given["port"], given["replicas"], given["threads"]) == (8000, 1, 4)
    assert (given["host"], given["grace"]) == ("0.0.0.0", 30)


def test_a_rolling_update_loses_no_request():
    for grace in (1, 30, 3600):
        spec = of_kind(kubernetes.manifests(dataclasses.replace(WORKLOAD, grace_seconds=grace)), "Deployment")["spec"]
        assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        arguments = container["args"]
        assert arguments[arguments.index("--grace") + 1] == str(grace)
        assert pod["terminationGracePeriodSeconds"] > before + grace
        readiness = container["readinessProbe"]
        assert before > readiness["periodSeconds"] * readiness["failureThreshold"]


def test_resources_follow_the_profile():
    for memory, cores, beside in ((800 << 20, 4, 256), (3 << 30, 1, 256)):
        workload = dataclasses.replace(WORKLOAD, profile=ReplicaProfile(memory, cores, 0.02, 6.0))
        (server,) = containers(of_kind(kubernetes.manifests(workload), "Deployment"))
        want = {"cpu": str(cores), "memory": f"{math.ceil(1.25 * (memory / 2**20 + beside))}Mi"}
        assert server["resources"] == {"requests": want, "limits": want}
        assert server["args"][server["args"].index("--threads") + 1] == str(cores)
        group = of_kind(kuberay.manifests(workload, RAY), "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][
            0
        ]
        (worker,) = containers(group)
        want = {"cpu": str(cores), "memory": f"{math.ceil(1.25 * (memory / 2**20 + 1024))}Mi"}
        assert worker["resources"] == {"requests": want, "limits": want}
        assert group["rayStartParams"]["num-cpus"] == str(cores)


def test_start_up_follows_the_profile():
    def allowed(seconds: float) -> int:
        workload = dataclasses.replace(WORKLOAD, profile=dataclasses.replace(PROFILE, startup_seconds=seconds))
        spec = of_kind(kubernetes.manifests(workload), "Deployment")["spec"]
        probe = spec["template"]["spec"]["containers"][0]["startupProbe"]
        assert spec["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"]
        return probe["periodSeconds"] * probe["failureThreshold"]

    assert [allowed(seconds) for seconds in (0.1, 6.0, 30.0)] == [60, 60, 300]


CONTAINER = ("spec", "template", "spec", "containers", 0)
LABELS = "app.kubernetes.io/instance"


@pytest.mark.parametrize(
    ("change", "deployment", "others"),
    [
        ({"image": "lepton@sha256:" + "0" * 64}, {(*CONTAINER, "image")}, set()),
        ({"source": InImage("/models/other")}, {(*CONTAINER, "args", 1)}, set()),
        ({"sha256": "b" * 64}, {("spec", "template", "metadata", "annotations", "checksum/model")}, set()),
        ({"namespace": "prod"}, {("metadata", "namespace")}, {("metadata", "namespace")}),
        ({"replicas": 3}, set(), {("spec", "minReplicas")}),
        ({"max_replicas": 20}, set(), {("spec", "maxReplicas")}),
        ({"cpu_target": 50}, set(), {("spec", "metrics", 0, "resource", "target", "averageUtilization")}),
        (
            {"port": 9000},
            {(*CONTAINER, "args", 5), (*CONTAINER, "ports", 0, "containerPort"),
             ("spec", "template", "metadata", "annotations", "prometheus.io/port")},
            set(),
        ),
        (
            {"grace_seconds": 60},
            {(*CONTAINER, "args", 11), ("spec", "template", "spec", "terminationGracePeriodSeconds")},
            set(),
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_an_argument_changes_what_it_says_and_nothing_else(change, deployment, others):
    before, after = kubernetes.manifests(WORKLOAD), kubernetes.manifests(dataclasses.replace(WORKLOAD, **change))
    assert [manifest["kind"] for manifest in before] == [manifest["kind"] for manifest in after]
    differ = [
        {at for at, _ in set(places(a).items()) ^ set(places(b).items())} for a, b in zip(before, after, strict=True)
    ]
    assert differ[0] == deployment
    assert set.union(*differ[1:]) == others


def test_a_metric_is_added_to_the_autoscaler_alone():
    before, after = kubernetes.manifests(WORKLOAD), kubernetes.manifests(METRIC)
    assert before[:-1] == after[:-1]
    cpu, pods = after[-1]["spec"]["metrics"]
    assert [cpu] == before[-1]["spec"]["metrics"]
    value = {"type": "AverageValue", "averageValue": "35000m"}
    assert pods == {"type": "Pods", "pods": {"metric": {"name": "lepton_requests_per_second"}, "target": value}}


def test_a_fixed_number_of_pods_has_no_autoscaler():
    fixed = kubernetes.manifests(WORKLOADS["fixed"])
    assert [manifest["kind"] for manifest in fixed] == ["Deployment", "Service", "PodDisruptionBudget"]
    assert fixed[0]["spec"]["replicas"] == 3
    assert "replicas" not in kubernetes.deployment(WORKLOAD)["spec"]
    service, budget = kuberay.manifests(WORKLOADS["fixed"], RAY)
    assert "enableInTreeAutoscaling" not in service["spec"]["rayClusterConfig"]
    (replica,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"]
    assert replica["num_replicas"] == 3
    assert "autoscaling_config" not in replica
    assert budget["spec"]["minAvailable"] == 2
    assert [manifest["kind"] for manifest in kuberay.manifests(WORKLOADS["one"], RAY)] == ["RayService"]


def test_where_the_model_file_comes_from():
    claim = of_kind(kubernetes.manifests(WORKLOADS["claim"]), "Deployment")["spec"]["template"]["spec"]
    assert {"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}} in claim["volumes"]
    assert claim["containers"][0]["args"][1] == "/models/encoders/minilm.safetensors"
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in claim["containers"][0]["volumeMounts"]
    assert "initContainers" not in claim
    url = of_kind(kubernetes.manifests(WORKLOADS["url"]), "Deployment")["spec"]["template"]["spec"]
    (first,) = url["initContainers"]
    path = url["containers"][0]["args"][1]
    assert first["command"] == ["python", "-m", "lepton_ai.serving.fetch", FETCHED.url, path, "a" * 64]
    assert {"name": "models", "mountPath": "/models"} in first["volumeMounts"]
    assert {"name": "models", "emptyDir": {"sizeLimit": "22Mi"}} in url["volumes"]
    assert url["containers"][0]["args"][2:4] == ["--tokenizer", "/opt/tokenizer"]


def test_the_modules_that_manifests_name_are_there():
    for name in (kuberay.APPLICATION.split(":")[0], "lepton_ai.serving.fetch"):
        assert importlib.util.find_spec(name) is not None


def test_ray_serve_is_told_what_the_pods_are_made_for():
    manifest = kuberay.ray_service(WORKLOADS["url"], RAY)
    spec = manifest["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert application["args"] == {
        "path": "/models/model.safetensors", "tokenizer": "/opt/tokenizer", "threads": 4,
    }  # fmt: skip
    (replica,) = application["deployments"]
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert replica["ray_actor_options"]["num_cpus"] == int(group["rayStartParams"]["num-cpus"]) == 4
    assert replica["autoscaling_config"]["min_replicas"] == group["minReplicas"] == 2
    assert replica["autoscaling_config"]["max_replicas"] == group["maxReplicas"] == 10
    assert application["route_prefix"] == "/infer"
    assert spec["rayClusterConfig"]["rayVersion"] == RAY
    assert spec["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    assert spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert spec["serveService"]["metadata"]["name"] == "minilm"


PROGRAM = """
from lepton_ai.serving import kuberay, kubernetes
from lepton_ai.serving.kubernetes import to_yaml
from lepton_ai.serving.workload import FromUrl, ReplicaProfile, Workload
profile = ReplicaProfile(800 << 20, 4, 0.02, 6.0)
workload = Workload("minilm", "lepton:1", FromUrl("https://models.example/a", 9), "a" * 64, profile, namespace="prod")
print(to_yaml(kubernetes.manifests(workload) + kuberay.manifests(workload, "2.60.0")))
"""


def test_two_runs_give_the_same_bytes(run_python):
    first, second = (run_python(PROGRAM, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert first == second
    assert "&id" not in first  # anchors are valid, and no one can edit them
    assert len(list(yaml.safe_load_all(first))) == 6


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": ""}, "name is ''; allowed: a label of RFC 1123"),
        ({"name": "MiniLM"}, "name is 'MiniLM'; allowed: a label of RFC 1123"),
        ({"name": "mini_lm"}, "allowed: a label of RFC 1123"),
        ({"name": "minilm-"}, "allowed: a label of RFC 1123"),
        ({"name": "a" * 64}, "allowed: a label of RFC 1123"),
        ({"name": "minilm\n"}, "allowed: a label of RFC 1123"),
        ({"name": "6layers"}, "name is '6layers'; allowed: a letter in front"),
        ({"namespace": "Prod"}, "namespace is 'Prod'; allowed: a label of RFC 1123"),
        ({"image": "lepton"}, "image is 'lepton'; allowed: a name with a tag other than latest"),
        ({"image": "lepton:latest"}, "allowed: a name with a tag other than latest"),
        ({"image": "Lepton:1"}, "allowed: a name with a tag"),
        ({"image": "registry.example:5000/lepton"}, "allowed: a name with a tag"),
        ({"sha256": "A" * 64}, "sha256 is 'AAAA.*allowed: 64 hexadecimal digits"),
        ({"tokenizer": "tokenizer"}, "tokenizer is 'tokenizer'; allowed: an absolute path"),
        ({"replicas": 0}, "replicas is 0; allowed: 1 to 10"),
        ({"replicas": 11}, "replicas is 11; allowed: 1 to 10"),
        ({"cpu_target": 0}, "cpu_target is 0; allowed: 1 to 100"),
        ({"port": 80}, "port is 80; allowed: 1024 to 65535"),
        ({"grace_seconds": 0}, "grace_seconds is 0; allowed: 1 to 3600"),
    ],
)
def test_bad_workloads(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(WORKLOAD, **change)


@pytest.mark.parametrize(
    "image", ["a:1", "localhost:5000/a/b_c:v1.2-rc", "a@sha256:" + "0" * 64, "x.y/a:latest@sha256:" + "0" * 64]
)
def test_good_images(image):
    assert dataclasses.replace(WORKLOAD, image=image).image == image


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: InImage("model"), "path is 'model'; allowed: an absolute path without .."),
        (lambda: InImage("/a/../b"), "allowed: an absolute path without .."),
        (lambda: OnClaim("Models", "a"), "claim is 'Models'; allowed: a subdomain of RFC 1123"),
        (lambda: OnClaim("a." * 127 + "a", "a"), "allowed: a subdomain of RFC 1123"),
        (lambda: OnClaim("models", "/a"), "path is '/a'; allowed with a claim: a path in it"),
        (lambda: OnClaim("models", "../a"), "path is '../a'; allowed with a claim"),
        (lambda: FromUrl("s3://bucket/a", 1), "url is 's3://bucket/a'; allowed: http://... or https://..."),
        (lambda: FromUrl("https://me:secret@a.example/b", 1), "url of a.example holds a user or a password"),
        (lambda: PodMetric("a-b", 1.0), "metric is 'a-b'; allowed: a name of Prometheus"),
        (lambda: PodMetric("a", 0.0), "metric_target is 0.0; allowed: a finite number, 0.001 or more"),
        (lambda: kuberay.manifests(WORKLOAD, "2.59.0"), "ray is '2.59.0'; allowed: a version, 2.60.0 or later"),
        (lambda: kuberay.manifests(WORKLOAD, "new"), "ray is 'new'; allowed: a version, 2.60.0 or later"),
        (lambda: kuberay.manifests(METRIC, RAY), "metric is 'lepton_requests_per_second' with ray; allowed: none"),
        (
            lambda: kuberay.manifests(dataclasses.replace(WORKLOAD, name="a" * 48), RAY),
            "name is 'a{48}'; allowed with ray: up to 47 characters",
        ),
    ],
)
def test_bad_parts(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), ("1500M", 1_500_000_000), ("1.5Gi", 3 << 29), ("800Mi", 800 << 20), ("2k", 2000)]
)
def test_memory(text, count):
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "1GB", "1e9", "Gi", "1 Gi", "\u0661"])
def test_bad_memory(text):
    with pytest.raises(ValueError, match="allowed: a number above 0 of bytes, or with k, M, G, Ki, Mi or Gi"):
        parse_memory(text)


@pytest.fixture
def deploy(tmp_path):
    """Runs `lepton deploy` with a file; gives exit code, text, and the manifests that it wrote."""
    file = tmp_path / "Small_Model.v2.safetensors"
    file.write_bytes(b"model")

    def run(*arguments: str) -> tuple[int, str, list[dict]]:
        folder = tmp_path / "out"
        done = CliRunner().invoke(app, ["deploy", str(file), "-o", str(folder), "--image", "lepton:1", *arguments])
        written = [yaml.safe_load_all(path.read_text()) for path in sorted(folder.glob("*"))]
        return done.exit_code, done.output, [manifest for documents in written for manifest in documents]

    return run


GIVEN = ("--kubernetes", "--memory", "800Mi", "--cores", "4")


def test_the_command_writes_what_the_functions_give(deploy):
    code, text, objects = deploy(*GIVEN, "--url", FETCHED.url, "--startup-seconds", "6", "--request-seconds", "0.02")
    assert code == 0, text
    assert "a replica takes 800 MiB on 4 cores, 20 ms a request, ready after 6.0 s" in text
    assert "small-model-v2.yaml: Deployment, Service, PodDisruptionBudget, HorizontalPodAutoscaler" in text
    source = FromUrl(FETCHED.url, 5)
    digest = "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4"  # of b"model"
    assert objects == kubernetes.manifests(Workload("small-model-v2", "lepton:1", source, digest, PROFILE))
    code, text, objects = deploy(*GIVEN, "--claim", "models", "--ray", RAY, "--name", "minilm")
    assert code == 0, text
    assert [manifest["kind"] for manifest in objects[-2:]] == ["PodDisruptionBudget", "HorizontalPodAutoscaler"]
    assert objects[0]["kind"] == "RayService"
    assert "/models/Small_Model.v2.safetensors" in objects[0]["spec"]["serveConfigV2"]


def test_the_command_measures_where_nothing_is_given(deploy, monkeypatch):
    asked = {}

    def profile(file: Path, **how: int) -> ReplicaProfile:
        asked.update(how)
        return PROFILE

    monkeypatch.setattr("lepton_ai.serving.profile.profile", profile)
    metric = ("--metric", "lepton_requests_per_second", "--cpu-target", "50")
    code, text, objects = deploy("--kubernetes", "--path", "/a", "--cores", "4", "--tokens", "64", *metric)
    assert code == 0, text
    assert asked == {"cores": 4, "batch": 32, "tokens": 64}
    scaler = of_kind(objects, "HorizontalPodAutoscaler")
    assert scaler["spec"]["metrics"][1]["pods"]["target"]["averageValue"] == "25000m"  # half of what 20 ms allow


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "deploy: nowhere to; allowed: --kubernetes"),
        (("--kubernetes", "--memory", "1Gi"), "memory is 1Gi without --cores"),
        (("--kubernetes", "--startup-seconds", "3"), "startup_seconds is 3 without --memory"),
        ((*GIVEN, "--metric-target", "3"), "metric_target is 3 without --metric"),
        ((*GIVEN, "--metric", "a"), "metric is a where nothing is measured; allowed: with --metric-target"),
        (GIVEN, "where the model file is: nothing given; allowed: path (in the image), claim"),
        ((*GIVEN, "--url", "https://a", "--claim", "b"), "where the model file is: claim and url given"),
        ((*GIVEN, "--url", "https://a", "--path", "/b"), "where the model file is: path and url given"),
        ((*GIVEN, "--path", "/a", "--name", "A"), "name is 'A'; allowed: a label of RFC 1123"),
        ((*GIVEN, "--path", "/a", "--request-seconds", "0"), "seconds_per_request is 0.0; allowed: a finite number"),
    ],
)
def test_wrong_arguments_write_nothing(deploy, arguments, text):
    code, output, objects = deploy(*arguments)
    assert code == 2
    assert text in output
    assert objects == []
