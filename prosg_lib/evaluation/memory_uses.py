"""What a memory in the weights is for, each use with its control: a long dialogue at flat memory, a prompt taken out
again, instructions kept turn by turn.

All of it is asked in the open world (`tasks.open_world`) and judged by `open_recall.judged`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import count

import pandas as pd
import torch

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.deltas.applying import applied
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.errors import UserError
from prosg_lib.evaluation import open_recall, recall
from prosg_lib.evaluation.baselines import Start
from prosg_lib.generators.base import Generator
from prosg_lib.generators.several_prompts import append_prompt, delta_of_prompts
from prosg_lib.generators.token_wise import TokenGenerator
from prosg_lib.tasks.open_world import Item, OpenWorld, Shape

TURNS = (1, 2, 4, 8, 16)
"""After which instructions are looked at, as in Li et al. 2024 (arXiv 2402.10962)."""

_FILLER = 40  # tokens of other text between two turns


def _row(item: Item, number: int, predicted: Sequence[str], **names) -> dict:
    """As a row of `open_recall.answers`, without text about other people."""
    said = {
        "prompt": number,
        "instructions": dict(item.instructions),
        "kinds": [p.kind for p in item.probes],
        "gold": [list(p.right) for p in item.probes],
        "predicted": list(predicted),
    }
    return {**names, **said, "competing_total": 0, "competing_right": 0}


def _asked(
    lm: LanguageModel, data: OpenWorld, item: Item, state: RecurrentState | None, delta: LowRankDelta | None
) -> list[str]:
    """The answers to an item's questions, each from a copy of the state."""
    return recall.ask(lm, data, [item], [[]], Start(state, delta), state, 0, open_recall.LONGEST)[0]


@torch.no_grad()
def removal(
    lm: LanguageModel, generator: Generator, data: OpenWorld, memories: int, facts: int, common: LowRankDelta
) -> pd.DataFrame:
    """Recall of two prompts in one memory, the second of which is taken out again; from a blank state.

    Args:
        common: what all changes share (`several_prompts.common_part`); a memory has it once.
    Returns:
        As `open_recall.judged`, by memory ("both"; "removed": the second prompt's change is subtracted; "never": it was
        never there) and about ("kept", "second": the prompt that is asked about).
    Raises:
        UserError: two prompts of so many facts would hardly ever be about different slots.
    """
    most = int(2 * len(data.level.slots()) ** 0.5)  # then one pair in fifty is
    if facts > most:
        raise UserError(f"two prompts of {facts} facts would share a slot of this level; choose 1 to {most}")
    shape, numbers, rows = Shape(facts, 0, facts), count(), []
    for number in range(memories):
        first, second = data.item(next(numbers), shape), data.item(next(numbers), shape)
        while {f.key for f in first.facts} & {f.key for f in second.facts}:
            second = data.item(next(numbers), shape)
        one, two = (generator.memorize(lm, [data.encode_prompt(item)]) for item in (first, second))
        own = two + common.scaled(-1.0)
        both = one + own
        for memory, delta in {"both": both, "removed": both + own.scaled(-1.0), "never": one}.items():
            for about, item in {"kept": first, "second": second}.items():
                rows.append(_row(item, number, _asked(lm, data, item, None, delta), memory=memory, about=about))
    return open_recall.judged(pd.DataFrame(rows))


