"""Reversal curse, the reversed direction: a context gives a name, then a description; a query describes and asks.

An item, as text::

    context: Mara Quill is the tailor who mended the lantern of the mill.
    query:   Question: Which tailor mended the lantern of the mill?
             Answer:
    answer:  Mara Quill

"The Reversal Curse" (Berglund et al. 2023, arXiv 2309.12288): a language model trained on "A is B" does not learn that
B is A. Zhang, Choshen, Andreas 2025 (arXiv 2506.20989) make a task of it: one gradient step on the context, then the
query. The description has the same words in both, so only the direction is new. Same split, seed and number: the same
person and question frame as in `tasks.characters`.
"""

from __future__ import annotations

from prosg_lib.tasks import people
from prosg_lib.tasks.pairs import Pair


def reversal(split: str, seed: int = 0, count: int | None = None) -> tuple[Pair, ...]:
    """Items of one split, each a pure function of (split, seed, its number).

    Args:
        split: train, validation or test. No name, no description and no wording is in two of them.
        count: number of items, from the first; None for 5,000 in train, 500 in validation and in test.
    Returns:
        Pairs whose context has the name first.
    Raises:
        UserError: an unknown split, or a count that is not a whole number from 1 to `people.capacity()`.
    """
    return people.pairs("reversal", split, seed, count, paraphrased=False)
