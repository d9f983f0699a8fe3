"""Recall against distance: every method on the same prompts, texts and questions, with intervals.

For each prompt one text of the largest distance is read once per method; at every distance the state is copied and
each question asked from the copy. A question is answered greedily, as a user would see it, and judged as text: what a
method said (`Answers`) is one thing, and how it is judged (`judged`) another, so that kept answers can be judged again.

A method may have several trainings, which are asked the same; its numbers are means over them, and its intervals are of
two levels: other prompts, and other trainings, might have been drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
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
from prosg_lib.errors import UserError
from prosg_lib.evaluation import reading
from prosg_lib.evaluation.baselines import Start, start
from prosg_lib.evaluation.predictions import Answers
from prosg_lib.evaluation.statistics import Estimate, resampled, resampled_means
from prosg_lib.generators.base import Generator
from prosg_lib.tasks.dialogue import COMPETING, Dialogues, Item, Shape, judge
from prosg_lib.training import distributed

_ANSWER_TOKENS = 12  # the longest answer, with all three instructions, has 8
_AT_ONCE = 32  # questions to a model whose state grows, at a time: each has a copy of all that was read


def measure(
    lm: LanguageModel,
    generators: dict[str, Generator],
    methods: Iterable[str],
    data: Dialogues,
    distances: Sequence[int],
    facts: int,
    prompts: int,
    probes: int,
) -> pd.DataFrame:
    """Recall of every method at every distance.

    Args:
        data: the items' split and seed.
        distances: tokens between prompt and question.
        facts, prompts, probes: facts a prompt, number of prompts, questions a prompt (at most one a fact).
    Returns:
        As `judged`.
    """
    items = data.items(prompts, _shape(facts, distances, probes))
    return judged(_answered(lm, generators, methods, data, items, distances))


def _shape(facts: int, distances: Sequence[int], probes: int) -> Shape:
    return Shape(facts, max(distances), min(probes, facts), instructions=2)


def judged(answers: Iterable[Answers]) -> pd.DataFrame:
    """What was said, judged (`tasks.dialogue.judge`).

    Returns:
        One row a method, training, distance, facts, seed and prompt: recall and followed (shares of the questions
        answered right, of the instructions kept; NaN where there were none), asked and competing (words of answers
        about other people in the text since the distance before, and the share of them that the model puts first; NaN
        where there were none).
    """
    rows = []
    for row in answers:
        verdicts = [judge(text, value, row.instructions) for text, value in zip(row.predicted, row.gold, strict=True)]
        rows.append(
            {
                "method": row.method,
                "training": row.training,
                "distance": row.distance,
                "facts": row.facts,
                "seed": row.seed,
                "prompt": row.prompt,
                "recall": float(np.mean([v.recalled for v in verdicts])),
                "followed": float(np.mean([v.followed for v in verdicts])) if row.instructions else float("nan"),
                "asked": row.asked,
                "competing": row.right / row.asked if row.asked else float("nan"),
            }
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def _answered(
    lm: LanguageModel,
    generators: dict[str, Generator],
    methods: Iterable[str],
    data: Dialogues,
    items: list[Item],
    distances: Sequence[int],
) -> Iterator[Answers]:
    """What every method says, which reads every item's text once, at each distance, nearest first, item by item."""
    encoded = [list(data.encode_prompt(item)) for item in items]
    for method in methods:
        begin = start(method, lm, generators, encoded)
        for distance, state, asked, right in _read(lm, begin, items, sorted(set(distances))):
            said = _ask(lm, data, items, encoded, begin, state, distance)
            for number, item in enumerate(items):
                yield Answers(
                    method=method,
                    distance=distance,
                    facts=len(item.facts),
                    seed=data.seed,
                    prompt=number,
                    instructions=item.instructions,
                    questions=tuple(p.question for p in item.probes),
                    gold=tuple(p.fact.value for p in item.probes),
                    predicted=tuple(said[number]),
                    asked=asked[number],
                    right=right[number],
                )


