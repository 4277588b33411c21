"""train from end to end: what it writes, what it refuses, and what stops it."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from tiny_runs import (
    EIGHT,
    RATE,
    SETTINGS,
    SHAPE,
    command,
    prepare,
    run,
    start,
    state_of,
    targets_of,
)

from pangu_tiny.checkpoints.read import committed_steps, open_checkpoint
from pangu_tiny.checkpoints.run import Writer
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.loader import batches
from pangu_tiny.data.order import Order
from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.program.step import abstract_state
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.mesh import make_mesh
from pangu_tiny.training import metrics, watch
from pangu_tiny.training import train as loop

STEPS = SETTINGS["steps"]


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def lines_of(workdir):
    """Lines of training figures by step, and lines of held-out figures by step."""
    lines = metrics.read_metrics(str(workdir))
    training = {line["step"]: line for line in lines if "loss" in line}
    held_out = {line["step"]: line for line in lines if "held_out_bits_per_byte" in line}
    assert len(lines) == len(training) + len(held_out), "a step came twice"
    return training, held_out


def test_metrics_have_every_figure_of_every_step(finished):
    training, held_out = lines_of(finished)
    assert list(training) == list(range(STEPS)) and list(held_out) == [9, 19]
    rate = Optimizer(learning_rate=RATE).schedule(STEPS, 1)
    for step, line in training.items():
        assert line["learning_rate"] == pytest.approx(float(rate(step)))
        assert 0 < line["gradient_norm"] < 100 and line["tokens_per_second"] > 0
        assert 0 <= line["data_wait_share"] <= 1
        assert "mfu" not in line, "a CPU has no peak that is known"
    assert training[19]["loss"] < training[0]["loss"] - 1


def test_row_losses_hold_every_trained_row_once_in_order(finished, dataset):
    rows = metrics.read_row_losses(str(finished))
    batch = SETTINGS["global_batch"]
    loader = batches(TokenDataset.open(dataset), "train", batch, Order(0))
    expected = np.concatenate([next(loader)["row_ids"] for _ in range(STEPS)])
    np.testing.assert_array_equal(rows["row"], expected)
    np.testing.assert_array_equal(rows["step"], np.repeat(np.arange(STEPS), batch))
    np.testing.assert_array_equal(rows["targets"], targets_of(dataset, rows["row"]))
    assert len(set(rows["targets"])) > 1
    for step, line in lines_of(finished)[0].items():
        part = rows[rows["step"] == step]
        mean = part["nats"].sum() / part["targets"].sum()
        assert mean == pytest.approx(line["loss"], rel=1e-5)


def test_tensorboard_and_profile_are_written(finished, one_device):
    assert list((finished / "tensorboard").glob("events.*"))
    assert list((one_device / "profile").rglob("*.xplane.pb"))


def test_a_checkpoint_describes_its_run(finished, dataset):
    rows = TokenDataset.open(dataset)
    opened = open_checkpoint(str(finished))
    assert opened.shape == SHAPE and opened.tokenizer_bytes == rows.tokenizer_bytes()
    about = opened.about
    assert (about["step"], about["next_batch"], about["sequence_length"]) == (STEPS, STEPS, 32)
    assert about["identity"]["dataset"] == rows.digest
    assert about["identity"]["tokenizer"] == rows.tokenizer_digest
    assert (about["begin_id"], about["end_id"]) == (rows.begin_id, rows.end_id)
    assert "jax" in about["environment"]["versions"]


def test_a_finished_run_does_nothing_and_compiles_nothing(copy, dataset):
    compiled = []

    def note(event, *_, **__):
        if "compile" in event:
            compiled.append(event)

    def content():
        return {
            path: path.read_bytes()
            for folder in ("checkpoints", "row_losses", "metrics")
            for path in [copy / folder, *(copy / folder).rglob("*")]
            if path.is_file()
        }

    before = content()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        done = run(dataset, copy)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert done.step == STEPS and content() == before
    assert not [event for event in compiled if "backend_compile" in event]


def test_another_configuration_is_refused_and_named(copy, dataset):
    with pytest.raises(UserError, match=r"holds another run: seed is 0 there, 1 here$"):
        run(dataset, copy, seed=1)
    with pytest.raises(UserError, match=r"optimizer\.clip is 1\.0 there, 0\.5 here; z_loss is 0"):
        run(dataset, copy, z_loss=0.1, optimizer=Optimizer(learning_rate=RATE, clip=0.5))
    run(dataset, copy)


def back_to(workdir, step):
    """Makes a run look as if it had been killed after the checkpoint of that step."""
    for later in committed_steps(workdir / "checkpoints"):
        if later > step:
            shutil.rmtree(workdir / "checkpoints" / str(later))


def test_a_damaged_note_of_the_hardware_is_said_and_written_anew(tmp_path, capsys):
    """It decides nothing."""
    (tmp_path / "hardware.json").touch()
    for _ in range(2):
        loop._note_hardware(epath.Path(tmp_path), Hardware(), 1)
    assert capsys.readouterr().out.count("hardware.json is damaged: it is empty") == 1


def test_changed_hardware_is_allowed_and_said(one_device, finished, dataset, tmp_path, capsys):
    """Half of the run on one device and half on eight: the same batches, nearly the same losses."""
    workdir = shutil.copytree(one_device, tmp_path / "run")
    back_to(workdir, 10)
    run(dataset, workdir)
    out = capsys.readouterr().out
    for change in ("fsdp changed: -1 → 4", "tensor changed: 1 → 2", "devices changed: 1 → 8"):
        assert f"since the last start, {change}\n" in out
    rows = [metrics.read_row_losses(str(folder))["row"] for folder in (workdir, finished)]
    np.testing.assert_array_equal(*rows)
    found, expected = lines_of(workdir)[0], lines_of(finished)[0]
    assert list(found) == list(range(STEPS))
    for step in range(STEPS):
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)


def test_mfu_is_what_its_formula_says(copy, dataset, monkeypatch, capsys):
    """As it would be logged on devices whose peak is known."""
    for module in (watch, loop):
        monkeypatch.setattr(module, "peak_flops", lambda: 1e9)
    back_to(copy, 15)
    run(dataset, copy)
    assert metrics.MFU_FORMULA in capsys.readouterr().out
    line = lines_of(copy)[0][19]
    expected = line["tokens_per_second"] * SHAPE.flops_per_token(32) / 1e9
    assert line["mfu"] == pytest.approx(expected, rel=1e-2)


def test_some_held_out_rows_may_stand_for_all(copy, finished, dataset, capsys):
    """How many is no part of a run's identity; that bits per byte are estimated is said."""
    back_to(copy, 15)
    run(dataset, copy, evaluate_rows=8)
    assert "nats per token (estimated from 8 of 39 rows)\n" in capsys.readouterr().err
    found, expected = lines_of(copy)[1][19], lines_of(finished)[1][19]
    assert found.keys() == expected.keys()
    for name in ("held_out_bits_per_byte", "held_out_nats_per_token"):
        assert found[name] != expected[name]
        assert found[name] == pytest.approx(expected[name], rel=0.1)


