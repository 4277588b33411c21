"""A stage that is killed at random moments finds what one finds that is not disturbed."""

import dataclasses
import json
import random
import sys

import pytest
from checkpoint_files import write_checkpoint
from shapes import TINY, random_params
from tiny_runs import kill_each, start

pytestmark = pytest.mark.simulation
KILLS = 10


def kept(folder):
    """Answers by key."""
    file = folder / "answers.json"
    return json.loads(file.read_text()) if file.exists() else {}


def test_killed_ten_times(real_data, tokenizer, tmp_path):
    """Each time up to half a second after so many answers were kept as were drawn beforehand: of
    choices, and of what is written."""
    shape = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    checkpoint = write_checkpoint(tmp_path, shape, random_params(shape), tokenizer, 256)
    command = [
        *(sys.executable, "-m", "pangu_tiny", "benchmark"),
        f"--gin.benchmark.checkpoint={checkpoint}",
        f"--gin.benchmark.folder={real_data / 'benchmarks'}",
        "--gin.benchmark.tasks=['eprstmt', 'ceval', 'xsum', 'piqa']",
        "--gin.benchmark.save_seconds=0",
    ]
    log = tmp_path / "log"
    assert start([*command, f"--gin.benchmark.workdir={tmp_path / 'whole'}"], 1, log).wait() == 0
    whole = kept(tmp_path / "whole")
    seed = random.randrange(2**16)
    print(f"\nseed {seed}")
    random.seed(seed)
    command.append(f"--gin.benchmark.workdir={tmp_path / 'killed'}")
    due = [1 + place for place in random.choices(range(len(whole) - 32), k=KILLS)]
    kill_each(command, 1, log, due, lambda: len(kept(tmp_path / "killed")), 0.5)
    assert kept(tmp_path / "killed") == whole
    found, expected = (tmp_path / name / "benchmark.json" for name in ("killed", "whole"))
    assert json.loads(found.read_text()) == json.loads(expected.read_text())
