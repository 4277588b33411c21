"""Models side by side: means over seeds, what each gains over another; whether a rung holds, and
whether an order is that of the paper."""

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


class Correlation(NamedTuple):
    """Of ranks.

    Attributes:
      rho: Spearman's, from −1 to 1.
      p: the share of orders in which it is as far from 0.
      rows: that are ranked.
    """

    rho: float
    p: float
    rows: int

    def __str__(self) -> str:
        return f"{self.rho:+.2f} (p = {self.p:.3f}, {self.rows} rows)"


_ORDERS = 40_320  # of 8: so many are all tried, of more as many that are drawn


def correlation_of(one: Sequence[float], other: Sequence[float]) -> Correlation | None:
    """Of two lists of numbers, equal ones with their mean rank; None where one is all equal or
    there are fewer than three."""
    count = len(one)
    if count < 3 or len({*one}) < 2 or len({*other}) < 2:
        return None
    ranks, others = (stats.zscore(stats.rankdata(values)) for values in (one, other))
    if math.factorial(count) <= _ORDERS:
        orders = np.array(list(itertools.permutations(range(count))))
    else:
        random = np.random.default_rng(0)
        orders = random.permuted(np.tile(np.arange(count), (_ORDERS, 1)), axis=1)
    rho = float(ranks @ others) / count
    all_rho = others[orders] @ ranks / count
    # Equal to the last bit or not, an order that comes to the same is as far.
    return Correlation(rho, float(np.mean(np.abs(all_rho) >= abs(rho) - 1e-9)), count)


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


def spread_of(by_seed: Mapping[int, float]) -> Spread:
    """From bits per byte by seed."""
    values = list(by_seed.values())
    return Spread(float(np.mean(values)), float(np.ptp(values)) / 2)


def compare(found: Mapping[str, Mapping[int, float]]) -> list[Line]:
    """From bits per byte by rung, the lowest rung first, and seed."""
    lines = [Line(rung, spread_of(found[rung]), None, None) for rung in itertools.islice(found, 1)]
    for below, rung in itertools.pairwise(found):
        before, after = spread_of(found[below]), spread_of(found[rung])
        holds = after.mean <= before.mean + max(before.half_range, after.half_range)
        lines.append(Line(rung, after, gain_of(found[below], found[rung]), holds))
    return lines
