"""The stage `compare-plans`: what two or more programs will do, side by side.

The folder that it writes holds

    comparison.json     the table, a list of rows, as on the page
    report.html         written last
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pangu_tiny.errors import UserError
from pangu_tiny.page import Report, paragraph, section, table
from pangu_tiny.planning.report import GIB, STEP, in_words, used
from pangu_tiny.workdir import absolute, claim, read_json, write_atomically

_PLAN = "plan.json"
_DECIDING = ("sequence_length", "global_batch", "accumulation", "dtype", "dcn_rate")


class Row(NamedTuple):
    """A figure of every plan; None where a plan has none of its kind.

    Attributes:
      unit: of the numbers; None where they are words.
    """

    part: str
    name: str
    unit: str | None
    values: tuple[Any, ...]

    def cells(self) -> tuple[str, ...]:
        """As shown: the first, and the others with their difference from it."""
        if self.unit is None:
            return tuple("" if value is None else str(value) for value in self.values)
        first = self.values[0]
        return (_number(first), *(_beside(value, first) for value in self.values[1:]))


def compare_plans(plans: list[str], workdir: str) -> list[Row]:
    """Lays plans side by side: memory, every line of the step, exchanges, parts of the model.

    Args:
      plans: workdirs of plan, of one topology or several; differences are those from the first.
      workdir: the folder to write.
    """
    if len(plans) < 2:
        raise UserError(f"compare_plans.plans has {len(plans)}, expected two workdirs of plan")
    figures = [_read(plan) for plan in plans]
    rows = list(_rows(figures))
    digests = [hashlib.sha256(json.dumps(plan).encode()).hexdigest() for plan in figures]
    folder = claim(workdir, "compare-plans", {"plans": digests})
    names = [f"{n}: {absolute(plan).name}" for n, plan in enumerate(plans, 1)]
    print(_text(rows, names))
    write_atomically(folder / "comparison.json", json.dumps([row._asdict() for row in rows]))
    _report(rows, names, plans).write(folder)
    print(f"  report       {folder / 'report.html'}")
    return rows


def _read(plan: str) -> dict[str, Any]:
    file = absolute(plan) / _PLAN
    if not file.exists():
        raise UserError(f"compare_plans.plans: {plan} has no {_PLAN}, expected a workdir of plan")
    figures = read_json(file, "tried", "environment")
    if "step" not in figures:
        raise UserError(f"compare_plans.plans: no program of {plan} fits, expected one that does")
    return figures


def _rows(plans: list[dict[str, Any]]) -> Iterator[Row]:
    """All that is compared; of what is asked for, what differs."""
    settings = [_settings(plan) for plan in plans]
    for name in _names(settings):
        values = tuple(setting.get(name) for setting in settings)
        if name in ("topology", "mesh") or len(set(map(str, values))) > 1:
            yield Row("program", name, None, values)
    exchanges = [{_kind(row): row for row in plan["collectives"]} for plan in plans]

    def of_exchanges(figure: str) -> list[dict[str, float]]:
        return [{kind: row[figure] for kind, row in rows.items()} for rows in exchanges]

    for part, unit, scale, tables in (
        ("memory of a chip", "GiB", 1 / GIB, [_memory(plan["memory"]) for plan in plans]),
        ("step", "ms", 1e3, [plan["step"] for plan in plans]),
        ("computation by part of the model", "ms", 1e3, [plan["parts"] for plan in plans]),
        ("exchanges, received by a chip", "MB", 1e-6, of_exchanges("bytes")),
        ("exchanges, exposed", "ms", 1e3, of_exchanges("exposed")),
        ("speed and cost", "", 1.0, [_run(plan["run"]) for plan in plans]),
    ):
        for name in _names(tables):
            found = (values.get(name) for values in tables)
            scaled = tuple(None if value is None else value * scale for value in found)
            yield Row(part, STEP.get(name, name), unit, scaled)


def _settings(plan: dict[str, Any]) -> dict[str, Any]:
    """What decides a program, by the names of bindings, and what compiled it."""
    (changes,) = (tried["changes"] for tried in plan["tried"] if tried["fits"])
    found = {
        "topology": plan["topology"],
        "mesh": " × ".join(map(str, plan["mesh"].values())),
        "changed to fit": in_words(changes) if changes else "nothing",
    }
    found |= {name: plan[name] for name in ("program", *_DECIDING)}
    for key, prefix in (("model", "ModelShape"), ("teacher", "teacher"), ("hardware", "Hardware")):
        found |= {f"{prefix}.{name}": value for name, value in plan.get(key, {}).items()}
    environment = plan["environment"]
    return found | environment["versions"] | {"commit": environment["commit"]}


def _memory(memory: dict[str, int]) -> dict[str, int]:
    return memory | {"total": used(memory)}


def _run(run: dict[str, float]) -> dict[str, float]:
    run = {"MFU, %": 100 * run["mfu"]} | run
    shown = {"tokens_per_second": "tokens/s", "chip_hours": "chip-hours"}
    return {shown.get(name, name): value for name, value in run.items() if name != "mfu"}


def _kind(row: dict[str, Any]) -> str:
    beside = "alone" if row["synchronous"] else "beside computation"
    return f"{row['kind']} {row['dtype']}, {row['network']}, {beside}"


def _names(tables: list[dict[str, Any]]) -> list[str]:
    """Of all tables, in the order in which they come."""
    return list(dict.fromkeys(name for names in tables for name in names))


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.2f}"


def _beside(value: float | None, first: float | None) -> str:
    if value is None or first is None:
        return _number(value)
    difference = _number(abs(value - first))
    if difference == _number(0.0):
        return _number(value)
    return f"{_number(value)} ({'+' if value > first else '−'}{difference})"


def _text(rows: list[Row], names: list[str]) -> str:
    """The table as lines, a heading before each part."""
    lines = [("", *names)]
    for before, row in zip([None, *rows], rows, strict=False):
        if before is None or before.part != row.part:
            lines.append((_heading(row), *([""] * len(names))))
        lines.append((f"  {row.name}", *row.cells()))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _heading(row: Row) -> str:
    return f"{row.part}, {row.unit}" if row.unit else row.part


def _report(rows: list[Row], names: list[str], plans: list[str]) -> Report:
    parts: dict[str, list[tuple[str, ...]]] = {_heading(row): [] for row in rows}
    for row in rows:
        parts[_heading(row)].append((row.name, *row.cells()))
    sections = [section(part, table(lines, ("", *names))) for part, lines in parts.items()]
    facts = dict(zip(names, plans, strict=True))
    note = paragraph("In parentheses: the difference from the first.")
    return Report("Plans side by side", facts, (), [note, *sections])
