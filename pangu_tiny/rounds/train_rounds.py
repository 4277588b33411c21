"""The stage `train-rounds`: a training in several rounds, each on what the model has forgotten."""

import dataclasses
import os
from typing import Any

from etils import epath

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import UserError, check_number, check_one_of
from pangu_tiny.program.optimizer import OWN_SCHEDULE, Optimizer, SharedSchedule
from pangu_tiny.rounds.score_batches import check_scoring, score_batches, scoring_layout
from pangu_tiny.rounds.scores import Scores
from pangu_tiny.rounds.select_batches import Drawing, select_batches
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
    resumes. Every round is drawn from all batches of the first, scored by the model at the end of
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
      How far the last round came; `stopped` where SIGTERM or ^C stopped it, or, after its last
      step, the rounds after it.
    """
    check_number("train_rounds.rounds", rounds, 1)
    check_one_of("train_rounds.schedule", schedule, SCHEDULES)
    check_number("train_rounds.restart_fraction", restart_fraction, above=0, most=1)

    def below(name: str, number: int) -> str:
        return os.fspath(epath.Path(workdir) / f"{name}_{number}")

    first = settings(train, dataset=dataset, workdir=below("round", 1))
    if first["shared_schedule"] != OWN_SCHEDULE:
        raise UserError("train-rounds sets SharedSchedule.start and SharedSchedule.steps itself")
    steps = total = first["steps"]
    if rounds > 1:
        later = later_steps(first)
        total += (rounds - 1) * later
        say(f"{total:,} steps in all: {steps:,} in round 1, {later:,} in each of the later ones")
    shares = schedule == "shared"
    pace: dict[str, Any] = {"shared_schedule": SharedSchedule(0, total if shares else None)}
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
                say(f"stopped after round {number - 1}; run the same command again to resume")
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
        if shares:
            pace["shared_schedule"] = SharedSchedule(steps + (number - 2) * later, total)
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


def later_steps(first: dict[str, Any]) -> int:
    """Steps of each round after the first, which has these settings; refuses those of the later
    rounds that cannot be."""
    steps, hardware = first["steps"], first["hardware"]
    scoring = settings(score_batches, checkpoint="", dataset="", workdir="")
    check_scoring(scoring["unit"], scoring["dtype"])
    mesh = make_mesh(hardware.data, hardware.fsdp, hardware.tensor)
    scoring_layout(mesh, hardware, scoring["batch_size"])
    selecting = settings(select_batches, scores="", workdir="")
    drawing = Drawing(
        **{field.name: selecting[field.name] for field in dataclasses.fields(Drawing)}
    )
    drawing.check(steps if scoring["unit"] == "batch" else steps * first["global_batch"])
    if selecting["reference"]:
        Scores.open(selecting["reference"])
    return drawing.batches(steps)


def _lower(first: dict[str, Any], dataset: str, fraction: float) -> Optimizer:
    """The optimizer of the first round with a share of its peak rate."""
    tokens = first["global_batch"] * TokenDataset.open(dataset).sequence_length
    peak = fraction * first["optimizer"].peak_rate(tokens)
    return dataclasses.replace(first["optimizer"], learning_rate=peak)
