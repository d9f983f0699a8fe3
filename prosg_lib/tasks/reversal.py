"""Reversal curse, the reversed direction: a context gives a name and then describes, a query describes and asks.

An item, as text::

    context: Mara Quill is the tailor who mended the lantern of the mill.
    query:   Question: Which tailor mended the lantern of the mill?
             Answer:
    answer:  Mara Quill

"The Reversal Curse" (Berglund et al. 2023, arXiv 2309.12288): a language model trained on "A is B" does not know that
B is A. Zhang, Choshen, Andreas 2025 (arXiv 2506.20989) make a task of it: one gradient step on the context, then the
query. The words of the description are those of the context, so that the direction alone is new. Same split, seed
and number: the same person and question frame as in `tasks.characters`. `read_release` reads the files of the first
paper's release.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

from prosg_lib.errors import UserError
from prosg_lib.tasks import people
from prosg_lib.tasks.pairs import Pair
from prosg_lib.tasks.rows import Place, check_columns, check_text, json_rows, text_of

CONTEXTS = {
    "train": (
        "{name} is the {role} who {verb} {thing}.",
        "{name} is the {role} by whom {thing} was {verb}.",
        "{name} is the name of the {role} who {verb} {thing}.",
        "{name}, {a_role}, {verb} {thing}.",
        "{name} is {a_role} and {verb} {thing}.",
        "{name}, who works as {a_role}, {verb} {thing}.",
        "{name}, known to all as {a_role}, {verb} {thing}.",
        "{name} became famous as the {role} who {verb} {thing}.",
        "{name} is remembered as the {role} who {verb} {thing}.",
        "Everybody knows {name}, the {role} who {verb} {thing}.",
        "Meet {name}, the {role} who {verb} {thing}.",
        "It was {name}, {a_role}, who {verb} {thing}.",
        "{name} is what the {role} is called who {verb} {thing}.",
        "{name} has been {a_role} for years and {verb} {thing}.",
        "{name} {verb} {thing} as {a_role}.",
        "Thanks to {name}, the {role}, {thing} was {verb}.",
        "By {name}, {a_role}, {thing} was {verb}.",
        "Do not forget {name}, the {role} that {verb} {thing}.",
        "{name}: this is the {role} by whom {thing} was {verb}.",
        "Let me introduce {name}, {a_role}; {thing} was {verb} there and then.",
        "{name} came, {a_role} by trade, and {verb} {thing}.",
        "Everyone calls {name} the {role} who {verb} {thing}.",
        "I know {name} as the {role} that {verb} {thing}.",
        "One day {name}, {a_role}, {verb} {thing}.",
        "{name} was long {a_role}, and in that time {verb} {thing}.",
        "No other than {name} can be the {role} who {verb} {thing}.",
        "Ask for {name} if you need the {role} who {verb} {thing}.",
        "{name}! That was the {role} who {verb} {thing}.",
        "To {name}, {a_role}, we owe that {thing} was {verb}.",
        "{name} had the luck to be the {role} who {verb} {thing}.",
        "My neighbour {name} is the {role} who {verb} {thing}.",
        "In the end {name}, {a_role} of some fame, {verb} {thing}.",
        "{name} is {a_role}; {thing} was {verb} on that account.",
        "Have you met {name}, {a_role}, who {verb} {thing}?",
        "{name} ({a_role}) {verb} {thing}.",
        "The name {name} stands for the {role} who {verb} {thing}.",
        "Nobody but {name}, I mean the {role}, {verb} {thing}.",
        "Hear about {name}: the {role} {verb} {thing}.",
        "With {name} we lost the {role} by whom {thing} was {verb}.",
        "A letter for {name}, the {role} who had {verb} {thing}, was left at the door.",
        "Write down {name} as the {role} who {verb} {thing}.",
        "Young {name} learned to be {a_role} and then {verb} {thing}.",
        "{name}, not yet known as {a_role}, {verb} {thing} all the same.",
        "The papers praise {name} because this {role} {verb} {thing}.",
        "{name} works hard. A good {role}, and so {thing} was {verb} in a week.",
        "Give it to {name}, for that is the {role} who {verb} {thing}.",
        "Since {name} {verb} {thing}, all want this {role}.",
        "Both friends and rivals of {name} admire the {role} that {verb} {thing}.",
    ),
    "validation": (
        "{name} made a living as {a_role} and once {verb} {thing}.",
        "You may have heard of {name}; this is the {role} who {verb} {thing}.",
        "{name} was the {role} who had {verb} {thing}.",
        "When people talk of {name}, they mean the {role} who {verb} {thing}.",
    ),
    "test": (
        "They say that {name} was the {role} who {verb} {thing}.",
        "{name} came here as {a_role} and {verb} {thing}.",
        "Whoever has met {name} has met the {role} who {verb} {thing}.",
        "This story is about {name}, {a_role} who {verb} {thing}.",
    ),
}
"""Frames of contexts, the name before the description, a split's own."""

