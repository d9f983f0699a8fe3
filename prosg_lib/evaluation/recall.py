"""Recall against distance: every method on the same prompts, texts and questions.

For each prompt one text of the largest distance is read once per method; at every distance the state is copied and
each question asked from the copy. A question is answered greedily, as a user would see it. What a method answers
(`answers`) is kept apart from how that is judged (`judged`), so that kept answers can be judged again.

A method may have several trainings, which all answer the same questions. Means, intervals and differences of what is
measured here are computed in `statistics`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.config.sizes import Evaluation
from prosg_lib.deltas.low_rank import LowRankDelta
from prosg_lib.evaluation import reading
from prosg_lib.evaluation.baselines import Baseline, Start, name_of, start
from prosg_lib.generators.base import Generator
from prosg_lib.tasks import open_world
from prosg_lib.tasks.dialogue import COMPETING, Dialogues, Item, Shape
from prosg_lib.tasks.wording import judge
from prosg_lib.training import distributed

_ANSWER_TOKENS = 12  # the longest answer, with all three instructions, has 8
_AT_ONCE = 32  # questions at a time to a model whose state grows: each gets a copy of everything read so far


def measure(
    lm: LanguageModel,
    generators: Mapping[str, Generator],
    methods: Iterable[str | Baseline],
    data: Dialogues,
    distances: Sequence[int],
    facts: int,
    prompts: int,
    probes: int,
) -> pd.DataFrame:
    """Recall of every method at every distance.

    Args:
        methods: see `baselines.start`.
        data: the items' split and seed.
        distances: tokens between prompt and question.
        facts, prompts, probes: facts a prompt, number of prompts, questions a prompt (at most one a fact).
    Returns:
        As `judged`.
    """
    items = data.items(prompts, _shape(facts, distances, probes))
    return judged(pd.DataFrame(_answered(lm, generators, methods, data, items, distances)))


def _shape(facts: int, distances: Sequence[int], probes: int) -> Shape:
    return Shape(facts, max(distances), min(probes, facts), instructions=2)


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Scores of answers (`tasks.wording.judge`).

    Args:
        rows: of `answers`.
    Returns:
        One row a method, training, distance, facts, seed and prompt: recall and followed (shares of the questions
        answered right, of the instructions kept; NaN where there are none), competing_total and competing (words of
        answers about other people in the text since the previous distance, and the share of them that the model ranks
        first; NaN where there are none).
    """
    found = []
    for row in rows.to_dict("records"):
        pairs = zip(row["predicted"], row["gold"], strict=True)
        verdicts = [judge(text, value, row["instructions"]) for text, value in pairs]
        total = row["competing_total"]
        found.append(
            {name: row[name] for name in ("method", "training", "distance", "facts", "seed", "prompt")}
            | {
                "recall": float(np.mean([v.recalled for v in verdicts])),
                "followed": float(np.mean([v.followed for v in verdicts])) if row["instructions"] else float("nan"),
                "competing_total": total,
                "competing": row["competing_right"] / total if total else float("nan"),
            }
        )
    return pd.DataFrame(found)


@torch.no_grad()
def _answered(
    lm: LanguageModel,
    generators: Mapping[str, Generator],
    methods: Iterable[str | Baseline],
    data: Dialogues,
    items: list[Item],
    distances: Sequence[int],
) -> Iterator[dict]:
    """Rows of `answers`: each method reads every item's text once and stops at each distance, nearest first."""
    encoded = [list(data.encode_prompt(item)) for item in items]
    for method in methods:
        begin = start(method, lm, generators, encoded)
        for distance, state, total, right in read_texts(lm, begin, items, sorted(set(distances))):
            predicted = ask(lm, data, items, encoded, begin, state, distance)
            for number, item in enumerate(items):
                yield {
                    "method": name_of(method),
                    "training": 0,
                    "distance": distance,
                    "facts": len(item.facts),
                    "seed": data.seed,
                    "prompt": number,
                    "instructions": dict(item.instructions),
                    "questions": [p.question for p in item.probes],
                    "gold": [p.fact.value for p in item.probes],
                    "predicted": predicted[number],
                    "competing_total": total[number],
                    "competing_right": right[number],
                }


def read_texts(
    lm: LanguageModel, begin: Start, items: list[Item], distances: list[int]
) -> Iterator[tuple[int, RecurrentState | None, list[int], list[int]]]:
    """Reads the items' texts piece by piece; yields (distance, state there, and for every item the number of words of
    competing answers since the previous distance, and how many of them were predicted right)."""
    competing = torch.tensor([item.body_kind for item in items], device=next(lm.parameters()).device) == COMPETING
    body = torch.tensor([item.body for item in items], device=competing.device)
    at = 0
    for distance, state, before in reading.read(lm, begin, [item.body for item in items], distances):
        chosen = competing[:, at:distance].clone()
        if at == 0:
            chosen[:, :1] = False  # no token of the text comes before the first
        if before is None:
            chosen[:] = False  # the hidden states that these words were predicted from are not known
        hit = torch.zeros_like(chosen)
        if chosen.any():
            hit[chosen] = lm.read_out(before[chosen]).argmax(-1) == body[:, at:distance][chosen]
        yield distance, state, chosen.sum(1).tolist(), hit.sum(1).tolist()
        at = distance


