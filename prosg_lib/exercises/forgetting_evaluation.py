"""Exercises of notebook 06: a paired difference, gap recovered over many prompts, and a gain that is ruled out."""

import math

import numpy as np
import pandas as pd

from prosg_lib.evaluation import statistics
from prosg_lib.exercises.checking import Exercise, Mistake


def _shares(prompts, *chances, seed=0):
    """Shares of six questions answered right, one array a method; prompts differ in how hard they are."""
    rng = np.random.default_rng(seed)
    ease = rng.random(prompts)
    return [rng.binomial(6, np.clip(c * (0.4 + 1.2 * ease), 0, 1)) / 6 for c in chances]


def _drawn(prompts, seed=1):
    return np.random.default_rng(seed).integers(prompts, size=(400, prompts))


# 6.1


def difference_interval(ours, theirs, drawn):
    """A 95 % interval of (ours - theirs), where both methods answered the same prompts.

    Args:
        ours, theirs: share of right answers, one a prompt, (prompts,); the same prompts in the same order.
        drawn: which prompts each resample has, numbers of prompts with repetition, (resamples, prompts).
    Returns:
        The interval's lower and upper end.
    """
    means = (ours - theirs)[drawn].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return low, high


def _one_by_one(ours, theirs, drawn):
    means = sorted(sum(ours[p] - theirs[p] for p in numbers) / len(numbers) for numbers in drawn)
    return tuple(np.interp(np.array([0.025, 0.975]) * (len(means) - 1), np.arange(len(means)), means))


def _pairs():
    return [(*_shares(20, 0.8, 0.6), _drawn(20)), (*_shares(12, 0.5, 0.6, seed=2), _drawn(12))]


def interval_unpaired(ours, theirs, drawn):
    low, high = np.percentile(ours[drawn].mean(1) - theirs[drawn[::-1]].mean(1), [2.5, 97.5])
    return low, high


def interval_of_ends(ours, theirs, drawn):
    low, high = np.percentile(ours[drawn].mean(1), [2.5, 97.5]) - np.percentile(theirs[drawn].mean(1), [2.5, 97.5])
    return low, high


def interval_between_bars(ours, theirs, drawn):
    a, b = np.percentile(ours[drawn].mean(1), [2.5, 97.5])
    c, d = np.percentile(theirs[drawn].mean(1), [2.5, 97.5])
    return a - d, b - c


# 6.2


def gap_over_prompts(method, none, repeated):
    """The share of the gap between two references that a method recovers, over many prompts.

    Args:
        method, none, repeated: share of right answers of the method, without a prompt, and with the prompt repeated
            before the question; one a prompt, (prompts,).
    Returns:
        A number; NaN where repeating is no better than no prompt.
    """
    gap = repeated.mean() - none.mean()
    if gap <= 0:
        return math.nan
    return (method.mean() - none.mean()) / gap


def _by_gap_recovered(method, none, repeated):
    shares = {"method": method, "none": none, "repeated": repeated}
    rows = [
        {"method": name, "facts": 6, "distance": 0, "seed": 0, "prompt": number, "recall": recall}
        for name, recalls in shares.items()
        for number, recall in enumerate(recalls)
    ]
    return statistics.gap_recovered(pd.DataFrame(rows), "method", 0).value


def _recalls():
    none, repeated, better = _shares(15, 0.1, 0.7, 0.95)
    lower = np.concatenate([none[:-1], [0.5]])
    return [(better, none, repeated), (repeated[::-1], lower, repeated), (better, repeated, repeated)]


def gap_as_mean_of_shares(method, none, repeated):
    gap = repeated - none
    if gap.mean() <= 0:
        return math.nan
    return ((method - none)[gap > 0] / gap[gap > 0]).mean()


def gap_up_to_one(method, none, repeated):
    gap = repeated.mean() - none.mean()
    if gap <= 0:
        return math.nan
    return min(1.0, (method.mean() - none.mean()) / gap)


