"""Recipes that are refused, and the sizes of those that are shipped."""

import json
import math

import hypothesis
import hypothesis.strategies as st
import pytest
from etils import epath
from recipes import SMALL, argv, shipped

from pangu_tiny import cli, config
from pangu_tiny.cli import STAGES, find_stage
from pangu_tiny.errors import Diverged, UserError
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.reproduce import ladder as ladder_file
from pangu_tiny.reproduce.ladder import Ladder, check_sizes, first_round
from pangu_tiny.reproduce.rows import Rows
from pangu_tiny.reproduce.rungs import RUNGS, SCOPES


@hypothesis.given(steps=st.integers(1, 10**6), rounds=st.integers(1, 4), rate=st.floats(0.01, 1.0))
@hypothesis.settings(deadline=None, derandomize=True)
def test_the_first_round_is_the_longest_that_leaves_room(steps, rounds, rate):
    def total(first):
        return first + (rounds - 1) * round(rate * first)

    first = first_round(steps, rounds, rate)
    assert first >= 1 and (total(first) <= steps or first == 1)
    assert total(first + 1) > steps


def refusal(recipe, workdir, capsys, **changes):
    """The one line by which a command is refused."""
    assert cli.main(argv(recipe, workdir, **changes)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert not workdir.exists()
    return line


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"reproduce.rungs": ["plain", "third"]}, "reproduce.rungs is 'third', expected one of pl"),
        ({"reproduce.rungs": ["rounds", "plain"]}, "expected each once, in the order plain, token"),
        ({"reproduce.protocols": ["fair"]}, "reproduce.protocols is 'fair', expected one of equa"),
        ({"reproduce.seeds": [1, 1]}, "reproduce.seeds is [1, 1], expected different ones"),
        ({"reproduce.seeds": []}, "reproduce.seeds is [], expected different ones"),
        ({"reproduce.seeds": [-1]}, "reproduce.seeds is -1, expected"),
        ({"reproduce.rates": [0.0]}, "reproduce.rates is 0.0, expected"),
        ({"third/train.steps": 3}, "unknown scope 'third', expected one of teacher, plain"),
        ({"teacher/ModelShape.depth": 1}, "ModelShape.depth is 2, the teacher has only 1"),
        ({"reproduce.teacher": "nowhere"}, "nowhere"),
        ({"reproduce.benchmarks": "nowhere", "benchmark.tasks": ["c3"]}, "dev_0.json is missing"),
        ({"reproduce.benchmarks": ".", "benchmark.tasks": ["bool"]}, "'bool' is unknown"),
        ({"reproduce.rungs": []}, "reproduce.rungs is [], expected each once"),
        ({"reproduce.protocols": ["equal", "equal"]}, "reproduce.protocols is ['equal', 'equal'],"),
        ({"reproduce.rates": [1e-3, 1e-3]}, "reproduce.rates is [0.001, 0.001], expected differe"),
        ({"select_batches.rate": 50}, "select_batches.rate is 50.0, expected"),
        ({"select_batches.rate": -2}, "select_batches.rate is -2.0, expected"),
        ({"rank_teacher.method": "tailor"}, "rank_teacher.method is 'tailor', expected one of"),
        ({"rank_teacher.kv": "merge"}, "rank_teacher.kv is 'merge', inherit.kv 'drop': expected"),
        ({"inherit.tie": "head"}, "inherit.tie is 'head', but no two matrices become one"),
        ({"train.checkpoint": "cut"}, "train.checkpoint goes with reproduce.dataset"),
        (
            {"teacher/ModelShape.vocab_size": 320},
            "ModelShape.vocab_size is 320 of teacher, 310 of plain: expected one, of the big tok",
        ),
        (
            {"plain/train.steps": 3},
            "plain/train.steps=3: rungs may differ in ModelShape and Optimizer.learning_rate, expe",
        ),
        ({"rounds/ModelShape.depth": 3}, "all rungs that inherit have one shape, expected ModelS"),
        ({"teacher/inherit.kv": "merge"}, "inherit is shared by all models, expected inherit.kv w"),
        (
            {"reproduce.rungs": ["plain"], "reproduce.teacher": "t"},
            "reproduce.teacher is bound, but no rung of reproduce.rungs inherits",
        ),
        ({"reproduce.dataset": "rows"}, "reproduce.text and reproduce.dataset are bound"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(changes, named, tmp_path, text, capsys):
    given = {"reproduce.text": str(text), **changes}
    assert named in refusal("laptop", tmp_path / "run", capsys, **given)


def test_a_rung_of_another_size_is_refused_with_the_width_that_fits(tmp_path, capsys):
    names = [name for name in SMALL if "tolerance" in name]
    sizes = {"ModelShape.ffn_width": 100, **dict.fromkeys(names, 0.01)}
    line = refusal("quickstart", tmp_path / "run", capsys, **sizes)
    assert line.startswith("pangu-tiny reproduce: rung rounds has ")
    width = line.rpartition("ModelShape.ffn_width = ")[2].removesuffix(" fits")
    flags = [(name, str(value)) for name, value in {**SMALL, **sizes}.items()]
    flags += [("ModelShape.ffn_width", width), ("reproduce.workdir", "w")]
    config.read(map(find_stage, STAGES), ["recipes/quickstart.gin"], flags, SCOPES)
    check_sizes(["plain", "rounds"], 0.01)


def test_no_width_may_fit(tmp_path, capsys):
    sizes = {"ModelShape.depth": 40, "reproduce.parameter_tolerance": 0.01}
    assert "; no ffn_width fits" in refusal("quickstart", tmp_path / "run", capsys, **sizes)


def test_a_recipe_without_a_teacher(tmp_path, text, capsys):
    (tmp_path / "a.gin").write_text("include 'recipes/laptop.gin'\n")
    bare = [flag for flag in argv("laptop", tmp_path / "run") if "teacher/" not in flag]
    kept = config.shipped_files() / "recipes" / "laptop.gin"
    lines = [line for line in kept.read_text().splitlines() if "teacher/" not in line]
    (tmp_path / "a.gin").write_text("\n".join(lines))
    bare[1] = f"--gin_file={tmp_path / 'a.gin'}"
    assert cli.main(bare) == 2
    assert "there is no teacher to inherit from, expected" in capsys.readouterr().err


def test_the_rungs_of_the_paper_differ_by_less_than_four_percent():
    """Its own shapes: a compact vocabulary in whole layers, and PanGu-π-1B Pro."""

    def made(model: ModelShape) -> None: ...

    counts = []
    for rung in RUNGS:
        config.read(map(find_stage, STAGES), [f"paper/ladder/{rung}.gin"], [], SCOPES)
        counts.append(config.arguments(made)[0]["model"].parameters)
    assert all(abs(count / counts[0] - 1) < 0.04 for count in counts)
    assert counts[2] == counts[3] == counts[4] == 995_604_736


def test_a_rate_that_diverges_is_not_taken(tmp_path, monkeypatch):
    """Where all do, or where a rate is bound, the rung is named."""

    def train_rounds(dataset: str, workdir: str, rounds: int = 2) -> None:
        raise Diverged("step 3: loss nan")

    monkeypatch.setattr(ladder_file, "train_rounds", train_rounds)
    flags = [(name, str(value)) for name, value in SMALL.items()]
    config.read(map(find_stage, STAGES), ["recipes/laptop.gin"], flags, SCOPES)
    rows = Rows(None, "rows")
    ladder = Ladder(epath.Path(tmp_path), rows, 32, None, rates=[1.0, 2.0], tuning_seed=0)
    *tried, made = ladder.steps(["tokenizer"], ["equal"], [1])
    for step in tried:
        step.run()
    assert ladder.tuned("tokenizer") == {1.0: math.inf, 2.0: math.inf}
    with pytest.raises(UserError, match=r"rung tokenizer diverged at all of reproduce\.rates"):
        made.run()
    (made,) = Ladder(epath.Path(tmp_path), rows, 32, None).steps(["tokenizer"], ["equal"], [1])
    with pytest.raises(UserError, match="rung tokenizer, seed 1: step 3: loss nan"):
        made.run()


@pytest.mark.pods
@pytest.mark.parametrize("recipe", ["quickstart", "gpu"])
def test_other_small_recipes_run(recipe, text, tmp_path):
    """As they are shipped, in small; in the ladder of `conftest.py` it is the laptop's."""
    given = {
        "reproduce.text": text,
        "prepare_data.text_key": "body",
        "prepare_data.tokenizer": None,
        "train.dtype": "float32",
        "reproduce.seeds": [1],
        "ModelShape.shortcut_ratio": 8,
    }
    if recipe == "gpu":
        given |= {"plain/ModelShape.heads": 2, "tokenizer/ModelShape.heads": 2}
    assert cli.main(argv(recipe, tmp_path / "run", **given)) == 0
    found = json.loads((tmp_path / "run" / "report.json").read_text())["results"]
    assert {"plain", "rounds"} <= found["rungs"].keys()


@pytest.mark.parametrize("file", shipped("recipes/*.gin"))
def test_every_recipe_has_models_of_one_size(file):
    """Where it has several rungs."""
    config.read(map(find_stage, STAGES), [file], [], SCOPES)
    values = dict.fromkeys(("workdir", "text", "dataset"), "x")
    found, _ = config.arguments(find_stage("reproduce"), **values)
    check_sizes(found.get("rungs") or ["rounds"], found.get("parameter_tolerance", 0.01))
