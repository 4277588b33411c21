"""Figures: what they mean, and that writing them costs what is written."""

import math

import jax
import numpy as np
import pytest
from etils import epath

from pangu_tiny.errors import UserError
from pangu_tiny.training import metrics


class Device:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peak_is_that_of_all_devices(monkeypatch, kind, peak):
    """'TPU v5' is the start of 'TPU v5 lite', which is less than half as fast."""
    monkeypatch.setattr(jax, "devices", lambda: [Device(kind)] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert metrics.peak_flops() == (4 * peak if peak else None)


def test_bits_per_byte():
    """8 nats·ln 2 over 4 bytes are 2 bits a byte."""
    assert metrics.bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)


def test_a_line_is_added_and_the_file_not_written_anew(tmp_path):
    """Else a run of n lines writes n² of them: the file stays the same one."""
    log = metrics.MetricsLog(epath.Path(tmp_path), 0, tensorboard=False)
    log.log(0, loss=1.0)
    [file] = (tmp_path / "metrics").iterdir()
    before = file.stat().st_ino
    log.log(1, loss=0.5)
    log.close()
    assert file.stat().st_ino == before
    assert [line["loss"] for line in metrics.read_metrics(str(tmp_path))] == [1.0, 0.5]


def test_figures_are_those_up_to_a_checkpoint(tmp_path):
    """A run that goes on drops what came later, and keeps what came before."""
    log = metrics.MetricsLog(epath.Path(tmp_path), 0, tensorboard=False)
    for step in range(5):
        log.log(step, loss=step)
        if step in (1, 3):
            log.flush(step + 1)
    assert [line["step"] for line in metrics.read_metrics(str(tmp_path))] == [0, 1, 2, 3, 4]
    again = metrics.MetricsLog(epath.Path(tmp_path), 2, tensorboard=False)
    again.log(2, loss=7)
    found = metrics.read_metrics(str(tmp_path))
    assert [(line["step"], line["loss"]) for line in found] == [(0, 0), (1, 1), (2, 7)]


def test_a_file_among_the_figures_is_named(tmp_path):
    log = metrics.MetricsLog(epath.Path(tmp_path), 0, tensorboard=False)
    log.log(0, loss=1.0)
    (tmp_path / "metrics" / ".000000001.jsonl.0123.tmp").touch()
    assert len(metrics.read_metrics(str(tmp_path))) == 1
    (tmp_path / "metrics" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt is not a file of figures"):
        metrics.read_metrics(str(tmp_path))


def records(steps):
    return [(step, row) for step in steps for row in (0, 1)]


def add(losses, steps):
    for step in steps:
        losses.add(step, np.array([0, 1]), np.array([0.5, 1.5]), np.array([3, 4]))


def read(folder):
    return [(int(line["step"]), int(line["row"])) for line in metrics.read_row_losses(str(folder))]


def test_row_losses_are_those_up_to_a_checkpoint(tmp_path):
    """What was added after the last flush is lost with the steps that a kill takes back, and what
    a later flush wrote is dropped if the run goes back further."""
    losses = metrics.RowLosses(epath.Path(tmp_path), 0)
    add(losses, range(3))
    losses.flush(3)
    add(losses, range(3, 5))
    assert read(tmp_path) == records(range(3))
    losses.flush(5)
    losses.flush(5)
    assert read(tmp_path) == records(range(5))
    again = metrics.RowLosses(epath.Path(tmp_path), 3)
    assert read(tmp_path) == records(range(3))
    add(again, range(3, 12))
    again.flush(12)
    assert read(tmp_path) == records(range(12))


def test_no_row_losses_read_as_none(tmp_path):
    metrics.RowLosses(epath.Path(tmp_path), 0)
    assert len(metrics.read_row_losses(str(tmp_path))) == 0


@pytest.mark.parametrize("line", ["", "\0\0", "[1]", '{"loss": 1.0}', '{"step": null}', '{"step"'])
def test_a_damaged_line_of_figures_is_named(tmp_path, line):
    """But for one without an end, which a kill leaves."""
    file = tmp_path / "metrics" / "000000000.jsonl"
    file.parent.mkdir()
    file.write_text(f'{{"step": 0}}\n{line}')
    assert metrics.read_metrics(str(tmp_path)) == [{"step": 0}]
    file.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"000000000\.jsonl:2 is damaged: "):
        metrics.read_metrics(str(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],  # as many records as steps, of two a step
        lambda content: content[:-24],
        lambda content: bytes(len(content)),
    ],
)
def test_damaged_row_losses_are_named(tmp_path, damage):
    losses = metrics.RowLosses(epath.Path(tmp_path), 0)
    add(losses, range(4))
    losses.flush(4)
    file = tmp_path / "row_losses" / "000000000-000000004.bin"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"000000000-000000004\.bin is damaged: "):
        metrics.read_row_losses(str(tmp_path))


@pytest.mark.parametrize("name", ["4.bin", "0-x.bin", "-4.bin", "4-4.bin", "1-2-3.bin"])
def test_a_file_among_the_row_losses_is_named(tmp_path, name):
    """What a kill left of a file that was being written is none of them."""
    losses = metrics.RowLosses(epath.Path(tmp_path), 0)
    add(losses, range(2))
    losses.flush(2)
    (tmp_path / "row_losses" / ".2-4.bin.0123.tmp").touch()
    assert read(tmp_path) == records(range(2))
    (tmp_path / "row_losses" / name).touch()
    for reading in (metrics.read_row_losses, lambda folder: metrics.RowLosses(folder, 0)):
        with pytest.raises(UserError, match=f"{name} is not a file of row losses"):
            reading(epath.Path(tmp_path))
