"""How small a difference an evaluation can show: what a number of items is good for, said before anybody reads it.

Methods that answer the same items are compared by the differences of their scores, item by item: a paired t-test. Its
power follows from the noncentral t distribution (Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences",
chapter 2), with d the true mean difference, s the deviation of the differences and n items::

    power(d) = P(t' > t(1 - level/2, n - 1)),    t' noncentral with n - 1 degrees of freedom and centre sqrt(n) d / s

(found with the wrong sign, which happens in less than one of 10,000 evaluations here, is not found).
For answers that are right or wrong this is McNemar's test but for its exact form: the differences are -1, 0 and 1.
"""

from __future__ import annotations

import math
from functools import lru_cache

from scipy import optimize, stats

LEVEL, POWER = 0.05, 0.80
"""Two-sided level of the test, and the share of evaluations that are to find a difference which is there."""


def smallest_difference(items: int, deviation: float | None = None) -> float | None:
    """The smallest true difference of mean scores that a paired t-test finds in `POWER` of all evaluations.

    Args:
        items: that both methods answered.
        deviation: of the differences between the two methods' scores, item by item. None: the largest there can be.
            Scores are between 0 and 1, so the square of a difference is at most 1, and with a mean of d its
            deviation at most sqrt(1 - d^2): the case where every answer differs (as in Connor 1987, Biometrics 43,
            for McNemar's test). What is found then is found whatever the answers are.
    Returns:
        The difference, 0 to 1; None where there is none: fewer than two items, or so few that only a difference of
        more than 1 could be found.
    """
    if items < 2:
        return None
    effect = _centre(items) / math.sqrt(items)
    difference = effect / math.sqrt(1 + effect**2) if deviation is None else effect * deviation
    return difference if difference <= 1 else None


@lru_cache(maxsize=256)
def _centre(items: int) -> float:
    """The noncentral t's centre at which the test has its power."""
    free = items - 1
    bound = stats.t.isf(LEVEL / 2, free)

    def lacks(centre: float) -> float:
        return stats.nct.sf(bound, free, centre) - POWER

    return float(optimize.brentq(lacks, 0.0, 3 * bound + 3))
