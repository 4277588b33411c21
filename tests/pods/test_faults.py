"""What happens to one of two processes, the other tells, and the same command goes on: to the bits
of a run to which nothing happened. Their folder is on gs://."""

import contextlib
import re
import signal
import subprocess

import numpy as np
import pytest
from etils import epath
from tiny_runs import EIGHT, assert_same_bits, command, run, start_together, state_of

from pangu_tiny.checkpoints.read import committed_steps
from pangu_tiny.topology import ending
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.training.metrics import read_metrics, read_row_losses

pytestmark = pytest.mark.pods

HANG = 240  # seconds, far above what any of this takes
STEPS = 40
SETTINGS = {"steps": STEPS, "save_every": 4, "keep_every": 4, "evaluate_every": STEPS}


class Pair:
    """Two processes of four devices that train in a folder."""

    def __init__(self, dataset, workdir, folder, **changes):
        folder.mkdir(exist_ok=True)
        argv = command(dataset.path, workdir, EIGHT, **SETTINGS, **changes)
        self.workdir, self.folder = workdir, folder
        self.processes = start_together(argv, folder)

    def until_saved(self, step):
        """Looks now and then; looking all the time would slow it."""
        while self.saved() < step:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.processes[0].wait(timeout=0.1)
                raise AssertionError(self.log(0))

    def saved(self):
        return max(committed_steps(epath.Path(self.workdir) / "checkpoints"), default=0)

    def lose(self, index, number):
        """Kills or stops one; the other has a minute to name it, and does it once."""
        self.processes[index].send_signal(number)
        assert self.processes[1 - index].wait(timeout=60) == 1
        found = re.findall(
            rf"^pangu-tiny: process {index} \(.+\) is lost", self.log(1 - index), re.M
        )
        assert len(found) == 1, self.log(1 - index)
        self.processes[index].kill()
        self.codes()

    def codes(self):
        return [process.wait(HANG) for process in self.processes]

    def log(self, index):
        return (self.folder / f"log{index}").read_text()


@pytest.fixture(scope="module")
def undisturbed(dataset, bucket, tmp_path_factory):
    workdir = f"{bucket}/undisturbed"
    pair = Pair(dataset, workdir, tmp_path_factory.mktemp("undisturbed") / "logs")
    assert pair.codes() == [0, 0], pair.log(0)
    assert re.search("checkpoints of .* GB, of which the newest 2 are there; one of", pair.log(0))
    return workdir


def test_a_run_survives(dataset, bucket, undisturbed, tmp_path):
    """SIGTERM to one; then the first is killed, and the second stopped, which the other sees by its
    silence; then the first is stopped, with a watchdog that is quicker than that."""
    workdir = f"{bucket}/survivor"

    pair = Pair(dataset, workdir, tmp_path / "term")
    pair.until_saved(4)
    pair.processes[1].terminate()
    assert pair.codes() == [143, 143], pair.log(0)
    stopped = re.search(r"stopped at step (\d+) of 40; run the same command", pair.log(0))
    assert int(stopped[1]) == pair.saved() < STEPS and "stopped at" not in pair.log(1)

    for lost, number in ((0, signal.SIGKILL), (1, signal.SIGSTOP)):
        pair = Pair(dataset, workdir, tmp_path / f"lost{lost}")
        pair.until_saved(pair.saved() + 4)
        pair.lose(lost, number)

    pair = Pair(dataset, workdir, tmp_path / "stop", watchdog_minutes=0.25)
    pair.until_saved(pair.saved() + 4)
    pair.processes[0].send_signal(signal.SIGSTOP)
    assert pair.processes[1].wait(HANG) == 1
    said = r"^pangu-tiny: process 1 \(.+\): what follows step \d+ has not come back for 15 s"
    assert re.search(said, pair.log(1), re.M), pair.log(1)
    assert re.search(r"File .*loop\.py., line \d+ in train_steps", pair.log(1)), "no stacks"
    pair.processes[0].kill()
    pair.codes()

    pair = Pair(dataset, workdir, tmp_path / "end")
    assert pair.codes() == [0, 0], pair.log(0)
    assert_same_bits(state_of(workdir, STEPS), state_of(undisturbed, STEPS))
    np.testing.assert_array_equal(read_row_losses(workdir), read_row_losses(undisturbed))


def test_one_process_and_another_mesh_go_on(dataset, bucket, undisturbed, tmp_path):
    """After the second one was killed, with losses that differ by the order of float32 sums, 1e-5
    of them."""
    workdir = f"{bucket}/moved"
    pair = Pair(dataset, workdir, tmp_path / "logs")
    pair.until_saved(4)
    pair.lose(1, signal.SIGKILL)
    mesh = Hardware(data=4, fsdp=2, tensor=1, per_device_batch=1)
    assert run(dataset.path, workdir, hardware=mesh, **SETTINGS).step == STEPS
    found, expected = (
        [line["loss"] for line in read_metrics(folder) if "loss" in line]
        for folder in (workdir, undisturbed)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_process_is_lost_where_nothing_is_heard_of_it(monkeypatch):
    """A clock that is set by hand: silence, not the age of a beat that was heard; this process
    itself is not held up for the others."""
    now, told = [100.0], {}

    class Client:
        def key_value_set(self, key, value, overwrite):
            told[key] = value

        def key_value_dir_get(self, place):
            return list(told.items())

    monkeypatch.setattr(ending, "client", Client)
    monkeypatch.setattr(ending, "count", lambda: 3)
    monkeypatch.setattr(ending, "index", lambda: 0)
    monkeypatch.setattr(ending.time, "monotonic", lambda: now[0])
    beats = ending.Beats(["a", "b", "c"])
    for second in range(0, 44, 4):
        now[0] = 100.0 + second
        told["pangu_tiny/beats/000002"] = str(second)
        beats.exchange()
        expected = "process 1 (b) is lost" if second >= ending.SILENT_SECONDS else None
        assert (beats.lost() or "").partition(",")[0] == (expected or ""), second
    beats.forgive()
    assert beats.lost() is None
    now[0] += ending.SILENT_SECONDS
    assert beats.lost().startswith("process 0 (a) is lost"), "its service is not reached"
