"""Pairs as tensors: contexts to learn from, queries to answer, and both as one prompt.

Glossary of shapes: B pairs, n contexts each, C context tokens, Q tokens of query and answer, A tokens of the longest
answer, P tokens of contexts, query and answer. Rows are padded on the left, so every row ends with the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

import torch
from torch import Tensor

from prosg_lib.errors import UserError
from prosg_lib.tasks.examples import Examples
from prosg_lib.tasks.pairs import PLAIN, Form, Pair
from prosg_lib.text.padding import Rows, left_padded
from prosg_lib.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class PairBatch(Examples):
    """Pairs of one batch.

    Attributes:
        context: (B, n, C); one of the n contexts is the pair's own.
        query: (B, Q), query and answer.
        prompted: (B, P), all contexts, one a line, then query and answer; a form's opening stands in front of both.
        answer: (B, Q), True at the tokens of the answer and at the newline after it, if it has one.
    """

    context: Rows
    query: Rows
    prompted: Rows
    answer: Tensor

    @property
    def answers(self) -> int:
        """Number of tokens of the longest answer, A."""
        return int(self.answer.sum(1).max())


def encoded(
    pair: Pair, tokenizer: Tokenizer, form: Form = PLAIN
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Tokens of context, query and answer; context and answer include the newline that ends them.

    Raises:
        UserError: the tokenizer gives no tokens for one of them.
    """
    answer = f" {pair.answer}\n" if form.ended else f" {pair.answer}"
    parts = tuple(tokenizer.encode(t) for t in (f"{pair.context}\n", pair.query, answer))
    for name, part in zip(("context", "query", "answer"), parts, strict=True):
        if not part:
            raise UserError(f"the tokenizer gives no tokens for this {name}: {getattr(pair, name)!r}")
    return parts


def pair_batch(
    groups: Sequence[Sequence[Pair]],
    tokenizer: Tokenizer,
    seed: object = 0,
    numbers: Iterable[int] | None = None,
    form: Form = PLAIN,
) -> PairBatch:
    """A batch with the query of each group's first pair and the contexts of all pairs of the group.

    Args:
        groups: B groups of n pairs.
        seed: decides the order of the contexts within a group, together with the group's number.
        numbers: of the groups, if they are some of many; None for 0 to B - 1.
    Raises:
        UserError: no groups, an empty group, or groups of different sizes.
    """
    if len({len(group) for group in groups}) != 1 or not groups[0]:
        raise UserError(
            f"{len(groups)} groups of {sorted({len(g) for g in groups})} contexts; all must have the same number"
        )
    contexts, queries, answers, prompts = [], [], [], []
    opening = tokenizer.encode(form.opening) if form.opening else ()
    for number, group in zip(range(len(groups)) if numbers is None else numbers, groups, strict=True):
        _, query, answer = encoded(group[0], tokenizer, form)
        shuffled = [encoded(pair, tokenizer)[0] for pair in group]
        random.Random(f"{seed}/{number}").shuffle(shuffled)
        contexts += shuffled
        queries.append([*opening, *query, *answer])
        answers.append(len(answer))
        prompts.append([*opening, *chain(*shuffled), *query, *answer])
    context, query = left_padded(contexts), left_padded(queries)
    n = len(groups[0])
    last = torch.arange(query.ids.shape[1], 0, -1)
    return PairBatch(
        Rows(*(t.view(len(groups), n, -1) for t in context)),
        query,
        left_padded(prompts),
        last <= torch.tensor(answers)[:, None],
    )


def repeated_tokens(
    batch: int, vocab: int, seed: object, length: int = 40, piece: int = 24, given: int = 1
) -> PairBatch:
    """Random tokens and a piece of them again: to find the place and go on from there is all there is to learn.

    Args:
        batch: B; vocab: tokens are drawn from 0 to vocab - 1.
        length: tokens of the context, C.
        piece: tokens that are repeated, Q: the first `given` are the query, the others the answer.
    """
    rng = random.Random(f"echo/{seed}")
    contexts = [rng.choices(range(vocab), k=length) for _ in range(batch)]
    starts = [rng.randrange(length - piece + 1) for _ in range(batch)]
    queries = [row[start : start + piece] for row, start in zip(contexts, starts, strict=True)]
    context, query = left_padded(contexts), left_padded(queries)
    answer = query.valid.clone()
    answer[:, :given] = False
    prompted = Rows(torch.cat([context.ids, query.ids], 1), torch.cat([context.valid, query.valid], 1))
    return PairBatch(Rows(context.ids[:, None], context.valid[:, None]), query, prompted, answer)


