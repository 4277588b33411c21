"""A run that is stopped anywhere and started again comes out as if it had not been: the same bits
in parameters, moments and counters, the same rows in the same order. Real processes, real signals.
"""

import pathlib
import random
import signal

import numpy as np
import pytest
from tiny_runs import SETTINGS, assert_same_bits, command, start, state_of

from pangu_tiny.checkpoints.read import committed_steps
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.training import metrics

STEPS = SETTINGS["steps"]
ONE = Hardware()


class Child:
    """A training process that is looked at, never waited for by time: `until` polls what it
    writes, and fails when it ends before that."""

    def __init__(self, dataset, workdir, hardware, devices):
        self.workdir, self.log = workdir, workdir.parent / "log"
        self.process = start(command(dataset, workdir, hardware), devices, self.log)

    def until(self, seen):
        while not seen():
            assert self.process.poll() is None, f"it ended too early: {self.log.read_text()}"

    def stop(self, number):
        self.process.send_signal(number)
        return self.process.wait()

    def steps_logged(self):
        files = (self.workdir / "metrics").glob("*.jsonl")
        return sum(file.read_text().count('"loss"') for file in files)

    def kill_inside_a_save(self):
        """Freezes it while a checkpoint has its temporary name, and kills it then."""
        while True:
            self.until(self._saves)
            self.process.send_signal(signal.SIGSTOP)
            if self._saves():
                return self.stop(signal.SIGKILL)
            self.process.send_signal(signal.SIGCONT)

    def _saves(self):
        folder = self.workdir / "checkpoints"
        return folder.exists() and any("tmp" in path.name for path in folder.iterdir())


def outcome(workdir):
    return state_of(workdir, STEPS), metrics.read_row_losses(str(workdir))


def assert_same_run(found, expected):
    assert_same_bits(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.pods
def test_signals_save_and_leave_cleanly(dataset, one_device, tmp_path):
    """^C after a few steps, then SIGTERM, then to the end: exit code 143 each time, a
    checkpoint where it stopped, and nothing is trained twice."""
    workdir = tmp_path / "run"
    stopped = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        child = Child(dataset, workdir, ONE, 1)
        before = stopped
        child.until(lambda child=child, before=before: child.steps_logged() > before + 1)
        assert child.stop(number) == 143, child.log.read_text()
        newest = committed_steps(workdir / "checkpoints")[0]
        assert before < newest < STEPS
        said = f"stopped at step {newest} of {STEPS}; run the same command again to resume"
        assert said in child.log.read_text()
        assert len(metrics.read_row_losses(str(workdir))) == newest * SETTINGS["global_batch"]
        stopped = newest
    child = Child(dataset, workdir, ONE, 1)
    assert child.process.wait() == 0
    assert_same_run(outcome(workdir), outcome(one_device))


@pytest.mark.pods
def test_killed_anywhere_it_goes_on_to_the_same_bits(dataset, one_device, tmp_path):
    """Once after a random step, and once in the middle of an asynchronous save; with several
    devices and processes in tests/pods."""
    workdir = pathlib.Path(tmp_path / "run")
    child = Child(dataset, workdir, ONE, 1)
    last = random.randrange(6, 14)
    child.until(lambda: child.steps_logged() >= last)
    assert child.stop(signal.SIGKILL) == -signal.SIGKILL
    child = Child(dataset, workdir, ONE, 1)
    child.kill_inside_a_save()
    assert committed_steps(workdir / "checkpoints")[:1] != [STEPS]
    child = Child(dataset, workdir, ONE, 1)
    assert child.process.wait() == 0, child.log.read_text()
    assert_same_run(outcome(workdir), outcome(one_device))
    logged = [line["step"] for line in metrics.read_metrics(str(workdir)) if "loss" in line]
    assert logged == list(range(STEPS))
