"""gin files and bindings in, typed and checked values out; every mistake is named in one line."""

import dataclasses
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from pangu_tiny import config
from pangu_tiny.cli import STAGES, find_stage
from pangu_tiny.errors import UserError
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.reproduce.rungs import SCOPES
from pangu_tiny.rounds.stages import settings


@dataclasses.dataclass(frozen=True)
class Sizes:
    depth: int
    ratio: float = 0.5


def bake(
    workdir: str,
    sizes: Sizes,
    steps: int = 3,
    rate: float = 0.1,
    quick: bool = False,
    names: list[str] | None = None,
    weights: dict[str, float] | None = None,
    note: str | None = None,
    text: str | list[str] | None = None,
) -> None: ...


def serve(port: int = 80) -> None: ...


BASE = "bake.workdir = 'out'\nSizes.depth = 2\n"


def read(tmp_path, text=BASE, *flags) -> dict[str, Any]:
    """What `bake` gets from a gin file with this text, and from flags."""
    (tmp_path / "a.gin").write_text(text, encoding="utf-8")
    config.read([bake, serve], [str(tmp_path / "a.gin")], flags, ("big", "wide"))
    return config.arguments(bake)[0]


def refusal(tmp_path, text=BASE, *flags) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text, *flags)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(tmp_path) + "/", "")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("bake.steps = 7", "steps", 7),
        ("bake.steps = -7", "steps", -7),
        ("bake.steps = 1e6", "steps", 1_000_000),
        ("bake.rate = 1", "rate", 1.0),
        ("bake.rate = 2.5e-3", "rate", 0.0025),
        ("bake.quick = True", "quick", True),
        ("bake.names = ['a', 'b']", "names", ["a", "b"]),
        ("bake.names = ('a',)", "names", ["a"]),
        ("bake.names = None", "names", None),
        ("bake.weights = {'a': 1, 'b': 0.5}", "weights", {"a": 1.0, "b": 0.5}),
        ("bake.note = 'x # y'", "note", "x # y"),
        ("bake.text = 'a.txt'", "text", "a.txt"),
        ("bake.text = ['a.txt']", "text", ["a.txt"]),
        ("bake:\n  steps = 4\n  rate = 2", "steps", 4),
        ("size = 5\nbake.steps = %size", "steps", 5),
        ("bake.steps = %size\nsize = %other\nother = 6", "steps", 6),
        ("which = 'b'\nbake.names = ['a', %which]", "names", ["a", "b"]),
    ],
)
def test_values_of_a_file(tmp_path, line, name, value):
    found = read(tmp_path, BASE + line)[name]
    assert found == value and type(found) is type(value)


def test_dataclasses_are_built_from_bindings_of_their_own(tmp_path):
    assert read(tmp_path, BASE + "Sizes.ratio = 2")["sizes"] == Sizes(2, 2.0)


