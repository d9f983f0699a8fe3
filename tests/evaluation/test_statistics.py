"""Intervals cover the truth, on both levels, and what is computed from frames is its formula."""

import math

import numpy as np
import pandas as pd
import pytest

from prosg_lib.errors import UserError
from prosg_lib.evaluation.statistics import (
    Estimate,
    by_distance,
    by_training,
    difference,
    differences,
    drawn_trainings,
    estimate,
    gap_recovered,
    half_life,
    locality,
    mean,
    resampled,
)


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


def test_what_is_drawn_together_widens_the_interval():
    """Questions about one passage that are all right or all wrong count as one: the interval is that of the passages,
    in whatever order questions stand; groups of one question each change nothing."""
    passages = answered(np.random.default_rng(4), 30)
    alone = resampled(passages, first)
    numbers = np.random.default_rng(5).permutation(np.repeat(np.arange(30), 4))
    together = resampled(passages[..., numbers], first, numbers)
    assert (together.value, together.low, together.high) == pytest.approx((alone.value, alone.low, alone.high))
    apart = resampled(passages[..., numbers], first)
    assert apart.high - apart.low < 0.7 * (together.high - together.low)
    assert resampled(passages, first, np.arange(30)) == alone


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


# From frames


def made(recall, distances=(0, 64, 256), seeds=(0,), facts=6, **columns):
    """A frame out of {method: one list of prompts' recalls a distance}."""
    return pd.DataFrame(
        [
            {"method": m, "distance": d, "facts": facts, "seed": s, "prompt": i, "recall": r, "followed": r}
            | {name: values[m][j][i] for name, values in columns.items()}
            for m, table in recall.items()
            for j, (d, prompts) in enumerate(zip(distances, table, strict=True))
            for s in seeds
            for i, r in enumerate(prompts)
        ]
    )


def test_gap_recovered_is_its_formula():
    """(R - none) / (repeated - none) of the means, not the mean of the ratios; NaN where there is no gap."""
    frame = made({"prosg-token": [[0.9, 0.5]], "none": [[0.1, 0.1]], "repeated": [[1.0, 0.8]]}, distances=(64,))
    found = gap_recovered(frame, "prosg-token", 64)
    assert found.value == pytest.approx((0.7 - 0.1) / (0.9 - 0.1))
    assert found.low == pytest.approx((0.5 - 0.1) / (0.8 - 0.1))  # both times the second prompt
    assert found.high == pytest.approx((0.9 - 0.1) / (1.0 - 0.1))
    assert gap_recovered(frame, "none", 64).value == 0
    assert gap_recovered(frame, "repeated", 64).value == 1
    closed = made({"base": [[0.5, 0.0]], "none": [[0.2, 0.2]], "repeated": [[0.2, 0.2]]}, distances=(64,))
    found = gap_recovered(closed, "base", 64)
    assert math.isnan(found.value)
    assert math.isnan(found.low)


def test_half_life_is_between_the_distances_that_enclose_it():
    """Linear in log(1 + d); infinite where half is never reached; the first crossing counts."""
    frame = made(
        {"base": [[1.0], [0.75], [0.25]], "prosg-token": [[1.0], [1.0], [0.5]], "wrong": [[1.0], [0.0], [1.0]]}
    )
    assert half_life(frame, "base") == pytest.approx(math.expm1((math.log(65) + math.log(257)) / 2))
    assert half_life(frame, "prosg-token") == math.inf
    assert half_life(frame, "wrong") == pytest.approx(math.expm1(math.log(65) / 2))


def test_interval_covers():
    """A 95 % interval encloses the true mean about that often: 60 prompts, 150 times."""
    rng = np.random.default_rng(1)
    found = [resampled(rng.binomial(6, 0.7, (1, 60)) / 6, lambda means: means[0]) for _ in range(150)]
    assert 0.88 <= np.mean([e.low <= 0.7 <= e.high for e in found]) <= 0.99


def test_differences_are_paired():
    """Two methods that differ by the same amount in every prompt differ by it for sure, however prompts differ."""
    recalls = np.linspace(0.2, 0.8, 7)
    frame = made({"wrong": [recalls - 0.1], "none": [recalls]}, distances=(64,))
    found = differences(frame, "wrong", "none")[64]
    assert (found.value, found.low, found.high) == pytest.approx((-0.1, -0.1, -0.1))


def test_the_band_of_differences_covers_a_whole_curve():
    """Of curves that differ nowhere, about one in twenty leaves the band somewhere; single intervals miss far more."""
    rng = np.random.default_rng(3)
    distances, missed, single = (0, 16, 64, 256, 512, 1024, 4096), 0, 0
    for _ in range(200):
        draws = rng.normal(size=(2, len(distances), 40))
        frame = made({"wrong": list(draws[0]), "none": list(draws[1])}, distances=distances)
        band = differences(frame, "wrong", "none")
        missed += any(not e.low <= 0 <= e.high for e in band.values())
        apart = draws[0] - draws[1]
        single += bool((np.abs(apart.mean(1)) > 1.96 * apart.std(1) / 40**0.5).any())
    assert 0.01 <= missed / 200 <= 0.11
    assert single / 200 > 0.2


