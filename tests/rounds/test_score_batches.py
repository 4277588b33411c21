"""score-batches: the losses of a round, in the very grouping of its training."""

import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
import tiny_runs
from etils import epath

from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.loader import batches
from pangu_tiny.data.order import Order
from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.program.step import Objective
from pangu_tiny.rounds.score_batches import _add_up, first_round
from pangu_tiny.rounds.scores import SCORES, Scores
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.training import metrics

STEPS, BATCH = 12, tiny_runs.SETTINGS["global_batch"]


@pytest.fixture(scope="module")
def expected(dataset, trained):
    """Nats, targets and source of every row of the round, on one device, a batch of training at a
    time."""
    opened = open_checkpoint(trained)
    rows = TokenDataset.open(dataset)
    objective = Objective(Decoder(opened.shape), rows.begin_id, rows.end_id, 64)
    params = opened.params()
    loader = batches(rows, "train", BATCH, Order(3, {"b": 1.0, "c": 2.0}))
    losses = jax.jit(lambda rows_bt: objective(params, rows_bt)[0].rows_b)
    found = [next(loader) for _ in range(STEPS)]
    nats = np.array([losses(batch["rows"]) for batch in found])
    row_ids = np.array([batch["row_ids"] for batch in found])
    targets = tiny_runs.targets_of(dataset, row_ids.reshape(-1)).reshape(nats.shape)
    return nats, targets, rows.source_ids("train", row_ids)


def command(dataset, trained, workdir, hardware):
    bindings = {f"Hardware.{name}": value for name, value in vars(hardware).items()}
    bindings |= {f"score_batches.{name}": value for name, value in {
        "dataset": dataset, "checkpoint": trained, "workdir": workdir, "batch_size": 16,
    }.items()}  # fmt: skip
    flags = [f"--gin.{name}={value}" for name, value in bindings.items()]
    return [sys.executable, "-m", "pangu_tiny", "score-batches", *flags]


def assert_close(found, nats, targets):
    np.testing.assert_array_equal(found.targets, targets)
    np.testing.assert_allclose(found.losses(), nats / targets, atol=1e-5, rtol=0)


def test_every_batch_has_its_loss(scored, expected):
    """Sequences at once are not those of the training: 4 × 16 × 4 shards, more than the round."""
    found = Scores.open(str(scored))
    nats, targets, sources = expected
    assert found.unit == "batch" and found.nats.dtype == np.float64
    assert_close(found, nats.sum(axis=1), targets.sum(axis=1))
    assert found.rows_by_source().tolist() == [0, 32, 64]
    assert found.sources[:, 2].tolist() == np.sum(sources == 2, axis=1).tolist()
    assert not (scored / "row_losses").exists()


def test_every_sequence_has_its_loss(score, expected, tmp_path):
    found = score(tmp_path / "scores", unit="sequence", batch_size=20)
    nats, targets, sources = expected
    assert_close(found, nats.reshape(-1), targets.reshape(-1))
    np.testing.assert_array_equal(found.sources, sources.reshape(-1))
    assert found.rows_by_source().tolist() == [0, 32, 64]


def test_a_round_that_was_not_shuffled_is_scored_as_it_was_trained(dataset, score, tmp_path):
    """And in its dtype."""
    tiny_runs.run(dataset, tmp_path / "run", steps=2, shuffle=False, dtype="bfloat16")
    found = score(tmp_path / "scores", checkpoint=str(tmp_path / "run"), unit="sequence")
    rows = np.arange(2 * BATCH)
    np.testing.assert_array_equal(metrics.read_row_losses(str(tmp_path / "run"))["row"], rows)
    np.testing.assert_array_equal(found.targets, tiny_runs.targets_of(dataset, rows))
    assert found.dtype == "bfloat16"


@pytest.mark.pods
@pytest.mark.parametrize("processes", [1, 2])
def test_one_device_and_two_processes_find_the_same(dataset, trained, scored, tmp_path, processes):
    workdir = tmp_path / "scores"
    if processes == 1:
        argv = command(dataset, trained, workdir, Hardware())
        children = [tiny_runs.start(argv, 1, tmp_path / "log0")]
    else:
        argv = command(dataset, trained, workdir, tiny_runs.EIGHT)
        children = tiny_runs.start_together(argv, tmp_path)
    codes = [child.wait() for child in children]
    assert codes == [0] * processes, (tmp_path / "log0").read_text()
    found, expected = Scores.open(str(workdir)), Scores.open(str(scored))
    assert_close(found, expected.nats, expected.targets)


def test_an_interrupted_scoring_goes_on_to_the_same_bits(score, tmp_path, monkeypatch):
    whole = score(tmp_path / "whole", batch_size=16)
    interrupted = {"batch_size": 16, "save_minutes": 0.0}

    class Stopped(Exception):
        pass

    add = metrics.RowLosses.add

    def stop(self, step, *rest):
        if step[0] == 64:
            raise Stopped
        add(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.RowLosses, "add", stop)
        with pytest.raises(Stopped):
            score(tmp_path / "scores", **interrupted)
    assert not (tmp_path / "scores" / SCORES).exists()
    begun = metrics.row_loss_files(tmp_path / "scores")
    assert max(end for _, end in begun) == 64
    seen = []

    def watch(self, step, *rest):
        seen.append(step[0])
        add(self, step, *rest)

    monkeypatch.setattr(metrics.RowLosses, "add", watch)
    found = score(tmp_path / "scores", **interrupted)
    assert seen == [64, 80], "what was scored is scored again"
    assert found.digest == whole.digest


