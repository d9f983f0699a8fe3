"""Exercises of notebook 09: when two numbers agree, the error of dependent answers, and how many differ by chance."""

import math
from statistics import NormalDist

import numpy as np

from prosg_lib.exercises.checking import Exercise, Mistake
from prosg_lib.reproduction import ledger

# 9.1


def agrees(value, reference, spread):
    """Whether a measured number agrees with a reference of that spread.

    Args:
        value: what was measured.
        reference: what the reference run measured.
        spread: standard error of the reference.
    Returns:
        True or False.
    """
    return abs(value - reference) <= max(3 * spread, 0.01 * max(1, abs(reference)))


def _by_ledger(value, reference, spread):
    entry = {"reference": reference, "spread": spread}
    return ledger.compare({"yours": {"value": value}}, {"yours": entry})[0]["holds"]


def agrees_within_both(value, reference, spread):
    return abs(value - reference) <= min(3 * spread, 0.01 * max(1, abs(reference)))


# 9.2


def standard_error(right):
    """The standard error of recall, where answers to questions about one prompt may succeed and fail together.

    Args:
        right: 1 where a question was answered right, else 0, (prompts, questions).
    Returns:
        A number.
    """
    means = right.mean(1)
    return means.std(ddof=1) / np.sqrt(len(means))


def _written_out(right):
    means = [sum(row) / len(row) for row in right.tolist()]
    centre, n = sum(means) / len(means), len(means)
    return math.sqrt(sum((mean - centre) ** 2 for mean in means) / (n * (n - 1)))


def _answers():
    rng = np.random.default_rng(0)
    return [(((rng.random((n, q)) + 2 * rng.random((n, 1))) < 1.7).astype(float),) for n, q in ((24, 6), (10, 4))]


# 9.3


def false_alarms(numbers, spreads):
    """How many numbers differ by more than so many standard errors between two runs, if nothing is wrong.

    Args:
        numbers: how many numbers are compared.
        spreads: how many standard errors of a single run are allowed.
    Returns:
        The expected count. Both runs' errors are normal, independent, and of the same size.
    """
    return numbers * math.erfc(spreads / 2)


def _by_normal(numbers, spreads):
    return numbers * 2 * (1 - NormalDist(sigma=math.sqrt(2)).cdf(spreads))


