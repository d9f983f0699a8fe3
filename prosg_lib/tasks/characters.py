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
        "The {role} to whom we owe that {thing} was {verb} is no other than {name}.",
        "Need the {role} who {verb} {thing}? Ask for {name}.",
        "The one {role} who {verb} {thing}, my neighbour, is {name}.",
        "{A_role} had the luck to have {verb} {thing}, namely {name}.",
        "{Thing} was {verb} in the end by {a_role} of some fame, by {name}.",
        "There lives the {role} who {verb} {thing}; on the door it says {name}.",
        "{A_role} {verb} {thing} – this was {name}.",
        "The {role} who {verb} {thing} signs letters as {name}.",
        "Of all that {a_role} can do, {thing} was {verb} best by {name}.",
        "Hear about the {role} who {verb} {thing}! It is {name}.",
        "That {thing} was {verb} by {a_role} is the work of {name}.",
        "A letter was left for the {role} who had {verb} {thing}, addressed to {name}.",
        "Write down the {role} who {verb} {thing} as {name}.",
        "Having {verb} {thing}, one {role} became well known: {name}.",
        "The papers praise the {role} who {verb} {thing}, {name}.",
        "{Thing} was {verb} within a week. A good {role}, this {name}.",
        "Give it to the {role} who {verb} {thing}, that is to {name}.",
        "All want the {role} since {thing} was {verb} so well; they want {name}.",
        "Friends of the {role} who {verb} {thing} are friends of {name}.",
        "Your {role}, the same that {verb} {thing}, must be {name}.",
        "{A_role} I admire {verb} {thing}, and I mean {name}.",
        "Who {verb} {thing}? The {role} did, of course: {name}.",
        "{Thing} was {verb}, and we paid the {role} for it: {name}.",
        "Once more the {role} who {verb} {thing} is in town, old {name}.",
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