def _read(lm: LanguageModel, begin: Start, items: list[Item], distances: list[int]):
    """Reads the items' texts piece by piece; yields (distance, state there, and for every item the number of words of
    competing answers since the distance before, and how many of them were right)."""
    competing = torch.tensor([item.body_kind for item in items], device=next(lm.parameters()).device) == COMPETING
    body = torch.tensor([item.body for item in items], device=competing.device)
    at = 0
    for distance, state, before in reading.read(lm, begin, [item.body for item in items], distances):
        chosen = competing[:, at:distance].clone()
        if at == 0:
            chosen[:, :1] = False  # nothing that was read here tells the first
        if before is None:
            chosen[:] = False  # nothing says what each of these words was predicted from
        hit = torch.zeros_like(chosen)
        if chosen.any():
            hit[chosen] = lm.read_out(before[chosen]).argmax(-1) == body[:, at:distance][chosen]
        yield distance, state, chosen.sum(1).tolist(), hit.sum(1).tolist()
        at = distance


def _ask(
    lm: LanguageModel,
    data: Dialogues,
    items: list[Item],
    prompts: list[list[int]],
    begin: Start,
    state: RecurrentState | None,
    distance: int,
) -> list[list[str]]:
    """Every item's questions, each from its own copy of the state; the generated answers."""
    newline = data.tokenizer.encode("\n")
    # Right before the question a line ends: the prompt's, the text's, or one that the distance cut in the middle.
    ends = [list(newline) if distance and item.body[distance - 1] != newline[-1] else [] for item in items]
    owner = [i for i, item in enumerate(items) for _ in item.probes]
    again = [ends[i] + (prompts[i] if begin.repeat else []) for i in range(len(items))]
    questions = [again[i] + list(data.encode_probe(p)[0]) for i, item in enumerate(items) for p in item.probes]
    texts = []
    together = _AT_ONCE if lm.state_grows else len(owner)
    for first in range(0, len(owner), together):
        rows = owner[first : first + together]
        asked, forked = begin.select(rows), None if state is None else state.select(rows)
        texts += reading.answering(lm, asked).generate(
            questions[first : first + together], forked, asked.delta, max_new_tokens=_ANSWER_TOKENS
        )
    texts = iter(texts)
    return [[next(texts) for _ in item.probes] for item in items]


@torch.no_grad()
def recall_alone(lm: LanguageModel, delta: LowRankDelta | None, data: Dialogues, items: list[Item]) -> np.ndarray:
    """Share of each item's questions answered right from a blank state, the prompt's delta alone in the weights.

    Args:
        delta: one change per item; None: none, so the prompt is nowhere.
    Returns:
        (items,).
    """
    prompts = [list(data.encode_prompt(item)) for item in items]
    said = _ask(lm, data, items, prompts, Start(None, delta), None, 0)
    verdicts = [
        [judge(text, probe.fact.value, item.instructions) for text, probe in zip(texts, item.probes, strict=True)]
        for item, texts in zip(items, said, strict=True)
    ]
    return np.array([np.mean([v.recalled for v in row]) for row in verdicts])


def knowledge(
    lm: LanguageModel,
    generators: dict[str, Generator],
    methods: Iterable[str],
    data: Dialogues,
    distances: Sequence[int],
    facts: int,
    prompts: int,
) -> pd.DataFrame:
    """Every single answer: which facts of which prompt a method still knows at which distance.

    Args:
        as in `measure`; every fact of a prompt is asked about.
    Returns:
        One row a method, distance, prompt and fact, facts in the order in which the prompt tells them: method,
        distance, prompt, slot, value, question, answer (as generated), right (the value, exactly), followed (share of
        the instructions kept).
    """
    items = data.items(prompts, Shape(facts, max(distances), facts, instructions=2))
    rows = []
    for row in _answered(lm, generators, methods, data, items, distances):
        item = items[row.prompt]
        said = zip(item.probes, row.predicted, strict=True)
        for probe, text in sorted(said, key=lambda pair: item.facts.index(pair[0].fact)):
            verdict = judge(text, probe.fact.value, row.instructions)
            rows.append(
                {
                    "method": row.method,
                    "distance": row.distance,
                    "prompt": row.prompt,
                    "slot": probe.fact.slot,
                    "value": probe.fact.value,
                    "question": probe.question,
                    "answer": text.strip(),
                    "right": verdict.recalled,
                    "followed": verdict.followed,
                }
            )
    return pd.DataFrame(rows)


def sweep(
    lm: LanguageModel,
    generators: dict[str, Generator],
    methods: Iterable[str],
    split: str,
    sizes: Evaluation,
    data_of: Callable[[str, int], Dialogues],
    facts: Sequence[int] | None = None,
    distances: Sequence[int] | None = None,
) -> pd.DataFrame:
    """`measure` over the seeds and numbers of facts of a profile's sizes: `answers`, `judged`."""
    return judged(answers(lm, generators, methods, split, sizes, data_of, facts, distances))


