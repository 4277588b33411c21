"""measure-speed: what is run, what is counted, what is kept."""

import dataclasses
import json

import jax
import pytest
from shapes import TINY

from pangu_tiny import config
from pangu_tiny.errors import UserError
from pangu_tiny.planning import measure_speed as stage
from pangu_tiny.planning.timed import PROGRAMS, Speed, Timed, measured
from pangu_tiny.topology.hardware import Hardware

HARDWARE = Hardware(per_device_batch=1)
SMALL = {"batch_size": 3, "prompt_tokens": 2, "new_tokens": 5, "sequence_length": 24, "rounds": 2}


def measure(workdir, **settings):
    """A batch is bound for train, as a recipe binds it."""
    given = {"workdir": str(workdir), "hardware": HARDWARE, "model": TINY, "dtype": "float32"}
    with config.within("", {"train.global_batch": 16}):
        return stage.measure_speed(**given | SMALL | settings)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    return folder, measure(folder, programs=list(PROGRAMS))


def test_tokens_are_those_of_all_sequences(found):
    """Of decoding, those that follow; of scoring, four times what a device takes in training."""
    folder, told = found
    assert json.loads((folder / "speed.json").read_text()) == told
    speeds = {one["program"]: one for one in told["speeds"].values()}
    tokens = {name: one["tokens"] for name, one in speeds.items()}
    assert tokens == {
        "decode": 15,
        "prefill": 72,
        "score": 4 * jax.device_count() * 24,
        "train": 16 * 24,
    }
    for one in speeds.values():
        assert len(one["seconds"]) == 2 and one["mfu"] is None
        assert one["slowest"] <= one["tokens_per_second"] <= one["fastest"]
        assert one["bytes"] > 0 and one["compile_seconds"] >= 0
    # Adam keeps two further numbers for each parameter.
    assert speeds["train"]["bytes"] > speeds["score"]["bytes"]
    page = (folder / "report.html").read_text()
    assert "29.49" in page and "3 × 32" in page


def test_what_is_measured_is_not_measured_again(found, monkeypatch, capsys):
    folder, told = found
    monkeypatch.setattr(stage, "ready", None)
    assert measure(folder, programs=list(PROGRAMS)) == told
    assert "3 × 32, decode" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds another run: sizes\.new is 5 there, 6 here"):
        measure(folder, programs=list(PROGRAMS), new_tokens=6)


def test_the_first_run_is_no_figure_of_speed():
    """It compiles; and the median is of the others."""
    runs = []
    timed = Timed(lambda: runs.append(0), 2, 8, 80, 1.5, 7)
    shown = []
    found = measured(timed, 3, lambda: shown.append(0))
    assert len(runs) == len(shown) == 4 and len(found.seconds) == 3
    assert (found.compile_seconds, found.bytes) == (1.5, 7)
    speed = Speed([1.0, 2.0, 4.0], 2, 8, 80, 0.0, 0)
    assert speed.tokens_per_second == 4 and speed.spread == (2, 8)


def test_mfu_is_of_what_is_computed(found, monkeypatch):
    """A forward pass is a third of both; of what is read up to the first token that follows, the
    head is applied to the last position alone."""
    flops = {one["program"]: one["flops"] for one in found[1]["speeds"].values()}
    of_row = TINY.flops_per_token(24)
    assert flops["train"] == 16 * 24 * of_row
    assert flops["score"] == 4 * jax.device_count() * 24 * of_row // 3
    assert flops["prefill"] == 72 * of_row // 3 - 2 * TINY.vocab_size * TINY.width * 3 * 23
    assert flops["decode"] == 15 * TINY.flops_per_token(7) // 3
    monkeypatch.setattr(stage, "peak_flops", lambda: 4000.0)
    told = stage._told(Speed([2.0, 2.0], 1, 8, 80, 0.0, 0), "score", "tiny", TINY)
    assert told["mfu"] == pytest.approx(0.01)


def test_several_shapes_come_from_files(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "ready", lambda *_: Timed(lambda: None, 1, 1, 1, None, 1))
    files = []
    for depth in (1, 2):
        shape = dataclasses.replace(TINY, depth=depth)
        files.append(str(tmp_path / f"{depth}.gin"))
        lines = [f"ModelShape.{name} = {value!r}" for name, value in vars(shape).items()]
        (tmp_path / f"{depth}.gin").write_text("\n".join(lines))
    told = measure(tmp_path / "out", model=None, models=files, programs=["decode"], rounds=1)
    assert [one["depth"] for one in told["speeds"].values()] == [1, 2]
    assert set(told["speeds"]) == {f"{file}, decode" for file in files}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"programs": ["decodes"]}, "measure_speed.programs is 'decodes', expected one of decode"),
        ({"programs": []}, r"measure_speed.programs is \[\], expected some"),
        ({"programs": ["train", "train"]}, "expected some, each of them once"),
        ({"models": ["models/tiny_test.gin"]}, "model or measure_speed.models is to be given, and"),
        ({"model": None}, "expected bindings of ModelShape, or a list of gin files"),
        ({"model": None, "models": []}, r"measure_speed.models is \[\], expected different gin"),
        ({"model": None, "models": ["a", "a"]}, "expected different gin files of shapes"),
        ({"batch_size": 0}, "measure_speed.batch_size is 0"),
        ({"rounds": 0}, "measure_speed.rounds is 0"),
        ({"dtype": "float16"}, "measure_speed.dtype is 'float16', expected one of float32"),
    ],
)
def test_mistakes_are_one_line(tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        measure(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
