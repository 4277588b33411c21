"""A ladder that is killed at random moments finds what one finds that is not disturbed."""

import contextlib
import json
import random
import subprocess
import sys
import time

import pytest
from recipes import argv
from tiny_runs import start

pytestmark = pytest.mark.simulation
KILLS = 10


def run(workdir, log, changes, kills=()):
    """The command again and again, killed after so many seconds of work; returns those it took."""
    command = [sys.executable, "-m", "pangu_tiny", *argv("laptop", workdir, **changes)]
    worked, due = 0.0, sorted(kills)
    while True:
        began = time.monotonic()
        process = start(command, 8, log)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(due[0] - worked, 0.01) if due else None)
            assert process.returncode == 0, log.read_text()[-3000:]
            return worked + time.monotonic() - began
        process.kill()
        process.wait()
        worked += time.monotonic() - began
        lines = [line for line in log.read_text().splitlines() if line.startswith("[")]
        print(f"killed after {due.pop(0):.0f} s, in {lines[-1:]}", flush=True)


def test_killed_ten_times(ladder, changes, tmp_path):
    """After `ladder` all programs are compiled, so that what follows takes as long each time."""
    seed = random.randrange(2**16)
    print(f"\nseed {seed}")
    random.seed(seed)
    changes = {**changes, "train.save_every": 2}
    seconds = run(tmp_path / "undisturbed", tmp_path / "log0", changes)
    print(f"undisturbed {seconds:.0f} s")
    kills = [random.uniform(0, 0.9 * seconds) for _ in range(KILLS)]
    run(tmp_path / "killed", tmp_path / "log1", changes, kills)
    found = [
        json.loads((folder / "report.json").read_text())["results"]
        for folder in (tmp_path / "killed", tmp_path / "undisturbed", ladder)
    ]
    assert found[0] == found[1] == found[2]
