"""reproduce: text in, a ladder of models and a report out, by the recipes that are shipped, made
small."""

import base64
import functools
import json
import re

import numpy as np
import pytest
from recipes import argv
from tiny_runs import prepare

from pangu_tiny import cli
from pangu_tiny.errors import UserError
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.reproduce import ladder as ladder_file
from pangu_tiny.reproduce.reproduce import reproduce
from pangu_tiny.reproduce.rungs import RUNGS
from pangu_tiny.rounds import train_rounds as rounds
from pangu_tiny.rounds.stages import settings
from pangu_tiny.training.train import Trained, train


def results(workdir):
    return json.loads((workdir / "report.json").read_text())["results"]


def identity(folder):
    return json.loads((folder / "identity.json").read_text())


def test_what_each_rung_is(ladder):
    """By the folders of its models."""
    rows = {name: identity(ladder / name) for name in ("big_data", "data")}
    description = json.loads((ladder / "data" / "dataset.json").read_text())
    cut = json.loads((ladder / "cut" / "manifest.json").read_text())
    assert rows["big_data"] != rows["data"] and cut
    first = {
        rung: identity(ladder / "models" / f"{rung}-1" / "round_1") for rung in RUNGS
    }  # fmt: skip
    assert [first[rung]["model"]["depth"] for rung in RUNGS] == [1, 1, 2, 2, 2]
    assert first["architecture"]["model"] == first["rounds"]["model"]
    compact = description["digest"]
    assert [first[rung]["dataset"] == compact for rung in RUNGS] == [False, *[True] * 4]
    assert [bool(first[rung]["checkpoint"]) for rung in RUNGS] == [*[False] * 3, True, True]
    assert {one["seed"] for one in first.values()} == {1}


def test_equal_tokens_and_one_corpus(ladder):
    found = results(ladder)
    tokens = {
        (model["rung"], model["protocol"]): model["tokens"]
        for model in found["models"]
        if model["seed"] == 1
    }
    assert {tokens[rung, "equal"] for rung in RUNGS} == {6 * 8 * 32}
    steps = {(m["rung"], m["protocol"]): m["steps"] for m in found["models"]}
    assert steps["rounds", "equal"] == [4, 2] and steps["rounds", "paper"] == [6, 3]
    text = found["text"]
    for model in found["models"]:
        rows = text["big" if model["rung"] == "plain" else "compact"]
        assert model["bytes"] == round(model["tokens"] * rows["bytes_a_token"])
    fewer = text["compact"]["bytes_a_token"] / text["big"]["bytes_a_token"]
    assert steps["plain", "paper"] == [round(6 * fewer)]
    assert set(tokens) == {(rung, "equal") for rung in RUNGS} | {
        ("plain", "paper"), ("rounds", "paper")
    }  # fmt: skip


def test_the_second_round_of_the_paper_goes_on_from_the_rung_below(ladder):
    models = ladder / "models"
    above = identity(models / "inheritance-1" / "round_2")
    assert above["checkpoint"] and above["keep_moments"]
    names = {path.name for path in models.iterdir()}
    assert names == {f"{rung}-1" for rung in (*RUNGS, "plain-paper")}


def test_the_report_says_what_was_evaluated(ladder):
    found = results(ladder)
    for model in found["models"]:
        if model["protocol"] == "equal":
            folder = ladder / "models" / f"{model['rung']}-{model['seed']}"
            number = len(model["steps"])
            told = json.loads((folder / f"evaluation_{number}" / "evaluation.json").read_text())
            assert told["bits_per_byte"] == model["bits_per_byte"]
            assert model["sources"].keys() == {"one", "two"}
    for line in found["ladder"]["equal"]["rungs"]:
        values = [
            m["bits_per_byte"]
            for m in found["models"]
            if (m["rung"], m["protocol"]) == (line["rung"], "equal")
        ]
        assert values == [line["mean"]]
    shape = ModelShape(**found["rungs"]["rounds"]["model"])
    assert found["rungs"]["rounds"]["parameters"] == shape.parameters
    teacher = json.loads((ladder / "teacher_evaluation" / "evaluation.json").read_text())
    assert found["teacher"]["bits_per_byte"] == teacher["bits_per_byte"]
    assert found["teacher"]["tokens"] == 6 * 8 * 32


