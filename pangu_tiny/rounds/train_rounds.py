"""The stage `train-rounds`: a training in several rounds, each on what the model has forgotten."""

import dataclasses
import os
from typing import Any

from etils import epath

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import UserError
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.rounds.score_batches import check_scoring, score_batches, scoring_feed
from pangu_tiny.rounds.scores import Scores
from pangu_tiny.rounds.select_batches import batches_at, check_drawing, select_batches
from pangu_tiny.rounds.stages import run, settings
from pangu_tiny.topology.mesh import make_mesh
from pangu_tiny.topology.processes import led, say
from pangu_tiny.training.train import Trained, train

SCHEDULES = ("shared", "restart")


def train_rounds(
    dataset: str,
    workdir: str,
    rounds: int = 2,
    schedule: str = "shared",
    restart_fraction: float = 0.5,
) -> Trained:
    """Trains, scores what was trained, draws a part of it, and trains on that; again and again.

    Every stage takes its own bindings (`train.steps` and all else of the first round,
    `score_batches.unit`, `select_batches.rate`, …) and writes a folder of its own below `workdir`:
    `round_1`, then `scores_2`, `index_2`, `round_2`, and so on. Stopped anywhere, the same command
    goes on. Every round is drawn from all batches of the first, scored by the model at the end of
    the round before; it starts from that model and from its moments of Adam.

    Args:
      dataset: workdir of prepare-data.
      workdir: the folder for everything.
      rounds: how many; 2 are the paper's recommendation, a third gained nothing there.
      schedule: of the learning rate, which the paper does not state. "shared" is one warm-up and
        one cosine over all rounds, so that `rounds` and the rate of the draw are settled before the
        first; "restart" is one for each round.
      restart_fraction: with "restart", the peak of a later round as a share of the first's.

    Returns:
      How far the last round came; `stopped` where SIGTERM or ^C stopped it, or, behind its last
      step, the rounds after it.

    Raises:
      UserError: of any of the stages.
    """
    if rounds < 1:
        raise UserError(f"train_rounds.rounds is {rounds}, expected at least 1")
    if schedule not in SCHEDULES:
        raise UserError(
            f"train_rounds.schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}"
        )
    if not 0 < restart_fraction <= 1:
        raise UserError(
            f"train_rounds.restart_fraction is {restart_fraction}, expected more than 0, at most 1"
        )

    def below(name: str, number: int) -> str:
        return os.fspath(epath.Path(workdir) / f"{name}_{number}")

    first = settings(train, dataset=dataset, workdir=below("round", 1))
    if first["schedule_start"] or first["schedule_steps"]:
        raise UserError("train-rounds sets train.schedule_start and train.schedule_steps itself")
    steps = total = first["steps"]
    if rounds > 1:
        later = _later_steps(first)
        total += (rounds - 1) * later
        say(f"{total:,} steps in all: {steps:,} in round 1, {later:,} in each of the later ones")
    pace = {"schedule_start": 0, "schedule_steps": total if schedule == "shared" else None}
    model = below("round", 1)
    trained = run(
        f"round 1 of {rounds}",
        train,
        dataset=dataset,
        workdir=model,
        round_index=None,
        **pace,
    )
    for number in range(2, rounds + 1):
        if trained.stopped or trained.step < trained.steps:
            if trained.step == trained.steps:
                say(f"stopped behind round {number - 1}; run the same command again to go on")
            break
        scores, index = below("scores", number), below("index", number)
        run(
            f"what round {number} is drawn from",
            score_batches,
            checkpoint=model,
            dataset=dataset,
            workdir=scores,
            round_of=below("round", 1),
        )
        with led() as leads:
            if leads:
                before = below("index", number - 1) if number > 2 else None
                run("", select_batches, scores=scores, workdir=index, before=before)
        if schedule == "shared":
            pace["schedule_start"] = steps + (number - 2) * later
        else:
            pace["optimizer"] = _lower(first, dataset, restart_fraction)
        start, model = model, below("round", number)
        trained = run(
            f"round {number} of {rounds}",
            train,
            dataset=dataset,
            workdir=model,
            steps=later,
            checkpoint=start,
            round_index=index,
            keep_moments=True,
            **pace,
        )
    return trained


def _later_steps(first: dict[str, Any]) -> int:
    """Steps of each round after the first, which has these settings.

    Raises:
      UserError: what is bound for scoring or drawing will never do; to be told before the first
        round, not behind it.
    """
    steps, hardware = first["steps"], first["hardware"]
    scoring = settings(score_batches, checkpoint="", dataset="", workdir="")
    check_scoring(scoring["unit"], scoring["dtype"])
    mesh = make_mesh(hardware.data, hardware.fsdp, hardware.tensor)
    scoring_feed(mesh, hardware, scoring["batch_size"])
    drawing = settings(select_batches, scores="", workdir="")
    free = ("scores", "workdir", "reference", "before")
    units = steps if scoring["unit"] == "batch" else steps * first["global_batch"]
    check_drawing(
        **{name: value for name, value in drawing.items() if name not in free}, units=units
    )
    if drawing["reference"]:
        Scores.open(drawing["reference"])
    return batches_at(drawing["rate"], steps)


def _lower(first: dict[str, Any], dataset: str, fraction: float) -> Optimizer:
    """The optimizer of the first round with a share of its peak rate."""
    tokens = first["global_batch"] * TokenDataset.open(dataset).sequence_length
    peak = fraction * first["optimizer"].peak_rate(tokens)
    return dataclasses.replace(first["optimizer"], learning_rate=peak)
