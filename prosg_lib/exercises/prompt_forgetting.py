"""Exercises of notebook 02: judging an answer, an interval over prompts, the share of a gap, and a half-life."""

import math

import numpy as np
import pandas as pd

from prosg_lib.evaluation import statistics
from prosg_lib.exercises.checking import Exercise, Mistake
from prosg_lib.tasks.wording import judge, words

# 2.1


def is_recalled(answer, value, polite):
    """Whether an answer says the value and, instruction words aside, nothing else.

    Args:
        answer: what the model wrote, e.g. " Well, Oslo, captain."
        value: the right value, e.g. "Oslo".
        polite: the words that instructions ask for, e.g. {"Well", "captain"}.
    Returns:
        True or False.
    """
    parts = answer.strip().removesuffix(".").split(", ")
    return [part for part in parts if part not in polite] == [value]


def _by_judge(answer, value, polite):
    table = words()["instructions"]
    asked = {kind: word for kind, spec in table.items() for word in spec["words"] if word in polite}
    return judge(answer, value, asked).recalled


def _answers():
    table = words()["instructions"]
    opener, address = (table[kind]["words"][0] for kind in ("opener", "address"))
    polite = {opener, address}
    texts = (
        f" {opener}, Oslo, {address}.",
        " Oslo.",
        f" {opener}, Rome, {address}.",
        " Oslo or Rome.",
        " It is Oslo.",
        " Oslo, Rome.",
        f" {opener}, {address}.",
    )
    return [(text, "Oslo", polite) for text in texts]


def recalled_if_last_word_is(answer, value, polite):
    parts = [part for part in answer.strip().removesuffix(".").split(", ") if part not in polite]
    return " ".join(parts).split(" ")[-1] == value


# 2.2


def interval(right, drawn):
    """A 95 % bootstrap interval of recall, over prompts.

    Args:
        right: 1 where a question was answered right, else 0, (prompts, questions).
        drawn: which prompts each resample has, numbers of prompts with repetition, (resamples, prompts).
    Returns:
        The interval's lower and upper end.
    """
    means = right.mean(1)[drawn].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return low, high


def _one_by_one(right, drawn):
    means = sorted(np.concatenate([right[prompt] for prompt in numbers]).mean() for numbers in drawn)
    return tuple(np.interp(np.array([0.025, 0.975]) * (len(means) - 1), np.arange(len(means)), means))


def _resamples():
    rng = np.random.default_rng(0)
    return [
        ((rng.random((n, q)) < rng.random((n, 1))).astype(float), rng.integers(n, size=(500, n)))
        for n, q in ((12, 6), (20, 3))
    ]


def interval_by_formula(right, drawn):
    error = right.std() / np.sqrt(right.size)
    return right.mean() - 1.96 * error, right.mean() + 1.96 * error


# 2.3


def share_of_gap(method, none, repeated):
    """The share of the gap between two references that a method has recovered.

    Args:
        method: the recall of the method.
        none: recall without any prompt.
        repeated: recall with the prompt repeated before the question.
    Returns:
        0 where the method is as good as no prompt, 1 where it is as good as repeating; NaN where there is no gap.
    """
    if repeated <= none:
        return math.nan
    return (method - none) / (repeated - none)


def _by_gap_recovered(method, none, repeated):
    shares = {"method": method, "none": none, "repeated": repeated}
    rows = [{"method": n, "facts": 6, "distance": 0, "seed": 0, "prompt": 0, "recall": r} for n, r in shares.items()]
    return statistics.gap_recovered(pd.DataFrame(rows), "method", 0).value


# 2.4


def half_life_of(distances, recall):
    """The distance at which recall is half of that at distance 0, on straight lines in log(1 + d).

    Args:
        distances: in tokens, rising from 0, (n).
        recall: at these distances, (n).
    Returns:
        A distance; infinity if recall never falls that low.
    """
    half, x = recall[0] / 2, np.log1p(distances)
    for i in range(1, len(distances)):
        if recall[i] < half:
            share = (recall[i - 1] - half) / (recall[i - 1] - recall[i])
            return np.expm1(x[i - 1] + share * (x[i] - x[i - 1]))
    return math.inf


def _by_statistics(distances, recall):
    frame = pd.DataFrame({"method": "you", "facts": 6, "distance": distances, "recall": recall})
    return statistics.half_life(frame, "you", 6)


def half_life_straight_in_d(distances, recall):
    half = recall[0] / 2
    for i in range(1, len(distances)):
        if recall[i] < half:
            share = (recall[i - 1] - half) / (recall[i - 1] - recall[i])
            return distances[i - 1] + share * (distances[i] - distances[i - 1])
    return math.inf


