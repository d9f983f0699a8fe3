"""Intervals of two levels: they enclose what is true, and widen where trainings differ, and only there."""

import numpy as np
import pytest

from prosg_lib.evaluation.statistics import drawn_trainings, resampled


def first(means):
    return means[0]


def answered(rng, prompts, trainings=1, apart=0.0):
    """Shares of six questions, (1, trainings, prompts): recall 0.7 but for a prompt's own, 0.15, and a training's."""
    own = 0.7 + apart * rng.normal(size=(trainings, 1)) + 0.15 * rng.normal(size=(1, prompts))
    return rng.binomial(6, own.clip(0, 1))[None] / 6


def test_two_levels_enclose_the_truth():
    """Five trainings and 60 prompts, whether the trainings or the prompts scatter more."""
    rng = np.random.default_rng(1)
    for apart, spread in ((0.05, 0.0), (0.05, 0.15), (0.0, 0.15)):
        tables = 0.5 + apart * rng.normal(size=(300, 1, 5, 1)) + spread * rng.normal(size=(300, 1, 1, 60))
        found = [resampled(table, first) for table in tables]
        assert 0.91 <= np.mean([e.low <= 0.5 <= e.high for e in found]) <= 0.99


def test_trainings_that_answer_alike_have_the_interval_over_prompts():
    """Exactly, however many they are; so a method that was trained once has the interval that it would have alone."""
    once = answered(np.random.default_rng(2), 40)
    alone = resampled(once, first)
    assert resampled(once[:, 0], first) == alone
    for count in (2, 5, 9):
        alike = resampled(np.repeat(once, count, 1), first)
        assert (alike.value, alike.low, alike.high) == pytest.approx((alone.value, alone.low, alone.high), abs=1e-12)


def test_trainings_that_differ_widen_the_interval():
    """It is wider than the one over prompts of the trainings' mean, and the wider, the farther they are apart."""
    rng, widths = np.random.default_rng(3), []
    for apart in (0.0, 0.03, 0.1):
        table = np.broadcast_to(answered(rng, 60), (1, 5, 60)) + apart * np.array([-1.5, -0.5, 0, 0.5, 1.5])[:, None]
        found, over_prompts = resampled(table, first), resampled(table.mean(1), first)
        assert found.value == pytest.approx(over_prompts.value)
        widths.append((found.high - found.low) / (over_prompts.high - over_prompts.low))
    assert widths[0] == pytest.approx(1.0)
    assert 1.1 < widths[1] < widths[2]


def test_without_prompts_scatter_it_goes_from_the_worst_training_to_the_best():
    """Of five, two are drawn: both are the worst one in a draw of 25."""
    each = np.array([0.6, 0.7, 0.71, 0.72, 0.9])
    found = resampled(np.repeat(each[None, :, None], 30, 2), first)
    assert (found.low, found.high) == pytest.approx((0.6, 0.9))


def test_methods_keep_the_same_trainings():
    """Two methods that differ by as much in every training and prompt differ by it for sure."""
    table = answered(np.random.default_rng(4), 30, 5, 0.1)
    found = resampled(np.concatenate([table, table - 0.1]), lambda means: means[0] - means[1])
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_prompts_that_ask_nothing_count_for_nothing():
    """NaN is left out of the mean; where there is nothing else, there is no interval."""
    table = np.array([[[0.2, np.nan, 0.4], [0.4, np.nan, 0.6]]])
    found = resampled(table, first)
    assert found.value == pytest.approx(0.4)
    assert 0.2 <= found.low < found.value < found.high <= 0.6


@pytest.mark.parametrize(("count", "drawn"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (10, 7), (100, 97)])
def test_so_few_trainings_are_drawn_that_students_t_is_met(count, drawn):
    """Nearly all of many, and few of few."""
    assert drawn_trainings(count) == drawn