@dataclass(frozen=True)
class PairDraw:
    """Step -> batch of pairs of one task, drawn with a seed of its own for each step. Tasks take turns.

    Attributes:
        tasks: pairs by task.
        contexts: numbers of contexts, of which a step draws one.
        turns: the order of the tasks; a task may have several turns.
        repeats: number of first steps with `repeated_tokens` instead.
        longest: largest context of theirs. In the first third of these steps it has 8 tokens, later more, while the
            batch shrinks from twice to half its size; 0: always 40 tokens.
        room: tokens of all contexts together; a batch in which they would be longer has fewer contexts.
    """

    tasks: dict[str, tuple[Pair, ...]]
    tokenizer: Tokenizer
    batch: int
    contexts: tuple[int, ...]
    seed: int
    turns: tuple[str, ...]
    repeats: int = 0
    longest: int = 0
    room: int = 1024

    def __call__(self, step: int) -> PairBatch:
        rng = random.Random(f"pairs/{self.seed}/{step}")
        if 0 <= step < self.repeats:
            return self._repeated(step)
        pairs = self.tasks[self.turns[step % len(self.turns)]]
        n = rng.choice(self.contexts)
        if n > len(pairs):
            raise UserError(f"{n} contexts cannot be drawn from {len(pairs)} pairs; use fewer contexts")
        drawn = [rng.sample(pairs, n) for _ in range(self.batch)]
        longest = max(len(encoded(pair, self.tokenizer)[0]) for group in drawn for pair in group)
        groups = [group[: max(1, self.room // longest)] for group in drawn]
        return pair_batch(groups, self.tokenizer, f"{self.seed}/{step}")

    def _repeated(self, step: int) -> PairBatch:
        vocab, seed = self.tokenizer.vocab, f"{self.seed}/{step}"
        if not self.longest:
            return repeated_tokens(self.batch, vocab, seed)
        length = round(8 * (self.longest / 8) ** max(0.0, 1.5 * step / self.repeats - 0.5))
        batch = max(self.batch // 2, min(2 * self.batch, self.longest * self.batch // (2 * length)))
        return repeated_tokens(batch, vocab, seed, length, piece=min(18, length * 3 // 4), given=2)


@dataclass(frozen=True)
class SharedContextDraw:
    """Step -> batch in which several queries are about the same context, so that it is read once for all of them. Tasks
    take turns.

    Attributes:
        tasks, tokenizer, batch, seed, turns: as in `PairDraw`.
        queries: about each context, at most; they stand together.
        forms: of the tasks.
    """

    tasks: dict[str, tuple[Pair, ...]]
    tokenizer: Tokenizer
    batch: int
    seed: int
    turns: tuple[str, ...]
    queries: int
    forms: Mapping[str, Form]

    @cached_property
    def _about(self) -> dict[str, list[list[Pair]]]:
        """Of every task, the pairs of each context."""
        about = {task: {} for task in self.tasks}
        for task, pairs in self.tasks.items():
            for pair in pairs:
                about[task].setdefault(pair.context, []).append(pair)
        return {task: list(found.values()) for task, found in about.items()}

    def __call__(self, step: int) -> PairBatch:
        rng = random.Random(f"shared/{self.seed}/{step}")
        task = self.turns[step % len(self.turns)]
        about = self._about[task]
        sampled = (rng.sample(pairs, min(self.queries, len(pairs))) for pairs in rng.sample(about, len(about)))
        drawn = [[pair] for pair in islice(chain.from_iterable(sampled), self.batch)]
        return pair_batch(drawn, self.tokenizer, f"{self.seed}/{step}", form=self.forms[task])
