"""Recall in the open world: every method on the same dialogues, level by level and distance by distance.

What a method answers (`answers`) is kept apart from how that is judged (`judged`).
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.evaluation import recall
from prosg_lib.evaluation.baselines import Baseline, name_of, start
from prosg_lib.generators.base import Generator
from prosg_lib.tasks.open_wording import UNKNOWN, judge
from prosg_lib.tasks.open_world import Item, OpenWorld

KINDS = ("fact", "other", "update", "query", "unknown")
"""Kinds of question; see `open_world.Probe`."""

ALONE = {"alone": "prosg-token", "final-alone": "prosg-final"}
"""Methods: the change of that one and nothing else; the prompt is never in the state."""

LONGEST = 28
"""Tokens of an answer: a value of five, and three instructions of up to five with their commas."""

RECALL = ("fact", "other", "update")
"""Kinds that count as recall of the prompt."""


@torch.no_grad()
def answers(
    lm: LanguageModel,
    generators: Mapping[str, Generator],
    methods: Iterable[str | Baseline],
    data: OpenWorld,
    items: Sequence[Item],
    distances: Sequence[int],
) -> pd.DataFrame:
    """What every method answers to every question, at every distance.

    Args:
        methods: see `baselines.start`; or of `ALONE`.
        items: of `data`; their bodies are as long as the largest distance.
    Returns:
        One row a method, distance and item: method, distance, seed, prompt (the item's number), facts, instructions,
        and lists with one entry a question: questions, kinds, gold (right answers, of which any will do), predicted;
        competing_total and competing_right: tokens of answers about other people in the text since the previous
        distance, and how many of them the model ranks first.
    """
    return pd.DataFrame(_answered(lm, generators, methods, data, list(items), sorted(set(distances))))


def _answered(lm, generators, methods, data, items, distances) -> Iterator[dict]:
    encoded = [list(data.encode_prompt(item)) for item in items]
    for method in methods:
        begin = start(ALONE.get(method, method), lm, generators, encoded)
        begin = replace(begin, state=None) if method in ALONE else begin
        for distance, state, total, right in recall.read_texts(lm, begin, items, distances):
            predicted = recall.ask(lm, data, items, encoded, begin, state, distance, LONGEST)
            for number, item in enumerate(items):
                yield {
                    "method": name_of(method),
                    "distance": distance,
                    "seed": data.seed,
                    "prompt": number,
                    "facts": len(item.facts),
                    "instructions": dict(item.instructions),
                    "questions": [p.question for p in item.probes],
                    "kinds": [p.kind for p in item.probes],
                    "gold": [list(p.right) for p in item.probes],
                    "predicted": predicted[number],
                    "competing_total": total[number],
                    "competing_right": right[number],
                }


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Scores of answers.

    Args:
        rows: of `answers`.
    Returns:
        One row a row of these: method, distance, seed, prompt, facts, and whatever else names it; recall (share of the
        questions about the prompt answered exactly right), each of `KINDS` (the same, of one kind of question),
        abstained (share of the questions about the prompt that were answered by `UNKNOWN`), followed (share of the
        instructions kept), competing_total, competing; NaN where there is nothing to count.
    """
    found = []
    for row in rows.to_dict("records"):
        verdicts = [judge(text, row["instructions"]) for text in row["predicted"]]
        right = [plain(v.said) in map(plain, gold) for v, gold in zip(verdicts, row["gold"], strict=True)]
        kinds, said = np.array(row["kinds"]), np.array([plain(v.said) == plain(UNKNOWN) for v in verdicts])
        about = np.isin(kinds, RECALL)
        total = row.pop("competing_total")
        scores = {"recall": _share(right, about), "abstained": _share(said, about)}
        scores |= {kind: _share(right, kinds == kind) for kind in KINDS}
        scores["followed"] = float(np.mean([v.followed for v in verdicts])) if row["instructions"] else float("nan")
        scores |= {"competing_total": total, "competing": row["competing_right"] / total if total else float("nan")}
        names = [
            n for n in row if n not in ("instructions", "questions", "kinds", "gold", "predicted", "competing_right")
        ]
        found.append({name: row[name] for name in names} | scores)
    return pd.DataFrame(found)


def _share(right: Sequence[bool], which: np.ndarray) -> float:
    return float(np.mean(np.array(right)[which])) if which.any() else float("nan")


def plain(answer: str) -> str:
    """An answer without case, articles, and punctuation around it."""
    words = answer.casefold().strip(string.punctuation + string.whitespace).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)
