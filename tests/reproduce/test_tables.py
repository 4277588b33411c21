"""The paper's tables: every row's file, and small tables run."""

import json
import types

import pytest
from recipes import TEACHER, table_argv

from pangu_tiny import cli, config
from pangu_tiny.cli import STAGES, find_stage
from pangu_tiny.errors import UserError
from pangu_tiny.model.layout import check_divides
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.reproduce.comparison import correlation_of
from pangu_tiny.reproduce.plans import within_row
from pangu_tiny.reproduce.reproduce import reproduce
from pangu_tiny.reproduce.tables import SCOPES_AND_ROWS, TABLES, find_table
from pangu_tiny.rounds.stages import settings
from pangu_tiny.training.train import train

OWN = {
    "batch_rate": {
        f"batch_16m_r_{exponent}/train.{key}": value
        for exponent in ("0_5", "1")
        for key, value in (("steps", 2), ("global_batch", 8))
    },
    "grouped_queries": {f"{row}/train.steps": 2 for row in ("kv_8", "kv_4")},
    "tokenizer_size": {
        "vocab_72k/ModelShape.vocab_size": 300,
        "vocab_100k/ModelShape.vocab_size": 310,
    },
    "inheritance": {"MaskTraining.steps": 2},
}
"""What is bound beside, of the two rows that are run."""
ROWS = [(name, row) for name, table in TABLES.items() for row in table.rows]


def training(name, row):
    with within_row(name, row):
        return settings(train, dataset="", workdir="")


def read(*files, **bindings):
    given = [(name, str(value)) for name, value in bindings.items()]
    config.read(map(find_stage, STAGES), files, given, SCOPES_AND_ROWS)


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_row_differs_in_what_its_table_says(name, row):
    """At the paper's scale by its file, at the laptop's by that or by the overlay; and in nothing
    else from the first row; and it is laid out on a slice."""
    rows = (row, next(iter(TABLES[name].rows)))
    files = [f"paper/{name}/{one}.gin" for one in rows]
    own, first = (config.bindings_of(map(find_stage, STAGES), file) for file in files)
    differs = {key for key in own.keys() | first.keys() if own.get(key) != first.get(key)}
    assert differs <= set(TABLES[name].varies)
    slice_of_256 = types.SimpleNamespace(shape={"data": 16, "fsdp": 16, "tensor": 1})
    shape = {key.partition(".")[2]: value for key, value in own.items() if "ModelShape" in key}
    check_divides(ModelShape(**shape), slice_of_256)
    for overlay in ("laptop", "gpu"):
        read(f"paper/{overlay}.gin")
        table = find_table(name)
        small, base = (training(name, one) for one in rows)
        tokens, others = (one["steps"] * one["global_batch"] for one in (small, base))
        assert tokens == pytest.approx(others, rel=0.01)
        if table.equal:
            assert small["model"].parameters == pytest.approx(base["model"].parameters, rel=0.02)
        if name == "expanding_rate":
            rate = small["model"].ffn_width / small["model"].width
            assert rate == pytest.approx(table.rows[row], rel=0.001)
        if name == "modules":
            assert small["model"].series_terms == own["ModelShape.series_terms"]


