"""Means with two-level bootstrap intervals: other prompts might have been drawn, and other trainings.

The design is crossed: every training answers every prompt. The first half computes intervals for arrays; the second
half computes what notebooks report from frames as `recall.judged` makes them, one row a method, training, distance,
number of facts, seed and prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy import stats

from prosg_lib.errors import UserError

_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def bars(self) -> tuple[float, float]:
        """Lengths of the error bars below and above the value, as matplotlib wants them: never negative.

        A bootstrap interval need not enclose the statistic of the sample itself.
        """
        return max(0.0, self.value - self.low), max(0.0, self.high - self.value)


def drawn_trainings(count: int) -> int:
    """How many of `count` trainings a resample draws, with replacement.

    Drawing all of them would make an interval too narrow, because their scatter is known from so few. Of five, two are
    drawn; then a mean scatters as widely as Student's t says, var = s^2 (n - 1) / (n m) = (t / z)^2 s^2 / n (the m out
    of n bootstrap, Bickel, Goetze and van Zwet 1997, with m chosen for that). Of fewer than five, one is drawn, so that
    without any scatter of prompts the interval runs from the worst training to the best, and covers the truth in fewer
    than 95 of 100 cases (with two trainings, in half of them).
    """
    if count == 1:
        return 1
    return max(1, round((count - 1) * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, count - 1)) ** 2))


@lru_cache(maxsize=4)
def _draws(trainings: int, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each resample draws each prompt, (prompts, resamples), and which trainings, (drawn, resamples)."""
    rng = np.random.default_rng(0)
    pick = rng.integers(prompts, size=(_RESAMPLES, prompts))
    often = np.stack([np.bincount(row, minlength=prompts) for row in pick], 1).astype(float)
    return often, rng.integers(trainings, size=(drawn_trainings(trainings), _RESAMPLES))