def test_a_resumed_run_drops_what_came_later(copy, dataset):
    """Figures and events of steps that are taken again must not be there twice; a line that a
    kill cut in half is none."""
    back_to(copy, 15)
    with (copy / "metrics" / "000000015.jsonl").open("a") as file:
        file.write('{"step": 19, "lo')
    run(dataset, copy, tensorboard=True)
    training, held_out = lines_of(copy)
    assert list(training) == list(range(STEPS)) and list(held_out) == [9, 19]
    assert len(metrics.read_row_losses(str(copy))) == STEPS * SETTINGS["global_batch"]
    starts = [path.read_bytes() for path in (copy / "tensorboard").glob("events.*")]
    purged = [content for content in starts if b"\x10\x0f" in content[:200]]
    assert len(starts) == 2 and purged, "no event says that step 15 begins anew"


def test_temporary_checkpoints_come_by_time(dataset, tmp_path):
    """With no minutes between them, they come as fast as requests travel; the newest two stay."""
    run(dataset, tmp_path / "run", save_every=100, keep_every=None, save_minutes=0.0)
    steps = committed_steps(tmp_path / "run" / "checkpoints")
    assert len(steps) == 2 and steps[0] == STEPS and steps[1] >= STEPS - 3
    files = sorted(path.stem for path in (tmp_path / "run" / "row_losses").iterdir())
    assert len(files) >= 8, "checkpoints did not come by time"


