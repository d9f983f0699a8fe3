"""Exercises of notebook 10: what a window sees, a map's own units, and a share of what the model itself can answer."""

import numpy as np
import torch

from prosg_lib.exercises.checking import Exercise, Mistake, random_tensors

# 10.1


def visible(tokens, window, sinks):
    """Which tokens of a text a model with a window and sinks still sees.

    Args:
        tokens: T, the length of the text.
        window: most tokens that one sees, itself and the sinks among them.
        sinks: how many of the text's first tokens always stay.
    Returns:
        (T, T) of True and False: row t, column s is True where token t sees token s.
    """
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (s <= t) & ((s < sinks) | (t - s < window - sinks))


def _one_token_after_the_other(tokens, window, sinks):
    rows, kept = [], []
    for t in range(tokens):
        kept.append(t)
        if len(kept) > window:
            del kept[sinks]  # the oldest that is no sink
        rows.append([s in kept for s in range(tokens)])
    return torch.tensor(rows)


def _windows():
    return [(9, 5, 2), (6, 8, 2), (7, 3, 0)]


def visible_without_sinks(tokens, window, sinks):
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (s <= t) & (t - s < window)


def visible_with_one_too_many(tokens, window, sinks):
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (s <= t) & ((s < sinks) | (t - s < window))


def visible_ahead(tokens, window, sinks):
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (s < sinks) | (t - s < window - sinks)


def visible_without_itself(tokens, window, sinks):
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (s < t) & ((s < sinks) | (t - s <= window - sinks))


# 10.2


def written_in_units(x, u, v, read, write):
    """What a change adds to a map's output, where its factors are in the map's own units.

    Args:
        x: inputs of the map, (tokens, in).
        u, v: factors of the change, (out, rank) and (in, rank), for inputs and outputs of size 1.
        read, write: the typical sizes of this map's inputs and outputs, two numbers.
    Returns:
        (tokens, out).
    """
    return write * (x / read @ v) @ u.T


def _by_scaled_factors(x, u, v, read, write):
    return torch.einsum("ti,ir,or->to", x, v / read, u * write)


def _maps():
    one, other = random_tensors((4, 6), (5, 2), (6, 2)), random_tensors((3, 2), (4, 3), (2, 3), seed=1)
    return [(*one, 0.3, 7.0), (*other, 9.0, 0.1)]


# 10.3


def share_of_reading(ours, read):
    """Of what the model answers while it sees the prompt, the share that is answered without it, over all prompts.

    Args:
        ours: how many questions about each prompt are answered without it in view, (prompts).
        read: and how many with it in view, (prompts); it may be 0 for some.
    Returns:
        A number.
    """
    return ours.sum() / read.sum()


def _counted(ours, read):
    without = within = 0
    for one, other in zip(ours, read, strict=True):
        without, within = without + one, within + other
    return without / within


def _counts():
    return [(np.array([1, 3, 0, 2]), np.array([3, 4, 1, 5])), (np.array([1, 2, 1]), np.array([0, 3, 2]))]


def share_as_a_mean_of_shares(ours, read):
    return np.mean(ours[read > 0] / read[read > 0])


