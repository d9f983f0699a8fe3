"""What a model answers once it has taken in a context: with it in front, after a gradient step on it, after a step on a
wrong one, and without any.

A greedy answer equals the gold answer, up to and including the newline that ends it, exactly if at each of its tokens,
given the gold tokens before it, the likeliest next token is the gold one. So one forward pass decides, and no text is
generated.

A method may be a list of trainings that differ only in their seed. Its share is the mean over pairs and trainings, and
its interval a bootstrap over both: over pairs, the same for all methods, and over each method's trainings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from prosg_lib.backbones.base import LanguageModel
from prosg_lib.errors import NotFinite, UserError
from prosg_lib.evaluation.statistics import Estimate, drawn_trainings, resampled
from prosg_lib.gradient_steps.one_step import Method, adapted
from prosg_lib.tasks.pair_batches import PairBatch, encoded, pair_batch
from prosg_lib.tasks.pairs import Pair
from prosg_lib.text.padding import Rows
from prosg_lib.text.tokenizer import Tokenizer
from prosg_lib.training import distributed
from prosg_lib.training.pair_objectives import hidden_of


@torch.no_grad()
def answered(
    lm: LanguageModel,
    ways: Mapping[str, Method | Sequence[Method]],
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    contexts: int = 1,
    seed: int = 0,
    successive: bool = False,
    batch: int = 25,
    controls: Collection[str] | None = None,
    known: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Which pairs are answered right, one row a pair, all of them by every method.

    Of several processes (`accelerate launch`) each takes a share of the batches, and all return all of it.

    Args:
        ways: by name, one or several trainings of each; none of them is called "prompted" or "none".
        contexts: of every pair: its own, and others drawn with `seed`.
        batch: pairs at a time; a step on all weights makes as many models.
        controls: names of the ways that are asked after a wrong context, too; None: all of them.
        known: a table of the same pairs, contexts and seed; its columns are taken over, and not measured again.
    Returns:
        One column of booleans a method: "prompted" (the contexts in front of the query), "none" (the query alone),
        and for every way its name (after the contexts) and "wrong <name>" (after another pair's, without its own).
        Several trainings have a column each, "<name> #0", "<name> #1" and so on; `hits` takes them together.
    Raises:
        NotFinite: a step broke the model.
        UserError: fewer pairs than contexts, no other pair's contexts are without a pair's own, or what is known is of
            another number of pairs.
    """
    if len(pairs) < max(2, contexts):
        raise UserError(f"{len(pairs)} pairs, but {max(2, contexts)} are needed")
    known = pd.DataFrame(index=range(len(pairs))) if known is None else known
    if len(known) != len(pairs):
        raise UserError(f"{len(pairs)} pairs, but what is known is of {len(known)}; pass the table of these pairs")
    groups = _groups(pairs, contexts, seed)
    others = _others(groups)
    device = next(lm.parameters()).device
    controls = ways if controls is None else controls
    lengths = [sum(map(len, encoded(group[0], tokenizer))) for group in groups]
    by_length = sorted(range(len(groups)), key=lengths.__getitem__)  # so that little of a batch is padding

    def measured(first: int) -> pd.DataFrame:
        which = by_length[first : first + batch]
        own, wrong = (
            pair_batch([some[i] for i in which], tokenizer, seed, which).to(device) for some in (groups, others)
        )
        found = _of_batch(lm, ways, own, wrong.context, successive, controls, known)
        return pd.DataFrame({name: right.cpu().numpy() for name, right in found}, index=which)

    found = pd.concat(distributed.shared(range(0, len(groups), batch), measured)).sort_index()
    return known.join(found)


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


def _of_batch(
    lm: LanguageModel,
    ways: Mapping[str, Method | Sequence[Method]],
    batch: PairBatch,
    wrong: Rows,
    successive: bool,
    controls: Collection[str],
    known: Collection[str],
) -> Iterator[tuple[str, Tensor]]:
    query = batch.query.ids[:, :-1], batch.query.valid[:, :-1], batch.answers
    if "prompted" not in known:
        says = lm.read_out(hidden_of(lm, batch.prompted)[:, -batch.answers :])
        yield "prompted", _right(_finite("prompted", says), batch)
    if "none" not in known:
        yield "none", _right(adapted(None, lm, batch.context)(*query), batch)
    for name, trained in ways.items():
        asked = [(name, batch.context)] + ([(f"wrong {name}", wrong)] if name in controls else [])
        for ending, way in _trainings(trained):
            for label, contexts in asked:
                if label + ending in known:
                    continue
                says = adapted(way, lm, contexts, successive)(*query)
                yield label + ending, _right(_finite(label + ending, says), batch)


