"""A table of the paper as it was found: HTML, Markdown, JSON and a plot."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from pangu_tiny.page import page, paragraph, section, table, vector
from pangu_tiny.reproduce.comparison import Correlation, Gain, Spread
from pangu_tiny.reproduce.tables import Table
from pangu_tiny.workdir import environment, write_atomically

_HEAD = ("row", "depth × width", "parameters")
_TOKENS = "M tokens"
_FOUND = ("bits per byte", "gain over the first", "paper")


def write_table(folder: epath.Path, of: Table, told: dict[str, Any], seconds: float) -> str:
    """Writes `table.json`, `table.md`, `table.svg` and `report.html`; gives lines for a terminal.

    Args:
      told: what `run_table` found.
    """
    run = {"seconds": seconds, **environment()}
    kept = {"results": told, "run": run}
    write_atomically(folder / "table.json", json.dumps(kept, indent=1, ensure_ascii=False))
    rows = told["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in _means(row)))
    if len({row["tokens"] for row in rows}) > 1:
        columns.insert(0, _TOKENS)
    head = (*_HEAD, *columns, *_FOUND)
    cells, notes = [_cells(row, columns) for row in rows], _notes(of, told)
    lines = [head, ["---"] * len(head), *cells]
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    write_atomically(folder / "table.md", f"{markdown}\n\n{' '.join(notes)}\n")
    plot = vector(_plot(rows))
    write_atomically(folder / "table.svg", plot)
    shown = section(of.title, *map(paragraph, notes), table(cells, head), plot)
    write_atomically(folder / "report.html", page("A table of the paper", shown))
    width = max(len(row["row"]) for row in rows)
    by_row = [f"  {cell[0]:<{width}}  {cell[-3]}  {cell[-2]}" for cell in cells]
    return "\n".join([f"{of.title}, held-out bits per byte", *by_row, *(f"  {n}" for n in notes)])


def _means(row: dict[str, Any]) -> dict[str, Sequence[float]]:
    """What else is told of a row, over seeds."""
    by_seed = list(row["others"].values())
    return {name: np.mean([one[name] for one in by_seed], axis=0) for name in by_seed[0]}


def _cells(row: dict[str, Any], columns: Sequence[str]) -> Sequence[str]:
    shape = row["model"]
    others = {_TOKENS: [row["tokens"] / 1e6], **_means(row)}
    return (
        row["row"],
        f"{shape['depth']} × {shape['width']:,}",
        f"{row['parameters'] / 1e6:,.3f}M",
        *(", ".join(map(_number, others.get(name, ()))) for name in columns),
        str(Spread(row["mean"], row["half_range"])),
        "" if row["gain"] is None else str(Gain(**row["gain"])),
        "" if row["paper"] is None else f"{row['paper']:g}",
    )


def _number(value: float) -> str:
    return f"{value:.4g}" if value < 10_000 else f"{value:,.0f}"


def _notes(of: Table, told: dict[str, Any]) -> list[str]:
    seeds = ", ".join(map(str, told["rows"][0]["bits_per_byte"]))
    tokens = [row["tokens"] / 1e6 for row in told["rows"]]
    count = f"{min(tokens):,.2f}M" + (
        f" to {max(tokens):,.2f}M" if max(tokens) > min(tokens) else ""
    )
    notes = [
        f"{count} tokens a model; means and half of the ranges over seeds"
        f" {seeds}; gains over the first row, seed by seed, with their 95 % interval.",
        *told["notes"],
        f"Paper: {of.reports}.",
    ]
    if told["correlation"]:
        correlation = Correlation(**told["correlation"])
        notes.append(f"Rank correlation of the paper's column with ours: {correlation}.")
    return notes


def _plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Every model, and the means."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        axes.plot(place, row["mean"], "o", ms=5, color="C0")
        for bits in row["bits_per_byte"].values():
            axes.plot(place, bits, "_", ms=12, color="C0")
    axes.set_xticks(range(len(rows)), [row["row"] for row in rows])
    axes.tick_params(axis="x", labelrotation=20)
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor")
    axes.set(ylabel="held-out bits per byte")
    axes.grid(alpha=0.3, axis="y")
    return figure
