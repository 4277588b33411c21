"""One device, eight devices, and two processes of four devices: one and the same run."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import flip
from tiny_runs import EIGHT, SETTINGS, command, start_together

from pangu_tiny.checkpoints.read import committed_steps
from pangu_tiny.topology import processes
from pangu_tiny.training import metrics

STEPS = SETTINGS["steps"]


def start_two(dataset, workdir, **changes):
    return start_together(command(dataset, workdir, EIGHT, **changes), workdir.parent)


def test_nothing_runs_on_the_mesh_in_what_the_first_process_does_alone(monkeypatch):
    """The other processes would not start the same program. The runs below go through all that
    training does alone."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    with processes.alone() as leads:
        assert leads
        with pytest.raises(RuntimeError, match="no_execution"):
            jnp.arange(3) + 1
    monkeypatch.setattr(processes, "index", lambda: 1)
    with processes.alone() as leads:
        assert not leads


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory, one_device, finished):
    workdir = tmp_path_factory.mktemp("two") / "run"
    codes = [child.wait() for child in start_two(dataset, workdir)]
    assert codes == [0, 0], (workdir.parent / "log0").read_text()
    return {"one": one_device, "eight": finished, "two": workdir}


@pytest.mark.pods
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


@pytest.mark.pods
def test_one_process_speaks(runs):
    """Lines that both print would come once for each host of a pod."""
    logs = [(runs["two"].parent / f"log{index}").read_text() for index in (0, 1)]
    assert "trained 20 steps" in logs[0] and "parameters" in logs[0]
    assert "trained" not in logs[1] and "parameters" not in logs[1]


@pytest.mark.pods
def test_two_processes_go_back_together_from_damage(runs, dataset):
    """A bit is flipped in what only the second process has to read: both must go back to the step
    before, and neither may wait for the other in vain."""
    workdir = runs["two"]
    files = list((workdir / "checkpoints/20/params/ocdbt.process_1/values").iterdir())
    assert files, "the second process wrote nothing"
    for file in files:
        flip(file)
    assert [child.wait() for child in start_two(dataset, workdir)] == [0, 0]
    log = (workdir.parent / "log0").read_text()
    [line] = [line for line in log.splitlines() if "20 is damaged" in line]
    # Which words follow depends on what the bit is of: a chunk, or a node that leads to it.
    assert re.search("resuming from step 15: .*Error (reading|opening)", line), (
        f"the second one says why: {line}"
    )
    assert committed_steps(workdir / "checkpoints")[0] == STEPS
