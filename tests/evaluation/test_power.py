"""The smallest difference that a number of items can show: by simulation, and beside McNemar's test."""

import math

import numpy as np
import pytest
from scipy import stats

from prosg_lib.evaluation.power import smallest_difference


@pytest.mark.parametrize("items", [5, 12, 60])
def test_normal_differences_are_found_in_four_of_five(items):
    """4,000 simulated evaluations at exactly that difference: 80 % of their paired t-tests say so, within 3 errors."""
    rng = np.random.default_rng(0)
    there = smallest_difference(items, 0.2)
    found = stats.ttest_1samp(rng.normal(there, 0.2, (4000, items)), 0.0, axis=1)
    assert abs(((found.pvalue < 0.05) & (found.statistic > 0)).mean() - 0.8) < 3 * (0.16 / 4000) ** 0.5


@pytest.mark.parametrize("items", [100, 400])
def test_right_and_wrong_answers_are_found_whatever_they_are(items):
    """At the difference for any answers: in the worst case, where all answers differ, in four of five (the answers are
    whole numbers, so not exactly), and where a third differs more often."""
    rng = np.random.default_rng(0)
    there = smallest_difference(items)
    shares = []
    for differ in (1.0, max(there, 1 / 3)):
        odds = [(differ + there) / 2, (differ - there) / 2, 1 - differ]
        table = rng.multinomial(items, odds, 4000)
        mean = (table[:, 0] - table[:, 1]) / items
        error = np.sqrt(((table[:, 0] + table[:, 1]) / items - mean**2) / (items - 1))
        shares.append((mean / error > stats.t.isf(0.025, items - 1)).mean())
    assert shares[0] == pytest.approx(0.8, abs=0.035)
    assert shares[1] > 0.95


def test_beside_mcnemars_formula():
    """Connor 1987: n d^2 = (z_a sqrt(q) + z_b sqrt(q - d^2))^2 with q = 1, all answers different; for many items the
    two agree in two digits."""
    z_a, z_b = stats.norm.isf(0.025), stats.norm.isf(0.2)
    for items in (500, 5000):
        d = smallest_difference(items)
        assert items * d**2 == pytest.approx((z_a + z_b * math.sqrt(1 - d**2)) ** 2, rel=0.02)


def test_more_items_show_smaller_differences():
    """Falling with items, in proportion to the scatter, and never above the one for any answers where that is less."""
    sizes = [smallest_difference(n) for n in (2, 5, 20, 100, 1000)]
    assert sizes == sorted(sizes, reverse=True)
    assert smallest_difference(50, 0.4) == pytest.approx(2 * smallest_difference(50, 0.2))
    assert smallest_difference(50, 0.0) == 0.0


@pytest.mark.parametrize(("items", "deviation"), [(0, None), (1, None), (1, 0.1), (2, 0.9)])
def test_some_show_nothing(items, deviation):
    """No items to speak of, or a scatter under which only a difference above 1 would be seen."""
    assert smallest_difference(items, deviation) is None
