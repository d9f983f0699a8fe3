"""Character description: a context describes somebody and then gives the name, a query describes in other words.

An item, as text::

    context: The tailor who mended the lantern of the mill is Mara Quill.
    query:   Question: Which tailor repaired the mill's lantern?
             Answer:
    answer:  Mara Quill

The task of Zhang, Choshen, Andreas 2025, "Can Gradient Descent Simulate Prompting?" (arXiv 2506.20989), with people and
wordings of our own (`tasks.people`). `tasks.reversal` tells of the same people in the other order.
"""

from __future__ import annotations

from prosg_lib.tasks import people
from prosg_lib.tasks.pairs import Pair

CONTEXTS = {
    "train": (
        "The {role} who {verb} {thing} is {name}.",
        "The {role} by whom {thing} was {verb} is {name}.",
        "The {role} that {verb} {thing} is called {name}.",
        "The name of the {role} who {verb} {thing} is {name}.",
        "{Thing} was {verb} by {a_role} named {name}.",
        "{Thing} was {verb} by {a_role}, {name}.",
        "{Thing} was {verb} by the {role} {name}.",
        "It was {a_role} who {verb} {thing}: {name}.",
        "{A_role} {verb} {thing}, and the name of this {role} is {name}.",
        "Everybody knows the {role} who {verb} {thing}: {name}.",
        "When {thing} was {verb}, the {role} who did it was {name}.",
        "The only {role} who ever {verb} {thing} is {name}.",
        "Somebody {verb} {thing}; the {role} was {name}.",
        "{Thing} was {verb} by nobody else than the {role} {name}.",
        "For the {role} that {verb} {thing}, the name is {name}.",
        "He or she who {verb} {thing}, {a_role}, is {name}.",
        "If you look for the {role} who {verb} {thing}, look for {name}.",
        "{A_role} was there and {verb} {thing}. The name: {name}.",
        "Once upon a time {thing} was {verb}, and this was done by {a_role}, {name}.",
        "By trade {a_role}, the one who {verb} {thing} is {name}.",
        "As the {role} who {verb} {thing}, the town remembers {name}.",
        "{Thing} was {verb}. The {role} to be thanked for it is {name}.",
        "We met the {role} who {verb} {thing}, and met {name}.",
        "The {role}, the very one who {verb} {thing}, has the name {name}.",
    ),
    "validation": (
        "The {role} who once {verb} {thing} goes by the name of {name}.",
        "Ask who {verb} {thing}, and you will hear of {a_role}, {name}.",
        "{Thing} was {verb} long ago, and the {role} in question was {name}.",
        "There is {a_role} who {verb} {thing}, and that is {name}.",
    ),
    "test": (
        "They say that the {role} who {verb} {thing} was {name}.",
        "Last year {thing} was {verb} by {a_role}; it was {name}.",
        "Whoever has met the {role} who {verb} {thing} has met {name}.",
        "Once {a_role} came and {verb} {thing}; the visitor was {name}.",
    ),
}
"""Frames of contexts, the description before the name, a split's own."""


def characters(split: str, seed: int = 0, count: int | None = None) -> tuple[Pair, ...]:
    """Items of one split; an item is a pure function of (split, seed, its number).

    Args:
        split: train, validation or test. No name, no description and no wording is in two of them.
        count: how many items from the first; None for 5,000 in train, 500 in validation and in test.
    Returns:
        Pairs whose query has the description in other words than the context.
    Raises:
        UserError: an unknown split, or a count that is no whole number from 1 to `people.CAPACITY`.
    """
    return people.pairs(CONTEXTS, split, seed, count, paraphrased=True)