def test_a_later_binding_wins_and_flags_win_over_files(tmp_path):
    text = BASE + "n = 1\nbake.steps = %n\nbake.steps = 4"
    assert read(tmp_path, text)["steps"] == 4
    assert read(tmp_path, text, ("bake.steps", "5"))["steps"] == 5
    assert read(tmp_path, BASE + "n = 1\nbake.steps = %n", ("n", "6"))["steps"] == 6
    assert read(tmp_path, BASE + "n = 1", ("bake.steps", "%n"))["steps"] == 1
    assert read(tmp_path, BASE + "bake.note = %n", ("n", "@me"))["note"] == "@me"
    assert "steps" not in read(tmp_path), "what was read before is forgotten"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("workdir", "runs/a b", "runs/a b"),
        ("workdir", "12", "12"),
        ("workdir", "None", "None"),
        ("workdir", "'quoted'", "quoted"),
        ("workdir", "'tis", "'tis"),
        ("workdir", '"a" and "b"', '"a" and "b"'),
        ("workdir", "@home", "@home"),
        ("workdir", "@home/a()", "@home/a()"),
        ("workdir", "%home", "%home"),
        ("workdir", "%gin.REQUIRED", "%gin.REQUIRED"),
        ("workdir", "%PATH% @me", "%PATH% @me"),
        ("workdir", "50%", "50%"),
        ("note", "%home", "%home"),
        ("text", " @home", " @home"),
        ("text", "%home", "%home"),
        ("text", "['%a', '@b']", ["%a", "@b"]),
        ("names", "['@a', '%b']", ["@a", "%b"]),
        ("workdir", "a\nb", "a\nb"),
        ("workdir", "", ""),
        ("note", "None", None),
        ("note", "(1, 2)", "(1, 2)"),
        ("text", "2024", "2024"),
        ("text", "1e5", "1e5"),
        ("text", "['a', 'b']", ["a", "b"]),
        ("text", "*.txt", "*.txt"),
        ("steps", "1e3", 1000),
        ("names", "['a']", ["a"]),
        ("weights", "{'a': 2}", {"a": 2.0}),
    ],
)
def test_values_of_the_command_line(tmp_path, name, text, value):
    """Where a string is wanted, the text is taken as it stands; else it is a gin literal."""
    assert read(tmp_path, BASE, (f"bake.{name}", text))[name] == value


@hypothesis.given(
    text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("%@a./() "),
)
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
def test_any_text_survives_the_command_line_and_the_effective_config(tmp_path_factory, text):
    hypothesis.assume(not text.strip().startswith(("'", '"')))
    flags = [("bake.workdir", text), ("Sizes.depth", "2")]
    config.read([bake], [], flags)
    values, effective = config.arguments(bake)
    assert values["workdir"] == text
    path = tmp_path_factory.getbasetemp() / "effective.gin"
    path.write_text(effective, encoding="utf-8")
    config.read([bake], [str(path)], [])
    assert config.arguments(bake)[0]["workdir"] == text


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("bake.steps = 'x'", "a.gin:3: bake.steps = 'x': expected int"),
        ("bake.steps = 1.5", "a.gin:3: bake.steps = 1.5: expected int"),
        ("bake.steps = True", "a.gin:3: bake.steps = True: expected int"),
        ("bake.rate = True", "a.gin:3: bake.rate = True: expected float"),
        ("bake.rate = '0.1'", "a.gin:3: bake.rate = '0.1': expected float"),
        ("bake.quick = 1", "a.gin:3: bake.quick = 1: expected bool"),
        ("bake.note = 5", "a.gin:3: bake.note = 5: expected str | None"),
        ("bake.names = 'a'", "a.gin:3: bake.names = 'a': expected list[str] | None"),
        ("bake.names = ['a', 3]", "a.gin:3: bake.names = ['a', 3]: expected list[str]"),
        ("bake.weights = {'a': 'b'}", "a.gin:3: bake.weights = {'a': 'b'}: expected dict[str, fl"),
        ("bake.workdir = None", "a.gin:3: bake.workdir = None: expected str"),
        ("\n# c\nSizes.depth = []", "a.gin:5: Sizes.depth = []: expected int"),
        ("bake.steps = @serve", "a.gin:3: bake.steps = @serve: expected int"),
        ("bake.steps = @serve()", "a.gin:3: bake.steps = @serve: expected int"),
        ("boil.steps = 3", "a.gin:3: unknown name 'boil', expected one of Sizes, bake, serve"),
        ("bake.depth = 3", "a.gin:3: bake has no parameter 'depth', expected Sizes.depth"),
        ("bake.stepz = 3", "a.gin:3: bake has no parameter 'stepz', expected one of workdir, si"),
        ("steps = 3", "a.gin:3: %steps is used nowhere"),
        ("bake.steps = %steps", "a.gin:3: %steps has no value, expected steps = VALUE"),
        ("bake.steps = %n\nn = %m\nm = %n", "a.gin:3: %n stands for itself"),
        ("small/bake.steps = 3", "a.gin:3: unknown scope 'small', expected one of big, wide"),
        ("import os", "a.gin:3: only bindings and includes"),
        ("include 'none.gin'", "a.gin:3: include 'none.gin': no such file"),
        ("bake.steps", "a.gin:3: Couldn't parse statement"),
        ("bake.steps = ", "a.gin:3: "),
        ("bake.steps = 1 +", "a.gin:3: "),
        ("bake.steps = (1,", "a.gin:"),
        ("bake.workdir = 'a", "a.gin:3: "),
        ("= 3", "a.gin:3: "),
        ("include none", "a.gin:3: "),
        (
            "bake.sizes = @Sizes()",
            "a.gin:3: bake.sizes cannot be bound itself, it is set by",
        ),
        ("bake.sizes = %NOWHERE", "a.gin:3: bake.sizes cannot be bound itself"),
        ("bake.sizes = None", "a.gin:3: bake.sizes cannot be bound itself"),
        ("bake.steps = %gin.REQUIRED", "bake.steps must be given: in a gin file, or as --gin.bak"),
    ],
)
def test_mistakes_in_a_file_are_named_with_their_line(tmp_path, line, named):
    assert refusal(tmp_path, BASE + line).startswith(named)


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        (("bake.steps", "x"), "--gin.bake.steps=x: bake.steps = 'x': expected int"),
        (("bake.steps", ""), "--gin.bake.steps=: bake.steps = '': expected int"),
        (("bake.names", "a"), "--gin.bake.names=a: bake.names = 'a': expected list[str] | None"),
        (("boil.steps", "3"), "--gin.boil.steps=3: unknown name 'boil'"),
        (("bake.stepz", "3"), "--gin.bake.stepz=3: bake has no parameter 'stepz'"),
        (("steps", "3"), "--gin.steps=3: %steps is used nowhere"),
        (("small/bake.steps", "3"), "--gin.small/bake.steps=3: unknown scope 'small'"),
        (("bake.steps", "%home"), "--gin.bake.steps=%home: %home has no value"),
        (("bake.steps", "@home"), "--gin.bake.steps=@home: bake.steps = @home: expected int"),
        (("bake.sizes", "small"), "--gin.bake.sizes=small: bake.sizes cannot be bound itself, i"),
    ],
)
def test_mistakes_in_a_flag_are_named(tmp_path, flag, named):
    assert refusal(tmp_path, BASE, flag).startswith(named)