def test_a_run_without_held_out_text_trains(tmp_path):
    dataset = prepare(tmp_path, held_out_fraction=0.0)
    assert run(dataset, tmp_path / "run").step == STEPS
    assert lines_of(tmp_path / "run")[1] == {}


def spoil(workdir, step):
    """Adds a checkpoint after which no loss is a number: a norm scale in it is infinite."""
    transformation = Optimizer().transformation(lambda _: 0.0)
    target = abstract_state(Decoder(SHAPE), transformation, make_mesh(1, 4, 2))
    writer = Writer(workdir / "checkpoints", 1)
    state, about = writer.restore_latest(target)
    scale = np.inf * state.params["final_norm"]["scale"]
    params = {**state.params, "final_norm": {"scale": scale}}
    writer.save(step, state._replace(params=params, step=state.step + 1), about, b"none")
    writer.close()


def test_a_loss_that_is_not_finite_stops_the_run(copy, dataset):
    """Before it is saved. The checkpoint that the step started from is not called good."""
    back_to(copy, 10)
    spoil(copy, 11)
    with pytest.raises(UserError) as caught:
        run(dataset, copy, save_every=1)
    message = str(caught.value)
    assert message.startswith("step 11: loss nan and gradient norm nan are not finite")
    good = copy / "checkpoints" / "10"
    assert f"the last checkpoint that finite steps followed is {good};" in message
    assert "skip_nonfinite" in message
    assert committed_steps(copy / "checkpoints")[0] == 11


HOT = Optimizer(learning_rate=1e30, warmup_fraction=0.0, clip=1e9)


def test_skipping_goes_on_and_counts(dataset, tmp_path):
    workdir = tmp_path / "run"
    done = run(dataset, workdir, steps=4, optimizer=dataclasses.replace(HOT, skip_nonfinite=True))
    assert done.step == 4
    training, _ = lines_of(workdir)
    assert training[3]["skipped_steps"] >= 2
    state = state_of(workdir, 4)
    assert int(state["optimizer['skipped']"]) == training[3]["skipped_steps"]
    assert all(np.isfinite(leaf).all() for leaf in state.values())


