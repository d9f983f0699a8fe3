"""Several prompts in one memory: three ways to make one delta of them, and how much of them each way still knows.

- add: every prompt's delta on its own, from a blank state, and their sum. A generator's deltas share their reading
  directions V, so U is added, and the sum is as small as one of them; a prompt can be taken out again.
- concatenate: the same deltas with their ranks side by side (`LowRankDelta.beside`). The change is the sum's, so it
  knows neither more nor less, and is as many times as large; it is what is left where reading directions differ, as
  those of gradient steps and of adapters do.
- rederive: the user's line goes on (`tell`): it is read where it stood, with the state carried on, and one delta is
  derived of all of it (`written`). Nothing grows with the number of prompts, and none can be taken out.

Much of a delta is what its generator writes for any prompt, whatever it says. A sum of n deltas has it n times, and the
answers soon are no answers any more. It has to be counted once: `common_part` estimates it, and `together` leaves out
the copies. A line that goes on has it once anyway.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence

import pandas as pd

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.errors import UserError
from prosg_lib.evaluate import recall_alone
from prosg_lib.generator import Generator, Memory, TokenGenerator
from prosg_lib.lowrank import LowRankDelta
from prosg_lib.tasks.dialogue import Dialogues, Item, Shape

WAYS = ("add", "concatenate", "rederive")


def tell(lm: LanguageModel, generator: TokenGenerator, text: str, memory: Memory | None = None) -> Memory:
    """Take in what a user says, as the beginning of a line of a dialogue, or as more of the line in `memory`.

    Args:
        text: without "User:" and without an end of line; of any length.
    Raises:
        UserError: the text is empty, or the generator was trained for another model.
    """
    text = text.strip()
    if not text:
        raise UserError("there is nothing to remember: the text is empty")
    return generator.remember(lm, f"User: {text}" if memory is None else f" {text}", memory)


def written(lm: LanguageModel, generator: TokenGenerator, memory: Memory) -> LowRankDelta:
    """The delta of a line that was told so far, as if it ended here."""
    return generator.delta_of(generator.remember(lm, "\n", memory))


def common_part(lm: LanguageModel, generator: Generator, texts: Sequence[str]) -> LowRankDelta:
    """What a generator writes for any prompt: the mean delta of some that say little else.

    Args:
        texts: as in `together`, of one fact each, e.g. of 64 prompts of the training split. A mean of prompts with
            more facts has more of what all facts have in common, and then a sum loses that, too.
    Raises:
        UserError: there are no texts, or one is empty.
    """
    if not texts:
        raise UserError("there are no texts to take a mean of; give some prompts of one fact each")
    each = generator.memorize(lm, [f"User: {text}\n" for text in texts])
    return sum(each.select([i]) for i in range(len(texts))).scaled(1 / len(texts))


def together(
    way: str, lm: LanguageModel, generator: Generator, texts: Sequence[str], common: LowRankDelta | None = None
) -> LowRankDelta:
    """One delta, of batch 1, that holds what all of these prompts say.

    Args:
        way: one of `WAYS`.
        texts: what the user says in each, without "User:" and without an end of line.
        common: what any prompt writes (`common_part`), to be left out of a sum but once; None: all copies stay.
    Raises:
        UserError: unknown way; no texts, or an empty one; a generator that cannot go on from what it has read.
    """
    if way not in WAYS:
        raise UserError(f"unknown way {way!r}; there are {', '.join(WAYS)}")
    if not texts:
        raise UserError("there are no texts; a memory holds at least one")
    if way == "rederive":
        if not isinstance(generator, TokenGenerator):
            raise UserError(
                f"a {type(generator).__name__} reads every prompt from the beginning; to re-derive one delta prompt "
                "after prompt, take a token-wise generator"
            )
        memory = functools.reduce(lambda memory, text: tell(lm, generator, text, memory), texts, None)
        return written(lm, generator, memory)
    each = generator.memorize(lm, [f"User: {text}\n" for text in texts])
    deltas = [each.select([i]) for i in range(len(texts))]
    if common is not None and len(texts) > 1:
        deltas.append(common.scaled(1 - len(texts)))
    return sum(deltas) if way == "add" else functools.reduce(LowRankDelta.beside, deltas)


def told_in(item: Item, prompts: int) -> list[str]:
    """What a dialogue's prompt of facts says, as so many prompts that say as many facts each.

    Raises:
        UserError: the prompt has instructions, too, or its facts cannot be shared out evenly.
    """
    sentences = re.split(r"(?<=\.) ", item.prompt.removeprefix("User: ").removesuffix("\n"))
    if len(sentences) != len(item.facts) or len(sentences) % prompts:
        raise UserError(
            f"{len(item.facts)} facts and {len(item.instructions)} instructions, in {len(sentences)} sentences, are "
            f"not to be told in {prompts} prompts; take no instructions, and as many facts for each prompt"
        )
    size = len(sentences) // prompts
    return [" ".join(sentences[i : i + size]) for i in range(0, len(sentences), size)]


def compare(
    lm: LanguageModel,
    generator: Generator,
    data: Dialogues,
    counts: Iterable[int] = (1, 2, 4, 8),
    facts: int = 3,
    items: int = 32,
    ways: Iterable[str] = WAYS,
    common: LowRankDelta | None = None,
) -> pd.DataFrame:
    """Recall of everything that several prompts said, from a blank state, their one delta alone in the weights.

    Args:
        data: the items' split and seed; the prompts of one memory are about different things.
        counts: numbers of prompts in one memory.
        facts: a prompt; every one is asked about.
        items: memories of each number of prompts.
        common: as in `together`.
    Returns:
        One row a way, number of prompts and memory: way, prompts, item, recall (share of the questions answered right),
        asked (their number), rank and bytes of the delta.
    """
    rows = []
    for count in counts:
        for number, item in enumerate(data.items(items, Shape(count * facts, 0, count * facts))):
            for way in ways:
                delta = together(way, lm, generator, told_in(item, count), common)
                rows.append(
                    {
                        "way": way,
                        "prompts": count,
                        "item": number,
                        "recall": float(recall_alone(lm, delta, data, [item])[0]),
                        "asked": len(item.probes),
                        "rank": delta.rank,
                        "bytes": delta.nbytes(),
                    }
                )
    return pd.DataFrame(rows)