def test_all_that_is_missing_is_named_at_once(tmp_path):
    found = refusal(tmp_path, "bake.workdir = %gin.REQUIRED")
    assert found.startswith("bake.workdir, Sizes.depth must be given")
    assert "--gin.bake.workdir=… --gin.Sizes.depth=…" in found
    assert read(tmp_path, "bake.workdir = %gin.REQUIRED", *[
        ("bake.workdir", "w"), ("Sizes.depth", "1")
    ])["workdir"] == "w"  # fmt: skip


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"--gin_file=none\.gin: no such file, here or in .*gin"):
        config.read([bake], ["none.gin"], [])
    with pytest.raises(UserError, match="no such file"):
        config.read([bake], [str(tmp_path)], [])
    (tmp_path / "a.gin").write_bytes(b"bake.note = '\xff'")
    with pytest.raises(UserError, match=r"a\.gin: not a text file in UTF-8"):
        config.read([bake], [str(tmp_path / "a.gin")], [])
    (tmp_path / "a.gin").write_text(f"include '{tmp_path / 'a.gin'}'")
    with pytest.raises(UserError, match=r"a\.gin:1: include .* the file includes itself"):
        config.read([bake], [str(tmp_path / "a.gin")], [])


def test_includes_are_bound_in_their_place(tmp_path):
    """What stands before an include is overridden by it, what stands after it overrides it."""
    (tmp_path / "b.gin").write_text("bake.steps = 10\nbake.rate = 10.0\n")
    include = f"bake.steps = 1\ninclude '{tmp_path / 'b.gin'}'\nbake.rate = 2.0\n"
    found = read(tmp_path, BASE + include)
    assert (found["steps"], found["rate"]) == (10, 2.0)
    (tmp_path / "b.gin").write_text("\nbake.steps = 'x'")
    assert refusal(tmp_path, BASE + include).startswith("b.gin:2: bake.steps")


