"""The ladder: models of several rungs and seeds, trained and evaluated alike.

Every model has a folder below `models/`, `RUNG-SEED`, which train-rounds and evaluate write. In
protocol "paper" rung `rounds` goes on from the finished models of rung `inheritance`, in their
folders; there `plain` takes as many steps as make its bytes equal, `plain-paper-SEED`.
"""

import os
from typing import Any, NamedTuple

from etils import epath

from pangu_tiny import config
from pangu_tiny.errors import UserError
from pangu_tiny.evaluation.evaluate import evaluate
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.reproduce.agenda import Step
from pangu_tiny.reproduce.rows import Rows, bytes_a_token
from pangu_tiny.reproduce.rungs import RUNGS
from pangu_tiny.reproduce.training import check_ended, flops_of, training_of
from pangu_tiny.rounds.select_batches import select_batches
from pangu_tiny.rounds.stages import run, settings
from pangu_tiny.rounds.train_rounds import train_rounds
from pangu_tiny.training.train import train
from pangu_tiny.workdir import read_json


class Trial(NamedTuple):
    """A model of a rung.

    Attributes:
      rate: the peak of its learning rate, while it is tuned; else it is found or bound.
    """

    rung: str
    protocol: str
    seed: int
    rate: float | None = None

    @property
    def title(self) -> str:
        tuned = f", rate {self.rate:g}" if self.rate else ""
        paper = ", protocol paper" if self.protocol == "paper" else ""
        return f"rung {self.rung}{paper}, seed {self.seed}{tuned}"


def trials_of(rung: str, protocols: list[str], seeds: list[int]) -> list[Trial]:
    """All models of a rung. A rung whose tokenizer is compact and that has one round is trained
    alike in both protocols."""
    differs = not RUNGS[rung].compact or RUNGS[rung].again
    named = protocols if differs else ["equal"]
    return [Trial(rung, protocol, seed) for protocol in named for seed in seeds]


def shape_of(rung: str) -> ModelShape:
    return training_of(rung)["model"]


def check_sizes(rungs: list[str], tolerance: float) -> None:
    """Refuses models whose parameters are not as many as those of the first."""
    wanted = shape_of(rungs[0]).parameters
    for rung in rungs[1:]:
        shape = shape_of(rung)
        if abs(shape.parameters / wanted - 1) <= tolerance:
            continue
        series = 2 * shape.series_terms if shape.series_terms > 1 else 0
        neuron = shape.depth * (3 * shape.width + series)
        fitting = shape.ffn_width + round((wanted - shape.parameters) / neuron)
        advice = f"ModelShape.ffn_width = {fitting} fits" if fitting > 0 else "no ffn_width fits"
        raise UserError(
            f"rung {rung} has {shape.parameters:,} parameters, {rungs[0]} {wanted:,}: expected a "
            f"difference of at most reproduce.parameter_tolerance, {tolerance:g}; {advice}"
        )


