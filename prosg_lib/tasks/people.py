"""Made-up people and what they did: what the tasks of character description and of the reversal curse share.

A person has a name and a description, both put together from word lists of our own: `Mara Quill`, and the tailor who
`mended` (or `repaired`) the `lantern` of the `mill`. A seed shuffles names and descriptions, and the splits take turns
in drawing from them, so no name and no description is there twice, within a split or across, whatever the counts.
Words meet in every split; frames, the sentences around them, belong to one.

After Berglund et al. 2023, "The Reversal Curse" (arXiv 2309.12288), whose names and descriptions are not used here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from prosg_lib.errors import UserError
from prosg_lib.tasks.pairs import Pair
from prosg_lib.text.prose import SPLITS, check_split

VERSION = 3
"""Goes up when the same seed would give other items."""

COUNTS = {"train": 5_000, "validation": 500, "test": 500}
"""Items of a split where no count is given: the paper's 5,000 and 500 (arXiv 2506.20989), and a validation split."""


def _listed_lines(lines: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in lines.splitlines())


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


FIRST_NAMES = _listed(
    """Adam Agnes Alice Alma Anna Anton Arno Arthur Basil Bernard Berta Beryl Betty Bianca Bruno Carl Carmen Celia
    Clive Conrad Cora Cyril Daniel David Delia Dennis Diana Dinah Dora Edith Edwin Elena Ella Emil Ernest Eva Fergus
    Fiona Flora Floyd Frank Fred Freda George Gerda Gilbert Gloria Grace Gustav Gwen Hanna Harold Hector Helga Henry
    Herman Hilda Ida Igor Ingrid Iris Irma Ivan Jakob James Jasper Jenny Joan Judith Julian Karin Karl Kate Kenneth
    Klara Kurt Lars Laura Lena Lionel Louise Lucas Lydia Mabel Magnus Mara Marta Martin Maud Miles Milo Nadia Neil Nell
    Nelson Nina Noel Nora Odette Olive Opal Orson Oscar Otto Paula Percy Peter Petra Philip Polly Rita Robert Rolf Rosa
    Rufus Ruth Samuel Sara Silas Simon Sonia Stefan Stella Tessa Thea Theo Tilda Toby Tomas Ugo Una Vera Vernon Victor
    Vincent Viola Vivian Walter Wanda Warren Wendel Willa Wilma"""
)
LAST_NAMES = _listed(
    """Ames Birch Boyd Brand Brock Bryce Burr Clay Coker Cole Combe Corrie Cray Croft Cross Dale Darby Dell Doyle Drake
    Dray Dunn Eames Egan Ellery Fane Farr Fenn Finch Flint Foss Frain Gale Garland Gill Glenn Gorse Gower Graves Grey
    Grove Hale Hall Harlow Harrow Hart Hatch Hawke Hay Heath Hill Holm Holt Horne Hyde Irving Ives Jarrow Joss Kane
    Keller Kent Kerr Lamb Lane Larch Lind Linden Lisle Locke Lorne Lunt Lyle Mace Marlow Marsh Mead Merrow Nash Neal
    Nettle North Oake Orr Otter Page Paine Parr Perrin Pike Platt Poole Pratt Quill Rand Ray Reeve Ridge Rook Rowe Rudd
    Rush Sable Sands Sayer Selby Severn Shore Sloane Snow Sorrel Spear Starling Stone Storm Strand Swan Tarn Tate Teal
    Thorne Trent Tull Tyne Vale Vance Vane Vesper Wade Warde Webb Weir Wharton Wick Winter Wolfe Wood Wray Wren Yarrow
    Zeller"""
)
ROLES = _listed(
    """actor archer architect astronomer baker barber brewer butcher carpenter chemist clerk cook dancer dentist
    diver doctor driver drummer editor engineer farmer florist gardener historian hunter jeweller judge juggler lawyer
    mason miller miner nurse organist painter pilot plumber poet porter potter printer rider sailor shepherd singer
    soldier student surveyor tailor teacher usher weaver writer"""
)
DEEDS = (
    ("bought", "purchased"),
    ("built", "constructed"),
    ("cleaned", "washed"),
    ("decorated", "adorned"),
    ("found", "discovered"),
    ("guarded", "protected"),
    ("inspected", "examined"),
    ("mended", "repaired"),
    ("ordered", "commissioned"),
    ("praised", "commended"),
    ("rescued", "saved"),
    ("wrecked", "ruined"),
)
"""Two words each for what somebody did, every one both a past tense and a participle ("was mended by")."""

