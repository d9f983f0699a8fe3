"""What a model answers once it has taken in a context: with it in front, after a gradient step on it, after a step on a
wrong one, and without any.

A greedy answer equals the gold answer, up to and including the newline that ends it, exactly if at each of its tokens,
given the gold tokens before it, the likeliest next token is the gold one. So one forward pass decides, and no text is
generated.

A method may be a list of trainings that differ only in their seed. Its share is the mean over pairs and trainings, and
its interval a bootstrap over both: over pairs, the same for all methods, and over each method's trainings.
"""

from __future__ import annotations

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
from prosg_lib.tasks.pairs import PLAIN, Form, Pair
from prosg_lib.text.padding import Rows
from prosg_lib.text.tokenizer import Tokenizer
from prosg_lib.training import distributed
from prosg_lib.training.pair_objectives import hidden_of


@torch.no_grad()
def answered(
    lm: LanguageModel,
    methods: Mapping[str, Method | Sequence[Method]],
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    contexts: int = 1,
    seed: int = 0,
    successive: bool = False,
    batch: int = 25,
    controls: Collection[str] | None = None,
    known: pd.DataFrame | None = None,
    form: Form = PLAIN,
    together: bool = False,
) -> pd.DataFrame:
    """Which pairs are answered right, one row a pair, every pair by every method.

    Several processes (`accelerate launch`) share the batches, and each returns all of it.

    Args:
        methods: by name, one or several trainings of each; none may be called "prompted" or "none".
        contexts: number of contexts a pair: its own, and others drawn with `seed`.
        batch: pairs at a time; a step on all weights makes as many models.
        controls: names of the methods that also answer after a wrong context; None: all of them.
        known: a table of the same pairs, contexts and seed; its columns are kept and not measured again.
        form: in which pairs are shown and answers judged.
        together: pairs about the same context go into the same batch, for methods that read it once for all of them.
    Returns:
        One column of booleans a method: "prompted" (the contexts in front of the query), "none" (the query alone),
        and for every method its name (after the contexts) and "wrong <name>" (after another pair's contexts, without
        its own). Several trainings have a column each, "<name> #0", "<name> #1" and so on; `hits` combines them.
    Raises:
        NotFinite: a step made the model's outputs infinite or NaN.
        UserError: fewer pairs than contexts; no other pair's contexts lack the pair's own; `known` has another number
            of pairs.
    """
    if len(pairs) < max(2, contexts):
        raise UserError(f"{len(pairs)} pairs, but {max(2, contexts)} are needed")
    known = pd.DataFrame(index=range(len(pairs))) if known is None else known
    if len(known) != len(pairs):
        raise UserError(f"{len(pairs)} pairs, but the known table has {len(known)}; pass the table of these pairs")
    groups = _groups(pairs, contexts, seed)
    others = _others(groups)
    device = next(lm.parameters()).device
    controls = methods if controls is None else controls
    lengths = [sum(map(len, encoded(group[0], tokenizer))) for group in groups]
    by_length = sorted(range(len(groups)), key=lengths.__getitem__)  # to keep padding short
    if together:
        by_length.sort(key=lambda i: (len(pairs[i].context), pairs[i].context))

    def measured(first: int) -> pd.DataFrame:
        which = by_length[first : first + batch]
        own, wrong = (
            pair_batch([some[i] for i in which], tokenizer, seed, which, form).to(device) for some in (groups, others)
        )
        found = _of_batch(lm, methods, own, wrong.context, successive, controls, known)
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
    """For each group the nearest preceding one without the context of its first pair."""
    found = []
    for i, group in enumerate(groups):
        before = (groups[i - j] for j in range(1, len(groups)))
        other = next((g for g in before if all(pair.context != group[0].context for pair in g)), None)
        if other is None:
            raise UserError(f"all other pairs have pair {i}'s context; add one with another context")
        found.append(other)
    return found