def test_models_end_on_benchmarks(ladder):
    """Of each rung the model of the first seed."""
    found, page = results(ladder)["benchmarks"], (ladder / "report.html").read_text()
    assert list(found) == list(RUNGS)
    for rung, scores in found.items():
        folder = ladder / "models" / f"{rung}-1" / f"benchmark_{rung}"
        told = json.loads((folder / "benchmark.json").read_text())
        assert told["tasks"] == scores["tasks"] and told["tasks"].keys() == {"boolq", "c3"}
        assert f"<td>{rung}</td><td>{scores['tasks']['boolq']['score']:.2f}</td>" in page
    assert "Benchmarks, beside the paper" in page and "<td>PanGu-π-1B Pro</td>" in page


def test_the_page_shows_it(ladder):
    found, page = results(ladder), (ladder / "report.html").read_text()
    plot = (ladder / "ladder.svg").read_text()
    assert plot.startswith("<svg") and plot in page
    for protocol, compared in found["ladder"].items():
        assert f"Protocol {protocol}: " in page
        for line in compared["rungs"] + compared["sources"]["two"]:
            assert f"<td>{line['mean']:.3f}</td>" in page
    assert page.count("<td>yes</td>") + page.count("<td>no</td>") == 4
    assert "<b>the &lt;b&gt;</b>" in page and "<h2>Forgetting</h2>" in page


@pytest.mark.pods
def test_rates_are_tuned_on_a_seed_of_their_own(changes, tmp_path, capsys):
    """The best of the grid is taken for all others."""
    few = {
        **changes,
        "reproduce.rungs": ["tokenizer"],
        "reproduce.seeds": [1, 2],
        "reproduce.rates": [1e-5, 4e-3],
    }
    assert cli.main(argv("laptop", tmp_path / "run", **few)) == 0
    found = results(tmp_path / "run")
    assert not (tmp_path / "run" / "teacher").exists(), "no rung inherits"
    tuned = found["tuning"]["tokenizer"]
    assert tuned["0.004"] < tuned["1e-05"]
    values = [model["bits_per_byte"] for model in found["models"]]
    assert [model["learning_rate"] for model in found["models"]] == [4e-3, 4e-3]
    assert [model["seed"] for model in found["models"]] == [1, 2]
    (line,) = found["ladder"]["equal"]["rungs"]
    assert line["mean"] == pytest.approx(np.mean(values))
    assert (
        line["half_range"] == pytest.approx(abs(values[0] - values[1]) / 2)
        and values[0] != values[1]
    )
    assert "at the edge of the grid" in (tmp_path / "run" / "report.html").read_text()
    assert cli.main(argv("laptop", tmp_path / "run", **few, **{"reproduce.tuning_seed": 1})) == 2
    assert "reproduce.tuning_seed is 1, expected none of" in capsys.readouterr().err


def test_the_rungs_stand_side_by_side(ladder, again, capsys):
    assert cli.main(again) == 0
    out = capsys.readouterr().out
    found = json.loads((ladder / "report.json").read_text())["results"]["ladder"]
    found = {protocol: compared["rungs"] for protocol, compared in found.items()}
    assert [line["rung"] for line in found["equal"]] == list(RUNGS)
    for line in found["equal"] + found["paper"]:
        assert f"  {line['rung']:<13}{line['mean']:.3f}" in out
    assert re.search(r"rounds: [0-9.]+% (less|more) than plain", out)
    assert f"report       {ladder / 'report.html'}" in out
    assert "recipes/laptop.gin" in out and "recipes/quickstart.gin" in out


