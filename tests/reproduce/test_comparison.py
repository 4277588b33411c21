"""Rungs side by side, against numbers worked out by hand and by another road."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from scipy import stats

from pangu_tiny.reproduce.comparison import compare, gain_of


def test_a_ladder_of_three_seeds():
    below = {1: 3.0, 2: 3.2, 3: 3.1}
    above = {1: 2.9, 2: 3.0, 3: 2.8}
    first, second = compare({"plain": below, "tokenizer": above})
    assert (first.rung, first.gain, first.holds) == ("plain", None, None)
    assert first.spread == pytest.approx((3.1, 0.1))
    assert second.spread == pytest.approx((2.9, 0.1)) and second.holds
    assert str(second.spread) == "2.900 ± 0.100" and str(second.gain) == "+0.200 [-0.048, +0.448]"
    assert second.gain.mean == pytest.approx(0.2)
    # Differences 0.1, 0.2, 0.3: standard error 0.1/√3, t of two degrees of freedom 4.3027.
    assert second.gain.interval == pytest.approx((0.2 - 0.24841, 0.2 + 0.24841), abs=1e-4)


@pytest.mark.parametrize(
    ("below", "above", "holds"),
    [
        ({1: 3.0, 2: 3.2}, {1: 3.18, 2: 3.2}, True),  # 3.19 ≤ 3.1 + 0.1
        ({1: 3.0, 2: 3.2}, {1: 3.2, 2: 3.22}, False),  # 3.21 > 3.1 + 0.1
        ({1: 3.1, 2: 3.1}, {1: 3.0, 2: 3.3}, True),  # the larger half range is the upper rung's
        ({1: 3.1}, {1: 3.1}, True),
        ({1: 3.1}, {1: 3.1001}, False),  # one seed has no range
    ],
)
def test_a_rung_holds_within_the_larger_half_of_the_ranges(below, above, holds):
    assert compare({"a": below, "b": above})[1].holds is holds


values = st.floats(0.5, 9.0)


@hypothesis.given(pairs=st.lists(st.tuples(values, values), min_size=2, max_size=8))
@hypothesis.settings(deadline=None, derandomize=True)
def test_the_interval_is_that_of_the_paired_t_test(pairs):
    before, after = np.array(pairs).T
    hypothesis.assume(np.ptp(before - after) > 1e-3)
    gain = gain_of(dict(enumerate(before)), dict(enumerate(after)))
    tested = stats.ttest_rel(before, after)
    assert gain.mean == pytest.approx((before - after).mean(), abs=1e-12)
    expected = tuple(tested.confidence_interval(0.95))
    assert gain.interval == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_only_seeds_that_both_have_make_pairs():
    assert gain_of({1: 3.0, 2: 9.0}, {1: 2.5, 3: 1.0}).mean == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no seed is in both"):
        gain_of({1: 3.0}, {2: 3.0})
