"""Intervals against scipy's, Holm's steps against their definition, and what chance alone would be called better."""

from __future__ import annotations

import math

import numpy
import pytest
from scipy import stats

from attunement.compare.statistics import Prior, compare, estimate, front, prior


def of(values: list[float], task: str = "t") -> dict[tuple[str, int], float]:
    return {(task, seed): value for seed, value in enumerate(values)}


def test_the_interval_is_students() -> None:
    values = [0.81, 0.83, 0.80]
    made = estimate(of(values))
    low, high = stats.t.interval(0.95, 2, loc=numpy.mean(values), scale=stats.sem(values))
    assert (made.mean, made.low, made.high) == pytest.approx((numpy.mean(values), low, high))
    assert made.count == 3


def test_one_value_has_no_interval() -> None:
    made = estimate(of([0.5]))
    assert (made.mean, made.low, made.high, made.half) == (0.5, None, None, None)


def test_equal_seeds_say_nothing_of_how_far_apart_seeds_lie() -> None:
    made = estimate(of([0.75, 0.75]))
    assert (made.mean, made.low, made.high) == (0.75, None, None)
    apart = compare(of([0.75, 0.75]), {"other": of([0.5, 0.5])})["other"]
    assert (apart.mean, apart.low, apart.p, apart.sure) == (0.25, None, 1.0, False)
    lent = compare(of([0.75, 0.75]), {"other": of([0.5, 0.5])}, Prior(1e-4, 20))["other"]
    assert lent.sure, "the other pairs of a study know how far apart seeds lie"


def test_an_interval_ends_where_no_value_can_be() -> None:
    made = estimate(of([0.01, 0.09, 0.02])).within(0, 1)
    assert (made.low, made.high) == (0.0, estimate(of([0.01, 0.09, 0.02])).high)
    assert estimate(of([0.99, 0.91, 0.98])).within(0, 1).high == 1.0
    assert estimate(of([0.5])).within(0, 1).low is None


def test_what_differs_between_tasks_is_no_noise() -> None:
    easy, hard = [0.90, 0.92, 0.91], [0.50, 0.52, 0.51]
    made = estimate({**of(easy, "easy"), **of(hard, "hard")})
    assert made.mean == pytest.approx(0.71)
    error = 0.01 * math.sqrt(1 / 3 + 1 / 3) / 2  # the standard deviation within each task is 0.01
    assert made.half == pytest.approx(stats.t.ppf(0.975, 4) * error)


def test_two_methods_are_compared_by_the_paired_t() -> None:
    one, other = [0.81, 0.83, 0.80, 0.84], [0.79, 0.82, 0.77, 0.81]
    made = compare(of(one), {"other": of(other)})["other"]
    expected = stats.ttest_rel(one, other)
    low, high = expected.confidence_interval(0.95)
    assert made.p == pytest.approx(expected.pvalue)
    assert (made.mean, made.low, made.high) == pytest.approx((0.0225, low, high))
    assert made.sure
    assert made.pairs == 4


def test_pairing_sees_what_two_intervals_do_not() -> None:
    seeds = numpy.array([0.0, 0.08, -0.08, 0.04])  # what a seed does to every method
    one, other = of(list(0.80 + seeds + [0.001, -0.001, 0.001, 0.0])), of(list(0.78 + seeds))
    assert estimate(one).low < estimate(other).high  # the intervals overlap widely
    assert compare(one, {"other": other})["other"].sure


def test_holm_by_hand_and_its_intervals_agree_with_its_p() -> None:
    random = numpy.random.default_rng(3)
    best = of(list(random.normal(0.80, 0.01, 5)))
    others = {f"m{i}": of(list(random.normal(0.80 - 0.006 * i, 0.01, 5))) for i in range(8)}
    made = compare(best, others)
    plain = {name: compare(best, {name: values})[name].p for name, values in others.items()}
    running = 0.0
    for step, name in enumerate(sorted(plain, key=plain.get)):  # type: ignore[arg-type]
        running = max(running, min(1.0, (8 - step) * plain[name]))
        assert made[name].p == pytest.approx(running)
    for one in made.values():
        assert one.sure == (one.p <= 0.05)
    assert 0 < sum(one.sure for one in made.values()) < 8


