"""What the established tests of memory share: something to remember, what is read afterwards, and what is judged.

A problem is token ids, so that a test over texts works with any tokenizer, and one over tokens with none. It is
answered teacher-forced: the rest is read as it stands, in one pass, and at each judged position the most likely next
token should be the gold one. Where the judged tokens are those of an answer, that is what greedy generation would have
produced (see `evaluation.pair_evaluation`).

Splits share the distribution and no content: a hash of what is to be remembered assigns it to a split, and content of
other splits is drawn again.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from prosg_lib.errors import UserError
from prosg_lib.tasks.examples import Examples
from prosg_lib.text.padding import Rows, left_padded, right_padded
from prosg_lib.text.prose import ProseTokens, check_split
from prosg_lib.text.tokenizer import Tokenizer

Content = TypeVar("Content")

VERSION = 1
"""Increased whenever the same seed would give different problems."""

_TENTHS = {0: "validation", 1: "test"}  # the others are for training
_ATTEMPTS = 10_000


@dataclass(frozen=True)
class Material:
    """What problems are made from: a model's tokenizer, and prose of the split in its tokens."""

    tokenizer: Tokenizer
    prose: ProseTokens


@dataclass(frozen=True)
class Problem:
    """One item of a test.

    Attributes:
        task: the test's name.
        cell: its settings, by name.
        memory: token ids of what is to be remembered.
        rest: token ids of what is read afterwards, including the questions.
        judged: positions in `rest`, ascending, at which the model's prediction of the next token is judged.
        gold: the right token at each judged position.
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
        judged: (B, T), True at the judged positions.
        gold: (B, T), the right token there; 0 elsewhere.
    """

    memory: Rows
    rest: Tensor
    judged: Tensor
    gold: Tensor


def problem_batch(problems: Sequence[Problem]) -> ProblemBatch:
    """Problems -> one batch."""
    rest = right_padded([p.rest for p in problems])
    judged, gold = torch.zeros_like(rest, dtype=torch.bool), torch.zeros_like(rest)
    for row, problem in enumerate(problems):
        judged[row, list(problem.judged)] = True
        gold[row, list(problem.judged)] = torch.tensor(problem.gold)
    return ProblemBatch(left_padded([p.memory for p in problems]), rest, judged, gold)


def with_answer(
    task: str, cell: Mapping[str, float], memory: Sequence[int], question: Sequence[int], answer: Sequence[int]
) -> Problem:
    """A problem with one question, whose answer is to be predicted token by token."""
    first = len(question) - 1
    rest = (*question, *answer[:-1])
    return Problem(task, cell, tuple(memory), rest, tuple(range(first, len(rest))), tuple(answer))


def encode_pieces(tokenizer: Tokenizer, *pieces: str) -> tuple[int, ...]:
    """Token ids of a text whose pieces are encoded separately, so that a piece has the same tokens wherever it stands.

    Raises:
        UserError: the tokenizer gives no tokens at all.
    """
    ids = tuple(i for piece in pieces for i in tokenizer.encode(piece))
    if not ids:
        raise UserError(f"the tokenizer gives no tokens for {''.join(pieces)!r}; use a model with a text tokenizer")
    return ids


def split_of(content: object) -> str:
    """The split of some content (numbers, strings, and tuples of them), by its hash: eight tenths are for training."""
    number = int.from_bytes(hashlib.sha256(_written(content).encode()).digest()[:8])
    return _TENTHS.get(number % 10, "train")


def _written(content: object) -> str:
    """The characters that are hashed: ('Ada', 7) or (7,)."""
    if isinstance(content, tuple):
        return f"({', '.join(map(_written, content))}{',' * (len(content) == 1)})"
    return f"'{content}'" if isinstance(content, str) else str(content)


def draw_content(draw: Callable[[random.Random], Content], split: str, name: str) -> Content:
    """The first content that belongs to the split, of those drawn with the seeds that follow from a name.

    Args:
        draw: returns numbers, strings, or tuples of them.
        name: of the item: test, settings, seed and number.
    Raises:
        UserError: an unknown split, or none of 10,000 draws belongs to it because there are too few different ones.
    """
    check_split(split)
    for attempt in range(_ATTEMPTS):
        content = draw(random.Random(f"{VERSION}/{name}/{split}/{attempt}"))
        if split_of(content) == split:
            return content
    raise UserError(f"{name}: too few different contents for a {split} split; make the problem larger")


def check_whole(what: str, value: object, least: int) -> None:
    """Raise a UserError unless the value is a whole number of at least that size."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{what} is {value!r}; it must be a whole number of {least} or more")
