"""Copying: random words are read, and then said again.

A problem, as text (4 words)::

    memory:  Text: lemon Oslo parrot violin
    rest:    The text once more: lemon Oslo parrot violin

Every token of the second text is judged, those before it given, as in the memory bench of RWKV (2023: "repeat this
text", the largest number of random words that is repeated without a mistake, and the largest with nine tenths right).
That bench's wording is not known here; wording and words are our own. Copying separates recurrent models from
attention also in "Repeat After Me" (Jelassi et al. 2024, arXiv 2402.01032).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from prosg_lib.tasks.dialogue import words
from prosg_lib.tasks.problems import Problem, asked, check_whole, drawn, tokens
from prosg_lib.text.tokenizer import Tokenizer

TASK = "copy"


@dataclass(frozen=True)
class Copy:
    """words: how many are to be repeated, 1 or more; drawn independently, so that one may come twice."""

    words: int

    def __post_init__(self):
        check_whole("the number of words to copy", self.words, 1)


@cache
def pool() -> tuple[str, ...]:
    """The words that are drawn from: those that the dialogues have as values, where they are one word."""
    values = {value for slot in words()["slots"].values() for value in slot["values"]}
    return tuple(sorted(value for value in values if value.isalpha()))


def problem(config: Copy, tokenizer: Tokenizer, split: str, seed: int, number: int) -> Problem:
    """Problem `number` of a split and seed; no sequence of words is in two splits.

    Raises:
        UserError: an unknown split, or a tokenizer that makes nothing of the words.
    """
    chosen = drawn(
        lambda rng: tuple(rng.choices(pool(), k=config.words)), split, f"{TASK}/{config.words}/{seed}/{number}"
    )
    text = tokens(tokenizer, *(f" {word}" for word in chosen))
    memory = (*tokens(tokenizer, "Text:"), *text, *tokenizer.encode("\n"))
    return asked(TASK, {"words": config.words}, memory, tokens(tokenizer, "The text once more:"), text)