def test_locality_pools_words_and_not_shares():
    """Prompts with more questions about other people weigh more; pieces without any say nothing, and where there are
    no others, as at distance 0, there is no ratio."""
    recall = {"base": [[0, 0], [0, 0]], "prosg-token": [[0, 0], [0, 0]]}
    nan = float("nan")
    frame = made(
        recall,
        distances=(0, 64),
        competing_total={"base": [[0, 0], [10, 2]], "prosg-token": [[0, 0], [10, 2]]},
        competing={"base": [[nan, nan], [0.8, 1.0]], "prosg-token": [[nan, nan], [0.6, 1.0]]},
    )
    assert locality(frame, "prosg-token").value == pytest.approx((6 + 2) / (8 + 2))
    assert locality(frame, "base").value == 1
    assert math.isnan(locality(frame[frame.distance == 0], "prosg-token").value)


def test_by_distance_is_a_table_of_estimates():
    """One row a method in the order given, one column a distance in rising order."""
    frame = made({"base": [[1.0], [0.5], [0.0]], "none": [[0.0], [0.0], [0.0]]}, distances=(256, 0, 64))
    table = by_distance(estimate, frame, ["none", "base"])
    assert list(table.index) == ["none", "base"]
    assert list(table.columns) == [0, 64, 256]
    assert table.loc["base", 256].value == 1.0
    assert str(table.loc["base", 0]) == "0.50 [0.50, 0.50]"


def trained(recalls, method="prosg-token"):
    """The frame of several trainings: number -> one list of prompts' recalls a distance."""
    return pd.concat([made({method: table}).assign(training=n) for n, table in recalls.items()], ignore_index=True)


def test_numbers_are_means_over_trainings():
    """Recall, gap, differences, half-life, answers about others; a method without trainings is the same in all."""
    several = trained({0: [[1.0, 0.8], [0.9, 0.7], [0.6, 0.4]], 1: [[0.6, 0.4], [0.5, 0.3], [0.0, 0.0]]})
    once = made({"none": [[0.2, 0.0]] * 3, "repeated": [[1.0, 1.0]] * 3}).assign(training=0)
    frame = pd.concat([several, once], ignore_index=True)
    assert [estimate(frame, "prosg-token", d).value for d in (0, 64, 256)] == pytest.approx([0.7, 0.6, 0.25])
    assert gap_recovered(frame, "prosg-token", 0).value == pytest.approx((0.7 - 0.1) / 0.9)
    assert differences(frame, "prosg-token", "none")[256].value == pytest.approx(0.15)
    mean = {"prosg-token": [[0.8, 0.6], [0.7, 0.5], [0.3, 0.2]]}
    assert half_life(frame, "prosg-token") == half_life(made(mean), "prosg-token")
    each = by_training(frame, "prosg-token")
    assert each.index.tolist() == [0, 1]
    assert each[256].map(lambda e: e.value).tolist() == [0.5, 0.0]
    assert by_training(once.drop(columns="training"), "none").index.tolist() == [0]
    about = frame.assign(
        competing_total=10, competing=np.where(frame.method == "none", 0.5, 0.25 + 0.5 * frame.training)
    )
    assert locality(about, "prosg-token", "none").value == pytest.approx(1.0)
    assert (locality(about, "prosg-token", "none").low, locality(about, "prosg-token", "none").high) == (0.5, 1.5)


def test_a_band_is_wider_where_trainings_differ():
    """And the same, where they do not."""
    rng = np.random.default_rng(0)
    prompts, none = rng.uniform(0.4, 0.6, (3, 30)), made({"none": [np.zeros(30)] * 3}).assign(training=0)

    def band(apart):
        tables = {n: list(prompts + apart * n) for n in range(-2, 3)}
        return differences(pd.concat([trained(tables), none]), "prosg-token", "none")[64]

    alone = differences(pd.concat([made({"prosg-token": list(prompts)}), none.drop(columns="training")]),
                        "prosg-token", "none")[64]  # fmt: skip
    alike, apart = band(0.0), band(0.05)
    assert (alike.low, alike.high) == pytest.approx((alone.low, alone.high))
    assert apart.low < alone.low - 0.05
    assert apart.high > alone.high + 0.05


def test_other_trainings_each_are_not_compared():
    """Two methods with several trainings need the same ones."""
    frame = pd.concat([trained({n: [[0.5]] * 3 for n in some}, m) for m, some in {"a": (0, 1), "b": (0, 2)}.items()])
    with pytest.raises(UserError, match="a, b have different trainings"):
        differences(frame, "a", "b")


def test_what_was_not_measured_is_named():
    """An estimate of a method or distance that is not in the frame is an error that names it."""
    with pytest.raises(UserError, match="repeated was not measured here; there are base, none"):
        gap_recovered(made({"base": [[1.0]], "none": [[0.0]]}, distances=(64,)), "base", 64)
    with pytest.raises(UserError, match="nothing was measured at 65 tokens with 6 facts"):
        estimate(made({"base": [[1.0]]}, distances=(64,)), "base", 65)


def test_means_are_of_all_rows_and_paired():
    """Whatever cells the rows belong to; items are matched by cell, seed and number, in any order of the rows."""
    rows = [
        {"cell": cell, "seed": seed, "item": item, "method": method, "score": 0.1 * item + shift}
        for method, shift in (("base", 0.0), ("other", 0.3))
        for cell in (0, 1)
        for seed in (0, 1)
        for item in range(5)
    ]
    frame = pd.DataFrame(rows).sample(frac=1.0, random_state=0)
    assert mean(frame, "base", "score").value == pytest.approx(0.2)
    found = difference(frame, "other", "base", "score")
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.3, 0.3))


def test_error_bars_are_never_negative():
    """A bootstrap interval need not enclose the value itself, and matplotlib takes no negative bar."""
    assert Estimate(0.5, 0.4, 0.7).bars == pytest.approx((0.1, 0.2))
    assert Estimate(0.5, 0.6, 0.7).bars == pytest.approx((0.0, 0.2))
