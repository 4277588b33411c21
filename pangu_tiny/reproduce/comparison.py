"""Rungs side by side: means over seeds, what each gains over the one below, whether it holds."""

import itertools
import math
from collections.abc import Mapping
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

    def __str__(self) -> str:
        reach = self.interval and f" [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]"
        return f"{self.mean:+.3f}{reach or ''}"


class Spread(NamedTuple):
    """Bits per byte over seeds: their mean, and half of their range."""

    mean: float
    half_range: float

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.half_range:.3f}" if self.half_range else "")


class Line(NamedTuple):
    """A rung.

    Attributes:
      spread: of held-out bits per byte.
      gain: over the rung below; None for the first.
      holds: whether its mean is not above that of the rung below by more than the larger half of
        the two ranges; None for the first.
    """

    rung: str
    spread: Spread
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

    def spread(by_seed: Mapping[int, float]) -> Spread:
        values = list(by_seed.values())
        return Spread(float(np.mean(values)), float(np.ptp(values)) / 2)

    lines = [Line(rung, spread(found[rung]), None, None) for rung in itertools.islice(found, 1)]
    for below, rung in itertools.pairwise(found):
        before, after = spread(found[below]), spread(found[rung])
        holds = after.mean <= before.mean + max(before.half_range, after.half_range)
        lines.append(Line(rung, after, gain_of(found[below], found[rung]), holds))
    return lines