def answers(
    lm: LanguageModel,
    generators: dict[str, Generator],
    methods: Iterable[str],
    split: str,
    sizes: Evaluation,
    data_of: Callable[[str, int], Dialogues],
    facts: Sequence[int] | None = None,
    distances: Sequence[int] | None = None,
) -> list[Answers]:
    """What every method says, over the seeds and numbers of facts of a profile's sizes.

    `sizes.prompts` prompts a seed with the main number of facts, `sizes.other_prompts` with the others. Of several
    processes (`accelerate launch`) each asks a share, and all return all of it, as one alone would.

    Args:
        data_of: (split, seed) -> Dialogues.
    """
    distances = distances or sizes.distances

    @lru_cache(maxsize=1)  # the methods of one number and seed follow each other
    def drawn(k: int, seed: int) -> tuple[Dialogues, list[Item]]:
        data, prompts = data_of(split, seed), sizes.prompts if k == sizes.main_facts else sizes.other_prompts
        return data, data.items(prompts, _shape(k, distances, sizes.probes))

    def said(unit: tuple[int, int, str]) -> list[Answers]:
        k, seed, method = unit
        return list(_answered(lm, generators, [method], *drawn(k, seed), distances))

    units = list(product(facts or sizes.facts, sizes.seeds, methods))
    return [row for rows in distributed.shared(units, said) for row in rows]


def answers_by_training(
    lm: LanguageModel,
    trainings: Mapping[int, Generator],
    split: str,
    sizes: Evaluation,
    data_of: Callable[[str, int], Dialogues],
    facts: Sequence[int] | None = None,
    distances: Sequence[int] | None = None,
) -> list[Answers]:
    """`answers` of the method "prosg-token", every training of its generator to the same questions.

    Args:
        trainings: number -> token-wise generator (`ablations.trainings`).
    """
    told = (["prosg-token"], split, sizes, data_of, facts, distances)
    return [
        replace(row, training=number)
        for number, generator in trainings.items()
        for row in answers(lm, {"token": generator}, *told)
    ]


def _table(frame: pd.DataFrame, column: str, facts: int, distance: int, methods: Sequence[str]) -> np.ndarray:
    """(methods, trainings, prompts of all seeds), as `_crossed`."""
    part = _numbered(frame[(frame.facts == facts) & (frame.distance == distance)])
    missing = [m for m in methods if m not in set(part.method)]
    if missing:
        raise UserError(f"{', '.join(missing)} was not measured at {distance} tokens with {facts} facts")
    return _crossed(part.pivot(index=["seed", "prompt"], columns=["method", "training"], values=column), methods)


def _numbered(frame: pd.DataFrame) -> pd.DataFrame:
    """With the column `training`, which what was measured of one training alone need not have."""
    return frame if "training" in frame else frame.assign(training=0)


def _crossed(wide: pd.DataFrame, methods: Sequence[str]) -> np.ndarray:
    """(methods, trainings, prompts), the same prompts in the same order for all; a method that was trained once, or not
    at all, is the same in every training.

    Args:
        wide: one row a prompt, one column a method and training.
    Raises:
        UserError: of two methods with several trainings each, they are others.
    """
    parts = [wide[method] for method in methods]
    numbers = {tuple(part.columns) for part in parts if part.shape[1] > 1}
    if len(numbers) > 1:
        raise UserError(f"{', '.join(methods)} have other trainings each, and cannot be compared training by training")
    most = max(part.shape[1] for part in parts)
    return np.stack([np.broadcast_to(part.to_numpy().T, (most, len(wide))) for part in parts])


def estimate(frame: pd.DataFrame, method: str, distance: int, facts: int = 6, column: str = "recall") -> Estimate:
    """Mean over all prompts, seeds and trainings, with its interval (`resampled`)."""
    return resampled(_table(frame, column, facts, distance, [method]), lambda means: means[0])


def gap_recovered(frame: pd.DataFrame, method: str, distance: int, facts: int = 6) -> Estimate:
    """(R - R_none) / (R_repeated - R_none): 0 is no better than no prompt, 1 as good as the prompt right there.

    NaN where there is no gap, that is where the repeated prompt does not help either.
    """
    table = _table(frame, "recall", facts, distance, [method, "none", "repeated"])
    return resampled(table, lambda m: _ratio(m[0] - m[1], m[2] - m[1]))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below > 1e-9, above / np.where(below > 1e-9, below, 1.0), np.nan)


