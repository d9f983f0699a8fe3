"""Passkey: a number somewhere in a long text, and then a question for it.

A problem, as text (depth 0.5)::

    memory:  ... the road to the village, and the dog followed.
             The pass key is 48213.
             A tired soldier had never forgotten the frozen ...
    rest:    What is the pass key? The pass key is 48213

The text is prose of the split, cut to exactly the requested length; the key stands at a relative depth in it, from 0 at
its beginning to 1 at its end. All of the text is to be remembered: nothing says beforehand which part of it matters.
Only the number is judged, and all of it must be right. The test of "Landmark Attention" (Mohtashami and Jaggi 2023,
arXiv 2305.16300), read as a map of length and depth as in "Stuffed Mamba" (Chen et al. 2024, arXiv 2410.07145) and
RULER (Hsieh et al. 2024, arXiv 2404.06654), with wording of our own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from prosg_lib.errors import UserError
from prosg_lib.tasks.problems import VERSION, Material, Problem, check_whole, draw_content, encode_pieces, with_answer

TASK = "passkey"


@dataclass(frozen=True)
class Passkey:
    """length: tokens of the text including the key; depth: share of the filler that stands before the key."""

    length: int
    depth: float

    def __post_init__(self):
        check_whole("the length of a passkey's text", self.length, 1)
        if not 0 <= self.depth <= 1:
            raise UserError(f"a passkey cannot stand at depth {self.depth}; depths are 0 (beginning) to 1 (end)")

    def problem(self, material: Material, split: str, seed: int, number: int) -> Problem:
        """Problem `number` of a split and seed; no key is in two splits. The prose must be of that split.

        Raises:
            UserError: an unknown split, a length too small for the key, or prose that is shorter.
        """
        tokenizer, name = material.tokenizer, f"{TASK}/{self.length}/{self.depth}/{seed}/{number}"
        key = draw_content(lambda rng: rng.randrange(10_000, 100_000), split, name)
        answer = encode_pieces(tokenizer, f" {key}")
        needle = (*encode_pieces(tokenizer, "\n", "The pass key is"), *answer, *encode_pieces(tokenizer, ".", "\n"))
        room = self.length - len(needle)
        if room < 0:
            raise UserError(
                f"a passkey's text cannot have {self.length} tokens: the sentence with the key has "
                f"{len(needle)}; choose a longer text"
            )
        filler = material.prose.passage(room, random.Random(f"{VERSION}/{name}/{split}/filler"))
        before = round(self.depth * room)
        memory = (*filler[:before], *needle, *filler[before:])
        question = encode_pieces(tokenizer, "What is the pass key?", " The pass key is")
        return with_answer(TASK, {"length": self.length, "depth": self.depth}, memory, question, answer)