def other(**changes):
    return dataclasses.replace(SHAPE, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "float16"}, r"train\.dtype is 'float16', expected one of float32, bfloat16"),
        ({"init": "zeros"}, r"train\.init is 'zeros', expected one of constant, gpt2, internevo"),
        ({"steps": 0}, r"train\.steps is 0"),
        ({"log_every": 0}, r"Watching\.log_every is 0, expected at least 1"),
        ({"save_every": 0}, r"train\.save_every is 0"),
        ({"keep_every": 7}, r"Watching\.keep_every is 7, expected a multiple of train\.save_every"),
        ({"evaluate_every": 0}, r"train\.evaluate_every is 0"),
        ({"evaluate_rows": 0}, r"Watching\.evaluate_rows is 0, expected at least 1"),
        ({"profile_steps": [3]}, r"Watching\.profile_steps is \[3\], expected \[first, last\]"),
        ({"profile_steps": [4, 3]}, r"Watching\.profile_steps is \[4, 3\]"),
        ({"hardware": Hardware(fsdp=4, tensor=2, remat="some")}, r"Hardware\.remat is 'some'"),
        ({"hardware": Hardware(fsdp=4, tensor=2, attention="x")}, r"Hardware\.attention is 'x'"),
        ({"hardware": Hardware(fsdp=3)}, "does not fit the 8 devices that JAX found"),
        ({"hardware": Hardware(fsdp=1, tensor=8)}, r"ModelShape\.heads 4 is not divisible by"),
        ({"global_batch": 6}, r"train\.global_batch 6 is not divisible by .* = 4, the devices"),
        ({"global_batch": 0}, r"train\.global_batch 0 is not divisible"),
        (
            {"model": other(vocab_size=200)},
            r"ids up to 299, but ModelShape\.vocab_size is 200",
        ),
        ({"mixture": {"none": 1.0}}, r"mixture names 'none'; the dataset has sources"),
        ({"checkpoint": "nowhere"}, "checkpoint nowhere: no checkpoint there"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_named_before_anything_is_written(dataset, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        run(dataset, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_row_numbers_beyond_int32_are_refused(dataset, tmp_path, monkeypatch):
    """They travel with the batch, and would come back negative in the losses per row."""
    monkeypatch.setattr(TokenDataset, "count", lambda *_: 2**31)
    with pytest.raises(UserError, match=r"2,147,483,648 rows, expected fewer than 2,147,483,648"):
        run(dataset, tmp_path / "run")


def test_a_start_from_a_checkpoint_takes_its_parameters(finished, dataset, tmp_path):
    """And nothing else of it: a new schedule, no moments, the first batch; an own identity, in
    which the step that it starts from counts."""
    workdir = tmp_path / "run"
    run(dataset, workdir, checkpoint=str(finished))
    before, after = lines_of(finished)[0], lines_of(workdir)[0]
    assert after[0]["loss"] < before[19]["loss"] + 0.2 < before[0]["loss"] - 1
    assert after[0]["learning_rate"] == before[0]["learning_rate"]
    rows = [metrics.read_row_losses(str(folder))["row"] for folder in (finished, workdir)]
    np.testing.assert_array_equal(*rows)
    assert int(state_of(workdir, STEPS)["optimizer['step']"]) == STEPS
    earlier = str(finished / "checkpoints" / "15")
    with pytest.raises(UserError, match=r"checkpoint\.step is 20 there, 15 here"):
        run(dataset, workdir, checkpoint=earlier)


@pytest.mark.parametrize(
    ("changes", "prepared", "said"),
    [
        ({"model": other(depth=3)}, {}, r"does not fit: ModelShape\.depth is 2 there, 3 here$"),
        ({"model": other(vocab_size=310)}, {}, r"ModelShape\.vocab_size is 300 there, 310 here$"),
        ({}, {"vocab_size": 290}, "was made with tokenizer .* checkpoint .* reads .*"),
        ({}, {"sequence_length": 16}, "has rows of 16 targets, checkpoint .* takes 32$"),
    ],
    ids=["depth", "vocabulary", "tokenizer", "length"],
)
def test_a_start_that_does_not_fit_is_refused(finished, dataset, tmp_path, changes, prepared, said):
    if prepared:
        dataset = prepare(tmp_path, **prepared)
    with pytest.raises(UserError, match=said):
        run(dataset, tmp_path / "run", checkpoint=str(finished), **changes)
    assert not (tmp_path / "run").exists()


def test_a_damaged_newest_checkpoint_is_replaced_by_training_on(copy, finished, dataset, capsys):
    """The run goes back to step 15 and comes out where it did before, bit for bit."""
    shutil.rmtree(copy / "checkpoints" / "20" / "optimizer" / "d")
    run(dataset, copy)
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if "is damaged" in line]
    damaged = copy / "checkpoints" / "20"
    assert line.startswith(
        f"checkpoint {damaged} is damaged, renamed to 20.damaged, resuming from "
    )
    assert f"step 15: [Errno 2] No such file or directory: '{damaged / 'optimizer' / 'd'}" in line
    found, expected = state_of(copy, STEPS), state_of(finished, STEPS)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_full_disk_is_one_line_and_the_run_can_go_on(copy, dataset, tmp_path):
    """Files of more than 20 kB cannot be written, which those of a checkpoint are."""
    back_to(copy, 10)
    argv = command(dataset, copy, EIGHT)
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *argv]
    log = tmp_path / "log"
    assert start(limited, 8, log).wait() == 2
    lines = [line for line in log.read_text().splitlines() if "step/s" not in line]
    complaint = lines[-1]
    assert complaint.startswith("pangu-tiny train: a checkpoint could not be saved in ")
    assert "the last that was saved is step 10: " in complaint and "File too large" in complaint
    assert "Traceback" not in log.read_text() and "Exception" not in log.read_text()
    assert committed_steps(copy / "checkpoints") == [10, 5]
    assert run(dataset, copy).step == STEPS