def test_the_report_shows_curves(ladder):
    report = (ladder / "report.html").read_text()
    curve = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", report).group(1))
    assert curve.startswith(b"\x89PNG\r\n")
    assert "<p>4 + 2 steps.</p>" in report and "<h2>Forgetting</h2>" in report


def test_what_was_found_is_apart_from_what_it_was_run_on(ladder):
    told = json.loads((ladder / "report.json").read_text())
    assert told["run"]["versions"]["jax"] and str(ladder) not in json.dumps(told["results"])
    assert [sample["prompt"] for sample in told["results"]["samples"]] == ["the <b>", "cat"]


def test_a_corpus_that_is_too_small_is_named(ladder, text, tmp_path, capsys):
    """Before anything is trained, with text or with rows."""
    few = {"reproduce.rungs": ["architecture"], "train.steps": 1000}
    given = {**few, "reproduce.dataset": ladder / "data"}
    assert cli.main(argv("laptop", tmp_path / "again", **given)) == 2
    err = capsys.readouterr().err
    assert "architecture: train.steps × train.global_batch is 8,000 rows, " in err
    assert "at most reproduce.max_epochs, 4: take more text" in err
    assert not (tmp_path / "again").exists()
    given = {**few, "reproduce.text": text, "prepare_data.text_key": "body"}
    assert cli.main(argv("laptop", tmp_path / "again", **given)) == 2
    assert "at most reproduce.max_epochs" in capsys.readouterr().err
    assert not (tmp_path / "again" / "models").exists()


@pytest.mark.parametrize(
    ("pieces", "held_out", "named"),
    [
        (290, 0.1, "architecture: ModelShape.vocab_size is 300, the tokenizer of dataset"),
        (300, 0.0, "holds nothing out"),
    ],
)
def test_rows_that_do_not_fit_are_named(pieces, held_out, named, tmp_path, capsys):
    rows = prepare(tmp_path, vocab_size=pieces, held_out_fraction=held_out)
    given = {"reproduce.rungs": ["architecture"], "reproduce.dataset": rows}
    assert cli.main(argv("laptop", tmp_path / "run", **given)) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_recipe_is_refused(ladder, again, capsys):
    """By the first stage that differs, or because it is no recipe's."""
    assert cli.main([*again, "--gin.teacher/train.steps=7"]) == 2
    err = capsys.readouterr().err
    assert f"workdir {ladder / 'teacher'} holds another run: " in err
    assert "steps is 6 there, 7 here" in err
    flag = f"--gin.reproduce.workdir={ladder / 'teacher'}"
    assert cli.main([*again, flag]) == 2
    assert "was made by train, expected a folder of reproduce" in capsys.readouterr().err


def test_every_stage_leaves_its_effective_config(ladder):
    for stage, bound in (
        ("big_data", "prepare_data.vocab_size = 310"),
        ("counts", "count_tokens.dataset ="),
        ("tokenizer", "compress_tokenizer.vocab_size = 300"),
        ("data", "prepare_data.sequence_length = 32"),
        ("teacher", "ModelShape.depth = 3"),
        ("importance", "rank_teacher.output_grams = True"),
        ("cut", "inherit.correct_outputs = True"),
        ("models/plain-1/round_1", "ModelShape.depth = 1"),
        ("models/rounds-1/round_1", "train.steps = 4"),
        ("models/rounds-1/round_2", "train.round_index ="),
        ("models/rounds-1/evaluation_2", "Hardware.per_device_batch = 8"),
    ):
        assert bound in (ladder / stage / "config.gin").read_text()
        assert (ladder / stage / "environment.json").exists()


