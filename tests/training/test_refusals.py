"""Of two real processes one is refused: both end, and each says in one line why."""

import os
import shutil

import pytest
from tiny_runs import command, free_port, prepare, start

from pangu_tiny.topology.hardware import Hardware

HANG = 120  # seconds; those that would wait for each other would do so for minutes
OTHER_VERSION = """
import sys, pangu_tiny
pangu_tiny.__version__ = "0.0.0"
from pangu_tiny.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def other_dataset(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("other"), held_out_fraction=0.2)


@pytest.mark.pods
@pytest.mark.parametrize(
    ("difference", "first_says", "second_says"),
    [
        ("--gin.Optimizer.learning_rate=1", "optimizer.learning_rate is 0.003 in process 0 (", ""),
        ("--gin_file=none.gin", "process 1 (", "--gin_file=none.gin: no such file"),
        ("another dataset", "dataset is ", ""),
        ("--gin.train.dataset=nowhere", "process 1 (", "dataset nowhere has no dataset.json"),
        ("another version", "version.pangu_tiny is '", ""),
        ("another folder", "process 1 (", "is not there, though process 0 has it"),
        ("no access", "process 1 (", "run cannot be written: Permission denied"),
        ("--processes=3", "--processes is ", ""),
    ],
)
def test_both_end_with_a_line_each(
    difference, first_says, second_says, dataset, other_dataset, tmp_path
):
    argv = command(dataset, "run", Hardware(data=2))
    python, *rest = argv
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    second, cwd = [*argv, *flags], tmp_path
    if difference.startswith("--"):
        second.append(difference)
    elif difference == "another dataset":
        second.append(f"--gin.train.dataset={other_dataset}")
    elif difference == "another version":
        second = [python, "-c", OTHER_VERSION, *rest[2:], *flags]
    elif difference == "no access":
        if os.geteuid() != 0 or not shutil.which("setpriv"):
            pytest.skip("only root, with setpriv, can take the right to write from one process")
        (tmp_path / "run").mkdir(mode=0)
        second = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *second]
    else:
        cwd = tmp_path / "elsewhere"
        cwd.mkdir()
    logs = [tmp_path / "log0", tmp_path / "log1"]
    processes = [
        start([*argv, *flags, "--process=0"], 1, logs[0], tmp_path),
        start([*second, "--process=1"], 1, logs[1], cwd),
    ]
    try:
        codes = [process.wait(timeout=HANG) for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [log.read_text().splitlines() for log in logs]
    assert codes == [2, 2], lines
    for found, said in zip(lines, (first_says, second_says or first_says), strict=True):
        (line,) = (line for line in found if line.startswith("pangu-tiny"))
        assert said in line, lines
        assert len(found) == 1 or "waiting for the other processes" in found[0], found
