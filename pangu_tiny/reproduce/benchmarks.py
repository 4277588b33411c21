"""The end of a recipe: its models on benchmarks."""

import os
from typing import Any

from pangu_tiny.benchmark.benchmark import benchmark, check_sizes, chosen_of
from pangu_tiny.benchmark.paper_tasks import TASKS
from pangu_tiny.reproduce.agenda import Step
from pangu_tiny.reproduce.ladder import Ladder, Trial
from pangu_tiny.reproduce.results import Recipe
from pangu_tiny.rounds.stages import run, settings
from pangu_tiny.workdir import absolute


def check_benchmarks(folder: str) -> None:
    """Reads all that will be asked, so that a mistake is told before anything is trained."""
    bound = settings(benchmark, checkpoint="", folder=folder, workdir="")
    names = ("folder", "suite", "tasks", "questions", "task_files", "shots")
    check_sizes(bound["batch_size"], bound["dtype"])
    ours, _ = chosen_of(**{name: bound[name] for name in names})
    for name in ours:
        for part in TASKS[name].parts:
            for of_set in part.sets:
                part.questions(absolute(folder), of_set)


def benchmark_steps(
    recipe: Recipe, ladder: Ladder, folder: str, scores: dict[str, Any]
) -> list[Step]:
    """A step for each rung, which puts what its model scored under its name."""

    def step(trial: Trial) -> Step:
        def score() -> None:
            model, place = ladder.found[trial]["checkpoint"], ladder.model_of(trial)
            where = os.fspath(place / f"benchmark_{trial.rung}")  # the folder may be another's too
            found = run("", benchmark, checkpoint=model, folder=folder, workdir=where)
            scores[trial.rung] = {name: found[name] for name in ("tasks", "lm_eval", "average")}

        return Step(f"benchmarks of {trial.title}", score)

    return [step(trial) for trial in recipe.shown]
