"""Draws have the law that the paper states, at any size of the losses."""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pangu_tiny.rounds.draw as module
from pangu_tiny.errors import UserError
from pangu_tiny.rounds.draw import bounds, clipped, draw, draw_parts, spread

LOSSES = np.array([0.0, 1.0, 2.0, 0.5, -1.0])
SIZES = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=40)


@pytest.fixture(scope="module", autouse=True)
def small_slices():
    """So that even these draws are computed in several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SLICE", 3)
        yield


def law(losses, count, temperature):
    """Every subset and its exact probability: units drawn one after another, each time by softmax
    among those that are left."""
    weights = np.exp(np.asarray(losses) / temperature)
    subsets = {}
    for ordered in itertools.permutations(range(len(weights)), count):
        left, probability = weights.sum(), 1.0
        for unit in ordered:
            probability *= weights[unit] / left
            left -= weights[unit]
        key = tuple(sorted(ordered))
        subsets[key] = subsets.get(key, 0.0) + probability
    return subsets


@pytest.mark.parametrize(
    "count, method, temperature", [(2, "loss", 1.0), (3, "loss", 0.5), (2, "uniform", 1.0)]
)
def test_sets_have_the_exact_law(count, method, temperature):
    """χ² over all subsets. Its 0.9999 quantile by Wilson and Hilferty; the seeds are fixed."""
    times = 20_000
    expected = law(LOSSES if method == "loss" else 0 * LOSSES, count, temperature)
    assert sum(expected.values()) == pytest.approx(1)
    seen = dict.fromkeys(expected, 0)
    for seed in range(times):
        seen[tuple(draw(LOSSES, count, method, temperature, [seed]).tolist())] += 1
    statistic = sum((seen[key] - times * p) ** 2 / (times * p) for key, p in expected.items())
    free = len(expected) - 1
    assert statistic < free * (1 - 2 / (9 * free) + 3.719 * math.sqrt(2 / (9 * free))) ** 3


def test_inclusion_is_as_in_numpy():
    """How often each of 60 units is among 20, against numpy's draws without replacement."""
    losses = np.random.default_rng(0).normal(size=60)
    p = np.exp(losses) / np.exp(losses).sum()
    times = 4000
    ours, theirs = np.zeros(60), np.zeros(60)
    for seed in range(times):
        ours[draw(losses, 20, "loss", 1.0, [seed])] += 1
        theirs[np.random.default_rng(seed).choice(60, 20, replace=False, p=p)] += 1
    deviation = np.sqrt((ours + theirs) * (1 - (ours + theirs) / (2 * times)))
    assert np.max(np.abs(ours - theirs) / deviation) < 5


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_losses_do_not_overflow(size):
    losses = np.full(100, size)
    losses[7] += 50  # e⁵⁰ times as likely as any other
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        assert draw(losses, 1, "loss", 1.0, [0]).tolist() == [7]
        found = spread(losses, 1, "loss", 1.0)
    assert found.effective_units == pytest.approx(1) and found.entropy == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 1e-14])
def test_equal_losses_are_drawn_by_chance(temperature):
    """However far from 0 they are, and however cold."""
    losses = np.full(1000, 1e4)
    first, second = (draw(losses, 500, "loss", temperature, [seed]) for seed in (0, 1))
    assert 200 < len(np.intersect1d(first, second)) < 300


@given(SIZES, st.data())
@settings(deadline=None)
def test_a_draw_is_a_set_of_units_that_its_key_decides(losses, data):
    losses = np.array(losses)
    count = data.draw(st.integers(0, len(losses)))
    method = data.draw(st.sampled_from(["loss", "uniform", "highest"]))
    found = draw(losses, count, method, 0.7, [3, 1])
    assert found.dtype == np.int64 and len(found) == count
    assert (np.diff(found) > 0).all() and set(found) <= set(range(len(losses)))
    np.testing.assert_array_equal(found, draw(losses, count, method, 0.7, [3, 1]))
    if method == "highest" and 0 < count < len(losses):
        assert losses[found].min() >= np.delete(losses, found).max()


