"""What may be said from a few seeds: intervals, paired tests, and the front of the best compromises.

Intervals are Student's t at 95 %, not the bootstrap: three seeds have ten distinct resamples, whose interval covers
the truth three times in four. Methods are compared on the differences at the same task and seed, which removes what a
seed does to all of them. The variance of three differences is itself mostly noise, so it is drawn towards what the
other pairs of the study show, by as much as they agree (the moderated t of Smyth, 2004,
https://doi.org/10.2202/1544-6115.1027, with few pairs the plain paired t; pairs of a wild variance are left out of it
and judged by their own, as Phipson et al., 2016, do, https://doi.org/10.1214/16-AOAS920). Many comparisons with one method
are corrected by Holm's steps, those with the best one for all pairs since it was found by looking. The interval of
each difference is taken at the level of its own step: it excludes zero exactly where the corrected test rejects, so
that `better` has one meaning. Seeds that came to the same value to the last digit, as they may where quality is counted on
some hundred rows, say nothing of how far apart seeds lie: there is no interval then, and nothing is sure, unless the
other pairs lend their variance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
from scipy import optimize, stats

LEVEL = 0.95
FEWEST_PAIRS = 10
"""Pairs of methods from which a common variance is learned; below this each has its own alone."""

UNLIKELY = 0.01
"""Of a variance under the common one: below this a pair is judged by its own, which can only make it less sure."""

Values = Mapping[tuple[str, int], float]
"""What was measured at a task and a seed."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval at 95 %; no interval (None) from fewer than two values, or where all are equal."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half of the interval's width."""
        return None if self.high is None else self.high - self.mean

    def within(self, least: float, most: float) -> Estimate:
        """The interval without what no value can be: it holds the truth as often as before."""
        if self.low is None or self.high is None:
            return self
        low, high = min(max(self.low, least), self.mean), max(min(self.high, most), self.mean)
        return Estimate(self.mean, low, high, self.count)


