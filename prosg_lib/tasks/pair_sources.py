"""The tasks of context and query by name, and where their data come from."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from prosg_lib.config import Profile
from prosg_lib.config.sizes import TASKS, PairSizes
from prosg_lib.errors import UserError
from prosg_lib.paths import extra_data
from prosg_lib.tasks.pairs import Fitted, Pair, fitted
from prosg_lib.tasks.people import characters, reversal
from prosg_lib.tasks.squad import squad
from prosg_lib.tasks.wikitext import copied, named, wikitext
from prosg_lib.text.tokenizer import Tokenizer, load_tokenizer

PEOPLE = TASKS[:2]
"""The tasks about made-up people; their data are always there."""


def available(task: str, profile: Profile) -> bool:
    """Whether a profile has a task, and this machine its data; the two about made-up people are always there.

    Raises:
        UserError: unknown task.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    sizes = profile.pairs
    return task in sizes.tasks and (task in PEOPLE or bool(_sources(task, sizes)))


@lru_cache(maxsize=32)
def pairs_of(task: str, split: str, profile: Profile, tokenizer: Tokenizer | None = None) -> Fitted:
    """A task's pairs that fit, and how many did not.

    SQuAD's questions and WikiText's passages are read from $PROSG_TEST_DATA (`xquad/xquad.en.json`, and the texts of
    `wikitext-2` and `books`), and otherwise, if the profile says so, from the hub.

    Args:
        tokenizer: None for the project's own.
    Raises:
        UserError: unknown task, or its data are not on this machine.
    """
    sizes = profile.pairs
    if not available(task, profile):
        raise missing(task, profile)
    return fitted(_pairs(task, split, sizes), tokenizer or load_tokenizer(), sizes.context, sizes.query)


def missing(task: str, profile: Profile) -> UserError:
    """The error for a task that a profile does not have, or that this machine has no data for."""
    if task not in profile.pairs.tasks:
        return UserError(f"{task} is not a task of {profile.name}; take cpu or gpu")
    return UserError(f"the data of {task} are not here; set PROSG_TEST_DATA to a folder with xquad/ or wikitext-2/")


def prose_pairs(kind: str, profile: Profile) -> dict[str, tuple[Pair, ...]]:
    """Pairs of the training split from every source of prose on this machine, by "KIND from SOURCE".

    Args:
        kind: "copied": any sentence of a passage is completed; "named": one that breaks off before a name.
    """
    sizes, make = profile.pairs, {"copied": copied, "named": named}[kind]
    sources = _sources("wikitext", sizes) if "wikitext" in sizes.tasks and not sizes.hub else []
    return {
        f"{kind} from {source.name}": fitted(
            make("train", source, sizes.words), load_tokenizer(), sizes.context, sizes.query
        ).pairs
        for source in sources
    }


def _pairs(task: str, split: str, sizes: PairSizes) -> tuple[Pair, ...]:
    if task == "characters":
        return characters(split)
    if task == "reversal":
        return reversal(split)
    sources = _sources(task, sizes)
    if task == "squad":
        return squad(split, sources[0])
    return sum((wikitext(split, source, sizes.words) for source in sources), ())


def _sources(task: str, sizes: PairSizes) -> list[str | Path]:
    if task == "squad":
        folder = extra_data("xquad")
        found = [folder / "xquad.en.json"] if folder else []
    else:
        found = [folder for folder in (extra_data("wikitext-2"), extra_data("books")) if folder]
    return found or (["hub"] if sizes.hub else [])
