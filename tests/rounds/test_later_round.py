"""train with a round index: exactly what was drawn, where the round before left off."""

import numpy as np
import pytest
import tiny_runs

from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.order import Order, Round
from pangu_tiny.data.round_index import RoundIndex
from pangu_tiny.errors import UserError
from pangu_tiny.program.optimizer import Optimizer, SharedSchedule
from pangu_tiny.rounds.select_batches import select_batches
from pangu_tiny.training.metrics import read_row_losses

ORDER = {"seed": 3, "mixture": {"b": 1.0, "c": 2.0}, "shuffle": True}
STEPS, BATCH = 12, tiny_runs.SETTINGS["global_batch"]


@pytest.fixture(scope="module")
def by_batch(scored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "index"
    return str(folder), select_batches(str(scored), str(folder))


@pytest.fixture(scope="module")
def by_sequence(score, tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_sequence")
    score(folder / "scores", unit="sequence")
    found = select_batches(str(folder / "scores"), str(folder / "index"), temperature=0.1)
    return str(folder / "index"), found


def later(dataset, trained, workdir, index, **changes):
    settings = {"steps": STEPS // 2, "checkpoint": trained, "round_index": index}
    settings |= ORDER | changes
    return tiny_runs.run(dataset, workdir, **settings)


def places(index):
    """Places in the order of the first round, in the order in which they are to be trained."""
    if index.unit == "sequence":
        return index.units
    return (index.units[:, None] * BATCH + np.arange(BATCH)).reshape(-1)


@pytest.fixture(scope="module")
def second(dataset, trained, by_batch, tmp_path_factory):
    """A second round that starts with fresh moments."""
    workdir = tmp_path_factory.mktemp("second") / "run"
    later(dataset, trained, workdir, by_batch[0])
    return workdir


def trains(dataset, workdir, index):
    """Row by row, in the order of the index."""
    order = Order(**ORDER).rows(TokenDataset.open(dataset), "train")
    found = read_row_losses(str(workdir))["row"]
    return found.tolist() == [order[int(place)] for place in places(index)]


def test_exactly_the_batches_that_were_drawn_are_trained(dataset, second, by_batch):
    assert trains(dataset, second, by_batch[1])


def test_exactly_the_sequences_that_were_drawn_are_trained(dataset, trained, by_sequence, tmp_path):
    later(dataset, trained, tmp_path / "run", by_sequence[0])
    assert trains(dataset, tmp_path / "run", by_sequence[1])


def test_a_round_is_what_one_run_over_both_would_be(dataset, trained, tmp_path):
    """Moments, their count and the schedule go on: a first round and all of it once more give the
    bits of a run that was told to go through the same batches twice."""
    order = Round(TokenDataset.open(dataset).digest, **ORDER, global_batch=BATCH, batches=STEPS)
    every, model = np.arange(STEPS), open_checkpoint(trained).digest
    for name, units in (("once", every), ("twice", np.tile(every, 2))):
        (tmp_path / name).mkdir()
        RoundIndex(order, "batch", model, units, {}).write(tmp_path / name)
    tiny_runs.run(
        dataset,
        tmp_path / "one_run",
        steps=2 * STEPS,
        round_index=str(tmp_path / "twice"),
        **ORDER,
    )
    later(
        dataset,
        trained,
        tmp_path / "round_2",
        str(tmp_path / "once"),
        steps=STEPS,
        keep_moments=True,
        shared_schedule=SharedSchedule(STEPS, 2 * STEPS),
    )
    found = tiny_runs.state_of(tmp_path / "round_2", STEPS)
    expected = tiny_runs.state_of(tmp_path / "one_run", 2 * STEPS)
    counters = [name for name in found if found[name].ndim == 0]
    assert len(counters) == 4  # Adam's and the schedule's count, step, skipped
    for name in counters:
        del expected[name]
        count = found.pop(name)
        assert count in (0, STEPS, 2 * STEPS)
    tiny_runs.assert_same_bits(found, expected)


def test_without_its_moments_a_round_is_another_one(dataset, trained, by_batch, second, tmp_path):
    later(dataset, trained, tmp_path / "kept", by_batch[0], keep_moments=True)
    fresh, kept = (tiny_runs.state_of(run, STEPS // 2) for run in (second, tmp_path / "kept"))
    assert any((fresh[name] != kept[name]).any() for name in fresh if name.startswith("params"))


def test_a_schedule_is_shared_between_runs():
    whole = Optimizer().schedule(40, 1000)
    part = Optimizer().schedule(40, 1000, start=25)
    np.testing.assert_array_equal(
        [part(step) for step in range(15)], [whole(step) for step in range(25, 40)]
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"steps": 5}, "train.steps is 5, round index .* holds 6 batches"),
        ({"global_batch": 16}, "global_batch is 8 there, 16 here"),
        ({"seed": 1}, "seed is 3 there, 1 here"),
        ({"mixture": None}, "mixture is {'b': 1.0, 'c': 2.0} there, None here"),
        ({"dataset": "other"}, "dataset is [0-9a-f]{12} there, [0-9a-f]{12} here"),
        (
            {"checkpoint": "10"},
            "follows the losses of model [0-9a-f]{12}, train.checkpoint .*/10 is",
        ),
        ({"shuffle": False}, "shuffle is True there, False here"),
        ({"index": "nowhere"}, "round index nowhere has no round_index.npz"),
        ({"shared_schedule": SharedSchedule(steps=5)}, "go beyond SharedSchedule.steps 5"),
        (
            {"checkpoint": None, "keep_moments": True},
            "keep_moments = True needs a train.checkpoint that",
        ),
    ],
)
def test_mistakes_are_named(dataset, trained, by_batch, tmp_path, changes, said):
    folder, _ = by_batch
    if changes.get("checkpoint"):
        changes = {"checkpoint": f"{trained}/checkpoints/10"}
    if changes.get("dataset"):
        changes = {"checkpoint": None, "mixture": None}  # refused for its tokenizer, its sources
        dataset = tiny_runs.prepare(tmp_path / "other", held_out_fraction=0.2)
    with pytest.raises(UserError, match=said):
        later(dataset, trained, tmp_path / "run", **{"index": folder, **changes})
    assert not (tmp_path / "run").exists()


def test_another_index_is_another_run(dataset, trained, second, by_sequence):
    with pytest.raises(UserError, match=r"holds another run: round_index\.digest is"):
        later(dataset, trained, second, by_sequence[0])
