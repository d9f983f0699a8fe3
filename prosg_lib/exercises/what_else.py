"""Exercises of notebook 06b: choosing a method's numbers, a cache of as many bytes, and how often one can reread."""

import math

import numpy as np

from prosg_lib.exercises.checking import Exercise, Mistake

# 6.4


def chosen(recall, error, others):
    """Which setting to take, by the one-standard-error rule.

    Args:
        recall: mean recall on validation prompts, one a setting, (n).
        error: the standard error of the best setting's recall, a number.
        others: right answers about other people, as a share of the plain model's, one a setting, (n).
    Returns:
        The setting's number, counted from 0.
    """
    equal = recall >= recall.max() - error
    return int(np.where(equal, others, -np.inf).argmax())


def _one_by_one(recall, error, others):
    best, place = max(recall), None
    for number in range(len(recall)):
        if best - recall[number] <= error and (place is None or others[number] > others[place]):
            place = number
    return place


def _settings():
    return [
        (np.array([0.50, 0.76, 0.78, 0.79]), 0.03, np.array([0.99, 0.54, 0.60, 0.20])),
        (np.array([0.90, 0.60, 0.89, 0.88]), 0.05, np.array([0.40, 0.95, 0.30, 0.41])),
        (np.array([0.90, 0.30, 0.85]), 0.02, np.array([0.2, 0.7, 0.5])),
        (np.array([0.80, 0.75, 0.73, 0.72]), 0.06, np.array([0.3, 0.5, 0.7, 0.9])),
        (np.array([0.70, 0.60, 0.55]), 0.2, np.array([0.5, 0.8, 0.6])),
    ]


def chosen_within_two_errors(recall, error, others):
    return int(np.where(recall >= recall.max() - 2 * error, others, -np.inf).argmax())


# 6.5


def tokens_that_fit(budget, layers, width, bytes_a_number):
    """How many tokens a transformer can look back at with a cache of so many bytes.

    Args:
        budget: bytes.
        layers, width: of the model; each layer keeps a key and a value of this width for every token.
        bytes_a_number: 4 for float32.
    Returns:
        A whole number of tokens.
    """
    return budget // (2 * layers * width * bytes_a_number)


def _token_by_token(budget, layers, width, bytes_a_number):
    tokens, kept = 0, 0
    while (kept := kept + sum(bytes_a_number * width for _ in range(layers) for _ in "KV")) <= budget:
        tokens += 1
    return tokens


# 6.6


def tokens_between_readings(read_ms, plain_ms, changed_ms):
    """How often the prompt can be read again for what a change of the weights costs a token.

    Args:
        read_ms: time to read the prompt once.
        plain_ms, changed_ms: time a token of the plain model, and with the change.
    Returns:
        After how many tokens the prompt is read again, a whole number of at least 1; infinity where the change costs
        nothing.
    """
    dearer = changed_ms - plain_ms
    if dearer <= 0:
        return math.inf
    return max(1, round(read_ms / dearer))


def _nearest(read_ms, plain_ms, changed_ms):
    if changed_ms <= plain_ms:
        return math.inf
    return min(range(1, 2000), key=lambda n: abs(n * (changed_ms - plain_ms) - read_ms))


def between_readings_of_the_whole_token(read_ms, plain_ms, changed_ms):
    if changed_ms <= plain_ms:
        return math.inf
    return max(1, round(read_ms / changed_ms))


def between_readings_upside_down(read_ms, plain_ms, changed_ms):
    if changed_ms <= plain_ms:
        return math.inf
    return max(1, round((changed_ms - plain_ms) / read_ms))


def between_readings_of_tokens(read_ms, plain_ms, changed_ms):
    if changed_ms <= plain_ms:
        return math.inf
    return max(1, round(read_ms / plain_ms))


def between_readings_not_at_all(read_ms, plain_ms, changed_ms):
    if changed_ms <= plain_ms:
        return math.inf
    return round(read_ms / (changed_ms - plain_ms))


