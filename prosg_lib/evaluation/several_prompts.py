"""Recall of several prompts that are kept in one delta."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.evaluation.recall import recall_alone
from prosg_lib.generators.base import Generator
from prosg_lib.generators.several_prompts import METHODS, joint_delta
from prosg_lib.tasks.dialogue import Dialogues, Item, Shape


def shared_out(item: Item, prompts: int) -> list[str]:
    """The facts of a dialogue's prompt as several prompts with equally many facts each.

    Raises:
        UserError: the prompt has instructions as well, or its facts cannot be shared out evenly.
    """
    sentences = re.split(r"(?<=\.) ", item.prompt.removeprefix("User: ").removesuffix("\n"))
    if len(sentences) != len(item.facts) or len(sentences) % prompts:
        raise UserError(
            f"{len(item.facts)} facts and {len(item.instructions)} instructions in {len(sentences)} sentences cannot "
            f"be shared out over {prompts} prompts; take no instructions, and equally many facts a prompt"
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
    methods: Iterable[str] = METHODS,
    common: LowRankDelta | None = None,
) -> pd.DataFrame:
    """Recall of all facts of several prompts, from a blank state with only their joint delta in the weights.

    Args:
        data: the items' split and seed; the prompts of one memory state different facts.
        counts: numbers of prompts in one memory.
        facts: a prompt; there is one question a fact.
        items: memories of each number of prompts.
        methods: of `METHODS`.
        common: as in `joint_delta`.
    Returns:
        One row per method, number of prompts and memory: method, prompts, item, recall (share of the questions answered
        right), questions (their number), rank and bytes of the delta.
    """
    rows = []
    for count in counts:
        for number, item in enumerate(data.items(items, Shape(count * facts, 0, count * facts))):
            for method in methods:
                delta = joint_delta(method, lm, generator, shared_out(item, count), common)
                rows.append(
                    {
                        "method": method,
                        "prompts": count,
                        "item": number,
                        "recall": float(recall_alone(lm, delta, data, [item])[0]),
                        "questions": len(item.probes),
                        "rank": delta.rank,
                        "bytes": delta.nbytes(),
                    }
                )
    return pd.DataFrame(rows)
