"""The paper's tables: their rows, what these differ in, and what the paper reports.

The rows of a table are the gin files of its folder, `gin/paper/TABLE/ROW.gin`, at the paper's
scale. An overlay, such as `paper/laptop.gin`, says everything else at another one; where a row is a
size, the overlay binds it with the row's name as a scope.
"""

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from pangu_tiny import config
from pangu_tiny.errors import UserError
from pangu_tiny.reproduce.rungs import SCOPES

_SHAPE = ("depth", "width", "heads", "ffn_width")


class Table(NamedTuple):
    """A table of the paper.

    Attributes:
      title: what it compares.
      rows: by name what the paper reports, more of which is better; None where it was not found.
      reports: what these numbers are, or what is known instead.
      varies: what the rows differ in.
      equal: whether their models have as many parameters.
    """

    title: str
    rows: Mapping[str, float | None]
    reports: str
    varies: tuple[str, ...]
    equal: bool = True


TABLES = {
    "initialisation": Table(
        "Random initialisation",
        {"constant": None, "gpt2": None, "internevo": None},
        "P1 recommends constant; its scores were not found",
        ("train.init",),
    ),
    "depth_width": Table(
        "Depth and width at equal parameters",
        {f"depth_{depth}": float(depth) for depth in (40, 30, 20, 15, 9)},
        "layers, whose correlation with the score is +0.528 in P1",
        tuple(f"ModelShape.{name}" for name in _SHAPE),
    ),
    "expanding_rate": Table(
        "Expanding rate of the feed-forward",
        {"rate_1_0": 1.0, "rate_2_0": 2.0, "rate_2_77": 2.77, "rate_4_0": 4.0},
        "the rate, whose correlation with the score is about 0 in P1",
        tuple(f"ModelShape.{name}" for name in _SHAPE[1:]),
    ),
    "heads": Table(
        "Number of heads",
        {f"heads_{heads}": None for heads in (14, 7, 28, 56)},
        "P1 has 14 at a width of 1,792; its scores were not found",
        ("ModelShape.heads",),
    ),
    "weight_decay": Table(
        "Weight decay",
        {f"decay_{decay}": None for decay in ("0_1", "0", "0_01", "0_3")},
        "P1 has 0.1; its scores were not found",
        ("Optimizer.weight_decay",),
    ),
    "modules": Table(
        "The modules of PanGu-π",
        {
            "plain": 35.0,
            **{f"series_{n}": score for n, score in ((2, 36.9), (3, 37.0), (4, 37.0))},
            **{
                f"shortcut_{r}": score
                for r, score in ((1, 36.5), (4, 36.7), (16, 36.5), (32, 36.3), (64, 35.5))
            },
            "both": None,
        },
        "C-Eval in P2",
        ("ModelShape.series_terms", "ModelShape.shortcut_ratio"),
        equal=False,
    ),
}
SCOPES_AND_ROWS = (*SCOPES, *{row: None for table in TABLES.values() for row in table.rows})
"""All that may stand before a name, in a recipe or in an overlay."""


def find_table(name: str) -> Table:
    """The table of a name; refuses an overlay that binds what its rows differ in, without saying
    it for each of them."""
    if name not in TABLES:
        near = difflib.get_close_matches(name, TABLES, 3) or TABLES
        raise UserError(f"reproduce.table is {name!r}, expected {' or '.join(near)}")
    table = TABLES[name]
    for binding in table.varies:
        scoped = [row for row in table.rows if binding in config.bound_with(row)]
        if (origin := config.origin_of(binding)) and len(scoped) < len(table.rows):
            raise UserError(
                f"{origin}: the rows of table {name} differ in {binding}, expected it with the name"
                f" of each before it, as in {next(iter(table.rows))}/{binding}, or not at all"
            )
    return table


def check_no_rows() -> None:
    """Refuses what is bound for the row of a table, where none is asked for."""
    for scope in SCOPES_AND_ROWS:
        for origin in () if scope in SCOPES else config.bound_with(scope).values():
            raise UserError(f"{origin}: {scope} is a row of a table, expected reproduce.table")