def test_the_same_function_twice_is_never_told_apart() -> None:
    values = of([0.81, 0.83, 0.80])
    for common in (None, Prior(1e-4, 20)):
        made = compare(values, {"again": dict(values)}, common)["again"]
        assert not made.sure
        assert made.p == 1.0


def test_without_a_common_seed_there_is_no_comparison() -> None:
    assert compare(of([0.5]), {"other": {("t", 7): 0.1}}) == {}
    assert not compare(of([0.5]), {"other": of([0.1])})["other"].sure


def test_the_common_variance_is_found() -> None:
    random = numpy.random.default_rng(0)
    methods = [of(list(random.normal(0.8, 0.01, 3))) for _ in range(40)]
    found = prior(methods)
    assert found.variance == pytest.approx(2 * 0.01**2, rel=0.35)  # of a difference of two
    assert 2 < found.degrees <= 2 * 39
    wild = [of(list(random.normal(0.8, 10 ** random.uniform(-4, -1), 3))) for _ in range(40)]
    assert prior(wild).degrees < found.degrees / 3  # where methods differ in their noise, each counts more for itself


def test_few_methods_have_no_common_variance() -> None:
    assert prior([of([0.1, 0.2, 0.4]), of([0.3, 0.2, 0.1])]) == Prior()


def test_chance_alone_is_seldom_called_better() -> None:
    """Equal methods at three seeds: the highest is called better than another in at most one study of twenty or so."""
    random = numpy.random.default_rng(7)
    wrong = careless = 0
    for _ in range(60):
        methods = {f"m{i}": of(list(random.normal(0.8, 0.01, 3))) for i in range(30)}
        common = prior(list(methods.values()))
        best = methods.pop(max(methods, key=lambda name: estimate(methods[name]).mean))
        wrong += any(one.sure for one in compare(best, methods, common, chosen=True).values())
        careless += any(one.sure for one in compare(best, methods, common).values())
    assert wrong <= 6
    assert careless > wrong  # the highest was found by looking: its lead over the lowest is what chance makes largest


def test_a_method_that_collapses_hides_nothing_but_itself() -> None:
    random = numpy.random.default_rng(5)
    methods = {f"m{i}": of(list(random.normal(0.80, 0.01, 3))) for i in range(12)}
    weak = {f"weak{i}": of(list(random.normal(0.70, 0.01, 3))) for i in range(3)}
    best = of(list(random.normal(0.83, 0.01, 3)))
    collapsed = {"wild": of([0.83, 0.82, 0.01]), "low": of([0.70, 0.60, 0.02])}
    calm = prior([best, *methods.values(), *weak.values()])
    common = prior([best, *methods.values(), *weak.values(), *collapsed.values()])
    assert common.variance == pytest.approx(calm.variance, rel=0.5)
    made = compare(best, methods | weak | collapsed, common, chosen=True)
    assert all(made[name].sure for name in weak)
    assert not any(made[name].sure for name in collapsed)


def test_chance_alone_is_seldom_called_better_where_some_methods_are_wild() -> None:
    random = numpy.random.default_rng(11)
    wrong = 0
    for _ in range(60):
        noise = [0.01] * 24 + [0.1] * 6
        methods = {f"m{i}": of(list(random.normal(0.8, spread, 3))) for i, spread in enumerate(noise)}
        common = prior(list(methods.values()))
        best = methods.pop(max(methods, key=lambda name: estimate(methods[name]).mean))
        wrong += any(one.sure for one in compare(best, methods, common, chosen=True).values())
    assert wrong <= 6


def test_a_real_lead_is_seen_at_three_seeds_among_sixty() -> None:
    random = numpy.random.default_rng(1)
    methods = {f"m{i}": of(list(random.normal(0.75, 0.01, 3))) for i in range(60)}
    best = of(list(random.normal(0.85, 0.01, 3)))
    made = compare(best, methods, prior([best, *methods.values()]), chosen=True)
    assert all(one.sure for one in made.values())
    alone = compare(best, methods)
    assert sum(one.sure for one in alone.values()) < 30  # three differences alone do not carry sixty corrections


def test_the_front_by_definition() -> None:
    random = numpy.random.default_rng(2)
    points = [(float(a), float(b)) for a, b in random.integers(0, 12, (60, 2))]
    beaten = {
        i
        for i, (cost, quality) in enumerate(points)
        if any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)
    }
    found = front(points)
    assert set(found) == set(range(60)) - beaten
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)