def gap_of_repeated(method, none, repeated):
    if repeated.mean() <= none.mean():
        return math.nan
    return method.mean() / repeated.mean()


def gap_in_points(method, none, repeated):
    if repeated.mean() <= none.mean():
        return math.nan
    return method.mean() - none.mean()


def gap_of_nothing(method, none, repeated):
    with np.errstate(all="ignore"):
        return (method.mean() - none.mean()) / (repeated.mean() - none.mean())


# 6.3


def gain_ruled_out(gains, drawn, margin):
    """Whether a control's gain of `margin` or more is ruled out, and by how little.

    Args:
        gains: (control - no prompt), one a prompt, (prompts,).
        drawn: which prompts each resample has, (resamples, prompts).
        margin: the largest gain that we would tolerate.
    Returns:
        The upper end of the 95 % interval of the mean gain, and True if it is below the margin.
    """
    upper = np.percentile(gains[drawn].mean(1), 97.5)
    return upper, upper < margin


def _upper_end(gains, drawn, margin):
    means = sorted(sum(gains[p] for p in numbers) / len(numbers) for numbers in drawn)
    upper = float(np.interp(0.975 * (len(means) - 1), np.arange(len(means)), means))
    return upper, not upper >= margin


def _gains():
    """Shown to be small; not shown, with zero inside; zero outside and still small; and not small."""
    rng = np.random.default_rng(3)

    def around(mean, spread, prompts):
        gains = rng.normal(0, spread, prompts)
        return gains - gains.mean() + mean

    return [
        (around(mean, spread, prompts), _drawn(prompts), margin)
        for mean, spread, prompts, margin in (
            (0.0, 0.05, 40, 0.05),
            (0.01, 0.3, 12, 0.05),
            (0.03, 0.02, 40, 0.05),
            (-0.06, 0.02, 40, 0.05),
            (0.2, 0.05, 20, 0.1),
        )
    ]


def ruled_out_if_not_significant(gains, drawn, margin):
    low, high = np.percentile(gains[drawn].mean(1), [2.5, 97.5])
    return high, low <= 0 <= high


def ruled_out_by_the_lower_end(gains, drawn, margin):
    low = np.percentile(gains[drawn].mean(1), 2.5)
    return low, low < margin


def ruled_out_by_the_prompts(gains, drawn, margin):
    upper = np.percentile(gains, 97.5)
    return upper, upper < margin


def ruled_out_both_ways(gains, drawn, margin):
    low, high = np.percentile(gains[drawn].mean(1), [2.5, 97.5])
    return high, -margin < low and high < margin