EXERCISES = (
    Exercise(
        number="10.1",
        title="what a window sees",
        stars=2,
        minutes=10,
        task="A memory of fixed size holds the first `sinks` tokens of a text and the latest ones, `window` in all. "
        "Write down, for every token of a text, which tokens it sees. It sees itself, and nothing that comes later.",
        hint="Compare a column of positions $t$ with a row of positions $s$. How many places are left for recent "
        "tokens, when the sinks have taken theirs?",
        solution=visible,
        expected=_one_token_after_the_other,
        cases=_windows,
        results=("the mask",),
        why="That is all of the forgetting in this notebook. While the text is no longer than the window, the mask is "
        "that of the full model, and so is every answer.",
        mistakes=(
            Mistake(visible_without_sinks, "The first tokens drop out of your window. They have to stay."),
            Mistake(
                visible_with_one_too_many,
                "Yours sees `window` recent tokens and the sinks besides. The sinks take their places from the window.",
            ),
            Mistake(visible_ahead, "Your tokens see what comes after them."),
            Mistake(visible_without_itself, "A token has to see itself, too."),
        ),
        misconception="That such a model forgets gradually. It knows a token as long as it is among the latest, and "
        "then not at all (what its layers passed on to later tokens is all that remains).",
        discussion=(
            "Layer 2 of token t sees outputs of layer 1, which saw further back. How far back can a model of 30 layers "
            "hear of something, in principle? Why does it make so little of it?",
            "What breaks if the sinks are left out? (Xiao et al. 2023 show it.)",
        ),
    ),
    Exercise(
        number="10.2",
        title="a change in the map's own units",
        stars=1,
        minutes=5,
        task="In this model one map's inputs are many times as large as another's. A generator makes factors $U$ and "
        "$V$ for inputs and outputs of size 1. Apply them to a map whose inputs are typically of size `read`, and "
        "whose outputs of size `write`.",
        hint="First make the input one of size 1. Make what comes out as large as the map's outputs are.",
        solution=written_in_units,
        expected=_by_scaled_factors,
        cases=_maps,
        results=("what is added",),
        why="So one learning rate fits all maps, and a step of it moves each of them by a like share of what it does.",
        mistakes=(
            Mistake(
                lambda x, u, v, read, write: (x @ v) @ u.T,
                "The units are nowhere: a map with large inputs is changed much, one with small inputs hardly.",
            ),
            Mistake(
                lambda x, u, v, read, write: (x / read @ v) @ u.T,
                "You read in the map's units and do not write in them. What is added should be of its outputs' size.",
            ),
            Mistake(
                lambda x, u, v, read, write: write * (x @ v) @ u.T,
                "You write in the map's units and do not read in them. Divide the inputs by their size.",
            ),
            Mistake(
                lambda x, u, v, read, write: write * (x * read @ v) @ u.T,
                "You multiply by the size of the inputs, so that large ones grow larger still. Divide.",
            ),
            Mistake(
                lambda x, u, v, read, write: (x / write @ v) @ u.T * read,
                "You have exchanged the two sizes: `read` belongs to inputs, `write` to outputs.",
            ),
        ),
        misconception="That an optimiser such as Adam makes units irrelevant. It makes the steps of all numbers alike, "
        "and that is the problem: what a number does depends on the size of what it is multiplied by.",
        discussion=(
            "Where else in deep learning is a number learned relative to the size of what it acts on?",
            "Would it do to normalise each input on its own, as a layer norm does?",
        ),
    ),
    Exercise(
        number="10.3",
        title="a share of what the model itself can answer",
        stars=1,
        minutes=5,
        task="A model does not answer everything even while it sees the prompt. So a fair question is which share of "
        "*that* is left without it. Given right answers per prompt, compute the share over all prompts.",
        hint="Some prompts have nothing to keep (0 right answers in view). What would a mean of shares do with them?",
        solution=share_of_reading,
        expected=_counted,
        cases=_counts,
        results=("the share",),
        why="A ratio of sums weighs every question alike and is not upset by prompts that the model cannot read. Its "
        "interval is found by drawing whole prompts anew, numerator and denominator together.",
        mistakes=(
            Mistake(
                share_as_a_mean_of_shares,
                "You average the prompts' shares. One with a single answer then weighs as much as one with five, and "
                "one with none is dropped.",
            ),
            Mistake(
                lambda ours, read: read.sum() / ours.sum(),
                "Upside down: you say how many times more is answered with the prompt in view.",
            ),
            Mistake(
                lambda ours, read: (read.sum() - ours.sum()) / read.sum(),
                "That is the share that was lost.",
            ),
            Mistake(
                lambda ours, read: ours.mean() - read.mean(),
                "A difference of counts is no share; divide.",
            ),
            Mistake(
                lambda ours, read: np.minimum(ours, read).sum() / read.sum(),
                "You cut off prompts that are answered better without the text than with it. That happens, and counts.",
            ),
        ),
        misconception="That 1 is the most that such a share can be. Who answers more than the model itself while it "
        "reads is above 1, and notebook 06d met such a case.",
        discussion=(
            "The share is 0.8 with an interval from 0.5 to 1.2. What would you say, and what would you measure next?",
            "Both methods may be right about different questions. When does that matter?",
        ),
    ),
)