def _of_batch(
    lm: LanguageModel,
    methods: Mapping[str, Method | Sequence[Method]],
    batch: PairBatch,
    wrong: Rows,
    successive: bool,
    controls: Collection[str],
    known: Collection[str],
) -> Iterator[tuple[str, Tensor]]:
    query = batch.query.ids[:, :-1], batch.query.valid[:, :-1], batch.answers
    if "prompted" not in known:
        logits = lm.read_out(hidden_of(lm, batch.prompted)[:, -batch.answers :])
        yield "prompted", _right("prompted", logits, batch)
    if "none" not in known:
        yield "none", _right("none", adapted(None, lm, batch.context)(*query), batch)
    for name, trained in methods.items():
        several = isinstance(trained, Sequence)
        for number, method in enumerate(trained if several else [trained]):
            ending = f" #{number}" if several else ""
            for column, contexts in ((name + ending, batch.context), (f"wrong {name}{ending}", wrong)):
                if column not in known and (contexts is batch.context or name in controls):
                    yield column, _right(column, adapted(method, lm, contexts, successive)(*query), batch)


def _right(column: str, logits: Tensor, batch: PairBatch) -> Tensor:
    """Whether each answer is the gold one, (B,), from the answers' logits, (B, A, vocab)."""
    if not torch.isfinite(logits).all():
        raise NotFinite(f"{column}: the logits are not finite; take a smaller inner learning rate")
    hit = logits.argmax(-1) == batch.query.ids[:, -batch.answers :]
    return (hit | ~batch.answer[:, -batch.answers :]).all(1)


def hits(frame: pd.DataFrame, method: str) -> np.ndarray:
    """Which pairs a method answers right, 1 or 0, one row a training: (trainings, pairs).

    Raises:
        UserError: it was not measured.
    """
    columns = [column for column in frame if method in (column, column.rpartition(" #")[0])]
    if not columns:
        raise UserError(f"{method!r} was not measured; there are {', '.join(frame)}")
    return frame[columns].to_numpy(float).T


def passages_of(pairs: Sequence[Pair]) -> np.ndarray:
    """Of every pair, the number of its context, (pairs,): the `groups` of an interval over contexts."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(pair.context, len(numbers)) for pair in pairs])


def share(frame: pd.DataFrame, method: str, groups: np.ndarray | None = None) -> Estimate:
    """Share of pairs that a method answers right, mean over its trainings, with a bootstrap interval over both.

    Args:
        groups: pairs that are drawn together (`passages_of`); None: each by itself.
    """
    return _resampled(frame, [method], lambda m: m[0], groups)


def difference(frame: pd.DataFrame, method: str, other: str, groups: np.ndarray | None = None) -> Estimate:
    """Share of pairs that a method answers right minus another's, with an interval like that of `share`."""
    return _resampled(frame, [method, other], lambda m: m[0] - m[1], groups)


def gap_recovered(
    frame: pd.DataFrame, method: str, start: str = "untrained", groups: np.ndarray | None = None
) -> Estimate:
    """(method - start) / (prompted - start), the paper's measure, with an interval like that of `share`."""

    def recovered(m):
        gap = m[2] - m[1]
        return np.where(np.abs(gap) > 1e-9, (m[0] - m[1]) / np.where(np.abs(gap) > 1e-9, gap, 1.0), np.nan)

    return _resampled(frame, [method, start, "prompted"], recovered, groups)


def _resampled(
    frame: pd.DataFrame,
    methods: Sequence[str],
    statistic: Callable[[np.ndarray], np.ndarray],
    groups: np.ndarray | None,
) -> Estimate:
    """Bootstrap in two levels: every resample draws pairs, the same for all methods, and each method's trainings."""
    tables = [hits(frame, method) for method in methods]
    ends = np.cumsum([len(table) for table in tables])[:-1]
    rng = np.random.default_rng(1)

    def combined(means: np.ndarray) -> np.ndarray:
        """From every training's mean, (trainings of all,) or (trainings of all, resamples)."""
        return statistic(np.stack([_over_trainings(part, rng) for part in np.split(means, ends)]))

    return resampled(np.concatenate(tables), combined, groups)


def _over_trainings(means: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mean over trainings, (trainings,) -> (), or over those that each resample draws, (trainings, n) -> (n,)."""
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