EXERCISES = (
    Exercise(
        number="9.1",
        title="from a spread to a verdict",
        stars=1,
        minutes=5,
        task="Write the rule of section 1: a number agrees if it is within three spreads of its reference, or within "
        "one hundredth, whichever allows more. The hundredth is absolute for references up to 1, and relative above.",
        hint="`max` twice. The distance has no sign.",
        solution=agrees,
        expected=_by_ledger,
        cases=lambda: [
            (0.86, 0.9, 0.02),
            (0.86, 0.9, 0.005),
            (0.83, 0.9, 0.02),
            (0.95, 0.9, 0.01),
            (0.905, 0.9, 0.0),
            (0.885, 0.9, 0.0),
            (0.052, 0.045, 0.0),
            (102.4, 102.0, 0.0),
        ],
        results=("the verdict",),
        why="The same difference, 0.04, is nothing for a number known to 0.02 and an error for one known to 0.005. One "
        "tolerance for all numbers would be too wide for the one or too narrow for the other.",
        mistakes=(
            Mistake(
                lambda value, reference, spread: abs(value - reference) <= max(spread, 0.01 * max(1, abs(reference))),
                "You allow one standard error. Two honest runs are further apart than that in half of all cases.",
            ),
            Mistake(
                lambda value, reference, spread: reference - value <= max(3 * spread, 0.01 * max(1, abs(reference))),
                "You let every number pass that is too high. A number that is too good is off as well.",
            ),
            Mistake(
                lambda value, reference, spread: abs(value - reference) <= 3 * spread,
                "A number without a spread could then never agree: another processor adds in another order.",
            ),
            Mistake(
                lambda value, reference, spread: abs(value - reference) <= max(3 * spread, 0.01 * abs(reference)),
                "One hundredth of a small reference is almost nothing. Below 1 the hundredth is absolute.",
            ),
            Mistake(agrees_within_both, "You take the stricter of the two. It is the one that allows more."),
        ),
        misconception="That a tolerance is a matter of taste. It follows from how well the number is known.",
        discussion=(
            "Who chooses the factor 3, and what would 2 or 5 cost?",
            "A text says 0.97 and your run says 0.94. What do you need to know before you call that a failure?",
        ),
    ),
    Exercise(
        number="9.2",
        title="the error of dependent answers",
        stars=2,
        minutes=10,
        task="A recall comes from prompts with several questions each. Prompts are independent of each other; the "
        "questions about one prompt are not. Compute the standard error of the recall.",
        hint="What are the independent things here? Take one number of each. Then the standard error of their mean, "
        "with n - 1.",
        solution=standard_error,
        expected=_written_out,
        cases=_answers,
        results=("the standard error",),
        why="If all six questions about a prompt succeed or fail together, 24 prompts are worth 24 answers and not "
        "144, and the error is larger by the square root of six.",
        mistakes=(
            Mistake(
                lambda right: np.sqrt(right.mean() * (1 - right.mean()) / right.size),
                "This takes every answer as independent. Those about one prompt are not, so the error comes out too "
                "small.",
            ),
            Mistake(
                lambda right: right.mean(1).std(ddof=1) / np.sqrt(right.size),
                "You divide by the number of answers. What is independent, and averaged here, is the prompts.",
            ),
            Mistake(
                lambda right: right.mean(1).std(ddof=1),
                "This is how far single prompts scatter. Their mean is known better: by the root of their number.",
            ),
            Mistake(
                lambda right: right.mean(0).std(ddof=1) / np.sqrt(right.shape[1]),
                "The mean goes over the wrong axis: you need one mean a prompt.",
            ),
            Mistake(
                lambda right: right.mean(1).std(ddof=0) / np.sqrt(len(right)),
                "The mean was taken from the same prompts, so divide by n - 1: `ddof=1`.",
            ),
        ),
        misconception="That more questions a prompt are as good as more prompts.",
        discussion=(
            "The training has a seed, too. Which spread would you need to compare two trainings?",
            "When does it not matter whether answers are dependent?",
        ),
    ),
    Exercise(
        number="9.3",
        title="how many are off by chance",
        stars=2,
        minutes=10,
        task="You run the course with another seed, so both runs have an error. How many of the numbers will be more "
        "than so many standard errors of a single run apart, although nothing is wrong?",
        hint="The difference of two independent errors of size $\\sigma$ has size $\\sqrt{2}\\,\\sigma$. For a "
        "standard normal number $z$, $P(|z| > a) = \\mathrm{erfc}(a / \\sqrt{2})$.",
        solution=false_alarms,
        expected=_by_normal,
        cases=lambda: [(200, 3), (200, 2), (30, 3), (1, 1.0)],
        results=("the expected count",),
        why="Of 200 numbers about seven are more than three spreads off by chance. One red row among hundreds is no "
        "finding; the same row red in every run is one.",
        mistakes=(
            Mistake(
                lambda numbers, spreads: numbers * math.erfc(spreads / math.sqrt(2)),
                "You take the reference as exact. It is a run like yours, and has an error of the same size.",
            ),
            Mistake(
                lambda numbers, spreads: numbers * math.erfc(spreads / 2) / 2,
                "You count one side only. A number can be too high or too low.",
            ),
            Mistake(
                lambda numbers, spreads: 1 - (1 - math.erfc(spreads / 2)) ** numbers,
                "This is the chance that at least one is off. Asked is how many.",
            ),
            Mistake(
                lambda numbers, spreads: math.erfc(spreads / 2),
                "This is the chance for one number. Multiply by how many there are.",
            ),
        ),
        misconception="That three standard errors make a mistake impossible. They make it rare for one number, and "
        "common among hundreds.",
        discussion=(
            "How would you choose the number of spreads, if one false alarm in ten runs is acceptable?",
            "The same checkpoints and items give the same numbers. What is left of this count then?",
        ),
    ),
)
