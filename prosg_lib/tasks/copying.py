"""Copying: random words are read and then repeated.

A problem, as text (4 words)::

    memory:  Text: lemon Oslo parrot violin
    rest:    The text once more: lemon Oslo parrot violin

Every token of the second text is judged given those before it, as in RWKV's memory bench (2023: "repeat this text", the
largest number of random words repeated without a mistake, and the largest with nine tenths right). That bench's wording
is not known to us; wording and words are our own. Copying also separates recurrent models from attention in "Repeat
After Me" (Jelassi et al. 2024, arXiv 2402.01032).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from prosg_lib.tasks.problems import Material, Problem, check_whole, draw_content, encode_pieces, with_answer
from prosg_lib.tasks.wording import words

TASK = "copy"


@cache
def pool() -> tuple[str, ...]:
    """The words that are drawn from: the values of the dialogues that are a single word."""
    values = {value for slot in words()["slots"].values() for value in slot["values"]}
    return tuple(sorted(value for value in values if value.isalpha()))


@dataclass(frozen=True)
class Copy:
    """words: how many are to be repeated, at least 1; drawn independently, so a word may occur twice."""

    words: int

    def __post_init__(self):
        check_whole("the number of words to copy", self.words, 1)

    def problem(self, material: Material, split: str, seed: int, number: int) -> Problem:
        """Problem `number` of a split and seed; no sequence of words is in two splits.

        Raises:
            UserError: an unknown split, or a tokenizer that gives no tokens for the words.
        """
        tokenizer = material.tokenizer
        name = f"{TASK}/{self.words}/{seed}/{number}"
        chosen = draw_content(lambda rng: tuple(rng.choices(pool(), k=self.words)), split, name)
        text = encode_pieces(tokenizer, *(f" {word}" for word in chosen))
        memory = (*encode_pieces(tokenizer, "Text:"), *text, *tokenizer.encode("\n"))
        return with_answer(TASK, {"words": self.words}, memory, encode_pieces(tokenizer, "The text once more:"), text)