@dataclass(frozen=True)
class Difference:
    """One method minus another, at the same tasks and seeds."""

    mean: float
    low: float | None
    high: float | None
    """The interval at the level of its step in Holm's correction; None where there were too few seeds for any, or all
    of them differed by the same."""
    p: float
    """Corrected for the number of comparisons."""
    pairs: int

    @property
    def sure(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Prior:
    """What the pairs of a study say of the variance of a difference: the value, and how many degrees it is worth."""

    variance: float = 0.0
    degrees: float = 0.0


def estimate(values: Values) -> Estimate:
    """The mean over tasks of the means over seeds, and its interval. Raises `ValueError` where there are no values."""
    mean, variance, degrees = _blocks(values)
    if not degrees or not variance:
        return Estimate(mean, None, None, len(values))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, degrees)) * math.sqrt(variance * _weight(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def prior(methods: Sequence[Values]) -> Prior:
    """The common variance of differences, from every pair of methods.

    Sample variances scatter by what their degrees explain and by what differs between pairs: a variance with its degrees
    is Smyth's F distribution. It is matched at its quartiles, not by its moments, so that a method with a seed that
    collapsed does not take from the others what they know of each other. Pairs without any difference are one function
    twice and say nothing.
    """
    found: dict[int, list[float]] = {}
    for one, other in itertools.combinations(methods, 2):
        _, variance, degrees = _blocks(_minus(one, other))
        if degrees and variance > 0:
            found.setdefault(degrees, []).append(variance)
    if not found:
        return Prior()
    degrees = max(found, key=lambda d: len(found[d]))  # the pairs with all seeds, where a few lack one
    variances = found[degrees]
    if len(variances) < FEWEST_PAIRS:
        return Prior()
    logs = numpy.log(numpy.maximum(variances, 1e-5 * numpy.median(variances)))
    low, middle, high = numpy.quantile(logs, (0.25, 0.5, 0.75))

    def excess(worth: float) -> float:
        """How much further apart the quartiles are than those of variances that share one worth so many degrees."""
        first, third = numpy.log(stats.f.ppf((0.25, 0.75), degrees, worth))
        return float((high - low) - (third - first))

    least, most = (
        0.1,
        float(degrees * (len(methods) - 1)),
    )  # pairs share methods: they know no more than all runs together
    worth = most if excess(most) <= 0 else least if excess(least) >= 0 else optimize.brentq(excess, least, most)
    return Prior(math.exp(float(middle) - math.log(stats.f.ppf(0.5, degrees, worth))), float(worth))


def compare(
    one: Values, others: Mapping[str, Values], common: Prior | None = None, chosen: bool = False
) -> dict[str, Difference]:
    """`one` minus each of the others, corrected by Holm for their number. Others without a common seed are left out.

    With `chosen`, `one` was picked for its mean, so that any pair could have been looked at: corrected for all pairs.
    """
    common = common or Prior()
    tests: dict[str, tuple[float, float, float, float, int]] = {}  # mean, error, degrees, p, pairs
    for name, other in others.items():
        difference = _minus(one, other)
        if not difference:
            continue
        mean, variance, degrees = _blocks(difference)
        if not degrees:
            tests[name] = (mean, math.inf, 0.0, 1.0, len(difference))
            continue
        shared = 0.0 if _wild(variance, degrees, common) else common.degrees
        total = float(degrees + shared)
        variance = (degrees * variance + shared * common.variance) / total
        error = math.sqrt(variance * _weight(difference))
        if all(value == 0 for value in difference.values()):
            tests[name] = (mean, error, total, 1.0, len(difference))
        elif not error:
            tests[name] = (mean, math.inf, 0.0, 1.0, len(difference))
        else:
            tests[name] = (mean, error, total, 2 * float(stats.t.sf(abs(mean) / error, total)), len(difference))
    made: dict[str, Difference] = {}
    level, corrected, stopped = 0.0, 0.0, False
    ordered = sorted(tests, key=lambda name: tests[name][3])
    for step, name in enumerate(ordered):
        mean, error, total, p, pairs = tests[name]
        left = (len(ordered) * (len(ordered) + 1) // 2 if chosen else len(ordered)) - step
        level = level if stopped else (1 - LEVEL) / left
        corrected = max(corrected, min(1.0, p * left))
        stopped = stopped or p > level
        if math.isinf(error):
            made[name] = Difference(mean, None, None, corrected, pairs)
            continue
        half = float(stats.t.ppf(1 - level / 2, total)) * error
        made[name] = Difference(mean, mean - half, mean + half, corrected, pairs)
    return {name: made[name] for name in others if name in made}


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of (cost, quality), the places that no other point beats in both, by rising cost; equal points all stay."""
    best, found = -math.inf, []
    for cost, group in itertools.groupby(
        sorted(range(len(points)), key=lambda i: points[i][0]), lambda i: points[i][0]
    ):
        places = list(group)
        top = max(points[i][1] for i in places)
        if top > best:
            found += [i for i in places if points[i] == (cost, top)]
            best = top
    return found


def _wild(variance: float, degrees: int, common: Prior) -> bool:
    """Whether a variance is so far above the common one that it is another: it then stands for itself alone."""
    if not common.degrees or not common.variance:
        return False
    return bool(stats.f.sf(variance / common.variance, degrees, common.degrees) < UNLIKELY)


def _minus(one: Values, other: Values) -> dict[tuple[str, int], float]:
    return {key: one[key] - other[key] for key in one if key in other}


def _tasks(values: Values) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for (task, _), value in values.items():
        found.setdefault(task, []).append(value)
    return found


def _blocks(values: Values) -> tuple[float, float, int]:
    """The mean of the tasks' means; the variance within tasks and its degrees: what differs between tasks is no noise."""
    tasks = _tasks(values)
    if not tasks:
        raise ValueError("no values")
    means = {task: math.fsum(found) / len(found) for task, found in tasks.items()}
    degrees = len(values) - len(tasks)
    squares = math.fsum((value - means[task]) ** 2 for (task, _), value in values.items())
    variance = squares / degrees if degrees else 0.0
    # what rounding leaves of equal numbers is not variance
    scale = max((abs(value) for value in values.values()), default=0.0)
    variance = 0.0 if variance < (1e-12 * scale) ** 2 else variance
    return math.fsum(means.values()) / len(means), variance, degrees


def _weight(values: Values) -> float:
    """What the variance of a value is multiplied by for that of the mean of the tasks' means."""
    tasks = _tasks(values)
    return math.fsum(1 / len(found) for found in tasks.values()) / len(tasks) ** 2
