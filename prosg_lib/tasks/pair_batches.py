"""Pairs as tensors: contexts to learn from, queries to answer, and both as one prompt.

Glossary of shapes: B pairs, n contexts each, C context tokens, Q tokens of query and answer, A of the longest answer
alone, P tokens of all together.
Every row is padded on the left, so the answer ends every row.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from prosg_lib.errors import UserError
from prosg_lib.tasks.examples import Examples
from prosg_lib.tasks.pairs import Pair
from prosg_lib.text.padding import Rows, left_padded
from prosg_lib.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class PairBatch(Examples):
    """Pairs of one batch.

    Attributes:
        context: (B, n, C), one context of n being the pair's own.
        query: (B, Q), query and answer.
        prompted: (B, P), all contexts, one a line, then query and answer.
        answer: (B, Q), True where the token belongs to the answer or is the newline that ends it.
    """

    context: Rows
    query: Rows
    prompted: Rows
    answer: Tensor

    @property
    def answers(self) -> int:
        """Tokens of the longest answer, A."""
        return int(self.answer.sum(1).max())


def encoded(pair: Pair, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Tokens of context, query and answer, the first and the last with the newline that ends them.

    Raises:
        UserError: the tokenizer makes nothing of one of them.
    """
    parts = tuple(tokenizer.encode(t) for t in (f"{pair.context}\n", pair.query, f" {pair.answer}\n"))
    for name, part in zip(("context", "query", "answer"), parts, strict=True):
        if not part:
            raise UserError(f"the tokenizer makes no tokens of this {name}: {getattr(pair, name)!r}")
    return parts


def pair_batch(
    groups: Sequence[Sequence[Pair]], tokenizer: Tokenizer, seed: object = 0, numbers: Iterable[int] | None = None
) -> PairBatch:
    """A batch in which each group's first pair is asked about, and the others' contexts are there, too.

    Args:
        groups: B groups of n pairs.
        seed: of the contexts' order within each group, together with its number.
        numbers: the groups', where they are some of many; None: 0 to B - 1.
    Raises:
        UserError: no groups, an empty one, or groups of different sizes.
    """
    if len({len(group) for group in groups}) != 1 or not groups[0]:
        raise UserError(f"{len(groups)} groups of {sorted({len(g) for g in groups})} contexts; all need equally many")
    contexts, queries, answers, prompts = [], [], [], []
    for number, group in zip(range(len(groups)) if numbers is None else numbers, groups, strict=True):
        _, query, answer = encoded(group[0], tokenizer)
        told = [list(encoded(pair, tokenizer)[0]) for pair in group]
        random.Random(f"{seed}/{number}").shuffle(told)
        contexts += told
        queries.append([*query, *answer])
        answers.append(len(answer))
        prompts.append([*chain(*told), *query, *answer])
    context, query = left_padded(contexts), left_padded(queries)
    n = len(groups[0])
    last = torch.arange(query.ids.shape[1], 0, -1)
    return PairBatch(
        Rows(*(t.view(len(groups), n, -1) for t in context)),
        query,
        left_padded(prompts),
        last <= torch.tensor(answers)[:, None],
    )


def echoed(batch: int, vocab: int, seed: object, told: int = 40, asked: int = 24, given: int = 1) -> PairBatch:
    """Random tokens, and a piece of them again, its first `given` as the query, the others as the answer: to find the
    place and go on from there is all there is to learn."""
    rng = random.Random(f"echo/{seed}")
    contexts = [rng.choices(range(vocab), k=told) for _ in range(batch)]
    starts = [rng.randrange(told - asked + 1) for _ in range(batch)]
    queries = [row[start : start + asked] for row, start in zip(contexts, starts, strict=True)]
    context, query = left_padded(contexts), left_padded(queries)
    answer = query.valid.clone()
    answer[:, :given] = False
    prompted = Rows(torch.cat([context.ids, query.ids], 1), torch.cat([context.valid, query.valid], 1))
    return PairBatch(Rows(context.ids[:, None], context.valid[:, None]), query, prompted, answer)


@dataclass(frozen=True)
class PairDraw:
    """Step -> batch: pairs of one task, drawn with their step's own seed. Tasks take turns.

    Attributes:
        tasks: pairs by task.
        turns: the tasks' order; one may have several turns.
        echoes: so many first steps are `echoed` random tokens instead.
        longest: of an echo's context: the first third of them have 8 tokens, then ever more, and the batch is the
            smaller, from twice to half its size; 0: all have 40.
        contexts: numbers of contexts; a step draws one. Fewer are taken where they would be longer than `room` tokens.
    """

    tasks: dict[str, tuple[Pair, ...]]
    tokenizer: Tokenizer
    batch: int
    contexts: tuple[int, ...]
    seed: int
    turns: tuple[str, ...]
    echoes: int = 0
    longest: int = 0
    room: int = 1024

    def __call__(self, step: int) -> PairBatch:
        rng = random.Random(f"pairs/{self.seed}/{step}")
        if 0 <= step < self.echoes:
            return self._echo(step)
        pairs = self.tasks[self.turns[step % len(self.turns)]]
        n = rng.choice(self.contexts)
        if n > len(pairs):
            raise UserError(f"{n} contexts asked for, but there are {len(pairs)} pairs; ask for fewer")
        drawn = [rng.sample(pairs, n) for _ in range(self.batch)]
        longest = max(len(encoded(pair, self.tokenizer)[0]) for group in drawn for pair in group)
        groups = [group[: max(1, self.room // longest)] for group in drawn]
        return pair_batch(groups, self.tokenizer, f"{self.seed}/{step}")

    def _echo(self, step: int) -> PairBatch:
        vocab, seed = self.tokenizer.vocab, f"{self.seed}/{step}"
        if not self.longest:
            return echoed(self.batch, vocab, seed)
        told = round(8 * (self.longest / 8) ** max(0.0, 1.5 * step / self.echoes - 0.5))
        batch = max(self.batch // 2, min(2 * self.batch, self.longest * self.batch // (2 * told)))
        return echoed(batch, vocab, seed, told, asked=min(18, told * 3 // 4), given=2)
