"""A ladder that is killed at random moments finds what one finds that is not disturbed."""

import contextlib
import json
import random
import re
import subprocess
import sys

import pytest
from recipes import argv
from tiny_runs import start

pytestmark = pytest.mark.simulation
KILLS = 10


def begun(log):
    """The number of the stage that was begun last."""
    numbers = re.findall(r"^\[(\d+)/", log.read_text(), re.MULTILINE)
    return int(numbers[-1]) if numbers else 0


def test_killed_ten_times(ladder, changes, tmp_path):
    """Each time in a stage drawn beforehand, up to two seconds after it began: while it reads,
    compiles, computes or writes."""
    stages = len(json.loads((ladder / "seconds.json").read_text()))
    seed = random.randrange(2**16)
    print(f"\nseed {seed}")
    random.seed(seed)
    due = sorted(random.choices(range(1, stages + 1), k=KILLS))
    changes = {**changes, "train.save_every": 2}
    command = [sys.executable, "-m", "pangu_tiny", *argv("laptop", tmp_path / "run", **changes)]
    log = tmp_path / "log"
    while due:
        process = start(command, 8, log)
        while begun(log) < due[0] and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=random.uniform(0, 2))
            assert process.returncode == 0, log.read_text()[-3000:]
        process.kill()
        process.wait()
        print(f"killed in stage {begun(log)}, {due.pop(0)} was due", flush=True)
    assert start(command, 8, log).wait() == 0, log.read_text()[-3000:]
    found, expected = (
        json.loads((folder / "report.json").read_text())["results"]
        for folder in (tmp_path / "run", ladder)
    )
    assert found == expected
