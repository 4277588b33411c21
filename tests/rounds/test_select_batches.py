"""select-batches: scores to a round index; what is wrong with either is said in one line."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from pangu_tiny.arrays import read_described, write_arrays
from pangu_tiny.data.order import Round
from pangu_tiny.data.round_index import INDEX, RoundIndex
from pangu_tiny.errors import UserError
from pangu_tiny.rounds.scores import SCORES, Scores
from pangu_tiny.rounds.select_batches import select_batches

ROUND = Round("d" * 64, seed=3, mixture=None, shuffle=True, global_batch=4, batches=50)


def scores(unit="batch", model="m" * 64, **changes):
    """Losses of 1 to 3 nats; two sources, rows of the second in every fourth place."""
    units = ROUND.units(unit)
    random = np.random.default_rng(0 if model.startswith("m") else 1)
    targets = random.integers(50, 100, units)
    nats = targets * random.uniform(1, 3, units)
    if unit == "batch":
        sources = np.tile(np.array([[3, 1]], np.int32), (units, 1))
    else:
        sources = (np.arange(units) % 4 == 3).astype(np.int16)
    made = Scores(ROUND, unit, model, "float32", ["a", "b"], nats, targets, sources)
    return dataclasses.replace(made, **changes)


@pytest.fixture
def write(tmp_path):
    def write(made, name="scores"):
        (tmp_path / name).mkdir()
        made.write(tmp_path / name)
        return str(tmp_path / name)

    return write


def chosen(found):
    return np.sort(found.units)


@pytest.mark.parametrize("unit, count", [("batch", 20), ("sequence", 80)])
def test_an_index_is_read_as_it_was_drawn(write, tmp_path, unit, count, capsys):
    folder = write(scores(unit))
    found = select_batches(folder, str(tmp_path / "index"), rate=0.4)
    assert found.batches == 20 and len(np.unique(found.units)) == count
    assert (np.diff(found.units) < 0).any(), "it is served in the order of the round"
    again = RoundIndex.open(str(tmp_path / "index"))
    np.testing.assert_array_equal(again.units, found.units)
    assert again.identity == found.identity
    assert (again.round, again.unit) == (ROUND, unit)
    said = capsys.readouterr().out
    assert "20 of 50 batches" in said and "effective" in said and "entropy" in said
    assert "overlap          100.00%" not in said, "a draw is compared with itself"
    page = (tmp_path / "index" / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "source b" in page
    other = select_batches(folder, str(tmp_path / "other"), rate=0.4, seed=1)
    assert (chosen(other) != chosen(found)).any()
    assert other.identity["digest"] != found.identity["digest"]


def test_the_order_is_that_of_the_round_or_of_the_seed(write, tmp_path):
    folder = write(scores())

    def drawn(name, **settings):
        return select_batches(folder, str(tmp_path / name), method="highest", **settings).units

    kept, first, second = drawn("kept", order="kept"), drawn("0"), drawn("1", seed=1)
    assert (np.diff(kept) > 0).all()
    assert sorted(first) == sorted(second) == kept.tolist() and (first != second).any()


def test_each_round_draws_anew_by_the_same_seed(write, tmp_path):
    """Where losses hardly differ, the same noise would take the same batches in every round."""
    flat = scores()
    units = [
        chosen(select_batches(write(dataclasses.replace(made, nats=1.0 * made.targets), name), str(
            tmp_path / f"index_{name}"
        )))
        for name, made in (("a", flat), ("b", dataclasses.replace(flat, model="n" * 64)))
    ]  # fmt: skip
    assert len(np.intersect1d(*units)) < 20


def test_losses_decide(write, tmp_path):
    """The highest; by a low temperature nearly the same; less a reference, other ones."""
    made = scores()
    losses = made.losses()
    top = np.sort(np.argsort(losses)[-25:])
    folder = write(made)

    def drawn(name, **settings):
        return chosen(select_batches(folder, str(tmp_path / name), **settings))

    np.testing.assert_array_equal(drawn("highest", method="highest"), top)
    np.testing.assert_array_equal(drawn("cold", temperature=1e-4), top)
    hot = drawn("hot", temperature=1e6)
    np.testing.assert_array_equal(hot, drawn("uniform", method="uniform"))
    assert 0 < len(np.intersect1d(hot, top)) < 25
    other = scores(model="r" * 64)
    reference = write(other, "reference")
    found = drawn("less", method="highest", reference=reference)
    np.testing.assert_array_equal(found, np.sort(np.argsort(losses - other.losses())[-25:]))
    clipped = drawn("clipped", method="loss", temperature=1e-4, clip=0.9)
    assert len(np.intersect1d(clipped, top)) < 25, "nine tenths have the same loss now"


def test_a_source_that_runs_away_is_warned_of(write, tmp_path, capsys):
    made = scores("sequence")
    nats = np.where(made.sources == 1, 3.0, 1.0) * made.targets
    select_batches(
        write(dataclasses.replace(made, nats=nats)), str(tmp_path / "index"), 0.2, temperature=0.05
    )
    said = capsys.readouterr().out
    assert "WARNING: source b has 100.0% of what was drawn, 25.0% of the round" in said
    assert "source a has 0.0%" in said


def test_what_may_even_it_out_is_what_can(write, tmp_path, capsys):
    """Parts, where sources came in turn; a reference, where losses decide."""
    made = scores("sequence")
    nats = np.where(made.sources == 1, 3.0, 1.0) * made.targets
    stored = dataclasses.replace(made, nats=nats, round=dataclasses.replace(ROUND, shuffle=False))

    def advice(name, made, **settings):
        select_batches(write(made, name), str(tmp_path / f"{name}_index"), 0.2, **settings)
        said = capsys.readouterr().out
        assert "WARNING" in said
        words = ("higher temperature", "batches.parts", "batches.reference")
        return [word.split(".")[-1] for word in words if word in said]

    shuffled = dataclasses.replace(stored, round=ROUND)
    assert advice("0", shuffled, temperature=0.05) == ["higher temperature", "reference"]
    assert advice("1", stored, method="highest") == ["parts", "reference"]
    assert advice("2", stored, method="highest", parts=2) == ["reference"]


def test_it_is_said_how_much_was_in_the_round_before(write, tmp_path, capsys):
    made = scores()
    first = select_batches(write(made), str(tmp_path / "first"), 0.2, method="highest")
    settings = {"rate": 0.4, "method": "highest", "before": str(tmp_path / "first")}
    select_batches(str(tmp_path / "scores"), str(tmp_path / "second"), **settings)
    said = capsys.readouterr().out
    assert len(first.units) == 10 and "drawn before 50.00%" in said
    assert "effective number" not in said, "nothing is left to chance"
    finer = write(scores("sequence"), "finer")
    with pytest.raises(UserError, match=r"before has batches, .* has sequences: expected"):
        select_batches(finer, str(tmp_path / "third"), **settings)
    other = write(dataclasses.replace(made, round=dataclasses.replace(ROUND, seed=4)), "other")
    with pytest.raises(UserError, match="before is of another round: seed is 3 there"):
        select_batches(other, str(tmp_path / "third"), **settings)


def test_losses_that_are_not_finite_are_named_or_left_out(write, tmp_path):
    made = scores()
    made.nats[[4, 17]] = np.nan, np.inf
    folder = write(made)
    with pytest.raises(UserError, match=r"the loss of batch 4, 17 is NaN or infinite \(2 in all\)"):
        select_batches(folder, str(tmp_path / "index"))
    with pytest.raises(UserError, match=r"choose a lower select_batches\.rate"):
        select_batches(folder, str(tmp_path / "index"), rate=1.0, nonfinite="exclude")
    assert not (tmp_path / "index").exists()
    found = select_batches(
        folder, str(tmp_path / "index"), rate=0.96, nonfinite="exclude", clip=0.1
    )
    np.testing.assert_array_equal(chosen(found), np.delete(np.arange(50), [4, 17]))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rate": 0.0}, "select_batches.rate is 0.0, expected more than 0 and at most 1"),
        ({"rate": 1.01}, "rate is 1.01"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"rate": 0.001}, "rate 0.001 of 50 batches leaves none"),
        ({"method": "best"}, "method is 'best', expected one of loss, uniform, highest"),
        ({"order": "x"}, "order is 'x'"),
        ({"nonfinite": "x"}, "nonfinite is 'x'"),
        ({"temperature": 0.0}, "temperature is 0.0, expected more than 0 and finite"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-320}, "temperature .* is too small for losses that differ by 1.8"),
        ({"parts": 0}, "parts is 0, expected at least 1 and at most 50"),
        ({"parts": 51}, "parts is 51, expected at least 1 and at most 50"),
        ({"clip": 1.0}, "clip is 1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_mistakes_are_named(write, tmp_path, changes, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        select_batches(write(scores()), str(tmp_path / "index"), **changes)
    assert not (tmp_path / "index").exists()


def test_scores_that_do_not_belong_together_are_refused(write, tmp_path):
    folder = write(scores())
    for name, other, said in (
        (
            "unit",
            scores("sequence", "r"),
            "reference has sequences, select_batches.scores has",
        ),
        ("round", scores(model="r", round=dataclasses.replace(ROUND, seed=4)), "seed is 4 there"),
        ("dtype", scores(model="r", dtype="bfloat16"), "reference was scored in bfloat16"),
        ("nan", scores(model="r", nats=np.full(50, np.nan)), "scores .*/nan: the loss of batch 0"),
        ("same", scores(), "same model"),
    ):
        with pytest.raises(UserError, match=said):
            select_batches(folder, str(tmp_path / "index"), reference=write(other, name))
    select_batches(folder, str(tmp_path / "index"))
    with pytest.raises(UserError, match=r"holds another run: rate is 0\.5 there, 0\.3 here"):
        select_batches(folder, str(tmp_path / "index"), rate=0.3)


def test_damaged_files_are_refused(write, tmp_path):
    with pytest.raises(UserError, match=r"has no scores\.npz"):
        select_batches(str(tmp_path), str(tmp_path / "index"))
    folder = pathlib.Path(write(scores()))
    whole = (folder / SCORES).read_bytes()
    (folder / SCORES).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        select_batches(str(folder), str(tmp_path / "index"))
    (folder / SCORES).write_bytes(whole)
    short = scores()
    write_arrays(
        folder / SCORES,
        {"nats": short.nats[:9], "targets": short.targets, "sources": short.sources},
        short.about,
    )
    with pytest.raises(UserError, match=r"has arrays of {.*\(9,\).*}, its round has 50 units"):
        Scores.open(str(folder))


@pytest.mark.parametrize(
    "unit, units, said",
    [
        ("batch", [3, 50], "names batch 50, its round has batch 0 to 49"),
        ("batch", [-1], "names batch -1"),
        ("sequence", [1, 2, 3], "holds 3 sequences, expected whole batches of 4"),
        ("batch", [], r"holds int64\[0\]"),
        ("batch", [[1]], r"holds int64\[1, 1\]"),
    ],
)
def test_an_index_that_points_nowhere_is_refused(tmp_path, unit, units, said):
    from etils import epath

    folder = epath.Path(tmp_path)
    RoundIndex(ROUND, unit, "m", np.array(units, np.int64), {}).write(folder)
    with pytest.raises(UserError, match=said):
        RoundIndex.open(str(folder))


def test_an_index_that_was_edited_is_another_one(write, tmp_path):
    """Its digest is part of what a run is."""
    found = select_batches(write(scores()), str(tmp_path / "index"))
    about, arrays = read_described(tmp_path / "index" / INDEX)
    assert json.loads(json.dumps(about)) == about
    arrays["units"][[0, 1]] = arrays["units"][[1, 0]]
    write_arrays(tmp_path / "index" / INDEX, arrays, about)
    assert RoundIndex.open(str(tmp_path / "index")).identity != found.identity
