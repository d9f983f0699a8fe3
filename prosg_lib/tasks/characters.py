"""Character description: a context describes a person and then gives the name; a query describes in other words.

An item, as text::

    context: The tailor who mended the lantern of the mill is Mara Quill.
    query:   Question: Which tailor repaired the mill's lantern?
             Answer:
    answer:  Mara Quill

The task of Zhang, Choshen, Andreas 2025, "Can Gradient Descent Simulate Prompting?" (arXiv 2506.20989), with people and
wordings of our own (`tasks.people`). `tasks.reversal` has the same people, with the name first.
"""

from __future__ import annotations

from prosg_lib.tasks import people
from prosg_lib.tasks.pairs import Pair


def characters(split: str, seed: int = 0, count: int | None = None) -> tuple[Pair, ...]:
    """Items of one split, each a pure function of (split, seed, its number).

    Args:
        split: train, validation or test. No name, no description and no wording is in two of them.
        count: number of items, from the first; None for 5,000 in train, 500 in validation and in test.
    Returns:
        Pairs whose query words the description differently from the context.
    Raises:
        UserError: an unknown split, or a count that is not a whole number from 1 to `people.capacity()`.
    """
    return people.pairs("characters", split, seed, count, paraphrased=True)
