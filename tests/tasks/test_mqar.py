"""MQAR: the published distribution, by its laws and against a derivation step by step; judged at the queries alone."""

import numpy as np
import pytest
from scipy import stats

from prosg_lib.config.sizes import Forgetting
from prosg_lib.tasks.mqar import VOCAB, Mqar, gap_weights
from prosg_lib.tasks.suite import settings

SMALL = Mqar(length=48, pairs=4, vocab=60)
SPACE = (48 - 2 * 4) // 2
LIKELY = 1e-3  # of a statistic; the seeds are fixed, so what passes once passes always


@pytest.fixture(scope="module")
def drawn():
    """3,000 problems as arrays: keys, values, gaps (each (N, pairs), in the order of the pairs), and rests (N, 40)."""
    keys, values, gaps, rests = [], [], [], []
    for number in range(3000):
        found = SMALL.problem(None, "train", 0, number)
        key, value = found.memory[0::2], found.memory[1::2]
        place = {found.rest[where]: where for where in found.judged}
        keys.append(key)
        values.append(value)
        gaps.append([place[k] // 2 for k in key])
        rests.append(found.rest)
    return tuple(map(np.array, (keys, values, gaps, rests)))


def uniform(numbers, low, high):
    """How likely such counts are of numbers from low to high - 1, all alike."""
    return stats.chisquare(np.bincount(numbers - low, minlength=high - low)).pvalue


def test_every_problem_is_well_formed():
    """On the whole published grid: lengths, halves of the vocabulary, different keys and values, each key repeated once
    at an even place, and its value the gold answer."""
    for length, pairs in Forgetting().mqar:
        for number in range(20):
            found = Mqar(length, pairs).problem(None, "test", 0, number)
            keys, values = found.memory[0::2], found.memory[1::2]
            assert len(found.memory) + len(found.rest) == length
            assert len(set(keys)) == len(set(values)) == len(found.judged) == pairs
            assert min(keys) >= 1
            assert max(keys) < VOCAB // 2 <= min(values)
            assert max(values) < VOCAB
            assert list(found.judged) == sorted(set(found.judged))
            assert all(place % 2 == 0 for place in found.judged)
            value_of = dict(zip(keys, values, strict=True))
            assert sorted(found.rest[place] for place in found.judged) == sorted(keys)
            assert [value_of[found.rest[place]] for place in found.judged] == list(found.gold)
            assert found.cell == {"length": length, "pairs": pairs}


def test_the_first_keys_gap_follows_the_power_law(drawn):
    """Chi-square against (g + 1)^(power - 1), normalised."""
    _, _, gaps, _ = drawn
    law = np.arange(1.0, SPACE + 1) ** -0.99
    expected = law / law.sum() * len(gaps)
    assert stats.chisquare(np.bincount(gaps[:, 0], minlength=SPACE), expected).pvalue > LIKELY
    np.testing.assert_allclose(gap_weights(SMALL), law / law.sum())


def test_later_keys_get_the_same_law_without_the_gaps_taken(drawn):
    """Chi-square of the second key's gap against the sum over what the first one left: sum_a p(a) p(b) / (1 - p(a))."""
    _, _, gaps, _ = drawn
    p = gap_weights(SMALL)
    second = np.array([sum(p[a] * p[b] / (1 - p[a]) for a in range(SPACE) if a != b) for b in range(SPACE)])
    assert stats.chisquare(np.bincount(gaps[:, 1], minlength=SPACE), second * len(gaps)).pvalue > LIKELY


def test_all_gaps_against_a_derivation_step_by_step(drawn):
    """The published steps done one by one, with another generator: draw, refuse what is taken, go on. Two samples of
    the sum, the least and the largest gap do not differ (Kolmogorov-Smirnov)."""
    _, _, gaps, _ = drawn
    rng = np.random.default_rng(12345)
    edges = np.cumsum(gap_weights(SMALL))
    others = []
    for _ in range(3000):
        taken = []
        while len(taken) < SMALL.pairs:
            gap = int(np.searchsorted(edges, rng.random() * edges[-1]))
            if gap not in taken:
                taken.append(gap)
        others.append(taken)
    others = np.array(others)
    assert all(len(set(row)) == SMALL.pairs for row in gaps.tolist())
    for statistic in (np.sum, np.min, np.max):
        assert stats.ks_2samp(statistic(gaps, 1), statistic(others, 1)).pvalue > LIKELY


def test_keys_values_and_filling_are_uniform(drawn):
    """Keys over 1 .. vocab/2 - 1, values over vocab/2 .. vocab - 1, and all other places over the whole vocabulary,
    including 0 and including the places right after a query."""
    keys, values, gaps, rests = drawn
    assert uniform(keys[:, 0], 1, 30) > LIKELY
    assert uniform(keys.ravel(), 1, 30) > LIKELY
    assert uniform(values.ravel(), 30, 60) > LIKELY
    filled = np.ones_like(rests, dtype=bool)
    np.put_along_axis(filled, 2 * gaps, False, 1)
    assert uniform(rests[filled], 0, 60) > LIKELY
    assert uniform(np.take_along_axis(rests, 2 * gaps + 1, 1).ravel(), 0, 60) > LIKELY


def test_keys_and_values_are_independent(drawn):
    """Chi-square of independence of their halves."""
    keys, values, _, _ = drawn
    table = np.histogram2d(keys.ravel() > 15, values.ravel() >= 45, bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > LIKELY


def test_a_smaller_models_vocabulary():
    """All tokens of the model, in two halves, but never more than published; what it does not allow is left out."""
    sizes = Forgetting(copy=(), mqar=((64, 4), (512, 64)), phonebook=(), passkey=())
    assert [[cell.vocab for cell in settings(sizes, vocab)[0]] for vocab in (50_000, 2048, 70)] == [
        [8192, 8192],
        [2048, 2048],
        [70],
    ]
    assert "needs a vocabulary of more than 512" in settings(sizes, 70)[1][0]
    found = Mqar(64, 4, 70).problem(None, "test", 0, 0)
    assert max(*found.memory, *found.rest) < 70
