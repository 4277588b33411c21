"""The report of select-batches: what was drawn and what was left."""

import dataclasses

import numpy as np
from matplotlib.figure import Figure

from pangu_tiny.data.order import UNITS
from pangu_tiny.page import Report, picture, section
from pangu_tiny.rounds.draw import PARTS, Spread, bounds
from pangu_tiny.rounds.scores import Scores

RUNS_AWAY = 1.5
"""Warn if a source's share changes by more than this factor."""


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """A draw, and what it was drawn from.

    Attributes:
      losses: float64 [units], what decided: clipped, less the reference.
      taken: bool [units].
      spread: of the probabilities.
      overlap: share of the units that other noise draws too.
      drawn_before: share of them that the round before had; None where none was named.
      excluded: units with a loss that is not finite.
      parts: that were drawn from on their own.
    """

    scores: Scores
    losses: np.ndarray
    taken: np.ndarray
    method: str
    spread: Spread
    overlap: float
    drawn_before: float | None
    excluded: int
    parts: int

    def sources(self) -> list[tuple[str, float, float]]:
        """Name, share of the rows of the round, share of the rows drawn."""
        every = self.scores.rows_by_source()
        drawn = self.scores.rows_by_source(self.taken)
        names = self.scores.source_names
        return list(zip(names, every / every.sum(), drawn / drawn.sum(), strict=True))

    def facts(self) -> dict[str, str]:
        units, count = len(self.taken), int(self.taken.sum())
        spread, method = self.spread, self.method
        taken, left = (self._mean(chosen) for chosen in (self.taken.copy(), ~self.taken))
        facts = {
            "drawn": f"{count:,} of {units:,} {UNITS[self.scores.unit]} by {method}"
            + (f", from {self.parts} parts" if self.parts > 1 else "")
        }
        if method != "highest":  # which leaves nothing to chance
            facts |= {
                "effective number": f"{spread.effective_units:,.0f}, "
                f"{spread.effective_units / units:.2%} of all",
                "entropy": f"{spread.entropy:.4f} nats, uniform {np.log(units):.4f}",
            }
        facts |= {
            "mean loss": f"taken {taken:.4f}" + (f", left {left:.4f}" if count < units else ""),
            "overlap": f"{self.overlap:.2%} of another draw's, uniform {count / units:.2%}",
        }
        if self.drawn_before is not None:
            facts["drawn before"] = f"{self.drawn_before:.2%} were in the round before too"
        if self.excluded:
            facts["excluded"] = f"{self.excluded:,} units whose loss is not finite"
        for name, before, after in self.sources():
            facts[f"source {name}"] = f"{before:.2%} of the round's rows, {after:.2%} of the drawn"
        return facts

    def warnings(self) -> list[str]:
        remedies = {
            "a higher temperature": self.method == "loss",
            "select_batches.parts": self.parts == 1 and not self.scores.round.shuffle,
            "select_batches.reference": self.method != "uniform",
        }
        if helps := " or ".join(name for name, fits in remedies.items() if fits):
            helps = f": {helps} may even that out"
        return [
            f"WARNING: source {name} has {after:.1%} of what was drawn, {before:.1%} of the round"
            + helps
            for name, before, after in self.sources()
            if before and not 1 / RUNS_AWAY <= after / before <= RUNS_AWAY
        ]

    def _mean(self, chosen: np.ndarray) -> float:
        chosen &= np.isfinite(self.losses)
        return float(np.mean(self.losses, where=chosen)) if chosen.any() else np.nan


def report_of(selection: Selection) -> Report:
    sections = [
        section("Losses", picture(_histogram(selection), "losses taken and left")),
        section(
            "Where in the round", picture(_places(selection), "share taken by part of the round")
        ),
    ]
    return Report(
        "What the next round trains on", selection.facts(), selection.warnings(), sections
    )


def _histogram(selection: Selection) -> Figure:
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    axes = figure.subplots()
    losses, finite = selection.losses, np.isfinite(selection.losses)
    lowest = np.min(losses, initial=np.inf, where=finite)
    edges = np.linspace(lowest, np.max(losses, initial=-np.inf, where=finite), 61)
    taken = np.histogram(losses[selection.taken & finite], edges)[0]
    left = np.histogram(losses[~selection.taken & finite], edges)[0]
    axes.stairs(taken, edges, fill=True, alpha=0.6, label="taken")
    axes.stairs(taken + left, edges, label="all")
    axes.set(xlabel="loss that decided, nats per token", ylabel="units")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _places(selection: Selection) -> Figure:
    figure = Figure(figsize=(6.5, 2.6), layout="constrained")
    axes = figure.subplots()
    parts = bounds(len(selection.taken), min(PARTS, len(selection.taken)))
    shares = [selection.taken[start:end].mean() for start, end in parts]
    axes.bar(np.arange(1, len(parts) + 1), shares)
    axes.set(xlabel="part of the round, in the order of training", ylabel="share taken")
    axes.grid(alpha=0.3, axis="y")
    return figure
