"""The paper's tables: their rows, what these differ in, and what the paper reports.

The rows of a table are the gin files of its folder, `gin/paper/TABLE/ROW.gin`, at the paper's
scale. An overlay, such as `paper/laptop.gin`, says everything else at another one; where a row is a
size, the overlay binds it with the row's name as a scope.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pangu_tiny import config
from pangu_tiny.errors import UserError, check_one_of
from pangu_tiny.reproduce.rungs import SCOPES

_OF_A_ROW = ("train", "ModelShape", "Optimizer", "Hardware")
_SHAPE = ("depth", "width", "heads", "ffn_width")


class Table(NamedTuple):
    """A table of the paper.

    Attributes:
      title: what it compares.
      rows: by name what the paper reports, or what it correlates with its scores; more of it is
        better; None where it was not found.
      reports: what these numbers are, or what is known instead.
      varies: what the rows differ in, or set for the whole table; it is read from their files.
      equal: whether their models have as many parameters.
      plan: how they are made, a key of `plans.PLANS`.
    """

    title: str
    rows: Mapping[str, float | None]
    reports: str
    varies: tuple[str, ...]
    equal: bool = True
    plan: str = "train"


_CRITERIA = {"l1": 46.06, "l2": 47.0, "taylor": 47.9, "learned": 48.08, "activation": None}

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
    "tokenizer_size": Table(
        "Size of the tokenizer at equal parameters",
        {
            "vocab_48k": 41.19,
            "vocab_8k": 37.94,
            "vocab_16k": 38.69,
            "vocab_32k": 40.48,
            "vocab_72k": 40.06,
            "vocab_100k": 40.4,
        },
        "mean scores, second-hand",
        (
            *(f"ModelShape.{name}" for name in ("vocab_size", "depth", "ffn_width")),
            "compress_tokenizer.vocab_size",
        ),
        plan="cut",
    ),
    "inheritance": Table(
        "Inheritance by criterion",
        {"none": 42.06, **_CRITERIA, **{f"{row}_corrected": None for row in _CRITERIA}},
        "mean scores, second-hand; activation and corrected outputs are not in it",
        (
            "train.checkpoint",
            "rank_teacher.method",
            "rank_teacher.output_grams",
            "inherit.correct_outputs",
        ),
        plan="inherit",
    ),
    "layer_skipping": Table(
        "Layers by what it costs to skip them",
        {"skip_1": None, "skip_2": None, "skip_3": None, "influence": None, "even": None},
        "P1 skips 1 to 3 adjacent layers and keeps the first and the last few; not how it chooses",
        ("LayerChoice.rule", "LayerChoice.score", "rank_teacher.method"),
        plan="inherit",
    ),
    "batch_rate": Table(
        "Batch size and exponent of the learning rate",
        {
            "batch_1m": None,
            **{
                f"batch_{batch}_r_{exponent}": None
                for batch in ("512k", "4m", "16m")
                for exponent in ("0_25", "0_5", "1")
            },
        },
        "P1 recommends batches below 4M tokens and an exponent of 0.5; its scores were not found."
        " Neither were its 6 batches and 4 exponents: these are chosen as far apart",
        (
            *(f"Optimizer.{name}" for name in ("learning_rate", "rate_exponent")),
            *(f"train.{name}" for name in ("global_batch", "steps")),
        ),
    ),
    "rounds": Table(
        "Number of rounds",
        {
            "one": 51.61,
            "two": 54.46,
            "three": 54.44,
            "two_whole": 54.64,
            "two_parts": None,
            "two_uniform": None,
            "two_highest": None,
            "two_sequences": None,
        },
        "mean scores, second-hand; that of two_whole is worked out of the 94 % of its gain that two"
        " is said to have",
        (
            "train_rounds.rounds",
            "score_batches.unit",
            *(f"select_batches.{name}" for name in ("rate", "method", "parts")),
        ),
        plan="rounds",
    ),
    "sampling_rate": Table(
        "Share of the batches that the second round takes",
        {f"share_{share}": None for share in ("0_5", "0_1", "0_25", "0_75", "1_0")},
        "P1 recommends a half, which is said to have 94 % of the gain of all; the other scores were"
        " not found",
        ("select_batches.rate",),
        plan="rounds",
    ),
    "forgetting": Table(
        "What is forgotten, by 8 parts of the first round",
        {"shuffled": None, "in_order": None},
        "the loss of early parts rises well above that at which they were trained, second-hand",
        ("train.shuffle", "train_rounds.rounds"),
        plan="rounds",
    ),
    "grouped_queries": Table(
        "Grouped queries, by 5 % of the steps after the conversion",
        {"kv_16": None, "kv_8": None, "kv_4": None},
        "92 to 97 % of the scores of the model with 16 key-value heads, second-hand; how many"
        " groups is not known",
        ("ModelShape.kv_heads",),
        equal=False,
        plan="merge",
    ),
}
SCOPES_AND_ROWS = (*SCOPES, *{row: None for table in TABLES.values() for row in table.rows})
"""All that may stand before a name, in a recipe or in an overlay."""


def find_table(name: str, rows: Sequence[str] | None = None) -> Table:
    """The table of a name, with these rows, in its own order; None are all. Refuses an overlay that
    binds what its rows differ in, without saying it for each of them."""
    if name not in TABLES:
        near = difflib.get_close_matches(name, TABLES, 3) or TABLES
        raise UserError(f"reproduce.table is {name!r}, expected {' or '.join(near)}")
    table = TABLES[name]
    for row in rows or ():
        check_one_of("reproduce.table_rows", row, tuple(table.rows))
    if rows is not None:
        if len(rows) < 2 or len({*rows}) < len(rows):
            raise UserError(
                f"reproduce.table_rows is {list(rows)}, expected two different ones or more"
            )
        table = table._replace(rows={row: table.rows[row] for row in table.rows if row in rows})
    for row in table.rows:
        for binding, origin in config.bound_with(row).items():
            if binding not in table.varies and binding.partition(".")[0] not in _OF_A_ROW:
                raise UserError(
                    f"{origin}: all rows of table {name} share {binding}, expected it without"
                    f" {row}/"
                )
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
