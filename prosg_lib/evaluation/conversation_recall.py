"""What a model with a window still answers about a prompt, by distance, in a form that it understands.

Every method gets the same prompts, the same text behind them and the same questions. The text is read once a prompt and
method; at every distance each question is asked from a copy of the state. What a method answers (`answers`) is kept
apart from how that is judged (`judged`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.backbones.state import RecurrentState
from prosg_lib.evaluation import reading
from prosg_lib.evaluation.baselines import Start, start
from prosg_lib.evaluation.open_recall import plain
from prosg_lib.generators.base import Generator
from prosg_lib.tasks.conversations import READING, Conversation, Form
from prosg_lib.text.prose import ProseTokens

OTHERS = "wrong-alone"
"""A method: as `alone`, with the change of another prompt. Control."""

METHODS = ("none", "base", "repeated", "prosg-token", "wrong", "static", "alone", OTHERS)
"""`prosg-token`, `base` and so on: see `baselines.METHODS`; `alone`: only the prompt's change, the window is empty."""

_TOKENS = 24  # of an answer
_AT_ONCE = 32  # questions


@torch.no_grad()
def answers(
    lm: LanguageModel,
    generators: Mapping[str, Generator],
    methods: Iterable[str],
    conversations: Sequence[Conversation],
    prose: ProseTokens,
    distances: Sequence[int] = (0,),
    form: Form = READING,
    at_once: int = 8,
) -> pd.DataFrame:
    """What every method answers to every question, after every distance of prose or conversation.

    Args:
        generators: "token", "static", as far as the methods need them.
        methods: of `METHODS`; the plain model's see the form's opening in front of the prompt, or of the question.
        at_once: prompts that are read together.
    Returns:
        One row a method, distance and conversation: method, distance, prompt (its number), and lists with one entry a
        question: questions, kinds, gold (right answers, of which any will do), predicted.
    """
    distances = sorted(set(distances))
    rng = random.Random("conversations")
    texts = [prose.passage(max(distances), rng) if max(distances) else [] for _ in conversations]
    rows = []
    for method in methods:
        encoded = _encoded(lm, conversations, form, method)
        for part in _parts(len(conversations), at_once):
            begin = _start(method, lm, generators, encoded[part])
            for distance, state, _ in reading.read(lm, begin, texts[part], distances):
                opening = form.opening if method == "none" else ""
                told = _asked(lm, begin, state, encoded[part], conversations[part], form, opening)
                for number, predicted in enumerate(told, part.start):
                    conversation = conversations[number]
                    rows.append(
                        {
                            "method": method,
                            "distance": distance,
                            "prompt": number,
                            "questions": [q.text for q in conversation.questions],
                            "kinds": [q.kind for q in conversation.questions],
                            "gold": [list(q.answers) for q in conversation.questions],
                            "predicted": predicted,
                        }
                    )
    return pd.DataFrame(rows)


def _encoded(lm: LanguageModel, conversations: Sequence[Conversation], form: Form, method: str) -> list[list[int]]:
    """The prompts. The plain model's begin with the form's opening, which trained generators do without."""
    opening = form.opening if method in ("base", "repeated") else ""
    return [list(lm.needed_tokenizer().encode(opening + form.prompt(c.prompt))) for c in conversations]


def _parts(count: int, at_once: int) -> list[slice]:
    """Some at a time; none is left alone, since a control needs another prompt."""
    starts = list(range(0, max(count - 1, 1), at_once))
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def _start(method: str, lm: LanguageModel, generators: Mapping[str, Generator], encoded: list[list[int]]) -> Start:
    """As `baselines.start`; where a change is alone, the state after the prompt is dropped."""
    alone = {"alone": "prosg-token", OTHERS: "wrong"}
    begin = start(alone.get(method, method), lm, generators, encoded)
    return replace(begin, state=None) if method in alone else begin


def _asked(
    lm: LanguageModel,
    begin: Start,
    state: RecurrentState | None,
    prompts: Sequence[Sequence[int]],
    conversations: Sequence[Conversation],
    form: Form,
    opening: str,
) -> list[list[str]]:
    """The generated answers to every conversation's questions, each from its own copy of the state."""
    encode = lm.needed_tokenizer().encode
    owner = [i for i, c in enumerate(conversations) for _ in c.questions]
    asked = [
        [*(prompts[i] if begin.repeat else ()), *encode(opening + form.question(q.text))]
        for i, c in enumerate(conversations)
        for q in c.questions
    ]
    said: list[str] = []
    for first in range(0, len(owner), _AT_ONCE):
        rows = owner[first : first + _AT_ONCE]
        forked, copies = begin.select(rows), None if state is None else state.select(rows)
        model = reading.answering(lm, forked)
        said += model.generate(asked[first : first + _AT_ONCE], copies, forked.delta, max_new_tokens=_TOKENS)
    told: Iterator[str] = iter(said)
    return [[next(told) for _ in c.questions] for c in conversations]


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Scores of answers: one row a row of these, with method, distance, prompt, questions (their number), exact (share
    of the answers that are a right one, but for case, articles and punctuation around it) and contained (share that
    contain a right one as whole words, which a sentence does)."""
    found = []
    for row in rows.to_dict("records"):
        pairs = list(zip(row["predicted"], row["gold"], strict=True))
        found.append(
            {name: row[name] for name in ("method", "distance", "prompt")}
            | {
                "questions": len(pairs),
                "exact": float(np.mean([plain(said) in map(plain, gold) for said, gold in pairs])),
                "contained": float(np.mean([any(_words(g) in _words(said) for g in gold) for said, gold in pairs])),
            }
        )
    return pd.DataFrame(found)


def _words(text: str) -> str:
    """The words of a text, each between spaces: a text contains another where this one does."""
    return f" {' '.join(''.join(c if c.isalnum() else ' ' for c in text.casefold()).split())} "


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Of `judged`: means over questions, one row a method and distance."""
    weighed = rows.assign(**{name: rows[name] * rows.questions for name in ("exact", "contained")})
    sums = weighed.groupby(["method", "distance"], sort=False)[["exact", "contained", "questions"]].sum()
    return sums.assign(exact=sums.exact / sums.questions, contained=sums.contained / sums.questions).reset_index()


@torch.no_grad()
def prose_losses(
    lm: LanguageModel,
    generators: Mapping[str, Generator],
    method: str,
    conversations: Sequence[Conversation],
    prose: ProseTokens,
    length: int = 256,
    form: Form = READING,
    at_once: int = 8,
) -> np.ndarray:
    """Mean negative log likelihood of prose, or of conversation, after each prompt, nats a token, (conversations,); the
    perplexity is exp of it. The same text for every method, so that differences are paired."""
    encoded = _encoded(lm, conversations, form, method)
    rng, found = random.Random("conversations' prose"), []
    for part in _parts(len(conversations), at_once):
        begin = _start(method, lm, generators, encoded[part])
        texts = [prose.passage(length, rng) for _ in encoded[part]]
        (read,) = reading.read(lm, begin, texts, [length])
        gold = torch.tensor(texts, device=read.before.device)[:, 1:]
        logits = lm.read_out(read.before[:, 1:]).float()
        found.append(F.cross_entropy(logits.transpose(1, 2), gold, reduction="none").mean(1).cpu().numpy())
    return np.concatenate(found)