THINGS = _listed(
    """bed bell bench boat bookcase cabinet cage cart chair chest clock cradle desk drum fountain gate globe harp ladder
    lamp lantern loom mirror piano plough raft sledge statue stove table telescope throne wagon"""
)
PLACES = (
    *_listed(
        """abbey academy airport bakery bank brewery castle chapel church circus club college convent cottage court
    dairy factory farm fortress harbour hotel inn island library lighthouse lodge manor market mill monastery museum
    opera palace prison quarry ranch school station studio tavern theatre university village windmill workshop"""
    ),
    "post office",
    "town hall",
)

QUESTIONS = {
    "train": (
        "Which {role} {verb} {thing}?",
        "Who is the {role} that {verb} {thing}?",
        "Who is the {role} who {verb} {thing}?",
        "What is the name of the {role} who {verb} {thing}?",
        "What do people call the {role} who {verb} {thing}?",
        "What is the {role} called who {verb} {thing}?",
        "By which {role} was {thing} {verb}?",
        "Can you name the {role} who {verb} {thing}?",
        "Do you know which {role} {verb} {thing}?",
        "{Thing} was {verb} by {a_role}. Who is this {role}?",
        "I am looking for the {role} who {verb} {thing}. Who is it?",
        "Somebody {verb} {thing}. Which {role} was it?",
        "Which {role} was it that {verb} {thing}?",
        "Who {verb} {thing}, I mean which {role}?",
        "{Thing} was {verb} by somebody. By which {role}?",
        "Will you name the {role} who {verb} {thing}?",
        "May I have the name of the {role} that {verb} {thing}?",
        "What name does the {role} have who {verb} {thing}?",
        "There was {a_role} who {verb} {thing}. Who was that?",
        "Whose name is it, the {role}'s who {verb} {thing}?",
        "After {thing} was {verb}, what {role} did they thank?",
        "We know that {a_role} {verb} {thing}. What is this person called?",
        "Would you please tell me which {role} it was that {verb} {thing}?",
        "By whom was {thing} {verb}, and I mean the {role}?",
        "Give me the name of the {role} who {verb} {thing}, will you?",
        "{Thing} was {verb}. Who was the {role} in that affair?",
        "Whom do we call the {role} that {verb} {thing}?",
        "Who, being {a_role}, {verb} {thing}?",
        "One {role} {verb} {thing}. The name, if you please?",
        "As for the {role} who {verb} {thing}: who is meant?",
        "To which {role} do we owe that {thing} was {verb}?",
        "Is there {a_role} known to you who {verb} {thing}, and who?",
        "How is the {role} named who {verb} {thing}?",
        "Let us speak of the {role} by whom {thing} was {verb}. Whom do I mean?",
        "And the {role} who {verb} {thing} is who?",
        "Could it be that {a_role} {verb} {thing}, and if so, who?",
    ),
    "validation": (
        "Could you tell me who the {role} is by whom {thing} was {verb}?",
        "We need the name of the {role} who {verb} {thing}. What is it?",
        "Who works as {a_role} and {verb} {thing}?",
        "{A_role} {verb} {thing}, as we know. Who exactly was it?",
    ),
    "test": (
        "If {a_role} {verb} {thing}, then what is the name of that {role}?",
        "Which name belongs to the {role} who {verb} {thing}?",
        "Of all who work as {a_role}, who {verb} {thing}?",
        "{Thing} was {verb} one day. What was the name of the {role} who did it?",
    ),
}
"""Frames of questions that ask for the name, a split's own. Both tasks ask in them."""


