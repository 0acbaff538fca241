"""How far a predicted time can be trusted, and what a few measured ones say about the others.

The error of log seconds is a Gaussian, whose covariance says what runs have in common: constants (each known within its
spread), one program on one machine, what neither of them says; and what is each one's own. Intervals are read off its
diagonal. A prediction is corrected by conditioning on what was measured: three runs move each constant by as much as
they know of it, and by little where they contradict each other (Rasmussen and Williams 2006, Gaussian Processes for
Machine Learning, 2.2).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

PROGRAM_DEVIATION = 0.10  # of log seconds, common to the runs of one program on one machine
RUN_DEVIATION = 0.08  # of one run
SCATTER = 0.7  # of the logarithm of that, from source to source
FREEDOM = 3.0  # degrees of it in the tail of a run's own error, by Student's t: an odd one is believed to be odd
NINETY = 1.645  # standard deviations of a Gaussian on either side that hold 90 %
STEP = 0.01  # of the logarithm of a constant, in its derivative

Array = np.ndarray[Any, np.dtype[np.float64]]


def sensitivities(log_seconds: Callable[[Mapping[str, float]], Any], spreads: Mapping[str, Any]) -> Array:
    """(runs, constants): what log seconds change by where the log of a constant grows by its spread.

    log_seconds: of one run or several, given factors by which constants are multiplied. spreads: of each constant, for
    all runs or each.
    """
    base = np.atleast_1d(log_seconds({}))
    changes = [np.atleast_1d(log_seconds({name: math.exp(STEP)})) - base for name in spreads]
    return np.stack([spread * change / STEP for spread, change in zip(spreads.values(), changes, strict=True)], axis=1)


def covariance(sensitive: Array, doubts: Sequence[Mapping[str, float]], programs: Sequence[object] = ()) -> Array:
    """(runs, runs) of log seconds: what runs of one source have in common, without what is each one's own.

    doubts: of each run, what its configuration does not say, and by how much that may move it: the same doubt of two
    runs moves both. programs: what each one runs, as far as it says; by default all run the same.
    """
    same = np.array([[mine == other for other in programs] for mine in programs]) if programs else 1.0
    common = sensitive @ sensitive.T + PROGRAM_DEVIATION**2 * (1 + same) / 2
    for name in {name for of_run in doubts for name in of_run}:
        moved = np.array([of_run.get(name, 0.0) for of_run in doubts])
        common += np.outer(moved, moved)
    return common


def corrected(common: Array, errors: Mapping[int, float]) -> tuple[Array, Array]:
    """Mean and standard deviation of each run's log(measured / predicted), once those of some runs are known.

    common: as `covariance` gives it. errors: log(measured / predicted) by index; none leaves a mean of zero.

    How far runs scatter of their own differs from source to source, and is not known: it is a tenth where one program
    was timed with care, and a half where a table mixes programs. So it is averaged over what the errors leave likely:
    where they agree, they move all others by nearly as much, and where they do not, by little.
    """
    variances = np.diag(common)
    if not errors:
        return np.zeros(len(common)), np.sqrt(variances + RUN_DEVIATION**2)
    seen, known = list(errors), np.array(list(errors.values()))
    spreads = np.linspace(-2.5, 4, 27)  # of its logarithm, around RUN_DEVIATION
    likely, means, left = [], [], []
    for own in RUN_DEVIATION * np.exp(SCATTER * spreads):
        among = common[np.ix_(seen, seen)] + own**2 * np.eye(len(seen))
        gain = np.linalg.solve(among, common[seen]).T
        likely.append(-(np.linalg.slogdet(among)[1] + known @ np.linalg.solve(among, known)) / 2)
        means.append(gain @ known)
        left.append(variances - np.einsum("ij,ij->i", gain, common[:, seen]) + own**2)
    weights = np.array(likely) - spreads**2 / 2
    weights = np.exp(weights - weights.max())
    weights /= weights.sum()
    mean = weights @ np.array(means)
    return mean, np.sqrt(weights @ (np.array(left) + np.square(means)) - mean**2)


def learnt(sensitive: Array, errors: Array) -> Array:
    """By how many of its spreads each constant has moved, most likely, where runs were off by `errors`.

    sensitive: as `sensitivities` gives it, (runs, constants). errors: log(measured / predicted) of each run. A run's
    own error is of Student's t: a Gaussian whose variance grows with what is left of it (Lange, Little and Taylor
    1989, Robust statistical modeling using the t distribution).
    """
    common = sensitive @ sensitive.T
    left, moved = errors - np.median(errors), np.zeros(sensitive.shape[1])
    for _ in range(50):
        own = RUN_DEVIATION**2 * (FREEDOM + (left / RUN_DEVIATION) ** 2) / (FREEDOM + 1)
        moved = sensitive.T @ np.linalg.solve(common + np.diag(own), errors)
        left = errors - sensitive @ moved
    return moved