def test_shipped_files_are_found_by_their_short_name():
    config.read(map(find_stage, STAGES), ["models/pangu_pi_1b.gin", "hardware/cpu.gin"], [])


@pytest.mark.parametrize("row", ["none", "l1", "l2", "taylor", "activation", "learned"])
def test_rows_of_the_table_of_inheritance(row):
    """With what they require, each gives its three stages all that they need."""
    stages = {"train": ["dataset", "workdir"]}
    if row != "none":
        stages["train"].append("checkpoint")
        stages["rank-teacher"] = ["teacher", "dataset", "workdir"]
        stages["inherit"] = ["teacher", "importance", "tokenizer", "workdir"]
    required = [
        (f"{stage.replace('-', '_')}.{name}", "somewhere")
        for stage, names in stages.items()
        for name in names
    ]
    config.read(map(find_stage, STAGES), [f"paper/inheritance/{row}.gin"], required)
    values = {stage: config.arguments(find_stage(stage))[0] for stage in stages}
    assert values["train"]["checkpoint"] == (None if row == "none" else "somewhere")
    assert values["train"]["model"].width == 1792
    if row != "none":
        assert values["rank-teacher"]["method"] == row
        assert values["rank-teacher"]["model"] == values["inherit"]["model"]


@pytest.mark.parametrize(
    "row, rounds, rate, parts",
    [
        ("one", 1, 0.5, 1),
        ("two", 2, 0.5, 1),
        ("two_whole", 2, 1.0, 1),
        ("two_parts", 2, 0.5, 8),
        ("three", 3, 0.5, 1),
    ],
)
def test_rows_of_the_table_of_rounds(row, rounds, rate, parts):
    """With what they require, each gives all stages of train-rounds all that they need."""
    required = [("train_rounds.dataset", "d"), ("train_rounds.workdir", "w")]
    config.read(map(find_stage, STAGES), [f"paper/rounds/{row}.gin"], required)
    assert config.arguments(find_stage("train-rounds"))[0]["rounds"] == rounds
    found = settings(find_stage("train"), dataset="d", workdir="w")
    assert (found["steps"], found["global_batch"]) == (75_000, 1024)
    found = settings(find_stage("select-batches"), scores="s", workdir="w")
    assert (found["rate"], found["parts"], found["method"]) == (rate, parts, "loss")
    settings(find_stage("score-batches"), checkpoint="c", dataset="d", workdir="w")


def brew(sizes: Sizes | None = None) -> None: ...


def test_an_optional_dataclass_is_built_where_something_is_bound(tmp_path):
    config.read([brew], [], [])
    assert config.arguments(brew)[0] == {"sizes": None}
    assert config.arguments(brew, sizes=Sizes(3))[0] == {"sizes": Sizes(3)}
    config.read([brew], [], [("Sizes.depth", "5")])
    values, effective = config.arguments(brew)
    assert values == {"sizes": Sizes(5)} and "Sizes.depth = 5\n" in effective
    assert config.describe(brew) == [
        line.replace("must be given", "must be given, unless nothing of Sizes is bound")
        for line in config.describe(Sizes)
    ]


def test_what_sets_a_parameter_that_is_built_is_named(tmp_path):
    config.read([brew], [], [("Sizes.depth", "5")])
    with pytest.raises(UserError, match=r"it is set by Sizes\.depth, Sizes\.ratio$"):
        config.read([brew], [], [("Sizes.depth", "5"), ("brew.sizes", "None")])


