"""A table of the paper at another scale: its rows trained over seeds, and what they show."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pangu_tiny.errors import UserError, check_number
from pangu_tiny.reproduce.agenda import Step, run_steps
from pangu_tiny.reproduce.comparison import correlation_of, gain_of, spread_of
from pangu_tiny.reproduce.plans import PLANS, Found, Plan
from pangu_tiny.reproduce.table_report import write_table
from pangu_tiny.reproduce.tables import Table, find_table
from pangu_tiny.text.sources import Text
from pangu_tiny.topology import processes
from pangu_tiny.workdir import absolute, claim


def run_table(
    workdir: str,
    name: str,
    rows: Sequence[str] | None,
    text: Text | None,
    seeds: Sequence[int],
    tolerance: float,
    max_epochs: float,
) -> dict[str, Any]:
    """Trains and evaluates every row with every seed, and writes `table.json`, `table.md`,
    `table.svg` and `report.html`. Run again, it goes on; see `reproduce`."""
    table = find_table(name, rows)
    if processes.several():
        raise UserError("reproduce.table runs on one host, in one process")
    for seed in seeds:
        check_number("reproduce.seeds", seed, 0)
    if not seeds or len({*seeds}) < len(seeds):
        raise UserError(f"reproduce.seeds is {seeds}, expected different ones")
    folder = absolute(workdir)
    plan = PLANS[table.plan](folder, name, tuple(table.rows), text, max_epochs)
    _check_parameters(name, table, plan, tolerance)
    found: dict[str, dict[int, Found]] = {row: {} for row in table.rows}
    steps = plan.steps()
    for seed, row in itertools.product(seeds, table.rows):

        def model(row: str = row, seed: int = seed) -> None:
            found[row][seed] = plan.model(row, seed)

        steps.append(Step(f"{row}, seed {seed}", model, plan.flops(row)))
    claim(workdir, "reproduce", {"table": name})
    seconds = run_steps(steps, folder)
    told = {
        "table": name,
        "rows": [_told(row, table.rows[row], plan, found) for row in table.rows],
        "correlation": _correlation(table, found),
        "notes": plan.notes,
    }
    print(f"\n{write_table(folder, table, told, seconds)}")
    return told


def _told(
    row: str, paper: float | None, plan: Plan, found: Mapping[str, Mapping[int, Found]]
) -> dict[str, Any]:
    """Of a row, with what it has over the first."""
    first = next(iter(found))
    gain = None if row == first else gain_of(_bits(found[first]), _bits(found[row]))
    model = plan.trainings[row]["model"]
    return {
        "row": row,
        "paper": paper,
        "model": vars(model),
        "parameters": model.parameters,
        "tokens": plan.tokens(row),
        "bits_per_byte": _bits(found[row]),
        **spread_of(_bits(found[row]))._asdict(),
        "gain": gain and gain._asdict(),
        "others": {seed: one.others for seed, one in found[row].items()},
    }


def _bits(found: Mapping[int, Found]) -> dict[int, float]:
    return {seed: one.bits_per_byte for seed, one in found.items()}


def _correlation(table: Table, found: Mapping[str, Mapping[int, Found]]) -> dict[str, Any] | None:
    """Of the paper's figures and of our bits per byte, fewer of which are better."""
    known = {row: paper for row, paper in table.rows.items() if paper is not None}
    bits = [-spread_of(_bits(found[row])).mean for row in known]
    correlation = correlation_of(list(known.values()), bits)
    return correlation and correlation._asdict()


def _check_parameters(name: str, table: Table, plan: Plan, tolerance: float) -> None:
    counts = {row: training["model"].parameters for row, training in plan.trainings.items()}
    first, *others = counts
    for row in others if table.equal else ():
        if abs(counts[row] / counts[first] - 1) > tolerance:
            raise UserError(
                f"row {row} of table {name} has {counts[row]:,} parameters, {first}"
                f" {counts[first]:,}: expected a difference of at most"
                f" reproduce.parameter_tolerance, {tolerance:g}"
            )