def test_what_is_done_is_not_done_again(ladder, again):
    """The time of each logged step is that of the first run, and no row is written anew."""

    def done():
        shards = (ladder / "data").glob("*array_record*")
        written = {path.name: path.stat().st_mtime_ns for path in shards}
        metrics = sorted((ladder / "models").glob("*/round_?/metrics/*.jsonl"))
        evaluations = (ladder / "models").glob("*/evaluation_?/evaluation.json")
        written |= {str(path): path.stat().st_mtime_ns for path in evaluations}
        assert len(metrics) == 8
        return [path.read_text() for path in metrics], written

    def results():
        return json.loads((ladder / "report.json").read_text())["results"]

    before = done(), results()
    for name in ("report.html", "report.json", "ladder.svg"):
        (ladder / name).unlink()
    assert cli.main(again) == 0
    assert (ladder / "report.html").exists() and (ladder / "ladder.svg").exists()
    assert (done(), results()) == before


def test_a_stopped_recipe_says_so_and_evaluates_nothing(again, monkeypatch, capsys):
    """What `train` returns after ^C, which `tests/training/test_resume.py` sends to processes."""
    stopped = functools.wraps(train)(lambda **given: train(**given)._replace(step=3))
    monkeypatch.setattr(rounds, "train", stopped)
    assert cli.main(again) == 143
    out, err = capsys.readouterr()
    assert err.endswith("pangu-tiny reproduce: stopped at step 3 of 6; run again to resume\n")
    assert "rung rounds" not in out


def test_several_hosts_begin_with_rows(ladder, monkeypatch):
    """They would all prepare the same folder at once."""
    monkeypatch.setattr("pangu_tiny.topology.processes.count", lambda: 2)
    with pytest.raises(UserError, match=r"reproduce\.dataset is None, found 2 processes"):
        reproduce(str(ladder))


def test_rows_may_be_given_instead_of_text(ladder, tmp_path, monkeypatch, capsys):
    """No text is prepared then; the stages after it get these rows, and start as bound."""
    rows, seen = str(ladder / "data"), []

    def train_rounds(dataset: str, workdir: str, rounds: int = 2) -> Trained:
        seen.append((dataset, settings(train, workdir="")["checkpoint"]))
        return Trained(1, 6, "", True)

    monkeypatch.setattr(ladder_file, "train_rounds", train_rounds)
    given = {"reproduce.dataset": rows, "train.checkpoint": "cut", "train.dataset": rows}
    assert cli.main(argv("laptop", tmp_path / "again", **given)) == 2
    assert "rung plain takes rows of the big tokenizer" in capsys.readouterr().err
    given["reproduce.rungs"] = ["rounds"]
    assert cli.main(argv("laptop", tmp_path / "again", **given)) == 143
    given["reproduce.rungs"] = ["architecture", "inheritance"]
    assert cli.main(argv("laptop", tmp_path / "again", **given)) == 143
    assert seen == [(rows, "cut"), (rows, None)], "what does not inherit starts at random"


def test_a_teacher_of_ones_own(ladder, text, tmp_path, capsys):
    """A checkpoint, whose tokenizer is then the big one; with the other small recipe."""
    given = {
        "reproduce.text": text,
        "prepare_data.text_key": "body",
        "reproduce.teacher": ladder / "teacher",
        "reproduce.rungs": ["inheritance"],
    }
    assert cli.main(argv("quickstart", tmp_path / "run", **given)) == 0
    told = json.loads((tmp_path / "run" / "report.json").read_text())["results"]
    assert told["teacher"]["tokens"] is None and not (tmp_path / "run" / "teacher").exists()
    before = json.loads((ladder / "report.json").read_text())["results"]
    assert told["text"]["big"]["tokenizer"] == before["text"]["big"]["tokenizer"]
    assert told["models"][0]["steps"] == [6]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Held-out text, protocol equal</h2>" in page and "<h2>Protocol" not in page
    bound = {**given, "prepare_data.tokenizer": ladder / "tokenizer" / "tokenizer.model"}
    assert cli.main(argv("quickstart", tmp_path / "other", **bound)) == 2
    assert "prepare_data.tokenizer and reproduce.teacher are bound" in capsys.readouterr().err