@torch.no_grad()
def rolling(
    lm: LanguageModel, generator: TokenGenerator, data: OpenWorld, dialogues: int, turns: int = 50, every: int = 5
) -> pd.DataFrame:
    """Recall at the end of a long dialogue, by how many turns ago a fact was stated. Every second turn states one; the
    others are prose.

    After every so many turns, what the user said in them goes into the change, and the state is blank again. Methods:
    "rolling" does that; "carried" keeps the state and has no change; "cut" makes the state blank as often and has no
    change; "wrong" has another dialogue's change.

    Args:
        dialogues: at least 2; turns: an even number, larger than `every`.
    Returns:
        As `open_recall.judged`, one row a method, dialogue and fact; age: turns ago.
    """
    if dialogues < 2 or turns % 2 or not 0 < every < turns:
        raise UserError(
            f"{dialogues} dialogues of {turns} turns, written every {every}: take at least 2 dialogues, an even number "
            "of turns, and fewer of them at a time"
        )
    items = data.items(dialogues, Shape(turns // 2, 0, turns // 2))
    told = [_turns(data, item, turns) for item in items]
    pieces = [range(start, min(start + every, turns)) for start in range(0, turns, every)]
    written = [_memory(lm, generator, [[said[t] for t in piece] for piece in pieces[:-1]]) for said, _ in told]
    rows = []
    for number, (item, (_, lines)) in enumerate(zip(items, told, strict=True)):
        whole, last = [t for line in lines for t in line], [t for k in pieces[-1] for t in lines[k]]
        texts = {"rolling": (last, written[number]), "carried": (whole, None), "cut": (last, None)}
        texts["wrong"] = last, written[(number + 1) % dialogues]
        starts = {method: (_reads(lm, None, text, delta), delta) for method, (text, delta) in texts.items()}
        stated = {fact.key: 2 * place for place, fact in enumerate(item.facts)}
        for method, start in starts.items():
            for probe, text in zip(item.probes, _asked(lm, data, item, *start), strict=True):
                age = turns - 1 - stated[probe.about]
                rows.append(_row(replace(item, probes=(probe,)), number, [text], method=method, age=age))
    return open_recall.judged(pd.DataFrame(rows))


def _turns(data: OpenWorld, item: Item, turns: int) -> tuple[list[str], list[list[int]]]:
    """What the user says in each turn ("" where it is prose), and each turn's tokens."""
    rng, encode = random.Random(item.prompt), data.tokenizer.encode_long
    said = [data.level.statement([item.facts[t // 2]], rng) if t % 2 == 0 else "" for t in range(turns)]
    prose = [[*data.prose.passage(30, rng), *encode("\n")] for _ in said]
    return said, [encode(f"User: {text}\n") if text else prose[t] for t, text in enumerate(said)]


def _memory(lm: LanguageModel, generator: TokenGenerator, pieces: list[list[str]]) -> LowRankDelta:
    """The change that is derived again after every piece, from all that the user said so far (`several_prompts`)."""
    texts = [" ".join(filter(None, piece)) for piece in pieces]
    return delta_of_prompts(
        lm, generator, reduce(lambda memory, text: append_prompt(lm, generator, text, memory), texts, None)
    )


@torch.no_grad()
def instructions_by_turn(
    lm: LanguageModel, generator: Generator, data: OpenWorld, dialogues: int, turns: int = max(TURNS)
) -> pd.DataFrame:
    """The share of a prompt's instructions that the model's own answers follow, turn by turn, after Li et al. 2024.

    In every turn other text comes first, then a question about the prompt, and the model's answer, which it reads as it
    reads everything. Methods: "base", "repeated" (the prompt is read again before every question), "prosg" (the
    prompt's change, and the state), "alone" (the change, and the prompt is never read), "none".

    Returns:
        As `open_recall.judged`, one row a method, dialogue and turn.
    """
    items = data.items(dialogues, Shape(turns, turns * _FILLER, turns, instructions=2))
    newline, rows = data.tokenizer.encode_long("\n"), []
    for number, item in enumerate(items):
        prompt = data.encode_prompt(item)
        delta = generator.memorize(lm, [prompt])
        read = _reads(lm, None, prompt, None)
        methods = {"base": (read, None), "repeated": (read, None), "prosg": (read, delta), "alone": (None, delta)}
        for method, (state, change) in (methods | {"none": (None, None)}).items():
            for turn, probe in enumerate(item.probes, 1):
                filler = [*item.body[(turn - 1) * _FILLER : turn * _FILLER], *newline]
                question = filler + (prompt if method == "repeated" else []) + data.encode_probe(probe)[0]
                state = _reads(lm, state, question[:-1], change)
                (text,) = lm.generate([question[-1:]], state, change, max_new_tokens=open_recall.LONGEST)
                state = _reads(lm, state, question[-1:] + data.tokenizer.encode_long(text) + newline, change)
                rows.append(_row(replace(item, probes=(probe,)), number, [text], method=method, turn=turn))
    return open_recall.judged(pd.DataFrame(rows))


def _reads(
    lm: LanguageModel, state: RecurrentState | None, ids: list[int], delta: LowRankDelta | None
) -> RecurrentState:
    """The state after more tokens."""
    with applied(lm, delta):
        return lm.step_through(torch.tensor([ids], device=next(lm.parameters()).device), state, None)[1]
