"""The stage `select-batches`: the losses of a round to the units that the next one trains on."""

import dataclasses
import math
import sys

import numpy as np

from pangu_tiny.data.order import UNITS
from pangu_tiny.data.round_index import INDEX, RoundIndex
from pangu_tiny.errors import UserError, check_number, check_one_of
from pangu_tiny.rounds.draw import METHODS, clipped, draw_parts, spread
from pangu_tiny.rounds.report import Selection, report_of
from pangu_tiny.rounds.scores import Scores
from pangu_tiny.workdir import claim

ORDERS = ("shuffled", "kept")
NONFINITE = ("refuse", "exclude")


def select_batches(
    scores: str,
    workdir: str,
    rate: float = 0.5,
    method: str = "loss",
    temperature: float = 1.0,
    parts: int = 1,
    reference: str | None = None,
    clip: float = 0.0,
    order: str = "shuffled",
    nonfinite: str = "refuse",
    seed: int = 0,
    before: str | None = None,
) -> RoundIndex:
    """Draws units of a round without replacement, by their losses (P1, multiple-round training).

    Args:
      scores: workdir of score-batches.
      workdir: the folder to write.
      rate: share of the round's batches that is drawn, N₀ / N; the paper recommends a half.
      method: "loss", with p = exp(loss / temperature) / Σ (the paper's, where the temperature is
        1); "uniform", for comparison; "highest", the units with the highest losses.
      temperature: the smaller, the more the losses decide. Losses of large batches hardly differ,
        so that the paper's draw is close to a uniform one; see the effective number of units that
        is printed.
      parts: stretches of the round of which each is drawn from on its own. The paper's repository
        knows none; second-hand notes have 8.
      reference: workdir of score-batches with another model, of the same round and unit, whose
        losses are subtracted: what it finds hard too is not forgotten but noise. Not in the paper.
      clip: share of the units whose losses, the highest ones, are brought down to the highest of
        the others. Not in the paper.
      order: "shuffled" serves what was drawn in another order, "kept" in that of the round. Not
        stated in the paper: shuffled, so that no part of the corpus comes last in every round.
      nonfinite: "refuse" units whose loss is NaN or infinite, or "exclude" them from the draw.
      seed: of the draw and of the order, together with the model that was scored: one seed serves
        all rounds.
      before: workdir of select-batches for the round before; the report then says how much of it
        was drawn again.
    """
    drawing = Drawing(rate, method, temperature, parts, clip, order, nonfinite, seed)
    scored = Scores.open(scores)
    round_ = scored.round
    drawing.check(round_.units(scored.unit))
    losses_u = scored.losses()
    _check_finite(scores, scored.unit, losses_u, nonfinite)
    compared = _subtract(losses_u, reference, scored, nonfinite) if reference else None
    batches = drawing.batches(round_.batches)
    losses_u[~np.isfinite(losses_u)] = np.nan
    excluded = int(np.isnan(losses_u).sum())
    losses_u = clipped(losses_u, clip)
    drawing.check_temperature(losses_u)
    count = batches * round_.global_batch // round_.rows(scored.unit)
    key = [seed, *scored.model.encode()]
    # One at a time, and as masks: of 100 million units an array of numbers is 800 MB.
    taken, other_taken = (
        _mask(draw_parts(losses_u, count, parts, method, temperature, [other, *key]), len(losses_u))
        for other in (0, 1)
    )
    earlier = _drawn_before(before, scored) if before else None
    how = {"scores": scored.digest, "reference": compared, **vars(drawing)}
    folder = claim(workdir, "select-batches", how)
    if (folder / INDEX).exists():
        return RoundIndex.open(workdir)
    selection = Selection(
        scores=scored,
        losses=losses_u,
        taken=taken,
        method=method,
        spread=spread(losses_u, parts, method, temperature),
        overlap=float(other_taken[taken].mean()),
        drawn_before=None if earlier is None else float(earlier[taken].mean()),
        excluded=excluded,
        parts=parts,
    )
    report = report_of(selection)
    report.write(folder)
    units = np.flatnonzero(taken)
    if order == "shuffled":
        np.random.default_rng([2, *key]).shuffle(units)
    index = RoundIndex(round_, scored.unit, scored.model, units, how)
    index.write(folder)
    print(f"round index {folder}: {index.batches:,} of {round_.batches:,} batches")
    print(report.text())
    return index


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The settings of a draw, as `select_batches` takes them."""

    rate: float
    method: str
    temperature: float
    parts: int
    clip: float
    order: str
    nonfinite: str
    seed: int

    def check(self, units: int) -> None:
        """Checks all that does not depend on the losses of so many units."""
        check_number("select_batches.rate", self.rate, above=0, most=1)
        check_number("select_batches.temperature", self.temperature, above=0, below=math.inf)
        check_number("select_batches.parts", self.parts, 1, units)
        check_number("select_batches.clip", self.clip, 0, below=1)
        check_number("select_batches.seed", self.seed, 0)
        check_one_of("select_batches.method", self.method, METHODS)
        check_one_of("select_batches.order", self.order, ORDERS)
        check_one_of("select_batches.nonfinite", self.nonfinite, NONFINITE)

    def check_temperature(self, losses_u: np.ndarray) -> None:
        """Refuses a temperature by which losses cannot be divided."""
        finite = np.isfinite(losses_u)
        if self.method == "loss" and finite.any():
            widest = float(np.nanmax(losses_u) - np.nanmin(losses_u))
            if self.temperature * sys.float_info.max < widest:
                raise UserError(
                    f"select_batches.temperature {self.temperature} is too small for losses that "
                    f"differ by {widest:.4g}"
                )

    def batches(self, batches: int) -> int:
        """How many of a round's batches are drawn."""
        if not (drawn := round(self.rate * batches)):
            raise UserError(f"select_batches.rate {self.rate} of {batches} batches leaves none")
        return drawn


