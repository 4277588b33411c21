"""One device, eight devices, and two processes of four devices: one and the same run."""

import numpy as np
import pytest
from tiny_runs import EIGHT, SETTINGS, command, start_together

from pangu_tiny.checkpoints.read import committed_steps
from pangu_tiny.training import metrics

pytestmark = pytest.mark.pods

STEPS = SETTINGS["steps"]


def start_two(dataset, workdir, **changes):
    return start_together(command(dataset, workdir, EIGHT, **changes), workdir.parent)


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory, one_device, finished):
    workdir = tmp_path_factory.mktemp("two") / "run"
    codes = [process.wait() for process in start_two(dataset, workdir)]
    assert codes == [0, 0], (workdir.parent / "log0").read_text()
    return {"one": one_device, "eight": finished, "two": workdir}


@pytest.mark.parametrize("other", ["eight", "two"])
def test_batches_are_the_same_and_losses_nearly(runs, other):
    """Float32 sums in another order, over 20 steps: 1e-5."""
    found, expected = (metrics.read_row_losses(str(runs[name])) for name in (other, "one"))
    for field in ("step", "row", "targets"):
        np.testing.assert_array_equal(found[field], expected[field])
    losses = [
        {line["step"]: line["loss"] for line in metrics.read_metrics(str(runs[name]))
         if "loss" in line}
        for name in (other, "one")
    ]  # fmt: skip
    assert list(losses[0]) == list(losses[1]) == list(range(STEPS))
    np.testing.assert_allclose(*(list(line.values()) for line in losses), rtol=1e-5)
    held_out = [
        [line["held_out_bits_per_byte"] for line in metrics.read_metrics(str(runs[name]))
         if "held_out_bits_per_byte" in line]
        for name in (other, "one")
    ]  # fmt: skip
    np.testing.assert_allclose(*held_out, rtol=1e-5)


def test_one_process_speaks(runs):
    """Lines that both print would come once for each host of a pod."""
    logs = [(runs["two"].parent / f"log{index}").read_text() for index in (0, 1)]
    assert "trained 20 steps" in logs[0] and "parameters" in logs[0]
    assert "trained" not in logs[1] and "parameters" not in logs[1]


def test_two_processes_go_back_together_from_damage(runs, dataset):
    """A file that only the second process has to read is damaged: both must go back to the step
    before, and neither may wait for the other in vain."""
    workdir = runs["two"]
    newest = workdir / "checkpoints" / "20" / "params" / "ocdbt.process_1" / "d"
    files = list(newest.iterdir()) if newest.exists() else []
    assert files, "the second process wrote nothing"
    for file in files:
        file.unlink()
    processes = start_two(dataset, workdir)
    assert [process.wait() for process in processes] == [0, 0]
    log = (workdir.parent / "log0").read_text()
    assert "20 is damaged" in log and "going on from step 15" in log
    assert committed_steps(workdir / "checkpoints")[0] == STEPS
