"""Recipes that are refused, and the sizes of those that are shipped."""

import hypothesis
import hypothesis.strategies as st
import pytest
from recipes import SMALL, argv, shipped

from pangu_tiny import cli, config
from pangu_tiny.cli import STAGES, find_stage
from pangu_tiny.reproduce.ladder import check_sizes, first_round
from pangu_tiny.reproduce.rungs import SCOPES


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


@pytest.mark.parametrize("file", shipped("recipes/*.gin"))
def test_every_recipe_has_models_of_one_size(file):
    """Where it has several rungs."""
    config.read(map(find_stage, STAGES), [file], [], SCOPES)
    values = dict.fromkeys(("workdir", "text", "dataset"), "x")
    found, _ = config.arguments(find_stage("reproduce"), **values)
    check_sizes(found.get("rungs") or ["rounds"], found.get("parameter_tolerance", 0.01))