def ask(
    lm: LanguageModel,
    data: Dialogues,
    items: list[Item],
    prompts: list[list[int]],
    begin: Start,
    state: RecurrentState | None,
    distance: int,
    longest: int = _ANSWER_TOKENS,
) -> list[list[str]]:
    """The generated answers to every item's questions, each asked from its own copy of the state."""
    newline = data.tokenizer.encode("\n")
    # A question begins a new line; where the distance cuts a line of the text in the middle, the line is ended first.
    ends = [list(newline) if distance and item.body[distance - 1] != newline[-1] else [] for item in items]
    owner = [i for i, item in enumerate(items) for _ in item.probes]
    lead = [ends[i] + (prompts[i] if begin.repeat else []) for i in range(len(items))]
    questions = [lead[i] + list(data.encode_probe(p)[0]) for i, item in enumerate(items) for p in item.probes]
    texts = []
    together = _AT_ONCE if lm.state_grows else len(owner)
    for first in range(0, len(owner), together):
        rows = owner[first : first + together]
        forked, copies = begin.select(rows), None if state is None else state.select(rows)
        texts += reading.answering(lm, forked).generate(
            questions[first : first + together], copies, forked.delta, max_new_tokens=longest
        )
    texts = iter(texts)
    return [[next(texts) for _ in item.probes] for item in items]


@torch.no_grad()
def recall_alone(lm: LanguageModel, delta: LowRankDelta | None, data: Dialogues, items: list[Item]) -> np.ndarray:
    """Share of each item's questions answered right from a blank state with only the prompt's delta in the weights.

    Args:
        delta: one an item; None: no delta, so that the prompt is nowhere.
    Returns:
        (items,).
    """
    prompts = [list(data.encode_prompt(item)) for item in items]
    predicted = ask(lm, data, items, prompts, Start(None, delta), None, 0)
    verdicts = [
        [judge(text, probe.fact.value, item.instructions) for text, probe in zip(texts, item.probes, strict=True)]
        for item, texts in zip(items, predicted, strict=True)
    ]
    return np.array([np.mean([v.recalled for v in row]) for row in verdicts])


def knowledge(
    lm: LanguageModel,
    generators: Mapping[str, Generator],
    methods: Iterable[str | Baseline],
    data: Dialogues,
    distances: Sequence[int],
    facts: int,
    prompts: int,
) -> pd.DataFrame:
    """Every single answer: which facts of which prompt a method still knows at which distance.

    Args:
        as in `measure`; there is one question a fact.
    Returns:
        One row a method, distance, prompt and fact, facts in the order in which the prompt states them: method,
        distance, prompt, slot, value, question, answer (as generated), right (exactly the value), followed (share of
        the instructions kept).
    """
    items = data.items(prompts, Shape(facts, max(distances), facts, instructions=2))
    rows = []
    for row in _answered(lm, generators, methods, data, items, distances):
        item = items[row["prompt"]]
        answered = zip(item.probes, row["predicted"], strict=True)
        for probe, text in sorted(answered, key=lambda pair: item.facts.index(pair[0].fact)):
            verdict = judge(text, probe.fact.value, item.instructions)
            rows.append(
                {name: row[name] for name in ("method", "distance", "prompt")}
                | {
                    "slot": probe.fact.slot,
                    "value": probe.fact.value,
                    "question": probe.question,
                    "answer": text.strip(),
                    "right": verdict.recalled,
                    "followed": verdict.followed,
                }
            )
    return pd.DataFrame(rows)


def answers(
    lm: LanguageModel,
    generators: Mapping[str, Generator],
    methods: Iterable[str | Baseline],
    split: str,
    sizes: Evaluation,
    data_of: Callable[[str, int], Dialogues],
    facts: Sequence[int] | None = None,
    distances: Sequence[int] | None = None,
) -> pd.DataFrame:
    """What every method answers, over all seeds and numbers of facts.

    `sizes.prompts` prompts a seed with the main number of facts, `sizes.other_prompts` with the others. Several
    processes (`accelerate launch`) share the work, and each returns all of it, as a single one would.

    Args:
        data_of: (split, seed) -> Dialogues.
        facts, distances: None: those of `sizes`.
    Returns:
        One row a method, distance, number of facts, seed and prompt, with the columns shown in `predictions`.
    """
    distances = distances or sizes.distances

    @lru_cache(maxsize=1)  # the methods of one number of facts and seed follow each other
    def drawn(k: int, seed: int) -> tuple[Dialogues, list[Item]]:
        data, prompts = data_of(split, seed), sizes.prompts if k == sizes.main_facts else sizes.other_prompts
        return data, data.items(prompts, _shape(k, distances, sizes.probes))

    def rows_of(unit: tuple[int, int, str | Baseline]) -> list[dict]:
        k, seed, method = unit
        return list(_answered(lm, generators, [method], *drawn(k, seed), distances))

    units = list(product(facts or sizes.facts, sizes.seeds, methods))
    return pd.DataFrame([row for rows in distributed.shared(units, rows_of) for row in rows])


@torch.no_grad()
def prose_losses(
    lm: LanguageModel,
    generators: Mapping[str, Generator],
    method: str | Baseline,
    data: Dialogues | open_world.OpenWorld,
    items: Sequence[Item | open_world.Item],
    length: int = 256,
) -> np.ndarray:
    """Mean negative log likelihood of prose after each prompt, nats a token, (items,); perplexity is exp of it.

    Args:
        items: of `data`, whose prose it is.
    """
    begin = start(method, lm, generators, [list(data.encode_prompt(item)) for item in items])
    rng, device = random.Random(f"prose/{data.seed}/{data.name}"), next(lm.parameters()).device
    ids = torch.tensor([data.prose.passage(length, rng) for _ in items], device=device)
    (read,) = reading.read(lm, begin, ids.tolist(), [length])
    logits = lm.read_out(read.before[:, 1:])
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1).cpu().numpy()
