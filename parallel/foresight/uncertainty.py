"""How far a predicted time can be trusted, and what a few measured ones say about the others.

The error of log seconds is a Gaussian, whose covariance says what runs have in common: constants (each known within its
spread), one program on one machine, what neither of them says; and what is each one's own. Intervals are read off its
diagonal. A prediction is corrected by conditioning on what was measured: three runs move each constant by as much as
they know of it, and one odd run cannot move much (Rasmussen and Williams 2006, Gaussian Processes for Machine Learning,
2.2).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

PROGRAM_DEVIATION = 0.10  # of log seconds, common to the runs of one program on one machine
RUN_DEVIATION = 0.08  # of one run
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


def covariance(sensitive: Array, doubts: Sequence[Mapping[str, float]]) -> Array:
    """(runs, runs) of log seconds, of runs of one program on one machine.

    doubts: of each run, what its configuration does not say, and by how much that may move it: the same doubt of two
    runs moves both.
    """
    common = sensitive @ sensitive.T + PROGRAM_DEVIATION**2
    for name in {name for of_run in doubts for name in of_run}:
        moved = np.array([of_run.get(name, 0.0) for of_run in doubts])
        common += np.outer(moved, moved)
    return common + RUN_DEVIATION**2 * np.eye(len(sensitive))


def corrected(covariance: Array, errors: Mapping[int, float]) -> tuple[Array, Array]:
    """Mean and standard deviation of each run's log(measured / predicted), once those of some runs are known.

    errors: log(measured / predicted) by index; none leaves a mean of zero. An odd one counts as three deviations.
    """
    n = len(covariance)
    seen = list(errors)
    if not seen:
        return np.zeros(n), np.sqrt(np.diag(covariance))
    limit = 3 * np.sqrt(np.diag(covariance)[seen])
    known = np.clip([errors[i] for i in seen], -limit, limit)
    gain = np.linalg.solve(covariance[np.ix_(seen, seen)], covariance[seen]).T
    left = np.diag(covariance) - np.einsum("ij,ij->i", gain, covariance[:, seen])
    return gain @ known, np.sqrt(np.maximum(left, 0) + RUN_DEVIATION**2 * np.isin(np.arange(n), seen))


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