def test_the_files_of_a_table_are_its_rows():
    for name, table in TABLES.items():
        folder = config.shipped_files() / "paper" / name
        files = {path.stem for path in folder.glob("*.gin")} - {"recipe", "speed"}
        assert files == table.rows.keys()
        own = [config.bindings_of(map(find_stage, STAGES), str(path)) for path in folder.glob("*")]
        assert set(table.varies) <= {key for one in own for key in one}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.pods] if place else [])
        for place, name in enumerate(TABLES)
    ],
)
def test_two_rows_of_a_table_run(name, text, tmp_path, monkeypatch, capsys):
    table = TABLES[name]
    two = dict(list(table.rows.items())[-2:])
    monkeypatch.setitem(TABLES, name, table._replace(rows=two))
    given = {**(TEACHER if table.plan == "inherit" else {}), **OWN.get(name, {})}
    assert cli.main(table_argv(name, text, tmp_path, **given)) == 0
    found = json.loads((tmp_path / "table.json").read_text())["results"]
    assert [row["row"] for row in found["rows"]] == list(two)
    assert all(row["bits_per_byte"].keys() == {"1"} for row in found["rows"])
    gain = found["rows"][0]["mean"] - found["rows"][1]["mean"]
    assert (
        found["rows"][1]["gain"]["mean"] == pytest.approx(gain) and found["rows"][0]["gain"] is None
    )
    steps = [found["rows"][0]["tokens"] // (8 * 32), found["rows"][1]["tokens"] // (8 * 32)]
    assert steps == {"rounds": [3, 3], "sampling_rate": [4, 4]}.get(name, [2, 2])
    page, markdown = ((tmp_path / file).read_text() for file in ("report.html", "table.md"))
    assert f"| {list(two)[1]} |" in markdown and table.reports in page
    assert (tmp_path / "table.svg").read_text() in page
    assert table.title in capsys.readouterr().out


def test_ranks_are_compared():
    """Of three in the same order one of six orders is as far from 0, and the reverse."""
    same = correlation_of([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    assert (same.rho, same.p, same.rows) == (pytest.approx(1), pytest.approx(2 / 6), 3)
    assert correlation_of([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]).rho == pytest.approx(-1)
    assert correlation_of([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert correlation_of([1.0, 2.0], [1.0, 2.0]) is None
    # Orders are drawn where they are many; of ten in the same order hardly any is as far.
    assert correlation_of(range(10), range(10)).p < 0.001
    assert str(same) == "+1.00 (p = 0.333, 3 rows)"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reproduce.table": "modul"}, "reproduce.table is 'modul', expected modules"),
        (
            {"train.init": "gpt2"},
            "--gin.train.init=gpt2: the rows of table initialisation differ in",
        ),
        (
            {"reproduce.table_rows": ["gpt2", "zero"]},
            "reproduce.table_rows is 'zero', expected one of constant, gpt2, internevo",
        ),
        ({"reproduce.table_rows": ["gpt2"]}, "reproduce.table_rows is ['gpt2'], expected two"),
        (
            {"reproduce.rungs": ["plain"]},
            "reproduce.table goes with table_rows",
        ),
        (
            {"reproduce.table": "grouped_queries", "kv_8/ModelShape.kv_heads": 3},
            "ModelShape.heads 4 is not divisible by ModelShape.kv_heads 3",
        ),
        (
            {"reproduce.table": "inheritance", "teacher/ModelShape.depth": 4},
            "ModelShape.depth is 5, the teacher has only 4",
        ),
        (
            {"reproduce.table": "layer_skipping", "LayerChoice.first": 4, "LayerChoice.last": 2},
            "LayerChoice.first 4 and last 2 are more than the 5 layers",
        ),
        (
            {"reproduce.table": "sampling_rate", "share_0_1/select_batches.rate": 1.5},
            "select_batches.rate is 1.5",
        ),
        (
            {"reproduce.table": "layer_skipping", "train.checkpoint": "x"},
            "--gin.train.checkpoint=x: rows start from the teacher",
        ),
        (
            {"reproduce.table": "inheritance", "l1/MaskTraining.steps": 4},
            "--gin.l1/MaskTraining.steps=4: all rows of table inheritance share MaskTraining.steps",
        ),
        ({"reproduce.parameter_tolerance": -1}, "reproduce.parameter_tolerance is -1"),
        ({"reproduce.seeds": []}, "reproduce.seeds is [], expected different ones"),
        ({"reproduce.seeds": [1, 1]}, "reproduce.seeds is [1, 1], expected different ones"),
        (
            {"reproduce.table": "expanding_rate", "reproduce.parameter_tolerance": 0.001},
            "row rate_2_0 of table expanding_rate has ",
        ),
        ({"ModelShape.vocab_size": 311}, "constant: ModelShape.vocab_size is 311, the tokenizer"),
    ],
)
def test_mistakes_are_one_line(changes, said, text, tmp_path, capsys):
    assert cli.main(table_argv("initialisation", text, tmp_path / "run", **changes)) == 2
    assert said in capsys.readouterr().err


def test_a_row_is_bound_for_a_table_alone(tmp_path):
    read("recipes/quickstart.gin", **{"depth_9/ModelShape.depth": 2, "reproduce.workdir": "x"})
    with pytest.raises(UserError, match="depth_9 is a row of a table"):
        reproduce(str(tmp_path))
