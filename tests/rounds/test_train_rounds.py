"""train-rounds: all rounds by one command, that may be stopped anywhere. Real processes, killed."""

import os
import random
import re
import shutil
import signal

import numpy as np
import pytest
import tiny_runs

from pangu_tiny import cli
from pangu_tiny.data.round_index import RoundIndex
from pangu_tiny.errors import UserError
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.rounds.scores import Scores
from pangu_tiny.rounds.train_rounds import train_rounds
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.training.metrics import read_metrics, read_row_losses
from pangu_tiny.workdir import read_identity

STEPS, LATER = 8, 4
FILES = {"round": 60, "scores": 4, "index": 4}
"""How many files such a folder comes to have, at least."""
BINDINGS = {
    "train_rounds.rounds": 3,
    "score_batches.batch_size": 8,
    "score_batches.save_minutes": 0,
}


def command(dataset, workdir, steps=STEPS):
    argv = tiny_runs.command(dataset, "", Hardware(), steps=steps, save_every=2, keep_every=2)
    bindings = {
        **BINDINGS,
        "train_rounds.dataset": dataset,
        "train_rounds.workdir": workdir,
    }
    argv[argv.index("train")] = "train-rounds"
    return argv + [f"--gin.{name}={value}" for name, value in bindings.items()]


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    process = tiny_runs.start(command(dataset, folder / "rounds"), 1, folder / "log")
    assert process.wait() == 0, (folder / "log").read_text()
    return folder / "rounds"


def outcome(workdir):
    """All that a round leaves to the next, and to the user."""
    found = {}
    for number, steps in ((1, STEPS), (2, LATER), (3, LATER)):
        run = workdir / f"round_{number}"
        found |= {f"{number}{name}": x for name, x in tiny_runs.state_of(run, steps).items()}
        found[f"{number}losses"] = read_row_losses(str(run))
    for number in (2, 3):
        scores = Scores.open(str(workdir / f"scores_{number}"))
        found[f"{number}nats"], found[f"{number}targets"] = scores.nats, scores.targets
        found[f"{number}units"] = RoundIndex.open(str(workdir / f"index_{number}")).units
    return found


@pytest.mark.pods
def test_each_round_goes_on_where_the_one_before_left_off(finished):
    """Scores are those of the first round's batches under the newest model; one cosine over all."""
    identities = {number: read_identity(finished / f"round_{number}") for number in (1, 2, 3)}
    assert [one["schedule"] for one in identities.values()] == [[0, 16], [8, 16], [12, 16]]
    assert identities[3]["checkpoint"]["identity"] == {
        name: value for name, value in identities[2].items() if name != "stage"
    }
    scores = [Scores.open(str(finished / f"scores_{number}")) for number in (2, 3)]
    assert scores[0].round == scores[1].round and scores[0].round.batches == STEPS
    assert scores[0].model != scores[1].model
    units = [RoundIndex.open(str(finished / f"index_{number}")).units for number in (2, 3)]
    assert [len(one) for one in units] == [LATER, LATER]
    rates = [
        line["learning_rate"]
        for number in (1, 2, 3)
        for line in read_metrics(str(finished / f"round_{number}"))
        if "loss" in line
    ]
    assert "loss when seen" in (finished / "scores_3" / "report.html").read_text()
    assert len(rates) == 16 and (np.diff(rates)[1:] < 0).all() and rates[-1] < 0.11 * rates[0]


@pytest.mark.pods
def test_killed_anywhere_it_goes_on_to_the_same_bits(dataset, finished, tmp_path):
    """SIGKILL in a stage of the first half and in one of the second, after any of its files."""
    workdir, log = tmp_path / "rounds", tmp_path / "log"
    argv = command(dataset, workdir)
    for stages in ("round_1 scores_2 index_2", "round_2 scores_3 index_3 round_3"):
        stage = random.choice(stages.split())
        last = random.randrange(1, FILES[stage[:-2]])
        print(f"killed in {stage} at file {last}")
        process = tiny_runs.start(argv, 1, log)
        while process.poll() is None and _files(workdir / stage) < last:
            pass
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()
    process = tiny_runs.start(argv, 1, log)
    assert process.wait() == 0, log.read_text()
    tiny_runs.assert_same_bits(outcome(workdir), outcome(finished))


def _files(folder):
    return sum(len(names) for _, _, names in os.walk(folder))


@pytest.mark.pods
def test_rounds_may_restart_the_schedule(dataset, tmp_path):
    workdir, log = tmp_path / "rounds", tmp_path / "log"
    changes = {"rounds": 2, "schedule": "restart", "restart_fraction": 0.25}
    flags = [f"--gin.train_rounds.{name}={value}" for name, value in changes.items()]
    flags.append("--gin.Optimizer.learning_rate=None")  # by the paper's rule
    process = tiny_runs.start(command(dataset, workdir, steps=2) + flags, 1, log)
    assert process.wait() == 0, log.read_text()
    assert "3 steps in all: 2 in round 1, 1 in each of the later ones" in log.read_text()
    first, second = (read_identity(workdir / f"round_{number}") for number in (1, 2))
    assert (first["schedule"], second["schedule"]) == ([0, 2], [0, 1])
    assert second["optimizer"]["learning_rate"] == 0.25 * Optimizer().peak_rate(8 * 32)
    assert second["keep_moments"] and not first["keep_moments"]


@pytest.mark.pods
def test_processes_stop_together(dataset, finished, tmp_path):
    """Two go on behind what one did, and the first of them, which draws alone, finds a draw by
    another seed; the other one would go on with it."""
    for name in ("round_1", "scores_2", "index_2"):
        shutil.copytree(finished / name, tmp_path / "rounds" / name)
    argv = [*command(dataset, tmp_path / "rounds"), "--gin.select_batches.seed=7"]
    argv = [flag for flag in argv if "Hardware.fsdp" not in flag]
    children = tiny_runs.start_together([*argv, "--gin.Hardware.fsdp=8"], tmp_path)
    assert [child.wait() for child in children] == [2, 2]
    assert "holds another run: seed is 0 there, 7 here" in (tmp_path / "log0").read_text()
    (line,) = re.findall("pangu-tiny.*", (tmp_path / "log1").read_text())
    assert "process 0 (" in line and "seed is 0 there, 7 here" in line


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rounds": 0}, "rounds is 0, expected at least 1"),
        ({"schedule": "x"}, "schedule is 'x', expected one of shared, restart"),
        ({"restart_fraction": 0.0}, "restart_fraction is 0.0"),
    ],
)
def test_mistakes_are_named(dataset, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        train_rounds(dataset, str(tmp_path / "rounds"), **changes)
    assert not (tmp_path / "rounds").exists()


@pytest.mark.parametrize(
    "flag, said",
    [
        ("SharedSchedule.start=3", "train-rounds sets SharedSchedule.start and"),
        ("score_batches.unit=row", "score_batches.unit is 'row'"),
        ("score_batches.batch_size=9", "score_batches.batch_size 9 is not divisible by"),
        ("select_batches.clip=2", "select_batches.clip is 2"),
        ("select_batches.parts=9", "parts is 9, expected at least 1 and at most 8"),
        ("select_batches.reference=nowhere", "scores nowhere has no scores.npz"),
        ("select_batches.rate=0.05", "rate 0.05 of 8 batches leaves none"),
    ],
)
def test_what_later_rounds_will_never_do_is_said_before_the_first(
    dataset, tmp_path, capsys, flag, said
):
    argv = command(dataset, tmp_path / "rounds")[3:]
    assert cli.main([*argv, "--gin.Hardware.fsdp=8", f"--gin.{flag}"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "rounds").exists()