def differences(frame: pd.DataFrame, method: str, other: str, facts: int = 6) -> dict[int, Estimate]:
    """Recall of one method minus another's by distance, paired, with a simultaneous 95 % band (bootstrap, max-t), over
    prompts, and over trainings where there are several (`resampled`).

    The band covers the whole curve: where there is no difference at any distance, it leaves out 0 somewhere in one case
    of twenty, while one interval a distance would do so in up to one case of twenty for each of them.
    """
    distances = sorted(frame[frame.facts == facts].distance.unique().tolist())
    tables = [_table(frame, "recall", facts, d, [method, other]) for d in distances]
    apart = np.stack([table[0] - table[1] for table in tables])  # (distances, trainings, prompts)
    means, middle = resampled_means(apart), apart.mean((1, 2))  # (distances, resamples), (distances,)
    error = means.std(1, keepdims=True)
    away = np.abs(means - middle[:, None]) / np.where(error > 1e-12, error, 1.0)
    width = np.quantile(away.max(0), 0.95) * error[:, 0]
    return {d: Estimate(float(m), float(m - w), float(m + w)) for d, m, w in zip(distances, middle, width, strict=True)}


def locality(frame: pd.DataFrame, method: str, other: str = "base", facts: int = 6) -> Estimate:
    """Right answers about other people, pooled over the whole text, as a ratio of two methods: 1 is nothing lost.

    NaN where none were asked for, or the other method has none right.
    """
    part = _numbered(frame[(frame.facts == facts) & (frame.asked > 0)])
    if not {method, other} <= set(part.method):
        return Estimate(float("nan"), float("nan"), float("nan"))
    right = (part.competing * part.asked).groupby([part.seed, part.prompt, part.method, part.training]).sum()
    return resampled(_crossed(right.unstack([2, 3]), [method, other]), lambda m: _ratio(m[0], m[1]))


def by_distance(
    statistic: Callable[..., Estimate], frame: pd.DataFrame, methods: Iterable[str], facts: int = 6
) -> pd.DataFrame:
    """A table of estimates, one row a method and one column a distance.

    Args:
        statistic: (frame, method, distance, facts) -> Estimate, as `estimate` and `gap_recovered` are.
    """
    distances = sorted(frame[frame.facts == facts].distance.unique().tolist())
    cells = [[statistic(frame, method, d, facts) for d in distances] for method in methods]
    return pd.DataFrame(cells, index=list(methods), columns=distances)


def by_training(frame: pd.DataFrame, method: str, facts: int = 6) -> pd.DataFrame:
    """Recall of every training of a method, with intervals over prompts: one row a training, one column a distance."""
    own = _numbered(frame[frame.method == method])
    tables = {n: by_distance(estimate, part, [method], facts) for n, part in own.groupby("training")}
    return pd.concat([table.set_axis([n]) for n, table in tables.items()])


def half_life(frame: pd.DataFrame, method: str, facts: int = 6) -> float:
    """Tokens after which recall is half of that at distance 0, linear between in log(1 + d); inf: not reached."""
    part = frame[(frame.facts == facts) & (frame.method == method)]
    means = part.groupby("distance").recall.mean()
    x, y = np.log1p(means.index.to_numpy(float)), means.to_numpy()
    half = y[0] / 2
    below = np.flatnonzero(y < half)
    if not len(below):
        return float("inf")
    j = below[0]
    share = (y[j - 1] - half) / (y[j - 1] - y[j])
    return float(np.expm1(x[j - 1] + share * (x[j] - x[j - 1])))


@torch.no_grad()
def prose_nll(
    lm: LanguageModel, generators: dict[str, Generator], method: str, data: Dialogues, prompts: int, length: int = 256
) -> np.ndarray:
    """Mean negative log likelihood of prose after each prompt, nats a token, (prompts,); perplexity is exp of it."""
    items = data.items(prompts, Shape(6, 0, 1, instructions=2))
    begin = start(method, lm, generators, [list(data.encode_prompt(item)) for item in items])
    rng = random.Random(f"prose/{data.seed}/{data.split}")
    device = next(lm.parameters()).device
    ids = torch.tensor([data.prose.passage(length, rng) for _ in items], device=device)
    (read,) = reading.read(lm, begin, ids.tolist(), [length])
    logits = lm.read_out(read.before[:, 1:])
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1).cpu().numpy()
