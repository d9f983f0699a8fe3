"""Real conversations: what else may stand between a prompt and its questions, and be left as it was.

The package `chitchat-dataset` (MIT) holds conversations that people had on a website of Brigham Young University in
2018 (Myers, Etchart and Fulda 2020, "Conversational Scaffolding"). Only its data file is read; its code is not run. A
message is a paragraph, so that a passage may start anywhere in a conversation::

    A: did you go to bed late?
    B: I have more of a head ache than anything else
    A: dude thats terrible
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from prosg_lib import files
from prosg_lib.errors import UserError
from prosg_lib.text.prose import SPLITS, Prose, split_titles

PACKAGE = "chitchat-dataset"
INSTALL = f"pip install {PACKAGE}"

_FILE = "chitchat_dataset/dataset.json"
_SHORTEST = 6  # messages; many people said hello, and nobody was there
_LEFT_OUT = re.compile(r"https?://|www\.\w|\S@\S+\.\w|\d{3}\W{1,2}\d{3}\W\d{4}|\S{41}")
"""In a message that is left out: an address, a telephone number, or a key that was held down."""


def source() -> str | None:
    """Name and version of the package; None if it is not installed."""
    found = _installed()
    return found and f"{PACKAGE} {found.version}"


def load_conversations() -> Prose:
    """The conversations between two people, by split: an empty line behind each. A conversation is in one split, which
    follows from its id; the people who speak are in several.

    Raises:
        UserError: the package is not installed, or its file is missing, damaged, or holds too little.
    """
    found = _installed()
    if found is None:
        raise UserError(f"real conversations come with the package {PACKAGE}, which is not installed; {INSTALL}")
    path = found.locate_file(_FILE)
    try:
        said = {name: _lines(entry["messages"]) for name, entry in files.read_json(path).items()}
        paragraphs = {s: [line for name in names for line in said[name]] for s, names in split_titles(said).items()}
    except (AttributeError, KeyError, IndexError, TypeError, UserError) as error:
        why = error if isinstance(error, UserError) else f"{path} is not in the package's format."
        raise UserError(f"{why} {_repair()}") from error
    if not all(paragraphs.values()):
        raise UserError(f"{path} holds too few conversations for {len(SPLITS)} splits. {_repair()}")
    return Prose(f"{PACKAGE} {found.version}", paragraphs)


def _installed() -> Distribution | None:
    try:
        return distribution(PACKAGE)
    except PackageNotFoundError:
        return None


def _repair() -> str:
    return f"Install the package again: {INSTALL} --force-reinstall --no-deps"


def _lines(messages: Sequence[Sequence[dict[str, str]]]) -> list[str]:
    """A conversation, a message a line; who speaks first is A. None of it if it is short, or not between two.

    messages: each the parts that a person sent in a row.
    """
    names: dict[str, str] = {}
    lines = []
    for parts in messages:
        text = " ".join(" ".join(part["text"] for part in parts).split())
        if text and not _LEFT_OUT.search(text) and not _repeats(text):
            name = names.setdefault(parts[0]["sender"], "B" if names else "A")
            lines.append(f"{name}: {text}")
    if len(names) != 2 or len(lines) < _SHORTEST:
        return []
    return [*lines[:-1], f"{lines[-1]}\n"]


def _repeats(text: str) -> bool:
    """A few words, again and again."""
    words = text.casefold().split()
    return len(words) >= 6 and len(set(words)) * 4 <= len(words)