ASIDES = {
    "before": _listed_lines(
        """Listen.
        Here is some news.
        I read this yesterday.
        It is worth knowing.
        People talk about it.
        This is a fact.
        By the way, this is new.
        We heard it at noon.
        A friend told me.
        It happened in spring."""
    ),
    "after": _listed_lines(
        """That is all.
        Nobody doubts it.
        It was in the papers.
        Keep it in mind.
        Many people saw it.
        The weather was fine.
        It took two days.
        We were glad about it.
        This was long ago.
        I wrote it down."""
    ),
    "question": _listed_lines(
        """Tell me, please.
        I forgot.
        One more thing.
        Here is a question for you.
        You will know this.
        Think about it."""
    ),
}
"""Sentences that may stand around a context, or before a question, of the training split."""


@dataclass(frozen=True)
class Person:
    """Somebody with a name and a description: the role, two words for the deed, the thing, and the place it is of."""

    name: str
    role: str
    deed: tuple[str, str]
    thing: str
    place: str


CAPACITY = len(FIRST_NAMES) * len(LAST_NAMES) // len(SPLITS)
"""People that one split can have."""


@lru_cache(maxsize=8)
def _order(seed: int) -> tuple[list[int], list[int]]:
    """The numbers of all names, shuffled, and of as many descriptions."""
    rng = random.Random(f"{VERSION}/people/{seed}")
    names = len(FIRST_NAMES) * len(LAST_NAMES)
    return rng.sample(range(names), names), rng.sample(range(descriptions()), names)


def descriptions() -> int:
    """How many descriptions there are."""
    return len(ROLES) * len(DEEDS) * len(THINGS) * len(PLACES)


def person(split: str, seed: int, index: int) -> Person:
    """Person `index` of a split, 0 to CAPACITY - 1; nobody else of this seed has the name or the description."""
    names, described = _order(seed)
    number = index * len(SPLITS) + SPLITS.index(split)
    first, last = divmod(names[number], len(LAST_NAMES))
    rest, place = divmod(described[number], len(PLACES))
    rest, thing = divmod(rest, len(THINGS))
    role, deed = divmod(rest, len(DEEDS))
    return Person(f"{FIRST_NAMES[first]} {LAST_NAMES[last]}", ROLES[role], DEEDS[deed], THINGS[thing], PLACES[place])


def pairs(
    contexts: Mapping[str, Sequence[str]], split: str, seed: int, count: int | None, *, paraphrased: bool
) -> tuple[Pair, ...]:
    """Items about the people of a split: a context that names and describes one, and a question for the name.

    Args:
        contexts: the frames of a context, by split.
        paraphrased: ask with the deed's other word and "the mill's lantern"; else in the words of the context.
        count: None for the split's own (COUNTS).
    Raises:
        UserError: an unknown split, or a count that is no whole number from 1 to CAPACITY.
    """
    check_split(split)
    count = COUNTS[split] if count is None else count
    if type(count) is not int or not 1 <= count <= CAPACITY:
        raise UserError(f"{count!r} items asked for; a split has 1 to {CAPACITY}, ask for a whole number of them")
    return tuple(_pair(contexts[split], paraphrased, split, seed, index) for index in range(count))


def _pair(contexts: Sequence[str], paraphrased: bool, split: str, seed: int, index: int) -> Pair:
    rng = random.Random(f"{VERSION}/{seed}/{split}/{index}")
    who = person(split, seed, index)
    verb, other = rng.sample(who.deed, 2)
    told = _words(who, verb, f"the {who.thing} of the {who.place}")
    asked = _words(who, other, f"the {who.place}'s {who.thing}") if paraphrased else told
    question = rng.choice(QUESTIONS[split]).format(**asked)
    context = rng.choice(contexts).format(name=who.name, **told)
    if split == "train":  # what is learned from few wordings is learned by heart
        before, after, lead = ("" if rng.random() < 0.5 else rng.choice(ASIDES[k]) for k in ASIDES)
        context, question = f"{before} {context} {after}".strip(), f"{lead} {question}".strip()
    return Pair(context, f"Question: {question}\nAnswer:", who.name)


def _words(who: Person, verb: str, thing: str) -> dict[str, str]:
    a_role = f"{'an' if who.role[0] in 'aeiou' else 'a'} {who.role}"
    upper = {"Thing": thing[0].upper() + thing[1:], "A_role": a_role[0].upper() + a_role[1:]}
    return {"role": who.role, "a_role": a_role, "verb": verb, "thing": thing} | upper
