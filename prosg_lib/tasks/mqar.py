"""Multi-query associative recall: keys with their values, and then, among random tokens, the keys again.

A problem as token ids (length 16, 3 pairs, a vocabulary of 20; the right prediction at the first 4 is 17, and so on)::

    memory:  4 17 9 12 2 15
    rest:    4 13 2 0 6 19 9 3 11 5
    judged:  ^    ^        ^            gold: 17, 15, 12

The distribution is that of MQAR in "Zoology" (Arora et al. 2023, arXiv 2312.04927) as its authors published it, token
for token. Keys are different numbers from 1 to vocab/2 - 1, values different numbers from vocab/2 to vocab - 1, and all
pairs come first. Each key occurs once more, an even number of places after the pairs: 2 g, with g drawn without
replacement (key by key, from the gaps that are left) from 0 to space - 1 with weight (g + 1)^(power - 1), where space
is half the number of places. All other places are uniform over the whole vocabulary; what follows a repeated key is
therefore random too, and only the model's prediction at the key is judged.

No global random state is used; the random numbers are not those of the published generator.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from prosg_lib.errors import UserError
from prosg_lib.tasks.problems import Material, Problem, check_whole, draw_content

TASK = "mqar"
VOCAB = 8192
"""Vocabulary of the published test."""

POWER = 0.01
"""Of the gaps' distribution, as published; 1 would be uniform."""


@dataclass(frozen=True)
class Mqar:
    """Sizes of a problem.

    Attributes:
        length: tokens of memory and rest together, even.
        pairs: number of keys, each with a value; every pair needs four tokens of the length.
        vocab: token ids are below this number: 8,192 as published, or fewer for a model with fewer tokens, with the
            same two halves.
    """

    length: int
    pairs: int
    vocab: int = VOCAB

    def __post_init__(self):
        check_whole("MQAR's number of pairs", self.pairs, 1)
        check_whole("MQAR's length", self.length, 4)
        check_whole("MQAR's vocabulary", self.vocab, 4)
        if self.length % 2 or 4 * self.pairs > self.length:
            raise UserError(
                f"MQAR cannot have {self.length} tokens with {self.pairs} pairs; the length must be even, and at "
                "least four times the number of pairs"
            )
        if self.vocab <= self.length or self.pairs > self.vocab // 2 - 1:
            raise UserError(
                f"MQAR of {self.length} tokens needs a vocabulary of more than {self.length}, and {self.pairs} "
                f"different keys in its lower half, but it has {self.vocab}; use a shorter one, or a larger vocabulary"
            )

    @property
    def name(self) -> str:
        """Enters the seed of every problem, so its characters must never change."""
        return f"Mqar(length={self.length}, pairs={self.pairs}, vocab={self.vocab}, power={POWER})"

    def problem(self, material: Material, split: str, seed: int, number: int) -> Problem:
        """Problem `number` of a split and seed; no sequence of tokens is in two splits. It needs no material.

        Raises:
            UserError: an unknown split.
        """

        def draw(source: random.Random) -> tuple[tuple[int, ...], ...]:
            rng = np.random.default_rng(source.getrandbits(128))
            half, space = self.vocab // 2, (self.length - 2 * self.pairs) // 2
            keys = 1 + rng.choice(half - 1, self.pairs, replace=False)
            values = half + rng.choice(self.vocab - half, self.pairs, replace=False)
            gaps = rng.choice(space, self.pairs, replace=False, p=gap_weights(self))
            fill = rng.integers(self.vocab, size=self.length - 2 * self.pairs)
            return tuple(tuple(part.tolist()) for part in (keys, values, gaps, fill))

        keys, values, gaps, rest = draw_content(draw, split, f"{TASK}/{self.name}/{seed}/{number}")
        rest, places = list(rest), [2 * gap for gap in gaps]
        for key, place in zip(keys, places, strict=True):
            rest[place] = key
        memory = tuple(token for pair in zip(keys, values, strict=True) for token in pair)
        judged, gold = zip(*sorted(zip(places, values, strict=True)), strict=True)
        cell = {"length": self.length, "pairs": self.pairs}
        return Problem(TASK, cell, memory, tuple(rest), judged, gold)


@lru_cache(maxsize=32)
def gap_weights(config: Mqar) -> np.ndarray:
    """Probabilities of the first key's gap, (space,); those of later keys are the same without the gaps taken."""
    weights = np.arange(1, (config.length - 2 * config.pairs) // 2 + 1) ** (POWER - 1.0)
    return weights / weights.sum()