EXERCISES = (
    Exercise(
        number="6.1",
        title="a difference, prompt by prompt",
        stars=2,
        minutes=10,
        task="Two methods answered the same prompts. Compute a 95 % interval of their difference. The resamples are "
        "drawn for you, as in exercise 2.2.",
        hint="Take the difference of each prompt first. Then everything is as for one method.",
        solution=difference_interval,
        expected=_one_by_one,
        cases=_pairs,
        results=("low", "high"),
        why="A hard prompt is hard for both, and in a difference that cancels. So two bars may overlap while the "
        "interval of the difference excludes 0.",
        mistakes=(
            Mistake(
                interval_unpaired,
                "You draw other prompts for one method than for the other. Then it does not cancel that a prompt is "
                "hard for both, and the interval is too wide.",
            ),
            Mistake(
                interval_of_ends,
                "You subtract the ends of two intervals, low from low and high from high. That is no interval of the "
                "difference; both ends may even be equal.",
            ),
            Mistake(
                interval_between_bars,
                "You take the largest and smallest distance between two intervals, as if both methods had their worst "
                "luck at once. It is far too wide.",
            ),
            Mistake(
                lambda ours, theirs, drawn: tuple(np.percentile(ours - theirs, [2.5, 97.5])),
                "This is where the differences of single prompts lie. Asked is where their mean lies; use `drawn`.",
            ),
            Mistake(
                lambda ours, theirs, drawn: tuple(np.percentile((theirs - ours)[drawn].mean(1), [2.5, 97.5])),
                "The sign is wrong: it is ours minus theirs.",
            ),
        ),
        misconception="That two methods with overlapping intervals do not differ. That is a test of two independent "
        "samples, and a weak one; here the prompts are the same.",
        discussion=(
            "When would pairing not narrow the interval?",
            "What would have to be paired to compare two ways of training?",
        ),
    ),
    Exercise(
        number="6.2",
        title="gap recovered, over many prompts",
        stars=2,
        minutes=10,
        task="In exercise 2.3 you computed the share of a gap from three numbers. Now each is one number a prompt. On "
        "some prompts there is hardly a gap, or none. Compute the share for all prompts together.",
        hint="A ratio of means is not the mean of ratios. Which of them gives a prompt without a gap no weight?",
        solution=gap_over_prompts,
        expected=_by_gap_recovered,
        cases=_recalls,
        results=("the share",),
        why="Means first, then one division: a prompt with a small gap has a small say. And nothing keeps the share "
        "below 1, because repeating the prompt is a reference and no bound.",
        mistakes=(
            Mistake(
                gap_as_mean_of_shares,
                "You average shares of single prompts. Where a gap is small its share is wild, and prompts without one "
                "are dropped. Take the means first, and divide once.",
            ),
            Mistake(
                gap_up_to_one,
                "You cut the share off at 1, as if repeating the prompt were an upper bound. A method may know more.",
            ),
            Mistake(gap_of_repeated, "You divide by the reference itself. Subtract from both what can be guessed."),
            Mistake(gap_in_points, "This is the gain in points. Divide it by the gap."),
            Mistake(
                gap_of_nothing,
                "Where repeating is no better than no prompt there is no gap to recover: return NaN before you divide.",
            ),
        ),
        misconception="That more than 1 must be a bug, or cheating. It says that the reference is weak: it can know "
        "no more than the model understands when it reads the prompt.",
        discussion=(
            "A method's recall stays the same, and *repeated* falls. What happens to the gap recovered? Is that fair?",
        ),
    ),
    Exercise(
        number="6.3",
        title="a gain that is ruled out",
        stars=2,
        minutes=15,
        task="We promised that a control is no more than `margin` better than no prompt. Decide, at one distance, "
        "whether this has been *shown*.",
        hint="The promise is broken by large gains only. Which end of the interval speaks about these?",
        solution=gain_ruled_out,
        expected=_upper_end,
        cases=_gains,
        results=("the upper end", "ruled out"),
        why="Only data can make an upper end small. A study that is too small shows nothing here, whereas it would "
        "easily find a gain 'not significant'.",
        mistakes=(
            Mistake(
                ruled_out_if_not_significant,
                "You ask whether 0 is inside. A small study has 0 inside and rules nothing out; a large one may "
                "exclude 0 and still show that the gain is tiny.",
            ),
            Mistake(
                lambda gains, drawn, margin: (np.percentile(gains[drawn].mean(1), 97.5), gains.mean() < margin),
                "You compare the mean itself. It may be small by luck; the interval says how large the gain may be.",
            ),
            Mistake(
                ruled_out_by_the_lower_end,
                "The lower end says how large the gain is at least. To rule out large gains look at the other end.",
            ),
            Mistake(
                ruled_out_by_the_prompts,
                "This is the percentile of single prompts. The promise is about their mean; use `drawn`.",
            ),
            Mistake(
                ruled_out_both_ways,
                "You ask that the control is not worse, either. That is a test of equivalence; the promise is about "
                "gains alone.",
            ),
        ),
        misconception="That 'no significant difference' means 'no difference'. It may only mean 'too few prompts'.",
        discussion=(
            "Who should choose the margin, and when?",
            "How many times as many prompts would make the interval half as wide?",
        ),
    ),
)