def test_a_scope_wins_where_it_is_entered(tmp_path):
    """Over what is bound without one, from files or flags; what is given wins over both."""
    text = BASE + "n = 7\nbig/Sizes.depth = 9\nbig/bake.steps = %n\nwide/bake.steps = 5"
    found = read(tmp_path, text, ("bake.steps", "4"), ("big/Sizes.ratio", "2"))
    assert (found["sizes"], found["steps"]) == (Sizes(2), 4)
    with config.within("big", {"bake.rate": 0.5}):
        values, effective = config.arguments(bake)
        assert (values["sizes"], values["steps"], values["rate"]) == (Sizes(9, 2.0), 7, 0.5)
        assert "Sizes.depth = 9\n" in effective and "big" not in effective
        with config.within("wide"):
            assert config.arguments(bake)[0]["steps"] == 5
        assert config.arguments(bake)[0]["steps"] == 7
    assert config.arguments(bake)[0] == found
    assert config.bound_with("wide") == {"bake.steps": f"{tmp_path / 'a.gin'}:6"}
    read(tmp_path)
    assert not config.bound_with("wide")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("big/bake.stepz = 3", "a.gin:3: bake has no parameter 'stepz'"),
        ("big/boil.steps = 3", "a.gin:3: unknown name 'boil'"),
        ("big/steps = 3\nbake.steps = %steps", "a.gin:3: a macro has no scope, expected steps ="),
    ],
)
def test_what_a_scope_binds_is_checked(tmp_path, line, named):
    assert named in refusal(tmp_path, BASE + line)


def test_a_value_of_a_scope_is_typed(tmp_path):
    read(tmp_path, BASE + "big/bake.steps = 'x'")
    with config.within("big"), pytest.raises(UserError, match=r"a\.gin:3: bake\.steps = 'x': ex"):
        config.arguments(bake)


def test_given_values_win_over_bindings(tmp_path):
    read(tmp_path, BASE + "bake.steps = 9")
    values, effective = config.arguments(bake, steps=4, sizes=Sizes(7))
    assert (values["steps"], values["sizes"]) == (4, Sizes(7))
    assert "bake.steps = 4\n" in effective and "Sizes.depth = 7\n" in effective


def test_effective_config_gives_the_same_arguments_again(tmp_path):
    """With defaults written out, so that a later default changes nothing."""
    given = [("train.dataset", "d"), ("train.workdir", "w"), ("train.mixture", "{'a': 1}")]
    stages = list(map(find_stage, STAGES))
    config.read(stages, ["recipes/laptop.gin"], [*given, ("reproduce.workdir", "r")], SCOPES)
    values, effective = config.arguments(find_stage("train"))
    (tmp_path / "effective.gin").write_text(effective)
    config.read(stages, [str(tmp_path / "effective.gin")], [])
    again, effective_again = config.arguments(find_stage("train"))
    assert effective_again == effective
    assert {name: again[name] for name in values} == values
    assert "train.z_loss = 0.0\n" in effective and "Optimizer.clip = 1.0\n" in effective
    assert again["mixture"] == {"a": 1.0} and not math.isnan(again["optimizer"].eps)


def test_a_dataclass_is_built_from_files_alone(tmp_path):
    shape = config.build(ModelShape, "models/pangu_pi_1b_pro.gin")
    assert (shape.depth, shape.width) == (21, 1792)
    read(tmp_path, BASE + "bake.steps = 9")
    config.build(ModelShape, "models/pangu_pi_1b_pro.gin")
    assert config.arguments(bake, sizes=Sizes(7))[0]["steps"] == 9  # what was read before stays
    (tmp_path / "part.gin").write_text("ModelShape.depth = 2")
    with pytest.raises(UserError, match=r"ModelShape\.width, .* must be given"):
        config.build(ModelShape, str(tmp_path / "part.gin"))
