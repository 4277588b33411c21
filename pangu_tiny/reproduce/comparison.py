"""Rungs side by side: means over seeds, what each gains over the one below, whether it holds."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Gain(NamedTuple):
    """What is taken off the bits per byte, seed by seed.

    Attributes:
      mean: of the differences of pairs of one seed; negative where something was lost.
      interval: of 95 %, by Student's t; None for a single seed.
    """

    mean: float
    interval: tuple[float, float] | None


class Line(NamedTuple):
    """A rung.

    Attributes:
      mean, half_range: over seeds, of held-out bits per byte.
      gain: over the rung below; None for the first.
      holds: whether its mean is not above that of the rung below by more than the larger half of
        the two ranges; None for the first.
    """

    rung: str
    mean: float
    half_range: float
    gain: Gain | None
    holds: bool | None


def gain_of(before: Mapping[int, float], after: Mapping[int, float]) -> Gain:
    """From bits per byte by seed, of the seeds that both have.

    Raises:
      ValueError: they have none in common.
    """
    pairs = [before[seed] - after[seed] for seed in sorted(before.keys() & after.keys())]
    if not pairs:
        raise ValueError("no seed is in both")
    mean, interval = float(np.mean(pairs)), None
    if len(pairs) > 1:
        error = float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs))
        reach = float(stats.t.ppf(0.975, len(pairs) - 1)) * error
        interval = (mean - reach, mean + reach)
    return Gain(mean, interval)


def compare(found: Mapping[str, Mapping[int, float]]) -> list[Line]:
    """From bits per byte by rung, the lowest rung first, and seed."""

    def middle(values: Sequence[float]) -> tuple[float, float]:
        return float(np.mean(values)), float(np.ptp(values)) / 2

    middles = {rung: middle(list(by_seed.values())) for rung, by_seed in found.items()}
    lines = [Line(rung, *middles[rung], None, None) for rung in itertools.islice(found, 1)]
    for below, rung in itertools.pairwise(found):
        (mean_below, half_below), (mean, half) = middles[below], middles[rung]
        holds = mean <= mean_below + max(half_below, half)
        lines.append(Line(rung, mean, half, gain_of(found[below], found[rung]), holds))
    return lines
