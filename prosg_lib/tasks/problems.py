"""What the established tests of memory have in common: something to remember, what is read afterwards, what is judged.

A problem is token ids, so that a test over texts works with any tokenizer, and one over tokens without any. It is
answered teacher-forced: the rest is read as it stands, in one pass, and at the judged positions the likeliest next
token should be the gold one. Where these are the tokens of an answer, that is what greedy generation would have said
(see `pair_evaluation`).

Splits share the distribution and no content: a hash of what is to be remembered says which split it belongs to, and
others are drawn again.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prosg_lib.errors import UserError
from prosg_lib.tasks.examples import Examples
from prosg_lib.text.padding import Rows, left_padded
from prosg_lib.text.prose import check_split
from prosg_lib.text.tokenizer import Tokenizer

Content = TypeVar("Content")

VERSION = 1
"""Goes up when the same seed would give other problems."""

_TENTHS = {0: "validation", 1: "test"}  # the others are for training
_ATTEMPTS = 10_000


@dataclass(frozen=True)
class Problem:
    """One item of a test.

    Attributes:
        task: the test's name; cell: its settings, by name.
        memory: token ids of what is to be remembered.
        rest: token ids of what is read afterwards, the questions among them.
        judged: positions in `rest`, ascending: what the model says there, having read so far, is judged.
        gold: what it should say, one token a judged position.
    """

    task: str
    cell: Mapping[str, float]
    memory: tuple[int, ...]
    rest: tuple[int, ...]
    judged: tuple[int, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True)
class ProblemBatch(Examples):
    """Problems as tensors.

    Attributes:
        memory: (B, M), left-padded.
        rest: (B, T), right-padded with zeros.
        judged: (B, T), True where the problem is judged.
        gold: (B, T), what should be said there; 0 elsewhere.
    """

    memory: Rows
    rest: Tensor
    judged: Tensor
    gold: Tensor


def problem_batch(problems: Sequence[Problem]) -> ProblemBatch:
    """Problems -> one batch."""
    rest = pad_sequence([torch.tensor(p.rest) for p in problems], batch_first=True)
    judged, gold = torch.zeros_like(rest, dtype=torch.bool), torch.zeros_like(rest)
    for number, problem in enumerate(problems):
        places = list(problem.judged)
        judged[number, places] = True
        gold[number, places] = torch.tensor(problem.gold)
    return ProblemBatch(left_padded([p.memory for p in problems]), rest, judged, gold)


def asked(
    task: str, cell: Mapping[str, float], memory: Sequence[int], question: Sequence[int], answer: Sequence[int]
) -> Problem:
    """A problem with one question: what should be said behind it, token by token, is the answer."""
    first = len(question) - 1
    rest = (*question, *answer[:-1])
    return Problem(task, cell, tuple(memory), rest, tuple(range(first, len(rest))), tuple(answer))


def tokens(tokenizer: Tokenizer, *pieces: str) -> tuple[int, ...]:
    """Token ids of a text, its pieces encoded each alone: so a piece has the same tokens wherever it stands.

    Raises:
        UserError: the tokenizer makes nothing of them all.
    """
    ids = tuple(i for piece in pieces for i in tokenizer.encode(piece))
    if not ids:
        raise UserError(f"the tokenizer makes no tokens of {''.join(pieces)!r}; take a model whose tokenizer has text")
    return ids


def split_of(content: object) -> str:
    """The split that some content belongs to, by a hash of it: train has eight tenths, the others one each."""
    number = int.from_bytes(hashlib.sha256(repr(content).encode()).digest()[:8])
    return _TENTHS.get(number % 10, "train")


def drawn(draw: Callable[[random.Random], Content], split: str, name: str) -> Content:
    """The first content of the split among those that are drawn with a name's own seeds.

    Args:
        draw: its result says by its `repr` what it is, as numbers, texts and tuples of them do.
        name: of the item: test, settings, seed and number.
    Raises:
        UserError: an unknown split, or none of 10,000 draws belongs to it, because there are too few different ones.
    """
    check_split(split)
    for attempt in range(_ATTEMPTS):
        content = draw(random.Random(f"{VERSION}/{name}/{split}/{attempt}"))
        if split_of(content) == split:
            return content
    raise UserError(f"{name}: too few different contents for a {split} split of their own; make the problem larger")


def check_whole(what: str, value: object, least: int) -> None:
    """A UserError unless it is a whole number of at least that size."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{what} is {value!r}; it is a whole number of {least} or more")
