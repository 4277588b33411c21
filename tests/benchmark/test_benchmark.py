"""The stage: what is asked in what form, what is kept, what comes out."""

import dataclasses
import json

import numpy as np
import opencompass_files
import pytest
from checkpoint_files import write_checkpoint
from etils import epath
from shapes import TINY, random_params

from pangu_tiny.benchmark import benchmark as stage
from pangu_tiny.benchmark import examined
from pangu_tiny.benchmark.answers import Answers, Request
from pangu_tiny.benchmark.paper_tasks import TASKS
from pangu_tiny.benchmark.put import Put, put
from pangu_tiny.benchmark.questions import NONE, Choice, Open
from pangu_tiny.benchmark.results import results_of
from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.errors import Diverged, UserError
from pangu_tiny.topology.hardware import Hardware


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(opencompass_files.write(tmp_path_factory.mktemp("benchmarks")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    shape = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    where = tmp_path_factory.mktemp("model")
    return write_checkpoint(where, shape, random_params(shape), tokenizer, 96)


def test_shots_go_from_the_last_on_and_then_the_beginning(folder, checkpoint, tokenizer):
    """Of 96 tokens: some shots fit, or none and not even the question."""
    opened = open_checkpoint(checkpoint)
    fits, *_ = put(opened, epath.Path(folder), ["boolq"], 1)
    assert not fits.cut and not fits.shots_left_out
    for name in ("mmlu", "ceval", "xsum"):
        for one in put(opened, epath.Path(folder), [name], 1):
            assert max(map(len, one.ids)) + one.tokens <= 96
            assert {ids[0] for ids in one.ids} == {opened.about["begin_id"]}
            if isinstance(one.question, Choice):
                assert one.shots_left_out
                # Cut inside of a character, its last bytes stay.
                texts = [tokenizer.decode(ids[1:]).lstrip("\ufffd") for ids in one.ids]
                whole = one.question.texts(0)
                for text, last in zip(texts, whole, strict=True):
                    assert text.endswith(last) or last.endswith(text)
                assert one.cut == (max(len(tokenizer.encode(text)) for text in whole) > 95)
            else:
                assert one.tokens == 48  # half of what the model allows


class Stopped(Exception):
    pass


def test_what_was_answered_is_kept_and_batches_stay_the_same(tmp_path):
    """Stopped at ten moments drawn at random, the batches that the model sees are those of a run
    that was not stopped, each of them once, but for what was not written yet."""
    random = np.random.default_rng(0)
    keys = [f"t/s/{i}" for i in range(100)]
    asked = [[Request(key, i), Request(f"{key}/too", -i)] for i, key in enumerate(keys)]
    batches = [asked[at : at + 4] for at in range(0, 100, 4)]
    seen: list[list[int]] = []

    def answer(batch):
        if stops and len(seen) == stops[0]:
            stops.pop(0)
            raise Stopped
        seen.append([one.given for row in batch for one in row])
        return [[float(one.given)] for row in batch for one in row]

    stops: list[int] = []
    whole = Answers(epath.Path(tmp_path / "whole.json"), 1e9).collect("whole", batches, answer)
    assert whole == {one.key: [float(one.given)] for row in asked for one in row}
    of_whole, seen = seen, []
    stops = sorted(random.choice(len(batches), 10, replace=False).tolist())
    for _ in range(10):
        with pytest.raises(Stopped):
            Answers(epath.Path(tmp_path / "kept.json"), -1).collect("kept", batches, answer)
    kept = Answers(epath.Path(tmp_path / "kept.json"), -1)
    kept.collect("kept", batches, answer)
    assert seen == of_whole and not stops
    assert kept.by_key == whole and len(whole) == 200


def test_the_lowest_cross_entropy_a_token_is_right(folder):
    """Summed, the second text of the first question would be: it is shorter. Of equal ones the
    first; where no choice is right, none."""
    (part,) = TASKS["boolq"].parts

    def one(place, gold, *lengths):
        question = Choice("", (), "", ("No", "Yes"), gold)
        return Put(
            f"boolq//{place}", part, question, [np.zeros(n) for n in lengths], 0, False, False
        )

    questions = [one(0, 0, 10, 4), one(1, 0, 4, 4), one(2, 1, 4, 4), one(3, NONE, 4, 4)]
    nats = {"boolq//0": [20.0, 10.0], "boolq//1": [8.0, 8.0], "boolq//2": [8.0, 7.0]}
    nats["boolq//3"] = [1.0, 2.0]
    (summary,) = TASKS["xsum"].parts
    written = Put("xsum//0", summary, Open("", "a cat"), [[0]], 9, False, True)
    found = results_of(["boolq", "xsum"], [*questions, written], {**nats, "xsum//0": "cat\nb"}, {})
    boolq, xsum = found["tasks"]["boolq"], found["tasks"]["xsum"]
    assert (boolq["score"], boolq["chance"], boolq["questions"]) == (75.0, 37.5, 4)
    assert xsum["score"] == pytest.approx(200 / 3) and xsum["chance"] is None
    assert xsum["cut_on_the_left"] == 1
    assert found["average"] == pytest.approx((75 + 200 / 3) / 2)


def test_a_run_tells_scores_and_is_not_run_again(folder, checkpoint, tmp_path, capsys, monkeypatch):
    settings = {"workdir": str(tmp_path / "out"), "tasks": ["boolq", "c3", "xsum"]}
    found = stage.benchmark(checkpoint, folder, hardware=Hardware(), **settings)
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text()) == found
    assert set(found["tasks"]) == {"boolq", "c3", "xsum"}
    assert found["tasks"]["boolq"]["score"] in (0, 50, 100)
    out = capsys.readouterr().out
    assert "BoolQ" in out and "chance 50.00 (accuracy, 2 of 3,270 questions" in out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "PanGu-π-1B Pro" in page and "63.43" in page  # beside the columns of the paper
    monkeypatch.setattr(examined, "score", None)
    monkeypatch.setattr(examined, "Drawing", None)
    assert stage.benchmark(checkpoint, folder, hardware=Hardware(), **settings) == found
    with pytest.raises(UserError, match="holds another run: questions is"):
        stage.benchmark(checkpoint, folder, hardware=Hardware(), **settings | {"tasks": ["c3"]})


def test_a_loss_that_is_not_finite_is_no_answer(folder, tmp_path, tokenizer):
    """Of NaNs the first would be the lowest."""
    shape = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    params = random_params(shape)
    params["final_norm"]["scale"] *= np.nan
    broken = write_checkpoint(tmp_path / "model", shape, params, tokenizer, 96)
    with pytest.raises(Diverged, match=r"boolq//. has a loss that is NaN"):
        stage.benchmark(broken, folder, str(tmp_path / "out"), Hardware(), tasks=["boolq"])


def test_ids_that_the_model_does_not_have_are_refused(folder, tmp_path, tokenizer):
    shape = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size - 200)
    other = write_checkpoint(tmp_path / "model", shape, random_params(shape), tokenizer, 96)
    with pytest.raises(UserError, match=r"has 100 ids, but its tokenizer makes id .* of question"):
        stage.benchmark(other, folder, str(tmp_path / "out"), Hardware(), tasks=["boolq"])


def test_answers_that_are_damaged_are_named(tmp_path):
    (tmp_path / "answers.json").write_text('{"boolq//0": [1.5, null]}')
    with pytest.raises(UserError, match=r"answers.json is damaged: boolq//0 is \[1.5, None\]"):
        Answers(epath.Path(tmp_path / "answers.json"), 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": ["bool"]}, "benchmark.tasks: 'bool' is unknown, expected boolq"),
        ({"suite": "papers"}, "benchmark.suite is 'papers', expected one of paper, ablation"),
        ({"batch_size": 0}, "benchmark.batch_size is 0"),
        ({"tasks": []}, r"benchmark.tasks is \[\], expected some, each of them once"),
        ({"tasks": ["c3", "c3"]}, "expected some, each of them once"),
        ({"folder": "nowhere", "tasks": ["c3"]}, "dev_0.json is missing, CLUE/C3/dev_0.json of"),
    ],
)
def test_mistakes_are_one_line(folder, checkpoint, tmp_path, settings, said):
    given = {"checkpoint": checkpoint, "folder": folder, "workdir": str(tmp_path / "out")}
    with pytest.raises(UserError, match=said):
        stage.benchmark(hardware=Hardware(), **given | settings)
    assert not (tmp_path / "out").exists()
