"""Means with bootstrap intervals of two levels: other prompts might have been drawn, and other trainings.

The design is crossed: every training answers every prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def drawn_trainings(count: int) -> int:
    """How many trainings a resample draws, with replacement, of so many that there are.

    As many would make an interval too narrow: their scatter is known from so few. Of five, two are drawn; then a mean
    scatters as wide as Student's t has it, var = s^2 (n - 1) / (n m) = (t / z)^2 s^2 / n (the bootstrap with m of n,
    Bickel, Goetze and van Zwet 1997, with m chosen for that). Of fewer than five it is one, so that an interval without
    any scatter of prompts goes from the worst training to the best, and encloses the truth in less than 95 of 100 cases
    (of two trainings in half of them).
    """
    if count == 1:
        return 1
    return max(1, round((count - 1) * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, count - 1)) ** 2))


@lru_cache(maxsize=4)
def _draws(trainings: int, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """How often every prompt is in each resample, (prompts, resamples), and which trainings are, (drawn, resamples)."""
    rng = np.random.default_rng(0)
    pick = rng.integers(prompts, size=(_RESAMPLES, prompts))
    often = np.stack([np.bincount(row, minlength=prompts) for row in pick], 1).astype(float)
    return often, rng.integers(trainings, size=(drawn_trainings(trainings), _RESAMPLES))


def resampled_means(table: np.ndarray) -> np.ndarray:
    """Means of a table (..., trainings, prompts) without its NaNs, one a resample: (..., resamples)."""
    often, which = _draws(*table.shape[-2:])
    there = ~np.isnan(table)
    with np.errstate(invalid="ignore"):  # of a resample that has nothing but NaN it is NaN
        each = (np.where(there, table, 0.0) @ often) / (there.astype(float) @ often)  # (..., trainings, resamples)
    return each[..., which, np.arange(_RESAMPLES)].mean(-2)


def resampled(table: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """A statistic of means, with a bootstrap interval over prompts, and over trainings where there are several.

    All methods keep the same resampled prompts and trainings, so differences and ratios are paired. A resample draws
    prompts, and trainings (`drawn_trainings`) which all answer these prompts; where all trainings answer alike, the
    interval is the one over prompts. What prompts and trainings do not explain each alone counts on both levels, so the
    interval errs on the wide side (Owen 2007, "The pigeonhole bootstrap").

    Args:
        table: (methods, prompts) or (methods, trainings, prompts); NaN: nothing to be asked there.
        statistic: means, (methods,) or (methods, resamples) -> one, or one a resample.
    """
    table = table if table.ndim == 3 else table[:, None]
    value = statistic(np.nanmean(table, (1, 2)))
    spread = statistic(resampled_means(table))
    spread = spread[~np.isnan(spread)]
    low, high = np.percentile(spread, [2.5, 97.5]) if len(spread) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high))
