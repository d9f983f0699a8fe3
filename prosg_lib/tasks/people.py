"""Two tasks about made-up people: character description, and the reversal curse.

An item of each, as text; the same split and number have the same person and the same frame of a question::

    characters   context: The tailor who mended the lantern of the mill is Mara Quill.
                 query:   Question: Which tailor repaired the mill's lantern?
                          Answer:
                 answer:  Mara Quill

    reversal     context: Mara Quill is the tailor who mended the lantern of the mill.
                 query:   Question: Which tailor mended the lantern of the mill?
                          Answer:
                 answer:  Mara Quill

A person has a name and a description, both put together from the word lists in `data/people.json`: `Mara Quill`, and
the tailor who `mended` (or `repaired`) the `lantern` of the `mill`. Names and descriptions are shuffled, and the splits
take turns drawing from them, so no name and no description occurs twice, within a split or across splits. Words occur
in every split; the frames, the sentences around them, belong to one split each.

Both are tasks of Zhang, Choshen, Andreas 2025, "Can Gradient Descent Simulate Prompting?" (arXiv 2506.20989): one
gradient step on the context, then the query. "The Reversal Curse" (Berglund et al. 2023, arXiv 2309.12288) is that a
language model trained on "A is B" does not learn that B is A. People and wordings are our own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from prosg_lib import files
from prosg_lib.paths import data_dir
from prosg_lib.tasks.pairs import Pair
from prosg_lib.text.prose import SPLITS, check_split

VERSION = 3
"""Increased whenever the same number would give another item."""

COUNTS = {"train": 5_000, "validation": 500, "test": 500}
"""Number of items: the paper's 5,000 and 500 (arXiv 2506.20989), and a validation split."""


@cache
def words() -> dict:
    """Names, roles, deeds, things, places, frames and asides: `data/people.json`.

    A deed has two synonyms, each both a past tense and a participle ("was mended by"). Asides are sentences that may
    stand around a context or before a question of the training split.
    """
    return files.read_json(data_dir() / "people.json")


@dataclass(frozen=True)
class Person:
    """A name and a description: the role, two synonyms for the deed, the thing, and the place it belongs to."""

    name: str
    role: str
    deed: tuple[str, str]
    thing: str
    place: str


def name_count() -> int:
    """How many different names the lists give."""
    return len(words()["first_names"]) * len(words()["last_names"])


def full_name(number: int) -> str:
    """Name `number`, from 0 to `name_count()` - 1."""
    first, last = divmod(number, len(words()["last_names"]))
    return f"{words()['first_names'][first]} {words()['last_names'][last]}"


@cache
def _order() -> tuple[list[int], list[int]]:
    """The numbers of all names, shuffled, and of as many descriptions."""
    rng = random.Random(f"{VERSION}/people/0")
    lists = (words()[part] for part in ("roles", "deeds", "things", "places"))
    roles, deeds, things, places = map(len, lists)
    return rng.sample(range(name_count()), name_count()), rng.sample(
        range(roles * deeds * things * places), name_count()
    )


def person(split: str, index: int) -> Person:
    """Person `index` of a split; nobody else, of any split, has the name or the description."""
    names, descriptions = _order()
    number = index * len(SPLITS) + SPLITS.index(split)
    table = words()
    rest, place = divmod(descriptions[number], len(table["places"]))
    rest, thing = divmod(rest, len(table["things"]))
    role, deed = divmod(rest, len(table["deeds"]))
    return Person(
        full_name(names[number]),
        table["roles"][role],
        tuple(table["deeds"][deed]),
        table["things"][thing],
        table["places"][place],
    )


def characters(split: str) -> tuple[Pair, ...]:
    """Character description: the query describes the person in other words than the context.

    Args:
        split: train, validation or test. No name, no description and no wording is in two of them.
    Raises:
        UserError: an unknown split.
    """
    return _pairs("characters", split)


def reversal(split: str) -> tuple[Pair, ...]:
    """Reversal curse: the context has the name first; query and context use the same words, so only the direction is
    new. Argument and error as in `characters`."""
    return _pairs("reversal", split)


def _pairs(task: str, split: str) -> tuple[Pair, ...]:
    check_split(split)
    return tuple(_pair(task, split, index) for index in range(COUNTS[split]))


def _pair(task: str, split: str, index: int) -> Pair:
    rng = random.Random(f"{VERSION}/0/{split}/{index}")
    table, who = words(), person(split, index)
    verb, synonym = rng.sample(who.deed, 2)
    in_context = slots(who, verb, f"the {who.thing} of the {who.place}")
    reworded = slots(who, synonym, f"the {who.place}'s {who.thing}")
    in_question = reworded if task == "characters" else in_context
    question = rng.choice(table["questions"][split]).format(**in_question)
    context = rng.choice(table["contexts"][task][split]).format(name=who.name, **in_context)
    if split == "train":  # few wordings would be learned by heart
        asides = table["asides"]
        before, after, lead = (
            "" if rng.random() < 0.5 else rng.choice(asides[k]) for k in ("before", "after", "question")
        )
        context, question = f"{before} {context} {after}".strip(), f"{lead} {question}".strip()
    return Pair(context, f"Question: {question}\nAnswer:", who.name)


def slots(who: Person, verb: str, thing: str) -> dict[str, str]:
    """What fills the gaps of a frame: role, verb and thing, the latter two also with a capital at the start."""
    a_role = f"{'an' if who.role[0] in 'aeiou' else 'a'} {who.role}"
    capitals = {"Thing": thing[0].upper() + thing[1:], "A_role": a_role[0].upper() + a_role[1:]}
    return {"role": who.role, "a_role": a_role, "verb": verb, "thing": thing} | capitals
