"""plan: a step is compiled for a slice that is not there, by libtpu."""

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys

import pytest
from flax.traverse_util import flatten_dict
from tiny_runs import SHAPE

from pangu_tiny import cli
from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import parameter_shapes
from pangu_tiny.planning.compare_plans import compare_plans
from pangu_tiny.planning.report import report_of

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
    """Once a step, in fewer sums than parameters; layer by layer, eight layers have more."""
    flags = ("--gin.Hardware.data=2", "--gin.ModelShape.depth=8")
    plan(tmp_path / "plan", "2 × v5e:2x2", *flags)
    figures = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert figures["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    between = [row for row in figures["collectives"] if row["network"] == "DCN"]
    large = [row for row in between if row["bytes"] > 1e4]
    assert {(row["kind"], row["dtype"]) for row in large} == {("all-reduce", "f32")}
    assert sum(row["times"] for row in large) < len(flatten_dict(parameter_shapes(SHAPE)))
    summed = sum(row["bytes"] for row in large)
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
    kept = 2 * SHAPE.depth * 2 * 128 * SHAPE.width  # the stream between layers, and much more
    assert kept < memory["activations"] < 80 * kept
    need = sum(memory.values()) - memory["capacity"]
    assert figures["tried"] == [
        {"changes": {}, "need": need, "seconds": figures["compile_seconds"], "fits": True}
    ]
    step = figures["step"]
    assert (
        min(step["products"], step["passes"]) > 0
        and step["exposed_ici"] > 0
        and step["exposed_dcn"] == 0
    )
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


TEACHER = "".join(
    f"ModelShape.{name} = {value}\n"
    for name, value in (vars(SHAPE) | {"ffn_width": 64, "depth": 3}).items()
)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Figures of the programs of the other stages, and what was said of them."""
    pytest.importorskip("libtpu")
    folder = tmp_path_factory.mktemp("others")
    (folder / "teacher.gin").write_text(TEACHER)
    rank = [f"--gin.plan.teacher={folder / 'teacher.gin'}", "--gin.MaskTraining.steps=7"]
    flags = {
        "score": [],
        "rank": [*rank, "--gin.rank_teacher.batch_size=8"],
        "decode": ["--gin.generate.batch_size=6"],
        "too_large": ["--gin.plan.sequence_length=1e8"],
    }
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        for name, more in flags.items():
            program = "decode" if name == "too_large" else name
            argv = [*command(folder / name, "v5e:2x2"), f"--gin.plan.program={program}", *more]
            with contextlib.redirect_stdout(io.StringIO()) as said:
                assert cli.main(argv) == 0
            found[name] = json.loads((folder / name / "plan.json").read_text()), said.getvalue()
    return found


def test_scoring_is_forward_only(others):
    figures, _ = others["score"]
    memory = figures["memory"]
    assert "optimizer" not in memory and memory["activations"] == 0
    assert figures["global_batch"] == 4 * 2 * 2  # four times what training takes
    step, run = figures["step"]["total"], figures["run"]
    assert run["tokens_per_second"] == pytest.approx(figures["global_batch"] * 128 / step)
    flops = figures["global_batch"] * 128 * SHAPE.flops_per_token(128) / 3
    assert run["mfu"] == pytest.approx(flops / (4 * 197e12 * step))
    assert run["steps"] == -(-1e9 // (16 * 128))


def test_ranking_trains_masks_of_a_teacher(others):
    """On a teacher of as many layers as are kept; its own shape is another than that to cut."""
    figures, _ = others["rank"]
    assert figures["teacher"]["depth"] == 3 and figures["model"]["depth"] == 2
    teacher = dataclasses.replace(SHAPE, ffn_width=64)
    largest = max(leaf.size for leaf in flatten_dict(parameter_shapes(teacher)).values())
    memory = figures["memory"]
    assert largest <= memory["parameters"] < 4 * teacher.parameters
    masks = SHAPE.width + SHAPE.depth * (SHAPE.kv_heads + SHAPE.heads + 64 + teacher.bottleneck)
    assert memory["optimizer"] == 3 * 4 * masks + 3 * 4  # with both moments, and three counters
    assert figures["run"]["tokens"] == 7 * 8 * 128 and figures["run"]["steps"] == 7
    assert (figures["global_batch"], figures["accumulation"]) == (8, 2)


def test_decoding_holds_a_cache_that_the_mesh_cuts(others):
    figures, _ = others["decode"]
    size = 2 * SHAPE.depth * 128 * SHAPE.kv_heads * SHAPE.head_dim
    assert 4 * 6 * size < 4 * figures["memory"]["cache"] < 4 * 6 * size + 4 * 64
    assert figures["run"].keys() == {"tokens_per_second", "mfu"}
    assert figures["run"]["tokens_per_second"] == pytest.approx(6 / figures["step"]["total"])


def test_what_does_not_fit_is_told_in_a_line(others):
    """A cache of 100M positions is refused by libtpu itself, and nothing of it can be changed."""
    figures, said = others["too_large"]
    (tried,) = figures["tried"]
    assert not tried["fits"] and tried["need"] > 16 * 2**30 and "step" not in figures
    (line,) = (line for line in said.splitlines() if "WARNING" in line)
    needs = f"{tried['need'] / 2**30:.1f} of 16 GiB"
    assert line == f"WARNING: it does not fit: {needs}, and nothing else is left to try"


def test_what_would_fit_is_told_in_a_line(planned):
    figures = json.loads((planned[0] / "plan.json").read_text())
    asked = {"changes": {}, "need": 21.4 * 2**30, "seconds": 9.0, "fits": False}
    changes = {"Hardware.remat": "full", "Hardware.per_device_batch": 2}
    fits = {"changes": changes, "need": 9.1 * 2**30, "seconds": 9.0, "fits": True}
    out = {"changes": {"Hardware.remat": "dots"}, "need": 2**35, "seconds": None, "fits": False}
    figures["tried"] = [asked, fits, out]
    figures["step"]["total"] = 0.612
    figures["thin_shards"] = ["Hardware.fsdp 32 cuts"]
    figures["memory"]["temporaries"] = 15 * 2**30
    report = report_of(figures)
    assert report.warnings[0].startswith(
        "WARNING: it does not fit: 21.4 of 16 GiB; with Hardware.remat=full, "
        "Hardware.per_device_batch=2 it does: 9.1 GiB, 612 ms"
    )
    assert (
        report.warnings[1].startswith("WARNING: 6.") and "of the HBM is free" in report.warnings[1]
    )
    assert report.warnings[2:] == ["WARNING: Hardware.fsdp 32 cuts"]
    assert "left out: not expected to fit" in "".join(report.sections)
    figures["tried"] = [asked, asked | {"changes": changes, "need": 2**35}, out]
    del figures["step"]
    (line,) = report_of(figures).warnings
    assert "nor does any of 2 others; the least, Hardware.remat=full" in line


def test_plans_lie_side_by_side(planned, others, tmp_path, capsys):
    workdir, _ = planned
    decoded = tmp_path / "decoded"
    decoded.mkdir()
    (decoded / "plan.json").write_text(json.dumps(others["decode"][0]))
    rows = compare_plans([str(workdir), str(decoded)], str(tmp_path / "both"))
    values = {(row.part, row.name): row.values for row in rows}
    figures = [json.loads((folder / "plan.json").read_text()) for folder in (workdir, decoded)]
    step = values["step", "total"]
    assert step == pytest.approx([1e3 * plan["step"]["total"] for plan in figures])
    assert values["program", "program"] == ("train", "decode")
    assert values["program", "topology"] == ("v5e:2x2", "v5e:2x2")
    assert ("program", "ModelShape.depth") not in values  # since they do not differ
    assert values["memory of a chip", "cache"][0] is None
    total = values["memory of a chip", "total"]
    assert total == pytest.approx([plan["tried"][0]["need"] / 2**30 for plan in figures])
    exposed = [row.values for row in rows if row.part == "exchanges, exposed"]
    assert any(decoding is None for _, decoding in exposed)  # what training alone exchanges
    assert any(decoding for _, decoding in exposed)
    said = capsys.readouterr().out
    shown = f"{step[0]:.2f}", f"{step[1]:.2f} (−{step[0] - step[1]:.2f})"
    lines = [line for line in said.splitlines() if line.startswith("  total")]
    assert any(all(cell in line for cell in shown) for line in lines)
    page = (tmp_path / "both" / "report.html").read_text()
    assert shown[1] in page and "Hardware" not in page.partition("memory of a chip")[2]


def test_plans_that_cannot_be_compared_are_named(planned, others, tmp_path):
    workdir, _ = planned
    for plans, said in {
        (str(workdir),): "has 1, expected two workdirs of plan",
        (str(workdir), str(tmp_path)): f"{tmp_path} has no plan.json, expected a workdir of plan",
    }.items():
        with pytest.raises(UserError, match=re.escape(said)):
            compare_plans(list(plans), str(tmp_path / "both"))
    (tmp_path / "plan.json").write_text(json.dumps(others["too_large"][0]))
    with pytest.raises(UserError, match=r"no program of .* fits"):
        compare_plans([str(workdir), str(tmp_path)], str(tmp_path / "both"))
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["plan.program=sing"],
            "plan.program is 'sing', expected one of train, score, rank, decode",
        ),
        (["plan.program=rank"], "expected the gin file of a shape where the program is 'rank'"),
        (["plan.teacher=models/llama_2_7b.gin"], "and there alone"),
        (["plan.program=rank", "plan.teacher=no.gin"], "no.gin: no such file"),
    ],
)
def test_mistakes_of_a_program_are_one_line(flags, said, tmp_path, capsys):
    argv = [*command(tmp_path / "plan", "v5e:2x2"), *(f"--gin.{flag}" for flag in flags)]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "plan").exists()


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


def test_a_slice_is_named_by_plan_or_by_hardware(tmp_path, capsys):
    flags = [flag for flag in command(tmp_path / "plan", "") if "topology" not in flag]
    assert cli.main(flags) == 2
    assert "plan.topology is None, and so is Hardware.topology" in capsys.readouterr().err
    assert cli.main([*flags, "--gin.Hardware.topology=v5e:2x2x2"]) == 2
    assert "its shape is '2x2x2', expected one of 1x1" in capsys.readouterr().err