def _trainings(trained: Method | Sequence[Method]) -> list[tuple[str, Method]]:
    """The ends of the columns' names, and what is measured there."""
    return [(f" #{i}", way) for i, way in enumerate(trained)] if isinstance(trained, Sequence) else [("", trained)]


def _finite(label: str, says: Tensor) -> Tensor:
    if not torch.isfinite(says).all():
        raise NotFinite(f"{label}: what the model says is not finite; take a smaller inner learning rate")
    return says


def _right(says: Tensor, batch: PairBatch) -> Tensor:
    """Whether each answer is the gold one, (B,), from the answers' logits, (B, A, vocab)."""
    hit = says.argmax(-1) == batch.query.ids[:, -batch.answers :]
    return (hit | ~batch.answer[:, -batch.answers :]).all(1)


def hits(frame: pd.DataFrame, method: str) -> np.ndarray:
    """Which pairs a method answers right, 1 or 0, a row for each of its trainings: (trainings, pairs).

    Raises:
        UserError: it was not measured.
    """
    columns = [c for c in frame if c == method or re.fullmatch(rf"{re.escape(method)} #\d+", c)]
    if not columns:
        raise UserError(f"{method!r} was not measured; there are {', '.join(frame)}")
    return frame[columns].to_numpy(float).T


def share(frame: pd.DataFrame, method: str) -> Estimate:
    """Share of pairs that a method answers right, a mean over trainings, with a bootstrap interval over both."""
    return _resampled(frame, [method], lambda m: m[0])


def difference(frame: pd.DataFrame, method: str, other: str) -> Estimate:
    """Share of pairs that a method answers right, less another's, with an interval as that of `share`."""
    return _resampled(frame, [method, other], lambda m: m[0] - m[1])


def gap_recovered(frame: pd.DataFrame, method: str, start: str = "untrained") -> Estimate:
    """(method - start) / (prompted - start), with an interval as that of `share`: the paper's measure."""

    def recovered(m):
        gap = m[2] - m[1]
        return np.where(np.abs(gap) > 1e-9, (m[0] - m[1]) / np.where(np.abs(gap) > 1e-9, gap, 1.0), np.nan)

    return _resampled(frame, [method, start, "prompted"], recovered)


def _resampled(frame: pd.DataFrame, methods: Sequence[str], statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """Bootstrap in two levels: every resample draws pairs, the same for all methods, and each method's trainings."""
    tables = [hits(frame, method) for method in methods]
    ends = np.cumsum([len(table) for table in tables])[:-1]
    rng = np.random.default_rng(1)

    def combined(means: np.ndarray) -> np.ndarray:
        """From every training's mean, (trainings of all,) or (trainings of all, resamples)."""
        return statistic(np.stack([_over_trainings(part, rng) for part in np.split(means, ends)]))

    return resampled(np.concatenate(tables), combined)


def _over_trainings(means: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mean over trainings, (trainings,) -> (); or over some drawn anew a resample, (trainings, n) -> (n,)."""
    if means.ndim > 1:
        which = rng.integers(len(means), size=(drawn_trainings(len(means)), means.shape[1]))
        means = np.take_along_axis(means, which, 0)
    return means.mean(0)


def eight_ways(frame: pd.DataFrame, method: str) -> pd.Series:
    """Shares of pairs by (right with the prompt, right after the step, right without context): the paper's table 4, a
    mean over trainings."""
    names = ["prompted", method, "none"]
    others = {name: frame[name] for name in ("prompted", "none")}
    counts = [
        pd.DataFrame(others | {method: right > 0}).groupby(names).size().reindex(_COMBINATIONS, fill_value=0)
        for right in hits(frame, method)
    ]
    return (sum(counts) / (len(counts) * len(frame))).rename_axis(names)


_COMBINATIONS = pd.MultiIndex.from_product([[True, False]] * 3)