def test_another_machine_may_finish_it(score, tmp_path, monkeypatch, scored):
    """With other sizes, which meet in the middle of what it takes at once."""
    add = metrics.RowLosses.add

    def stop(self, step, *rest):
        if step[0] == 60:
            raise KeyboardInterrupt
        add(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.RowLosses, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            score(tmp_path / "scores", batch_size=20, save_minutes=0.0)
    found, expected = score(tmp_path / "scores", batch_size=32), Scores.open(str(scored))
    assert_close(found, expected.nats, expected.targets)
    assert score(tmp_path / "scores", batch_size=8).digest == found.digest


def test_losses_that_are_missing_or_damaged_are_named(dataset, trained, tmp_path):
    """Else units without a loss would have one of 0."""
    rows, round_ = TokenDataset.open(dataset), first_round(open_checkpoint(trained))
    losses = metrics.RowLosses(epath.Path(tmp_path), 0)
    total = round_.units("sequence")
    for start, end in ((0, 40), (40, 60), (60, total)):
        places = np.arange(start, end)
        losses.add(places, places, np.ones(end - start), np.ones(end - start))
        losses.flush(end)

    def gather():
        return _add_up(epath.Path(tmp_path), rows, round_, "sequence")

    _, targets, _ = gather()
    assert (targets == 1).all()
    files = metrics.row_loss_files(epath.Path(tmp_path))
    *_, last = files.values()
    content = last.read_bytes()
    last.write_bytes(content[:-24])
    with pytest.raises(UserError, match=rf"{last.name} is damaged"):
        gather()
    last.write_bytes(content)
    files[40, 60].unlink()
    with pytest.raises(UserError, match=rf"{last.name} holds .* from 60 on, expected .* from 40"):
        gather()


def test_forgetting_is_drawn_from_what_training_saw(scored, trained, capsys, score, tmp_path):
    """Losses when seen are those that the run wrote down."""
    page = (scored / "report.html").read_text()
    assert "data:image/png" in page and "<th>loss when seen" in page
    records = metrics.read_row_losses(trained)
    first = records[records["step"] < STEPS // 8]
    assert len(first) == BATCH
    assert f"{first['nats'].sum() / first['targets'].sum():.4f}" in page
    lost = tmp_path / "lost"
    shutil.copytree(trained, lost)
    shutil.rmtree(lost / "row_losses")
    score(tmp_path / "scores", checkpoint=str(lost))
    assert "<th>loss when seen" not in (tmp_path / "scores" / "report.html").read_text()


def test_another_model_scores_the_round_of_this_one(score, trained, scored, tmp_path):
    """As a reference: its own round is a shorter one."""
    other = f"{trained}/checkpoints/10"
    found = score(tmp_path / "scores", checkpoint=other, round_of=trained)
    expected = Scores.open(str(scored))
    assert found.round == expected.round and found.model != expected.model
    np.testing.assert_array_equal(found.targets, expected.targets)
    assert (found.nats != expected.nats).all()


def test_what_is_done_is_not_done_again(score, scored, monkeypatch):
    monkeypatch.setattr("pangu_tiny.rounds.score_batches._score", None)
    assert score(scored).round.batches == STEPS


@pytest.fixture(scope="module")
def other_rows(tmp_path_factory):
    return tiny_runs.prepare(tmp_path_factory.mktemp("other"), sequence_length=16)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"unit": "token"}, "unit is 'token', expected one of batch, sequence"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"batch_size": 0}, "score_batches.batch_size 0 is not divisible by"),
        ({"batch_size": 6}, "score_batches.batch_size 6 is not divisible by"),
        ({"checkpoint": "nowhere"}, "no checkpoint there"),
        ({"dataset": "nowhere"}, "has no dataset.json"),
        ({"dataset": "other"}, "the round was trained on"),
    ],
)
def test_mistakes_are_named(score, other_rows, tmp_path, changes, said):
    if changes.get("dataset") == "other":
        changes = {"dataset": other_rows}
    with pytest.raises(UserError, match=said):
        score(tmp_path / "scores", **changes)
    assert not (tmp_path / "scores").exists()


def test_other_scores_are_refused(score, scored, trained):
    with pytest.raises(UserError, match=r"holds another run: .*model is"):
        score(scored, checkpoint=str(pathlib.Path(trained) / "checkpoints" / "10"))


def test_models_without_a_round_are_refused(trained):
    """One that was cut and not trained since, and one of a version that told less."""
    opened = open_checkpoint(trained)
    told = opened.about["identity"]
    for identity, said in (
        ({"tokenizer": told["tokenizer"]}, "was not trained, and has no batches to score"),
        ({**told, "round_index": {"round": {}}}, "does not say what it was trained on"),
        ({name: told[name] for name in told if name != "shuffle"}, "does not say .*: 'shuffle'"),
    ):
        with pytest.raises(UserError, match=said):
            first_round(opened._replace(about={**opened.about, "identity": identity}))