def half_life_below_one_half(distances, recall):
    x = np.log1p(distances)
    for i in range(1, len(distances)):
        if recall[i] < 0.5:
            share = (recall[i - 1] - 0.5) / (recall[i - 1] - recall[i])
            return np.expm1(x[i - 1] + share * (x[i] - x[i - 1]))
    return math.inf


def half_life_on_the_grid(distances, recall):
    for i in range(1, len(distances)):
        if recall[i] < recall[0] / 2:
            return distances[i]
    return math.inf


def half_life_in_the_middle(distances, recall):
    for i in range(1, len(distances)):
        if recall[i] < recall[0] / 2:
            return (distances[i - 1] + distances[i]) / 2
    return math.inf


def half_life_within_the_grid(distances, recall):
    half, x = recall[0] / 2, np.log1p(distances)
    for i in range(1, len(distances)):
        if recall[i] < half:
            share = (recall[i - 1] - half) / (recall[i - 1] - recall[i])
            return np.expm1(x[i - 1] + share * (x[i] - x[i - 1]))
    return distances[-1]


EXERCISES = (
    Exercise(
        number="2.1",
        title="an exact match",
        stars=1,
        minutes=10,
        task="Judge an answer. It counts as recalled if, apart from the words that instructions ask for, it consists "
        "of the value and nothing else. Parts of an answer are separated by a comma and a blank, and it may end with "
        "a full stop.",
        hint="`strip`, `removesuffix`, `split`. Then drop the polite parts and compare what is left with `[value]`.",
        solution=is_recalled,
        expected=_by_judge,
        cases=_answers,
        results=("recalled",),
        why="It forgives the form of an answer and nothing about its content. A judge this strict can only understate "
        "what a model knows, and nobody has to take its leniency on trust.",
        mistakes=(
            Mistake(
                lambda answer, value, polite: value in answer,
                "You accept whatever mentions the value. A model that answers 'Oslo or Rome' hedges, and would be "
                "right twice.",
            ),
            Mistake(
                lambda answer, value, polite: answer.strip() == f"{value}.",
                "You count obedience as an error: 'Well, Oslo, captain.' says Oslo and follows its instructions.",
            ),
            Mistake(
                lambda answer, value, polite: [p for p in answer.strip().split(", ") if p not in polite] == [value],
                "The full stop is still there, so the last part never equals the value.",
            ),
            Mistake(
                lambda answer, value, polite: value in answer.strip().removesuffix(".").split(", "),
                "You accept the value among other parts. 'Oslo, Rome' names two towns; nothing but polite words may "
                "stand beside the value.",
            ),
            Mistake(
                recalled_if_last_word_is,
                "You look at the last word only. 'It is Oslo' is a sentence, and the task asks for the value alone.",
            ),
        ),
        misconception="That a lenient judge is the kinder measure. It is kind to hedging, too, and then two methods "
        "are compared by how much they say.",
        discussion=(
            "Which errors would a language model as a judge make here, and how would you notice?",
            "When is an exact match a bad measure?",
        ),
    ),
    Exercise(
        number="2.2",
        title="an interval over prompts",
        stars=2,
        minutes=15,
        task="The resamples are drawn for you: each row of `drawn` names the prompts of one. Compute the recall of "
        "every resample and return the interval that holds the middle 95 % of them.",
        hint="All questions of a drawn prompt come along with it. Take the mean of each prompt first; then "
        "`means[drawn]` has the shape (resamples, prompts). `np.percentile` does the rest.",
        solution=interval,
        expected=_one_by_one,
        cases=_resamples,
        results=("low", "high"),
        why="Questions about one prompt may succeed and fail together, so the prompt is what must be drawn anew. The "
        "library's intervals are these, with 2,000 resamples.",
        mistakes=(
            Mistake(
                lambda right, drawn: tuple(np.percentile(right.ravel()[drawn].mean(1), [2.5, 97.5])),
                "You draw single questions. Those of one prompt need not be independent, so whole prompts must be "
                "drawn.",
            ),
            Mistake(
                lambda right, drawn: tuple(np.percentile(right.mean(1), [2.5, 97.5])),
                "This is where 95 % of the prompts lie. Asked is where the mean lies, and that is known better.",
            ),
            Mistake(
                lambda right, drawn: tuple(np.percentile(right.mean(1)[drawn].mean(1), [5, 95])),
                "The 5th and 95th percentiles hold 90 %. For 95 % leave out 2.5 % on each side.",
            ),
            Mistake(
                interval_by_formula,
                "This formula takes every question as an independent draw. Use the resamples: they draw whole prompts.",
            ),
            Mistake(
                lambda right, drawn: tuple(np.percentile(right.mean(1)[drawn].mean(0), [2.5, 97.5])),
                "The mean goes over the wrong axis: you need one mean for each resample, over its prompts.",
            ),
        ),
        misconception="That more questions a prompt narrow the interval like more prompts. As far as a prompt's "
        "questions fail together, they do not: the prompts stay as few as they were.",
        discussion=(
            "The model, too, might have been trained with another seed. Does this interval know of that?",
            "How would you compare two methods that answered the same prompts?",
        ),
    ),
    Exercise(
        number="2.3",
        title="the share of a gap",
        stars=1,
        minutes=5,
        task="A friend's method has recall 0.55 where no prompt has 0.10 and repeating the prompt has 0.70. Write the "
        "measure that puts 0 at the one and 1 at the other. Notebook 06 uses it.",
        hint="Subtract what can be guessed from both. Mind the case without a gap.",
        solution=share_of_gap,
        expected=_by_gap_recovered,
        cases=lambda: [(0.55, 0.10, 0.70), (0.9, 0.2, 0.8), (0.3, 0.05, 0.5), (0.2, 0.3, 0.3)],
        results=("the share",),
        why="0.45 of 0.60: three quarters. It may be above 1, because repeating the prompt is a strong reference and "
        "not a bound.",
        mistakes=(
            Mistake(
                lambda method, none, repeated: method / repeated if repeated > none else math.nan,
                "You divide by the reference itself. What can be guessed is in both; subtract it.",
            ),
            Mistake(
                lambda method, none, repeated: method - none if repeated > none else math.nan,
                "This is the gain in points. Divide it by the gap to get a share.",
            ),
            Mistake(
                lambda method, none, repeated: (repeated - method) / (repeated - none) if repeated > none else math.nan,
                "This is the share that is still missing.",
            ),
            Mistake(
                lambda method, none, repeated: (method - none) / none if repeated > none else math.nan,
                "You divide by the recall without a prompt. The gap is repeated minus none.",
            ),
            Mistake(
                lambda method, none, repeated: (method - none) / (repeated - none),
                "Where repeating does not help either, there is no gap to recover: return NaN before you divide.",
            ),
        ),
        misconception="That a share of a gap can be compared across distances. The gap itself changes: where it is "
        "small, the share is mostly noise.",
        discussion=("What does a value above 1 say about the method, and what about the reference?",),
    ),
    Exercise(
        number="2.4",
        title="a half-life",
        stars=2,
        minutes=15,
        task="At which distance is recall half of what it was at distance 0? Between two measured distances draw a "
        "straight line in $\\log(1 + d)$.",
        hint="Find the first distance where recall is below the half. Which share of the way down from the distance "
        "before is the half? Go that share of the way in `np.log1p`, and come back with `np.expm1`.",
        solution=half_life_of,
        expected=_by_statistics,
        cases=lambda: [
            ([0, 64, 256], [0.8, 0.6, 0.1]),
            ([0, 16, 64, 256], [0.9, 0.85, 0.3, 0.1]),
            ([0, 64, 256], [0.8, 0.7, 0.6]),
            ([0, 64], [0.9, 0.2]),
        ],
        results=("the half-life",),
        why="One number for a whole curve. It depends on the model, on what is read in between and on how much the "
        "prompt holds, so quote it together with these.",
        mistakes=(
            Mistake(half_life_straight_in_d, "You draw the line in d. It is to be straight in log(1 + d)."),
            Mistake(
                half_life_below_one_half,
                "You look for a recall of 0.5. Half of the recall at distance 0 is asked: 0.4 where it began at 0.8.",
            ),
            Mistake(
                half_life_on_the_grid, "This is the first measured distance below the half. Interpolate to the half."
            ),
            Mistake(
                half_life_in_the_middle,
                "This is the middle between two measured distances. How far the half lies along the line depends on "
                "the recall at both.",
            ),
            Mistake(
                half_life_within_the_grid,
                "Where recall never falls to the half, the last distance is no answer: it is infinity, more than was "
                "measured.",
            ),
        ),
        misconception="That recall decays exponentially, as a half-life in physics suggests. After two half-lives "
        "there need not be a quarter left.",
        discussion=("Which of two methods is better if one starts lower and has the longer half-life?",),
    ),
)
