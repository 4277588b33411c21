"""reproduce: text in, a report out, by the recipe that is shipped for laptops, made small."""

import base64
import functools
import json
import re

import pytest
from tiny_runs import prepare

from pangu_tiny import cli
from pangu_tiny.errors import UserError
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.reproduce.reproduce import reproduce
from pangu_tiny.rounds import train_rounds as rounds
from pangu_tiny.training.train import Trained

SMALL = {
    "prepare_data.text_key": "body",
    "prepare_data.vocab_size": 310,
    "compress_tokenizer.vocab_size": 300,
    "prepare_data.sequence_length": 32,
    "prepare_data.held_out_fraction": 0.1,
    "ModelShape.vocab_size": 300,
    "ModelShape.depth": 2,
    "ModelShape.width": 32,
    "ModelShape.ffn_width": 48,
    "train.steps": 6,
    "train.evaluate_every": 3,
    "Watching.log_every": 1,
    "generate.tokens": 4,
    "reproduce.prompts": ["the <b>", "cat"],
}


def argv(text, workdir):
    bindings = {**SMALL, "reproduce.text": text, "reproduce.workdir": workdir}
    flags = [f"--gin.{name}={value}" for name, value in bindings.items()]
    return ["reproduce", "--gin_file=recipes/laptop.gin", *flags]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    prepare(folder)
    text = folder / "text.jsonl"
    text.write_text(text.read_text().replace('{"text":', '{"body":'))
    return text


@pytest.fixture(scope="module")
def workdir(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reproduced")
    assert cli.main(argv(text, workdir)) == 0
    return workdir


def test_the_report_shows_what_was_measured(workdir):
    report = (workdir / "report.html").read_text()
    measured = json.loads((workdir / "evaluation" / "evaluation.json").read_text())
    for name in ("bits_per_byte", "gzip_9_bits_per_byte", "xz_9_bits_per_byte"):
        assert f"<td>{measured[name]:.3f}</td>" in report
    curve = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", report).group(1))
    assert curve.startswith(b"\x89PNG\r\n")
    assert "<b>the &lt;b&gt;</b>" in report and "<b>cat</b>" in report, "a prompt is text"
    assert "6 + 3 steps of 8 × 32 tokens" in report
    assert "<h2>Forgetting</h2>" in report and report.count("data:image/png") == 2


def test_what_was_found_is_apart_from_what_it_was_run_on(workdir):
    told = json.loads((workdir / "report.json").read_text())
    results, measured = told["results"], workdir / "evaluation" / "evaluation.json"
    assert results["evaluation"] == json.loads(measured.read_text())
    assert results["steps"] == [6, 3] and results["tokens_a_step"] == 8 * 32
    assert results["parameters"] == ModelShape(**results["model"]).parameters
    assert [sample["prompt"] for sample in results["samples"]] == ["the <b>", "cat"]
    assert told["run"]["versions"]["jax"] and str(workdir) not in json.dumps(results)


def test_a_corpus_that_is_too_small_is_named(workdir, text, tmp_path, capsys):
    flags = [flag for flag in argv(text, tmp_path / "again") if "reproduce.text" not in flag]
    flags += [f"--gin.reproduce.dataset={workdir / 'data'}", "--gin.train.steps=1000"]
    assert cli.main(flags) == 2
    err = capsys.readouterr().err
    assert "is 8,000 rows, " in err and "at most reproduce.max_epochs, 4: take more text" in err
    assert not (tmp_path / "again").exists()


def test_every_stage_leaves_its_effective_config(workdir):
    for stage, bound in (
        ("big_data", "prepare_data.vocab_size = 310"),
        ("counts", "count_tokens.dataset ="),
        ("tokenizer", "compress_tokenizer.vocab_size = 300"),
        ("data", "prepare_data.sequence_length = 32"),
        ("model/round_1", "train.steps = 6"),
        ("model/round_2", "train.round_index ="),
        ("evaluation", "Hardware.attention = 'blocked'"),
    ):
        assert bound in (workdir / stage / "config.gin").read_text()
        assert (workdir / stage / "environment.json").exists()


def test_what_is_done_is_not_done_again(workdir, text, capsys):
    """The time of each logged step is that of the first run, and no row is written anew."""

    def done():
        shards = (workdir / "data").glob("*array_record*")
        written = {path.name: path.stat().st_mtime_ns for path in shards}
        rounds = sorted((workdir / "model").glob("round_?/metrics/*.jsonl"))
        assert len(rounds) == 2
        return [path.read_text() for path in rounds], written

    def results():
        return json.loads((workdir / "report.json").read_text())["results"]

    before = done(), results()
    for name in ("report.html", "report.json"):
        (workdir / name).unlink()
    assert cli.main(argv(text, workdir)) == 0
    assert (workdir / "report.html").exists()
    assert (done(), results()) == before
    assert "bits per byte on held-out documents" in capsys.readouterr().out


def test_a_stopped_recipe_says_so_and_evaluates_nothing(workdir, text, monkeypatch, capsys):
    """What `train` returns after ^C, which `tests/training/test_resume.py` sends to processes."""
    train = rounds.train
    stopped = functools.wraps(train)(lambda **given: train(**given)._replace(step=3))
    monkeypatch.setattr(rounds, "train", stopped)
    assert cli.main(argv(text, workdir)) == 143
    out, err = capsys.readouterr()
    assert err.endswith("pangu-tiny reproduce: stopped at step 3 of 6; run again to resume\n")
    assert "evaluate" not in out


def test_several_hosts_begin_with_rows(workdir, monkeypatch):
    """They would all prepare the same folder at once."""
    monkeypatch.setattr("pangu_tiny.topology.processes.count", lambda: 2)
    with pytest.raises(UserError, match=r"reproduce\.dataset is None, found 2 processes"):
        reproduce(str(workdir))


def test_rows_may_be_given_instead_of_text(workdir, text, tmp_path, monkeypatch, capsys):
    """No text is prepared then; the stages after it get these rows."""
    rows, seen = str(workdir / "data"), []

    def stopped(dataset: str, workdir: str) -> Trained:
        seen.append(dataset)
        return Trained(1, 6, "", True)

    monkeypatch.setattr("pangu_tiny.reproduce.reproduce.train_rounds", stopped)
    flags = [flag for flag in argv(text, tmp_path / "again") if "reproduce.text" not in flag]
    flags.append(f"--gin.reproduce.dataset={rows}")
    assert cli.main([*flags, f"--gin.reproduce.text={text}"]) == 2
    assert "expected one of them" in capsys.readouterr().err
    assert cli.main(flags) == 143 and seen == [rows]
    assert not (tmp_path / "again").exists()
