"""Draws without replacement, on arrays alone.

The paper draws N₀ of N batches one after another, each time by pᵢ = exp(lᵢ) / Σ exp(lⱼ) among
those that are left. The N₀ largest of lᵢ / T + Gᵢ, with Gᵢ independent and Gumbel, have that law
(for T = 1) and need one pass; −G is the logarithm of an exponential variable. All in float64.

Axes: u unit.
"""

from typing import NamedTuple

import numpy as np

from pangu_tiny.errors import UserError

METHODS = ("loss", "uniform", "highest")

_SLICE = 2**20
"""Units that are computed at once, so that what is needed on the way takes no room."""

PARTS = 8
"""Into how many parts the paper's figure of forgetting cuts a round, and so do the reports."""


class Spread(NamedTuple):
    """How uneven p is: 1 / Σ p² and −Σ p · log p, in nats; both at their largest, the number of
    units and its logarithm, where p is uniform."""

    effective_units: float
    entropy: float


def draw(
    losses_u: np.ndarray, count: int, method: str, temperature: float, key: list[int]
) -> np.ndarray:
    """Draws `count` units.

    Args:
      losses_u: float64; what is not finite is never drawn.
      count: how many, at most as many as are finite.
      method: "loss", by exp(loss / temperature); "uniform"; "highest", those with the highest
        losses, without chance.
      temperature: positive; 1 is the paper's.
      key: seeds; the same ones give the same draw.

    Returns:
      int64 [count], ascending.
    """
    if count in (0, len(losses_u)):
        return np.arange(count)
    if method == "highest":
        late_u = np.negative(losses_u)
    else:
        late_u = np.random.default_rng(key).standard_exponential(len(losses_u))
        np.log(late_u, out=late_u)
    peak = _peak(losses_u)
    for some in _slices(len(losses_u)):
        if method == "loss":  # the peak first: what is far from 0 would swallow the noise
            late_u[some] -= (losses_u[some] - peak) / temperature
        late_u[some][~np.isfinite(losses_u[some])] = np.nan  # which comes last, after ∞
    drawn = np.argpartition(late_u, count - 1)[:count]
    drawn.sort()
    return drawn


def draw_parts(
    losses_u: np.ndarray, count: int, parts: int, method: str, temperature: float, key: list[int]
) -> np.ndarray:
    """`draw` from each of `parts` stretches of a round on its own, from each its share of `count`;
    int64 [count], ascending."""
    drawn = []
    total = len(losses_u)
    for part, (start, end) in enumerate(bounds(total, parts)):
        share = count * end // total - count * start // total
        part_u = losses_u[start:end]
        finite = int(np.isfinite(part_u).sum())
        if share > finite:
            raise UserError(
                f"{share} of the units {start} to {end - 1} are to be drawn, {finite} of them "
                f"have a finite loss: choose a lower select_batches.rate"
            )
        drawn.append(start + draw(part_u, share, method, temperature, [*key, part]))
    return np.concatenate(drawn)


def bounds(units: int, parts: int) -> list[tuple[int, int]]:
    """First and end unit of each part; as equal as can be."""
    return [(units * part // parts, units * (part + 1) // parts) for part in range(parts)]


def clipped(losses_u: np.ndarray, share: float) -> np.ndarray:
    """The losses, finite or NaN, the highest `share` of them brought down to the highest of the
    others; NaN stays."""
    count = len(losses_u) - int(np.isnan(losses_u).sum())
    if not (top := int(share * count)):
        return losses_u
    kept = count - top - 1
    return np.minimum(losses_u, np.partition(losses_u, kept)[kept])  # NaN are last


def spread(losses_u: np.ndarray, parts: int, method: str, temperature: float) -> Spread:
    """Of the p of a first draw by `draw_parts`, over all units together; those that are not finite
    have none."""
    total = len(losses_u)
    squares = entropy = 0.0
    for start, end in bounds(total, parts):
        share = (end - start) / total
        part = _spread(losses_u[start:end], method, temperature)
        squares += share**2 / part.effective_units
        entropy += share * (part.entropy - np.log(share))
    return Spread(1 / squares, float(entropy))


def _spread(losses_u: np.ndarray, method: str, temperature: float) -> Spread:
    peak = _peak(losses_u)
    total = squares = weighted = 0.0
    for some in _slices(len(losses_u)):
        part_u = losses_u[some]
        part_u = part_u[np.isfinite(part_u)]
        logits_u = (part_u - peak) / temperature if method == "loss" else np.zeros(len(part_u))
        weights_u = np.exp(logits_u)
        total += weights_u.sum()
        squares += np.dot(weights_u, weights_u)
        weighted += np.dot(weights_u, logits_u)
    if not total:  # nothing finite, hence nothing drawn
        return Spread(np.inf, 0.0)
    return Spread(float(total**2 / squares), float(np.log(total) - weighted / total))


def _peak(losses_u: np.ndarray) -> float:
    """The highest finite loss."""
    return float(np.max(losses_u, initial=-np.inf, where=np.isfinite(losses_u)))


def _slices(units: int) -> list[slice]:
    return [slice(start, start + _SLICE) for start in range(0, units, _SLICE)]