EXERCISES = (
    Exercise(
        number="6.4",
        title="the one-standard-error rule",
        stars=2,
        minutes=10,
        task="Choose among the settings of a method: of all whose recall is within one standard error of the best, "
        "take the one that leaves the most right answers about other people.",
        hint="First find which settings count as equal. Among these, `others` decides; give the rest no chance.",
        solution=chosen,
        expected=_one_by_one,
        cases=_settings,
        results=("the setting",),
        why="The rule spends what the data cannot tell apart on something that matters. It was fixed before the test "
        "split was looked at, and anybody can apply it again.",
        mistakes=(
            Mistake(
                lambda recall, error, others: int(recall.argmax()),
                "You take the best recall. Its lead may be less than its error, and then another setting that harms "
                "less is as good.",
            ),
            Mistake(
                lambda recall, error, others: int(others.argmax()),
                "You look at others alone. A method that does nothing harms nobody.",
            ),
            Mistake(chosen_within_two_errors, "You count two standard errors as equal. The rule says one."),
            Mistake(
                lambda recall, error, others: int(np.where(recall >= recall.max() - error, others, np.inf).argmin()),
                "Of the equal ones you took the one that loses the most answers.",
            ),
            Mistake(
                lambda recall, error, others: int(np.where(recall >= recall.max() - error, recall, np.inf).argmin()),
                "Of the equal ones you took the lowest recall. They count as equal; `others` decides among them.",
            ),
            Mistake(
                lambda recall, error, others: int((recall + others).argmax()),
                "You add two shares. Nothing says that a point of one is worth a point of the other.",
            ),
        ),
        misconception="That a rival deserves less care than one's own method. A comparison is as good as its worst "
        "tuned entry.",
        discussion=("How would you notice in a paper that the baselines were tuned less?",),
    ),
    Exercise(
        number="6.5",
        title="a cache of as many bytes",
        stars=1,
        minutes=5,
        task="A transformer keeps a key and a value for every token in every layer. How many tokens fit into a budget? "
        "Try 468,992 bytes, 4 layers, width 128, float32 afterwards.",
        hint="How many bytes does one token take? A token that fits in part is not known.",
        solution=tokens_that_fit,
        expected=_token_by_token,
        cases=lambda: [(468_992, 4, 128, 4), (10_000, 3, 64, 2), (4_096, 4, 128, 4), (4_095, 4, 128, 4)],
        results=("tokens",),
        why="One delta takes as many bytes as 114 tokens of this small transformer's cache. Both grow with the model: "
        "the cache a token with layers times width, and a delta of fixed rank likewise.",
        mistakes=(
            Mistake(
                lambda budget, layers, width, bytes_a_number: budget // (layers * width * bytes_a_number),
                "Each layer keeps two vectors a token, a key and a value.",
            ),
            Mistake(
                lambda budget, layers, width, bytes_a_number: budget // (2 * width * bytes_a_number),
                "This is the cache of a single layer; every layer has its own.",
            ),
            Mistake(
                lambda budget, layers, width, bytes_a_number: budget // (2 * layers * width),
                "You count numbers. The budget is in bytes.",
            ),
            Mistake(
                lambda budget, layers, width, bytes_a_number: budget / (2 * layers * width * bytes_a_number),
                "A part of a token cannot be looked back at: round down.",
            ),
            Mistake(
                lambda budget, layers, width, bytes_a_number: math.ceil(budget / (2 * layers * width * bytes_a_number)),
                "You round up, and the last token does not fit any more: round down.",
            ),
        ),
        misconception="That a delta is a compressed prompt. 114 tokens are about one such prompt, so in bytes "
        "nothing is saved; what is gained is that nothing has to be looked back at.",
        discussion=("Which of the two would you rather have quantised to 4 bits, and how would you test it?",),
    ),
    Exercise(
        number="6.6",
        title="equal cost a token",
        stars=2,
        minutes=10,
        task="A change of the weights makes every token a little dearer. For the same time, how often could the plain "
        "model read its prompt again?",
        hint="Shared out among n tokens, one reading costs each of them read_ms / n. Set that equal to what a token "
        "costs more with the change.",
        solution=tokens_between_readings,
        expected=_nearest,
        cases=lambda: [(12.0, 2.5, 3.7), (12.0, 2.5, 2.6), (1.0, 2.5, 5.0), (12.0, 2.5, 2.5), (12.0, 2.5, 2.4)],
        results=("tokens",),
        why="So the two are compared at equal cost, and not at a frequency that somebody happened to choose. Mind what "
        "the answer depends on: prompts four times as long can be read a quarter as often.",
        mistakes=(
            Mistake(
                between_readings_of_the_whole_token,
                "You divide by the whole cost of a token with the change. Only what it costs *more* can be spent.",
            ),
            Mistake(between_readings_upside_down, "It is upside down: a dear reading has to be rarer."),
            Mistake(
                between_readings_of_tokens, "This is how many plain tokens a reading is worth. Where is the change?"
            ),
            Mistake(
                between_readings_not_at_all,
                "A reading cannot come after 0 tokens. Where it is cheap, it comes after each.",
            ),
            Mistake(
                lambda read_ms, plain_ms, changed_ms: max(1, round(read_ms / abs(changed_ms - plain_ms))),
                "Where the change costs nothing, no reading is affordable: return infinity.",
            ),
        ),
        misconception="That a cost counted once is comparable with a cost a token. Only after it is shared out.",
        discussion=("A server answers many users at once. Which of the two costs grows with the batch?",),
    ),
)