def test_another_key_is_another_draw():
    losses = np.zeros(1000)
    first, second = (draw(losses, 500, "loss", 1.0, [seed]) for seed in (0, 1))
    assert 0.4 < len(np.intersect1d(first, second)) / 500 < 0.6


@given(st.integers(1, 200), st.integers(1, 9), st.floats(0, 1))
@settings(deadline=None)
def test_each_part_gives_its_share(units, parts, rate):
    count, parts = int(rate * units), min(parts, units)
    found = draw_parts(np.linspace(0, 9, units), count, parts, "loss", 1.0, [0])
    assert len(np.unique(found)) == count and (np.diff(found) > 0).all()
    for start, end in bounds(units, parts):
        share = np.sum((found >= start) & (found < end))
        assert abs(share - count * (end - start) / units) < 1


def test_parts_are_drawn_apart():
    """Of losses that are alike, other places are taken in each."""
    found = draw_parts(np.zeros(400), 200, 2, "loss", 1.0, [0])
    first, second = found[found < 200], found[found >= 200] - 200
    assert 40 < len(np.intersect1d(first, second)) < 60


def test_parts_draw_by_their_own_losses():
    """Whatever the parts' means: the second has losses so high that it would take all."""
    losses = np.concatenate([np.zeros(50), np.full(50, 1e3)])
    assert draw_parts(losses, 50, 1, "loss", 1.0, [0]).min() == 50
    assert np.sum(draw_parts(losses, 50, 2, "loss", 1.0, [0]) < 50) == 25


@pytest.mark.parametrize("method", ["loss", "uniform", "highest"])
def test_units_that_are_not_finite_are_never_drawn(method):
    losses = np.zeros(20)
    losses[[3, 8]] = np.nan, np.inf
    for seed in range(30):
        found = draw_parts(losses, 9, 2, method, 1.0, [seed])
        assert not {3, 8} & set(found.tolist()) and len(found) == 9
    with pytest.raises(UserError, match=r"10 of the units 0 to 9 are to be drawn, 8 of them"):
        draw_parts(losses, 20, 2, method, 1.0, [0])


@given(SIZES, st.floats(0, 0.99))
def test_clipping_brings_the_top_down_to_the_rest(losses, share):
    losses = np.array([*losses, np.nan])
    found = clipped(losses, share)
    top = int(share * (len(losses) - 1))
    ordered = np.sort(losses[:-1])
    np.testing.assert_array_equal(
        np.sort(found[:-1]), np.minimum(ordered, ordered[len(ordered) - 1 - top])
    )
    assert np.isnan(found[-1])


@given(SIZES, st.floats(0.1, 10))
def test_spread_is_its_definition(losses, temperature):
    losses = np.array(losses)
    logits = losses / temperature - max(losses / temperature)
    p = np.exp(logits) / np.exp(logits).sum()
    found = spread(np.append(losses, np.nan), 1, "loss", temperature)
    assert found.effective_units == pytest.approx(1 / np.sum(p**2))
    entropy = -np.sum(p[p > 0] * np.log(p[p > 0]))
    assert found.entropy == pytest.approx(entropy, abs=1e-9)
    even = spread(losses, 1, "uniform", temperature)
    assert even == pytest.approx((len(losses), math.log(len(losses))))


@given(SIZES.filter(lambda losses: len(losses) > 2), st.integers(1, 3))
def test_spread_of_parts_is_that_of_each_at_its_share(losses, parts):
    total = len(losses)
    p = []
    for start, end in bounds(total, parts):
        weights = np.exp(np.array(losses[start:end]) - max(losses[start:end]))
        p.extend(weights / weights.sum() * (end - start) / total)
    found, p = spread(np.array(losses), parts, "loss", 1.0), np.array(p)
    assert found.effective_units == pytest.approx(1 / np.sum(p**2))
    assert found.entropy == pytest.approx(-np.sum(p[p > 0] * np.log(p[p > 0])), abs=1e-9)