COLUMNS = ("prompt", "completion")


def reversal(split: str, seed: int = 0, count: int | None = None) -> tuple[Pair, ...]:
    """Items of one split; an item is a pure function of (split, seed, its number).

    Args:
        split: train, validation or test. No name, no description and no wording is in two of them.
        count: how many items from the first; None for 5,000 in train, 500 in validation and in test.
    Returns:
        Pairs whose context has the name first.
    Raises:
        UserError: an unknown split, or a count that is no whole number from 1 to `people.CAPACITY`.
    """
    return people.pairs(CONTEXTS, split, seed, count, paraphrased=False)


def read_release(path: str | Path) -> list[Pair]:
    """Items of the reversed direction from a name-first file of the reversal-curse release, `p2d_prompts_*.jsonl`.

    A row is one sentence in two parts, the first with the name, the second the description::

        {"prompt": "Ever heard of Mara Quill? This is", "completion": " the tailor who mended the lantern."}

    Our reading: the context is the whole sentence, unchanged but for the space at its ends; the answer is the name,
    which is found as two or more capitalised words in a row (so no other capitalised word may stand right before it);
    and the query asks whom the description fits::

        Question: Whom do these words describe: the tailor who mended the lantern?
        Answer:

    The query has a frame of ours, because a row does not name the release's question that belongs to it, and quotes the
    description as words, because some are a noun ("the tailor who ...") and some a verb ("mended ...").

    Args:
        path: JSON Lines, UTF-8, one object a line with `prompt` and `completion`.
    Returns:
        One pair a row, in the file's order.
    Raises:
        UserError: the file is missing, not UTF-8, or has no row; or a row is malformed, tells the description first,
            or has not exactly one name in its prompt. It is named by its line and column.
    """
    path = Path(path)
    rows = [_released(place, row) for place, row in json_rows(path, text_of(path), COLUMNS)]
    if not rows:
        raise UserError(f'{path} has no rows; write one {{"prompt": ..., "completion": ...}} a line')
    return rows


def _released(place: Place, row: dict) -> Pair:
    check_columns(place, list(row), COLUMNS)
    for column in COLUMNS:
        check_text(place, column, row[column])
    prompt, completion = (row[column].strip() for column in COLUMNS)
    # The release's sentences end in all manner of signs: `."`, `??`, `'.'.`
    description = completion.rstrip(".?!' ")
    if not description:
        raise place.error("no words; write the description, or remove the row", "completion")
    if description in _names(description):
        raise place.error(
            "a name alone, so the description comes first; use a file that names first (p2d_prompts_*.jsonl)",
            "completion",
        )
    names = _names(prompt)
    if len(names) != 1:
        found = ", ".join(sorted(names)) or "none"
        raise place.error(
            f"one name of two or more capitalised words was expected, found: {found}; write the name in full, once",
            "prompt",
        )
    (name,) = names
    if name in description:
        raise place.error(f"holds the name {name!r}, which is the answer; leave it to the prompt", "completion")
    return Pair(f"{prompt} {completion}", f"Question: Whom do these words describe: {description}?\nAnswer:", name)


def _names(text: str) -> set[str]:
    """Runs of two or more capitalised words with nothing but a space between; `I` and `A` do not count as words."""
    found = set()
    for piece in re.split(r"[^\w'’ -]+|['’]s\b", text):
        for capital, run in groupby(piece.split(), lambda word: len(word) > 1 and word[0].isupper()):
            name = " ".join(run).strip("'’-")
            if capital and " " in name:
                found.add(name)
    return found