class Ladder:
    """Trains and evaluates; what it finds is kept in `found`, by trial.

    Args:
      length: of the rows.
      start: the workdir of inherit; None leaves `train.checkpoint` as it is bound.
      rates: the grid that the peak rate of every rung is taken from; None takes those bound.
      tuning_seed: on which it is.
    """

    def __init__(
        self,
        folder: epath.Path,
        rows: Rows,
        length: int,
        start: str | None,
        rates: list[float] | None = None,
        tuning_seed: int = 0,
    ):
        self._folder, self._rows, self._start = folder / "models", rows, start
        self._length = length
        self._rates, self._tuning_seed = rates or [], tuning_seed
        self.found: dict[Trial, dict[str, Any]] = {}

    def steps(self, rungs: list[str], protocols: list[str], seeds: list[int]) -> list[Step]:
        """Those of all models, rung by rung for every seed, after those of tuning."""
        trials = [
            Trial(rung, "equal", self._tuning_seed, rate) for rung in rungs for rate in self._rates
        ]
        trials += [
            trial
            for seed in seeds
            for rung in rungs
            for trial in trials_of(rung, protocols, [seed])
        ]
        return [self._step(trial) for trial in trials]

    def tuned(self, rung: str) -> dict[float, float]:
        """Held-out bits per byte by the peak rates that were tried."""
        trials = [Trial(rung, "equal", self._tuning_seed, rate) for rate in self._rates]
        return {trial.rate: self.found[trial]["bits_per_byte"] for trial in trials}  # type: ignore

    def model_of(self, trial: Trial) -> epath.Path:
        """Its folder."""
        name = f"{_scope(trial)}-{trial.seed}"
        if trial.protocol == "paper" and not RUNGS[trial.rung].again:
            name = f"{trial.rung}-paper-{trial.seed}"
        return self._folder / (name if trial.rate is None else f"{name}-rate-{trial.rate:g}")

    def _step(self, trial: Trial) -> Step:
        flops = flops_of(training_of(_scope(trial)), self._length)
        if trial.protocol == "paper" and RUNGS[trial.rung].again:
            flops *= settings(select_batches, scores="", workdir="")["rate"]
        return Step(trial.title, lambda: self._run(trial), flops)

    def _run(self, trial: Trial) -> None:
        rung, folder = RUNGS[trial.rung], self.model_of(trial)
        rows = self._rows.compact if rung.compact else self._rows.big
        rate = trial.rate
        if rate is None and self._rates:
            tuned = self.tuned(_scope(trial))
            rate = min(tuned, key=tuned.__getitem__)
        given: dict[str, Any] = {"train.seed": trial.seed}
        if rate is not None:
            given["Optimizer.learning_rate"] = rate
        if not rung.inherits or self._start is not None:
            given["train.checkpoint"] = self._start if rung.inherits else None
        with config.within(_scope(trial), given):
            rounds, plan = self._plan(trial)
            with config.within(_scope(trial), plan):
                schedule = {"schedule": "restart"} if trial.protocol == "paper" else {}
                trained = run(
                    "", train_rounds, dataset=rows, workdir=os.fspath(folder), rounds=rounds,
                    **schedule,
                )  # fmt: skip
                check_ended(trained)
                place = os.fspath(folder / f"evaluation_{rounds}")
                result = run(
                    "", evaluate, checkpoint=trained.checkpoint, dataset=rows, workdir=place
                )
        self.found[trial] = self._figures(folder, rows, rounds, result) | {
            "checkpoint": trained.checkpoint
        }

    def _plan(self, trial: Trial) -> tuple[int, dict[str, int]]:
        """How many rounds, and the steps of the first."""
        steps = settings(train, dataset="", workdir="")["steps"]
        rounds = 1
        if RUNGS[trial.rung].again:
            rounds = settings(train_rounds, dataset="", workdir="")["rounds"]
            if trial.protocol == "equal":
                rate = settings(select_batches, scores="", workdir="")["rate"]
                steps = first_round(steps, rounds, rate)
        elif trial.protocol == "paper" and self._rows.big and not RUNGS[trial.rung].compact:
            steps = round(steps * bytes_a_token(self._rows.compact) / bytes_a_token(self._rows.big))
        return rounds, {"train.steps": steps}

    def _figures(
        self, folder: epath.Path, rows: str, rounds: int, result: dict[str, Any]
    ) -> dict[str, Any]:
        """What is told of a model, whatever it was run on."""
        ran = [read_json(folder / f"round_{n}" / "identity.json") for n in range(1, rounds + 1)]
        first = ran[0]
        tokens = first["global_batch"] * first["sequence_length"] * sum(one["steps"] for one in ran)
        return {
            "learning_rate": first["optimizer"]["learning_rate"],
            "steps": [one["steps"] for one in ran],
            "tokens": tokens,
            "bytes": round(tokens * bytes_a_token(rows)),
            "bits_per_byte": result["bits_per_byte"],
            "sources": {
                name: source["bits_per_byte"] for name, source in result["sources"].items()
            },
        }


def _scope(trial: Trial) -> str:
    """The rung whose settings a model is trained with."""
    again = RUNGS[trial.rung].again and trial.protocol == "paper"
    return "inheritance" if again else trial.rung


def first_round(steps: int, rounds: int, rate: float) -> int:
    """Steps of a first round, so that with the later ones, each a `rate` of it, they are as many as
    `steps`, or a little fewer."""

    def total(first: int) -> int:
        return first + (rounds - 1) * round(rate * first)

    first = int(steps / (1 + (rounds - 1) * rate))
    while total(first + 1) <= steps:
        first += 1
    while first > 1 and total(first) > steps:
        first -= 1
    return first
