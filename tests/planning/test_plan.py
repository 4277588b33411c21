"""plan: a step is compiled for a slice that is not there, by libtpu."""

import json
import os
import subprocess
import sys

import pytest
from flax.traverse_util import flatten_dict
from tiny_runs import SHAPE

from pangu_tiny import cli
from pangu_tiny.model.decoder import parameter_shapes

BINDINGS = {
    **{f"ModelShape.{name}": value for name, value in vars(SHAPE).items()},
    "Hardware.per_device_batch": 2,
    "Hardware.tensor": 2,
    "train.dtype": "bfloat16",
    "plan.sequence_length": 128,
    "plan.tokens": 1e9,
}


def command(workdir, topology):
    bindings = BINDINGS | {"plan.topology": topology, "plan.workdir": workdir}
    return ["plan", *(f"--gin.{name}={value}" for name, value in bindings.items())]


def plan(workdir, topology, *flags):
    """In a process of its own: libtpu allows one at a time, unless it is told otherwise."""
    pytest.importorskip("libtpu")
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pangu_tiny", *command(workdir, topology), *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plan") / "plan"
    return workdir, plan(workdir, "v5e:2x2")


def test_between_slices_goes_what_replicas_sum(tmp_path):
    plan(tmp_path / "plan", "2 × v5e:2x2", "--gin.Hardware.data=2")
    figures = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert figures["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    between = [row for row in figures["collectives"] if row["network"] == "DCN"]
    summed = sum(row["bytes"] for row in between if row["dtype"] == "f32")
    assert summed >= SHAPE.parameters  # a quarter a chip, of four bytes, padded


def test_a_plan_tells_what_a_step_needs(planned):
    workdir, said = planned
    figures = json.loads((workdir / "plan.json").read_text())
    assert figures["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert figures["global_batch"] == 4 and figures["accumulation"] == 1
    memory = figures["memory"]
    largest = max(leaf.size for leaf in flatten_dict(parameter_shapes(SHAPE)).values())
    assert largest <= memory["parameters"] < 4 * SHAPE.parameters
    assert 2 * memory["parameters"] <= memory["optimizer"] <= 2 * memory["parameters"] + 64
    assert memory["capacity"] == 16 * 2**30 and memory["temporaries"] > 0
    step = figures["step"]
    assert step["compute"] > 0 and step["exposed_ici"] > 0 and step["exposed_dcn"] == 0
    assert step["total"] == pytest.approx(sum(step.values()) - step["total"])
    assert figures["unknown_loops"] == []
    assert figures["run"]["steps"] == -(-1e9 // (4 * 128))
    assert {row["network"] for row in figures["collectives"]} == {"ICI"}
    assert "a chip" in said and f"{workdir / 'report.html'}" in said
    page = (workdir / "report.html").read_text()
    assert "data:image/png" in page and "all-reduce" in page


def test_it_is_not_compiled_again(planned, capsys, monkeypatch):
    workdir, said = planned
    monkeypatch.setattr("pangu_tiny.planning.plan._figures", None)
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    assert cli.main(command(workdir, "v5e:2x2")) == 0
    assert capsys.readouterr().out.splitlines()[-6:] == said.splitlines()[-6:]


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5e:5x5", "its shape is '5x5', expected one of 1x1, 2x2"),
        ("v5e-4 please", "expected GENERATION:SHAPE"),
        ("0 × v5e:2x2", "expected GENERATION:SHAPE"),
    ],
)
def test_mistakes_are_one_line(topology, said, tmp_path, capsys):
    assert cli.main(command(tmp_path / "plan", topology)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "plan").exists()
