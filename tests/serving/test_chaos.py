"""lepton chaos: plans, and a short one that kills and replaces replicas under load without a request lost."""

import json

import pytest
from lepton_ai.cli import app
from lepton_ai.serving.chaos import ChaosPlan, ChaosReport, _recovery, _same
from typer.testing import CliRunner


def test_plans_are_fixed_by_their_seed_and_bounded():
    plan = ChaosPlan(seconds=100, kill=3, freeze=1, scale=2, update=1, seed=5)
    assert plan.events() == plan.events()
    assert plan.events() != ChaosPlan(seconds=100, kill=3, freeze=1, scale=2, update=1, seed=6).events()
    assert sorted(kind for _, kind in plan.events()) == ["freeze", "kill", "kill", "kill", "scale", "scale", "update"]
    assert all(20 <= at <= 80 for at, _ in plan.events())
    for name, value in (
        ("seconds", 1),
        ("seconds", 1e9),
        ("clients", 0),
        ("replicas", 65),
        ("kill", -1),
        ("scale", 101),
    ):
        with pytest.raises(ValueError, match=f"ChaosPlan: {name} is"):
            ChaosPlan(**{name: value})
    assert [kind for _, kind in ChaosPlan(kill=0, scale=0, update=0, node=2, engine="ray").events()] == ["node"] * 2
    with pytest.raises(ValueError, match="node is 2 with engine 'local', which has no nodes; allowed: 0"):
        ChaosPlan(node=2)
    with pytest.raises(ValueError, match="engine is 'slurm'; allowed: local, ray"):
        ChaosPlan(engine="slurm")


def test_what_counts_as_wrong_and_as_recovered():
    assert _same([[1.0, 2.0]], [[1.01, 2.0]])
    assert not _same([[1.0, 2.0]], [[2.0, 1.0]])
    assert not _same([[1.0]], [[1.0], [1.0]])
    fast = [(t / 10, 0.01) for t in range(100)]
    late = [(2 + t / 10, 1.5) for t in range(10)]
    assert _recovery(1.0, fast, 0.02, 10.0) == 0
    assert 1.5 <= _recovery(2.5, fast + late, 0.02, 10.0) <= 2.25
    assert _recovery(2.5, fast + late, 0.02, 4.0) is None
    assert _recovery(9.5, fast, 0.02, 10.0) is None
    report = ChaosReport(ChaosPlan(), answered=3, lost=["500: no"], recovery=[("kill", 1.5), ("update", None)])
    assert not report.fine
    assert "1 lost" in str(report)
    assert "after at most 1.5 s; 1 not before the next event" in str(report)


@pytest.mark.slow
def test_no_request_is_lost(spec, tmp_path):
    (tmp_path / "request.json").write_text(spec.warm_up)
    arguments = ["chaos", spec.path, "--model", spec.architecture, "--warm-up", f"{tmp_path}/request.json", "--seconds",
                 "20", "--kill", "2", "--scale", "1", "--update", "1", "--clients", "4", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["lost"], report["wrong"], report["fine"]) == ([], 0, True)
    assert report["answered"] > 100
    assert report["restarts"] >= 1
    assert len(report["recovery"]) == 4
    assert report["overhead_p99"] > 0


def test_errors(spec):
    result = CliRunner().invoke(app, ["chaos", spec.path, "--model", spec.architecture])
    assert result.exit_code == 2
    assert "--tokenizer and --warm-up: allowed: one of them" in result.output
