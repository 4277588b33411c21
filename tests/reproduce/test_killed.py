"""A ladder or a table killed at random moments finds what one finds that is not disturbed."""

import json
import random
import re
import sys

import pytest
from recipes import TEACHER, argv, table_argv
from tiny_runs import kill_each, start

pytestmark = pytest.mark.simulation
KILLS = 10


def begun(log):
    """The number of the stage that was begun last."""
    numbers = re.findall(r"^\[(\d+)/", log.read_text(), re.MULTILINE)
    return int(numbers[-1]) if numbers else 0


def disturb(command, stages, log):
    """Runs a command, killed ten times, each in a stage drawn beforehand, up to two seconds after
    it began: while it reads, compiles, computes or writes."""
    seed = random.randrange(2**16)
    print(f"\nseed {seed}")
    random.seed(seed)
    due = random.choices(range(1, stages + 1), k=KILLS)
    kill_each(command, 8, log, due, lambda: begun(log), 2)


def results(*reports):
    return [json.loads(report.read_text())["results"] for report in reports]


def test_a_ladder_is_killed_ten_times(ladder, changes, tmp_path):
    stages = len(json.loads((ladder / "seconds.json").read_text()))
    changes = {**changes, "train.save_every": 2}
    command = [sys.executable, "-m", "pangu_tiny", *argv("laptop", tmp_path / "run", **changes)]
    disturb(command, stages, tmp_path / "log")
    found, expected = results(tmp_path / "run" / "report.json", ladder / "report.json")
    assert found == expected


def test_a_table_is_killed_ten_times(text, tmp_path):
    given = {**TEACHER, "reproduce.table_rows": ["none", "learned_corrected"]}
    given |= {"MaskTraining.steps": 4, "reproduce.seeds": [1, 2], "train.save_every": 1}
    alone, killed = (
        [sys.executable, "-m", "pangu_tiny", *table_argv("inheritance", text, folder, **given)]
        for folder in (tmp_path / "alone", tmp_path / "killed")
    )
    assert start(alone, 8, tmp_path / "log").wait() == 0
    stages = len(json.loads((tmp_path / "alone" / "seconds.json").read_text()))
    disturb(killed, stages, tmp_path / "log_killed")
    found, expected = results(tmp_path / "killed" / "table.json", tmp_path / "alone" / "table.json")
    assert found == expected
