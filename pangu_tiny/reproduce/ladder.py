"""The ladder: models of several rungs and seeds, trained and evaluated alike.

Every model has a folder below `models/`, `RUNG-SEED`, which train-rounds and evaluate write. In
protocol "paper" rung `rounds` goes on from the finished models of rung `inheritance`, in their
folders; there `plain` takes as many steps as make its bytes equal, `plain-paper-SEED`.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from pangu_tiny import config
from pangu_tiny.errors import Diverged, UserError
from pangu_tiny.evaluation.evaluate import evaluate
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.reproduce.agenda import Step
from pangu_tiny.reproduce.rows import Rows, bytes_a_token
from pangu_tiny.reproduce.rungs import RUNGS
from pangu_tiny.reproduce.training import check_ended, flops_of, training_of
from pangu_tiny.rounds.select_batches import select_batches
from pangu_tiny.rounds.stages import run, settings
from pangu_tiny.rounds.train_rounds import later_steps, train_rounds
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
    def goes_on(self) -> bool:
        """Whether it is a finished model of rung `inheritance` that is trained further."""
        return self.protocol == "paper" and RUNGS[self.rung].again

    @property
    def scope(self) -> str:
        """The rung whose settings it has."""
        return "inheritance" if self.goes_on else self.rung

    @property
    def folder(self) -> str:
        paper = "-paper" if self.protocol == "paper" and not self.goes_on else ""
        rate = "" if self.rate is None else f"-rate-{self.rate!r}"
        return f"{self.scope}{paper}-{self.seed}{rate}"

    @property
    def title(self) -> str:
        rate = "" if self.rate is None else f", rate {self.rate!r}"
        paper = ", protocol paper" if self.protocol == "paper" else ""
        return f"rung {self.rung}{paper}, seed {self.seed}{rate}"


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
        name = "ModelShape.ffn_width"
        scope = f"{rung}/" if name in config.bound_with(rung) else ""
        advice = f"{scope}{name} = {fitting} fits" if fitting > 0 else "no ffn_width fits"
        raise UserError(
            f"rung {rung} has {shape.parameters:,} parameters, {rungs[0]} {wanted:,}: expected a "
            f"difference of at most reproduce.parameter_tolerance, {tolerance:g}; {advice}"
        )


class Ladder:
    """Trains and evaluates; what it finds is kept in `found`, by trial.

    Args:
      length: of the rows.
      start: the workdir of inherit; None leaves `train.checkpoint` as it is bound.
      rates: the grid that the peak rate of every rung is taken from; none takes those bound.
      tuning_seed: on which it is.
    """

    def __init__(
        self,
        folder: epath.Path,
        rows: Rows,
        length: int,
        start: str | None,
        rates: Sequence[float] = (),
        tuning_seed: int = 0,
    ):
        self._folder, self._rows, self._length = folder / "models", rows, length
        self._start, self._rates, self._tuning_seed = start, rates, tuning_seed
        self.found: dict[Trial, dict[str, Any]] = {}

    def steps(self, rungs: list[str], protocols: list[str], seeds: list[int]) -> list[Step]:
        """Those of all models, rung by rung for every seed, after those of tuning."""
        made = [t for seed in seeds for rung in rungs for t in trials_of(rung, protocols, [seed])]
        if any(RUNGS[trial.rung].again for trial in made):
            later_steps(training_of("rounds"))  # for its complaints
        scopes = dict.fromkeys(trial.scope for trial in made)
        tried = [trial for scope in scopes for trial in self._grid(scope)]
        return [self._step(trial) for trial in (*tried, *made)]

    def tuned(self, scope: str) -> dict[float, float]:
        """Held-out bits per byte by the peak rates that were tried; infinite where a loss was."""
        grid = self._grid(scope)
        return {trial.rate: self.found[trial]["bits_per_byte"] for trial in grid}  # type: ignore

    def model_of(self, trial: Trial) -> epath.Path:
        """Its folder."""
        return self._folder / trial.folder

    def _grid(self, scope: str) -> list[Trial]:
        return [Trial(scope, "equal", self._tuning_seed, rate) for rate in self._rates]

    def _step(self, trial: Trial) -> Step:
        training = training_of(trial.scope)
        flops = flops_of(training, self._length)
        if trial.goes_on:
            flops *= later_steps(training) / training["steps"]
        return Step(trial.title, lambda: self._run(trial), flops)

    def _run(self, trial: Trial) -> None:
        """Trains and evaluates a model; one of a rate that is tried may diverge."""
        try:
            self.found[trial] = self._train(trial)
        except Diverged as error:
            if trial.rate is None:
                raise UserError(f"{trial.title}: {error}") from error
            self.found[trial] = {"bits_per_byte": math.inf}

    def _train(self, trial: Trial) -> dict[str, Any]:
        rung, folder = RUNGS[trial.rung], self.model_of(trial)
        rows = self._rows.compact if rung.compact else self._rows.big
        rate = trial.rate
        if rate is None and self._rates:
            rate = self._best_rate(trial.scope)
        rounds, steps = self._plan(trial)
        given: dict[str, Any] = {"train.seed": trial.seed, "train.steps": steps}
        if rate is not None:
            given["Optimizer.learning_rate"] = rate
        if not rung.inherits:
            given["train.checkpoint"] = None
        elif self._start is not None:
            given["train.checkpoint"] = self._start
        schedule = {"schedule": "restart"} if trial.protocol == "paper" else {}
        with config.within(trial.scope, given):
            place = os.fspath(folder)
            trained = run("", train_rounds, dataset=rows, workdir=place, rounds=rounds, **schedule)
            check_ended(trained)
            place, model = os.fspath(folder / f"evaluation_{rounds}"), trained.checkpoint
            result = run("", evaluate, checkpoint=model, dataset=rows, workdir=place)
        return {**self._figures(folder, rows, rounds, result), "checkpoint": model}

    def _best_rate(self, scope: str) -> float:
        tuned = self.tuned(scope)
        best = min(tuned, key=tuned.__getitem__)
        if tuned[best] == math.inf:
            raise UserError(f"rung {scope} diverged at all of reproduce.rates, expected lower ones")
        return best

    def _plan(self, trial: Trial) -> tuple[int, int]:
        """How many rounds, and the steps of the first."""
        steps, rung = training_of(trial.scope)["steps"], RUNGS[trial.rung]
        if rung.again:
            rounds = settings(train_rounds, dataset="", workdir="")["rounds"]
            rate = settings(select_batches, scores="", workdir="")["rate"]
            return rounds, steps if trial.goes_on else first_round(steps, rounds, rate)
        if trial.protocol == "paper" and self._rows.big:
            steps = round(steps * bytes_a_token(self._rows.compact) / bytes_a_token(self._rows.big))
        return 1, steps

    def _figures(
        self, folder: epath.Path, rows: str | None, rounds: int, result: dict[str, Any]
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
