"""What a model answers that has taken a context in: given it, after a step on it, after a wrong one, without any.

A greedy answer is the gold one, token for token up to the newline that ends it, exactly where at each of its tokens,
the gold ones before it given, the likeliest next token is the gold one. So one forward pass tells, and no text is
generated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from prosg_lib import processes
from prosg_lib.backbones.base import LanguageModel
from prosg_lib.conditioning import hidden_of
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.evaluate import Estimate, resampled
from prosg_lib.gradient_step import Way, answering
from prosg_lib.tasks.pair_batches import PairBatch, Rows, collate
from prosg_lib.tasks.pairs import Pair
from prosg_lib.tokenizer import Tokenizer


@torch.no_grad()
def answered(
    lm: LanguageModel,
    ways: dict[str, Way],
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    contexts: int = 1,
    seed: int = 0,
    successive: bool = False,
    batch: int = 25,
) -> pd.DataFrame:
    """Which pairs are answered right, one row a pair, all of them by every method.

    Of several processes (`accelerate launch`) each takes a share of the batches, and all return all of it.

    Args:
        ways: by name; none of them is called "prompted" or "none".
        contexts: of every pair: its own, and others drawn with `seed`.
        batch: pairs at a time; a step on all weights makes as many models.
    Returns:
        One column of booleans a method: "prompted" (the contexts in front of the query), "none" (the query alone),
        and for every way its name (after the contexts) and "wrong <name>" (after another pair's, without its own).
    Raises:
        NotFinite: a step broke the model.
        UserError: fewer pairs than contexts, or no other pair's contexts are without a pair's own.
    """
    if len(pairs) < max(2, contexts):
        raise UserError(f"{len(pairs)} pairs, but {max(2, contexts)} are needed")
    groups = _groups(pairs, contexts, seed)
    others = _others(groups)
    device = next(lm.parameters()).device

    def measured(first: int) -> pd.DataFrame:
        own, wrong = (
            collate(some[first : first + batch], tokenizer, f"{seed}/{first}").to(device) for some in (groups, others)
        )
        found = _of_batch(lm, ways, own, wrong.context, successive)
        return pd.DataFrame({name: hits.cpu().numpy() for name, hits in found})

    return pd.concat(processes.shared(range(0, len(groups), batch), measured), ignore_index=True)


def _groups(pairs: Sequence[Pair], contexts: int, seed: int) -> list[list[Pair]]:
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(len(pairs)):
        others = rng.choice(len(pairs) - 1, contexts - 1, replace=False)
        groups.append([pairs[i], *(pairs[j + (j >= i)] for j in others)])
    return groups


def _others(groups: list[list[Pair]]) -> list[list[Pair]]:
    """For each group the nearest one before it that does not have its first pair's context."""
    found = []
    for i, group in enumerate(groups):
        before = (groups[i - j] for j in range(1, len(groups)))
        other = next((g for g in before if all(pair.context != group[0].context for pair in g)), None)
        if other is None:
            raise UserError(f"every other of {len(groups)} pairs has pair {i}'s context; a wrong one is needed, too")
        found.append(other)
    return found


def _of_batch(lm: LanguageModel, ways: dict[str, Way], batch: PairBatch, wrong: Rows, successive: bool):
    says = lm.read_out(hidden_of(lm, batch.prompted)[:, -batch.query.ids.shape[1] + 1 :])
    yield "prompted", _right(_finite("prompted", says), batch)
    query = batch.query.ids[:, :-1], batch.query.valid[:, :-1]
    yield "none", _right(answering(None, lm, batch.context)(*query), batch)
    for name, way in ways.items():
        for label, contexts in ((name, batch.context), (f"wrong {name}", wrong)):
            yield label, _right(_finite(label, answering(way, lm, contexts, successive)(*query)), batch)


def _finite(label: str, says: Tensor) -> Tensor:
    if not torch.isfinite(says).all():
        raise NotFinite(f"{label}: what the model says is not finite; take a smaller inner learning rate")
    return says


def _right(says: Tensor, batch: PairBatch) -> Tensor:
    """Whether each answer is the gold one, (B,), from logits (B, Q - 1, vocab)."""
    hit = says.argmax(-1) == batch.query.ids[:, 1:]
    return (hit | ~batch.answer[:, 1:]).all(1)


def share(frame: pd.DataFrame, method: str) -> Estimate:
    """Share of pairs that a method answers right, with a bootstrap interval over pairs."""
    return resampled(frame[[method]].to_numpy(float).T, lambda m: m[0])


def gap_recovered(frame: pd.DataFrame, method: str, start: str = "untrained") -> Estimate:
    """(method - start) / (prompted - start), with a bootstrap interval over pairs: the paper's measure."""
    table = frame[[method, start, "prompted"]].to_numpy(float).T

    def recovered(m):
        gap = m[2] - m[1]
        return np.where(np.abs(gap) > 1e-9, (m[0] - m[1]) / np.where(np.abs(gap) > 1e-9, gap, 1.0), np.nan)

    return resampled(table, recovered)


def eight_ways(frame: pd.DataFrame, method: str) -> pd.Series:
    """Shares of pairs by (right with the prompt, right after the step, right without context): the paper's table 4."""
    names = ["prompted", method, "none"]
    return frame.groupby(names).size().reindex(_COMBINATIONS.set_names(names), fill_value=0) / len(frame)


_COMBINATIONS = pd.MultiIndex.from_product([[True, False]] * 3)
