"""The Dockerfiles, as far as that is possible where no image can be built; `make lint` runs hadolint on them."""

import re
import sys
from pathlib import Path

import pytest
from lepton_ai.serving.kubernetes import USER

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "docker").glob("Dockerfile*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def instructions(request) -> list[tuple[str, str]]:
    """Instruction and arguments, comments left out and continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", request.param.read_text(), flags=re.MULTILINE)
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def of(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions if instruction == name]


def last_stage(instructions: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return instructions[max(i for i, (name, _) in enumerate(instructions) if name == "FROM") :]


def test_there_is_one_for_cpus_and_one_for_gpus():
    assert [path.name for path in FILES] == ["Dockerfile", "Dockerfile.cuda"]


def test_stages_have_names_and_images_have_versions(instructions):
    stages = [re.fullmatch(r"(\S+):([\w.-]+)(?: AS (\w+))?", arguments) for arguments in of(instructions, "FROM")]
    assert len(stages) == 3
    assert all(stage is not None and re.search(r"\d", stage[2]) for stage in stages)
    assert [stage[3] for stage in stages] == ["wheel", "packages", None]
    copied = re.findall(r"--from=(\w+)", " ".join(of(instructions, "COPY")))
    assert copied == ["wheel", "packages"]


def test_what_is_copied_is_there_and_is_what_a_wheel_is_made_of(instructions):
    local = [arguments.split()[:-1] for arguments in of(instructions, "COPY") if not arguments.startswith("--from")]
    copied = {name for names in local for name in names}
    assert copied >= {"CMakeLists.txt", "cmake", "csrc", "pyproject.toml", PROJECT["project"]["readme"]}
    assert copied >= {package.split("/")[0] for package in PROJECT["tool"]["scikit-build"]["wheel"]["packages"]}
    assert copied >= set(PROJECT["project"]["license-files"])
    for name in copied:
        assert (ROOT / name).exists(), name


def test_versions_are_pinned_and_extras_exist(instructions):
    commands = " ".join(of(instructions, "RUN"))
    installs = re.findall(r"pip install .*?(?=&&|;|$)", commands)
    assert len(installs) >= 2
    assert all("--constraint" in line or "grep '^torch==' " in line for line in installs)
    assert re.search("^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    arguments = dict(line.split("=") for line in of(instructions, "ARG"))
    (extras,) = re.findall(r'\*\.whl\)\[([$\w,]+)\]"', commands)
    extras = arguments[extras[1:]] if extras.startswith("$") else extras
    assert set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()


def test_the_image_runs_the_command_as_the_user_of_the_manifests(instructions):
    stage = last_stage(instructions)
    assert of(stage, "USER") == [f"{USER}:{USER}"]
    assert f"--uid {USER} --gid {USER}" in " ".join(of(stage, "RUN"))
    after_user = [name for name, _ in stage[stage.index(("USER", f"{USER}:{USER}")) :]]
    assert "RUN" not in after_user
    assert of(stage, "ENTRYPOINT") == ['["lepton"]']
    assert PROJECT["project"]["scripts"].keys() == {"lepton"}
    (check,) = of(stage, "HEALTHCHECK")
    assert "http://127.0.0.1:8000/health" in check
    assert of(stage, "EXPOSE") == ["8000"]
