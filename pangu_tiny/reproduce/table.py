"""A table of the paper at another scale: its rows trained over seeds, and what they show."""

import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from etils import epath

from pangu_tiny import config
from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.errors import UserError, check_number
from pangu_tiny.evaluation.evaluate import evaluate
from pangu_tiny.reproduce.agenda import Step, run_steps
from pangu_tiny.reproduce.comparison import correlation_of, gain_of, spread_of
from pangu_tiny.reproduce.corpus import write_python_library
from pangu_tiny.reproduce.table_report import write_table
from pangu_tiny.reproduce.tables import Table, find_table
from pangu_tiny.reproduce.training import check_ended, check_rows, flops_of, tokens_of
from pangu_tiny.rounds.stages import run, settings
from pangu_tiny.text.sources import Text
from pangu_tiny.topology import processes
from pangu_tiny.training.train import train
from pangu_tiny.workdir import absolute, claim


def run_table(
    workdir: str,
    name: str,
    text: Text | None,
    seeds: Sequence[int],
    tolerance: float,
    max_epochs: float,
) -> dict[str, Any]:
    """Trains and evaluates every row with every seed, on one tokenizer and one text, and writes
    `table.json`, `table.md`, `table.svg` and `report.html`. Run again, it goes on; see `reproduce`.
    """
    table = find_table(name)
    if processes.several():
        raise UserError("reproduce.table runs on one host, in one process")
    for seed in seeds:
        check_number("reproduce.seeds", seed, 0)
    if len({*seeds}) < len(seeds):
        raise UserError(f"reproduce.seeds is {seeds}, expected different ones")
    trainings = {row: _training(name, table, row) for row in table.rows}
    _check_parameters(name, table, trainings, tolerance)
    folder, corpus = absolute(workdir), text
    steps: list[Step] = []
    if text is None:
        library = folder / "corpus.jsonl"
        corpus = os.fspath(library)  # type: ignore[assignment]
        steps.append(Step("the library of Python", lambda: write_python_library(library)))
    rows = os.fspath(folder / "data")
    length = settings(prepare_data, text=corpus, workdir=rows)["sequence_length"]

    def prepare() -> None:
        run("", prepare_data, text=corpus, workdir=rows)
        for row, training in trainings.items():
            check_rows(f"row {row}", training, rows, max_epochs)

    steps.append(Step("prepare-data", prepare))
    found: dict[str, dict[int, float]] = {row: {} for row in table.rows}
    for seed, row in itertools.product(seeds, table.rows):

        def model(row: str = row, seed: int = seed) -> None:
            place = folder / "models" / f"{row}-{seed}"
            with _within_row(name, table, row):
                found[row][seed] = _trained(place, rows, seed)

        steps.append(Step(f"{row}, seed {seed}", model, flops_of(trainings[row], length)))
    claim(workdir, "reproduce", {"table": name})
    seconds = run_steps(steps, folder)
    tokens = tokens_of(next(iter(trainings.values())), length)
    told = {
        "table": name,
        "tokens": tokens,
        "rows": [_told(row, table.rows[row], trainings[row], found) for row in table.rows],
        "correlation": _correlation(table, found),
    }
    print(f"\n{write_table(folder, table, told, seconds)}")
    return told


def _told(
    row: str,
    paper: float | None,
    training: dict[str, Any],
    found: Mapping[str, Mapping[int, float]],
) -> dict[str, Any]:
    """Of a row, with what it has over the first."""
    first = next(iter(found))
    gain = None if row == first else gain_of(found[first], found[row])
    return {
        "row": row,
        "paper": paper,
        "model": vars(training["model"]),
        "parameters": training["model"].parameters,
        "bits_per_byte": dict(found[row]),
        **spread_of(found[row])._asdict(),
        "gain": gain and gain._asdict(),
    }


def _correlation(table: Table, found: Mapping[str, Mapping[int, float]]) -> dict[str, Any] | None:
    """Of the paper's figures and of our bits per byte, fewer of which are better."""
    known = {row: paper for row, paper in table.rows.items() if paper is not None}
    bits = [-spread_of(found[row]).mean for row in known]
    correlation = correlation_of(list(known.values()), bits)
    return correlation and correlation._asdict()


def _within_row(name: str, table: Table, row: str) -> AbstractContextManager[None]:
    """Inside, what the row says is bound: by the overlay with its scope, else by its own file."""
    own = config.bindings_of([train], f"paper/{name}/{row}.gin")
    scoped = config.bound_with(row)
    return config.within(row, {key: own[key] for key in table.varies if key not in scoped})


def _training(name: str, table: Table, row: str) -> dict[str, Any]:
    with _within_row(name, table, row):
        return settings(train, dataset="", workdir="")


def _check_parameters(
    name: str, table: Table, trainings: Mapping[str, dict[str, Any]], tolerance: float
) -> None:
    counts = {row: training["model"].parameters for row, training in trainings.items()}
    first, *others = counts
    for row in others if table.equal else ():
        if abs(counts[row] / counts[first] - 1) > tolerance:
            raise UserError(
                f"row {row} of table {name} has {counts[row]:,} parameters, {first}"
                f" {counts[first]:,}: expected a difference of at most"
                f" reproduce.parameter_tolerance, {tolerance:g}"
            )


def _trained(place: epath.Path, rows: str, seed: int) -> float:
    """Held-out bits per byte of a model."""
    trained = run("", train, dataset=rows, workdir=os.fspath(place), seed=seed)
    check_ended(trained)
    where = os.fspath(place / "evaluation")
    result = run("", evaluate, checkpoint=trained.checkpoint, dataset=rows, workdir=where)
    return result["bits_per_byte"]