def resampled_means(table: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Means of a table (..., trainings, prompts) ignoring NaN, one a resample: (..., resamples). groups: as in
    `resampled`."""
    trainings, prompts = table.shape[-2:]
    often, which = _draws(trainings, prompts if groups is None else int(groups.max()) + 1)
    often = often if groups is None else often[groups]
    there = ~np.isnan(table)
    with np.errstate(invalid="ignore"):  # a resample with nothing but NaN has the mean NaN
        each = (np.where(there, table, 0.0) @ often) / (there.astype(float) @ often)  # (..., trainings, resamples)
    return each[..., which, np.arange(_RESAMPLES)].mean(-2)


def resampled(
    table: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], groups: np.ndarray | None = None
) -> Estimate:
    """A statistic of means, with a bootstrap interval over prompts, and over trainings where there are several.

    All methods share the resampled prompts and trainings, so differences and ratios are paired. A resample draws
    prompts, and trainings (`drawn_trainings`) that all answer these prompts; if all trainings answer alike, the
    interval is the one over prompts. Variance that neither prompts nor trainings alone explain counts on both levels,
    so the interval errs on the wide side (Owen 2007, "The pigeonhole bootstrap").

    Args:
        table: (methods, prompts) or (methods, trainings, prompts); NaN where there was no question.
        statistic: means, (methods,) or (methods, resamples) -> one number, or one a resample.
        groups: of every prompt, the number of the group that is drawn as a whole (questions about one passage), from 0
            on, (prompts,); None: each prompt is drawn by itself.
    """
    table = table if table.ndim == 3 else table[:, None]
    value = statistic(np.nanmean(table, (1, 2)))
    spread = statistic(resampled_means(table, groups))
    spread = spread[~np.isnan(spread)]
    low, high = np.percentile(spread, [2.5, 97.5]) if len(spread) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))


def mean(frame: pd.DataFrame, method: str, column: str = "recall") -> Estimate:
    """Mean of a column over all of a method's rows, one row an item and training, with its interval (`resampled`)."""
    return resampled(_table(frame, [method], column), lambda means: means[0])


def difference(frame: pd.DataFrame, method: str, other: str, column: str = "recall") -> Estimate:
    """Mean of a column for one method minus that for another, paired item by item, with its interval (`resampled`)."""
    return resampled(_table(frame, [method, other], column), lambda means: means[0] - means[1])


def estimate(frame: pd.DataFrame, method: str, distance: int, facts: int = 6, column: str = "recall") -> Estimate:
    """Mean over all prompts, seeds and trainings at one distance, with its interval (`resampled`)."""
    return mean(_at(frame, distance, facts), method, column)


def gap_recovered(frame: pd.DataFrame, method: str, distance: int, facts: int = 6) -> Estimate:
    """(R - R_none) / (R_repeated - R_none): 0 is no better than no prompt, 1 as good as the prompt repeated at the end.

    NaN where there is no gap, that is where repeating the prompt does not help either.
    """
    table = _table(_at(frame, distance, facts), [method, "none", "repeated"], "recall")
    return resampled(table, lambda m: ratio(m[0] - m[1], m[2] - m[1]))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, NaN where below is not positive."""
    return np.where(below > 1e-9, above / np.where(below > 1e-9, below, 1.0), np.nan)


def differences(frame: pd.DataFrame, method: str, other: str, facts: int = 6) -> dict[int, Estimate]:
    """Recall of one method minus another's by distance, paired, with a simultaneous 95 % band (bootstrap, max-t), over
    prompts, and over trainings where there are several (`resampled`).

    The band covers the whole curve: if there is no difference at any distance, it excludes 0 somewhere in one case
    of twenty, whereas separate intervals would do so in up to one case of twenty for each distance.
    """
    distances = sorted(frame[frame.facts == facts].distance.unique().tolist())
    tables = [_table(_at(frame, d, facts), [method, other], "recall") for d in distances]
    apart = np.stack([table[0] - table[1] for table in tables])  # (distances, trainings, prompts)
    means, middle = resampled_means(apart), apart.mean((1, 2))  # (distances, resamples), (distances,)
    error = means.std(1, keepdims=True)
    away = np.abs(means - middle[:, None]) / np.where(error > 1e-12, error, 1.0)
    width = np.quantile(away.max(0), 0.95) * error[:, 0]
    return {d: Estimate(float(m), float(m - w), float(m + w)) for d, m, w in zip(distances, middle, width, strict=True)}


def locality(frame: pd.DataFrame, method: str, other: str = "base", facts: int = 6) -> Estimate:
    """Right answers about other people over the whole text, one method's as a ratio to another's: 1 means none lost.

    NaN where the text has no such answers, or the other method gets none of them right.
    """
    part = _numbered(frame[(frame.facts == facts) & (frame.competing_total > 0)])
    if not {method, other} <= set(part.method):
        return Estimate(float("nan"), float("nan"), float("nan"))
    right = (part.competing * part.competing_total).groupby([part.seed, part.prompt, part.method, part.training]).sum()
    return resampled(_crossed(right.unstack([2, 3]), [method, other]), lambda m: ratio(m[0], m[1]))


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
    """Recall of each training of a method, with intervals over prompts: one row a training, one column a distance."""
    own = _numbered(frame[frame.method == method])
    tables = {n: by_distance(estimate, part, [method], facts) for n, part in own.groupby("training")}
    return pd.concat([table.set_axis([n]) for n, table in tables.items()])


def half_life(frame: pd.DataFrame, method: str, facts: int = 6) -> float:
    """Distance in tokens at which recall is half of that at distance 0, interpolated linearly in log(1 + d); inf if
    recall never falls that low."""
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


def _at(frame: pd.DataFrame, distance: int, facts: int) -> pd.DataFrame:
    part = frame[(frame.facts == facts) & (frame.distance == distance)]
    if part.empty:
        raise UserError(f"nothing was measured at {distance} tokens with {facts} facts")
    return part


def _table(frame: pd.DataFrame, methods: Sequence[str], column: str) -> np.ndarray:
    """(methods, trainings, items), as `_crossed`; an item is a row's cell, seed and number.

    Raises:
        UserError: a method was not measured.
    """
    missing = [m for m in methods if m not in set(frame.method)]
    if missing:
        raise UserError(f"{', '.join(missing)} was not measured here; there are {', '.join(frame.method.unique())}")
    items = [name for name in ("cell", "seed", "prompt", "item") if name in frame]
    return _crossed(_numbered(frame).pivot(index=items, columns=["method", "training"], values=column), methods)


def _numbered(frame: pd.DataFrame) -> pd.DataFrame:
    """With the column `training`, which a measurement of a single training may lack."""
    return frame if "training" in frame else frame.assign(training=0)


def _crossed(wide: pd.DataFrame, methods: Sequence[str]) -> np.ndarray:
    """(methods, trainings, items), the same items in the same order for all; a method that was trained once, or not
    at all, is repeated for every training.

    Args:
        wide: one row an item, one column a method and training.
    Raises:
        UserError: two methods have several trainings each, and not the same ones.
    """
    parts = [wide[method] for method in methods]
    numbers = {tuple(part.columns) for part in parts if part.shape[1] > 1}
    if len(numbers) > 1:
        raise UserError(f"{', '.join(methods)} have different trainings and cannot be compared training by training")
    most = max(part.shape[1] for part in parts)
    return np.stack([np.broadcast_to(part.to_numpy().T, (most, len(wide))) for part in parts])