def _subtract(losses_u: np.ndarray, reference: str, scores: Scores, nonfinite: str) -> str:
    """Subtracts the losses of another model in place; returns the digest of its scores. They are
    not kept: of 100 million units they take gigabytes."""
    other = Scores.open(reference)
    _check_reference(scores, other)
    less_u = other.losses()
    _check_finite(reference, scores.unit, less_u, nonfinite)
    losses_u -= less_u
    return other.digest


def _drawn_before(before: str, scores: Scores) -> np.ndarray:
    """bool [units], those that an earlier round index holds."""
    index = RoundIndex.open(before)
    _check_same_units("before", index, scores)
    return _mask(index.units, scores.round.units(scores.unit))


def _check_finite(folder: str, unit: str, losses_u: np.ndarray, nonfinite: str) -> None:
    """Refuses losses that are not finite, unless they are to be left out."""
    if nonfinite == "refuse" and len(bad := np.flatnonzero(~np.isfinite(losses_u))):
        shown = ", ".join(map(str, bad[:10])) + (", …" if len(bad) > 10 else "")
        raise UserError(
            f"scores {folder}: the loss of {unit} {shown} is NaN or infinite ({len(bad):,} in "
            f"all); select_batches.nonfinite = 'exclude' leaves them out"
        )


def _mask(drawn: np.ndarray, units: int) -> np.ndarray:
    taken = np.zeros(units, bool)
    taken[drawn] = True
    return taken


def _check_same_units(name: str, other: Scores | RoundIndex, scores: Scores) -> None:
    """Refuses a parameter that is about other units than the scores."""
    if other.unit != scores.unit:
        raise UserError(
            f"select_batches.{name} has {UNITS[other.unit]}, select_batches.scores has "
            f"{UNITS[scores.unit]}: expected the same unit"
        )
    if differences := other.round.differences(scores.round):
        raise UserError(f"select_batches.{name} is of another round: {differences}")


def _check_reference(scores: Scores, reference: Scores) -> None:
    _check_same_units("reference", reference, scores)
    if scores.dtype != reference.dtype:
        raise UserError(
            f"select_batches.reference was scored in {reference.dtype}, select_batches.scores in "
            f"{scores.dtype}; score_batches.dtype makes them alike"
        )
    if scores.model == reference.model:
        raise UserError(
            "select_batches.reference is of the same model as select_batches.scores, which leaves "
            "0 of every loss: expected another one"
        )
