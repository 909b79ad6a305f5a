"""What a study found, in sentences that say no more than the intervals do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attunement.compare.records import BASELINES, Study
from attunement.compare.statistics import Difference
from attunement.compare.table import FULL, MEASURES, STILL, TIMED, Row, higher, leaders, shown, unit_of, within


@dataclass(frozen=True)
class Finding:
    """A question, its answer in a word or two, and the sentence behind it."""

    title: str
    answer: str
    sentence: str
    labels: tuple[str, ...] = ()
    """The methods that the answer names."""


NO_GAIN, BEST = "Against zero-shot", "Best quality"

QUESTIONS = (
    ("backward_bytes", "Least kept for backward"),
    ("step", "Fastest step"),
    ("trainable", "Fewest trained numbers"),
)


def findings(study: Study, rows: Sequence[Row]) -> list[Finding]:
    """What may be said of one task; empty where nothing was measured yet."""
    ranked = [row for row in rows if row.quality]
    if not ranked:
        return []
    found = [one for one in (no_gain(ranked),) if one is not None]
    found.append(_quality(ranked))
    full = next((row for row in ranked if row.method == FULL), None)
    good, words = [row for row in ranked if row.among_best], "at the top"
    told = any(row.to_best is not None and row.to_best.low is not None for row in ranked)
    if full is not None:
        if told := any(row.to_full is not None and row.to_full.low is not None for row in ranked):
            good, words = [row for row in ranked if keeps_up(row, full)], "that keep up with full fine-tuning"
        found.append(_against_full(full, [row for row in ranked if row is not full]))
    good = [row for row in good if row.method != STILL]  # what adapts nothing costs nothing
    if len(good) == 1 and not told:
        return found  # the highest of means of which nothing can be said
    for key, title in QUESTIONS:
        if first := leaders(study, good, key)[0]:
            found.append(_least(key, title, first, good, full, words))
    return found


def keeps_up(row: Row, full: Row) -> bool:
    """Whether a row is not surely below full fine-tuning, and its mean not below the interval of that.

    What varies much from seed to seed is sure of nothing: the mean has to say something, too.
    """
    if row is full or not below(row):
        return True
    return not (row.to_full and row.to_full.sure) and within(full, row)


def below(row: Row) -> bool:
    """Whether the mean difference to full fine-tuning is to this row's disadvantage."""
    return row.to_full is not None and (row.to_full.mean < 0) == higher(row.metric)


def no_gain(rows: Sequence[Row]) -> Finding | None:
    """That no method is surely better than the model as it is, where that is so; baselines are no methods."""
    still = next((row for row in rows if row.method == STILL and row.quality), None)
    own = [row for row in rows if row.quality and row.method not in BASELINES]
    if still is None or not own or any(_gains(row) for row in own):
        return None
    best = max(own, key=_gain)
    value = f"The model as it is, without any training, has {with_interval(still, 'quality')}"
    others = [row.label for row in rows if row.method in BASELINES and _gains(row)]
    but = f" Better is only {listed(others)}." if others else ""
    if _gain(best) <= 0:
        none = f"none of the {len(own)} methods is better" if own[1:] else f"{best.label} is not better"
        return Finding(NO_GAIN, "No method beats zero-shot", f"{value}, and {none}.{but}", (still.label,))
    gap = shown_gap(_gain(best), unit_of(MEASURES[0], still.metric))
    compared = [row.to_still for row in own if row.to_still]
    told = any(one.low is not None for one in compared)
    reason = "that may be chance" if told else unsaid(compared)
    sentence = f"{value}. The best mean of the methods, that of {best.label}, lies {gap} above it, and {reason}.{but}"
    return Finding(NO_GAIN, "No method surely beats zero-shot", sentence, (still.label,))


def _gain(row: Row) -> float:
    """How much better the mean of a row is than that of the model as it is."""
    mean = row.to_still.mean if row.to_still else 0.0
    return mean if higher(row.metric) else -mean


def _gains(row: Row) -> bool:
    return row.to_still is not None and row.to_still.sure and _gain(row) > 0


def unsaid(differences: Sequence[Difference]) -> str:
    """Why none of these differences has an interval."""
    if max((one.pairs for one in differences), default=1) < 2:
        return "with one seed nothing can be said of the differences"
    return "where all seeds came to the same nothing can be said of the differences"


def _quality(ranked: Sequence[Row]) -> Finding:
    best = ranked[0]
    unit = unit_of(MEASURES[0], best.metric)
    top = [row for row in ranked if row.among_best]
    behind = sum(row.to_best is not None and row.to_best.sure for row in ranked)
    unsteady = [row.label for row in ranked if not row.among_best and not (row.to_best and row.to_best.sure)]
    value = with_interval(best, "quality")
    mean = best.values["quality"].mean
    equal = [row.label for row in ranked if math.isclose(row.values["quality"].mean, mean, rel_tol=1e-6)]
    has = "have" if equal[1:] else "has"
    if len(ranked) == 1:
        return Finding(BEST, best.label, f"{value}; there is no other to compare with.", (best.label,))
    if all(row.to_best is None or row.to_best.low is None for row in ranked[1:]):
        reason = unsaid([row.to_best for row in ranked[1:] if row.to_best])
        if len(equal) == len(ranked):
            sentence = f"All {len(ranked)} have {value}; {reason}."
        else:
            sentence = f"{listed(equal)} {has} the highest value, {value}; {reason}."
        return Finding(BEST, "Not to be told", sentence, tuple(equal))
    if len(top) == 1 and not unsteady:
        second = ranked[1]
        lead = second.to_best
        gap = f"; {shown_gap(lead.mean, unit)} above {second.label}" if lead else ""
        what = f"each of the {len(ranked) - 1} others" if len(ranked) > 2 else second.label
        return Finding(BEST, best.label, f"{value}, better than {what}{gap}.", (best.label,))
    count = f"{behind} others" if behind else "none of the others"
    beats = f"; {best.label} is better than" if equal[1:] else f", {'and' if behind else 'but'} is better than"
    apart = f"{len(top)} of {len(ranked)} methods cannot be told apart at the top. " if top[1:] else ""
    sentence = f"{apart}{listed(equal)} {has} the highest mean, {value}{beats} {count}."
    if unsteady:
        ends = ("means lie", "they are") if unsteady[1:] else ("mean lies", "it is")
        below_it = f"{listed(unsteady)}, and whether {ends[1]} worse is not sure: more seeds would tell"
        sentence += f" The {ends[0]} below that interval for {below_it}."
    return Finding(BEST, level(top), sentence, tuple(row.label for row in top))


def _least(key: str, title: str, first: Sequence[Row], good: Sequence[Row], full: Row | None, words: str) -> Finding:
    measure = next(one for one in MEASURES if one.key == key)
    best = first[0]
    value = shown(best.values[key].mean, measure.unit)
    if measure.unit == "ratio":
        value += " full fine-tuning’s"
    elif full is not None and best is not full and key in full.values and full.values[key].mean:
        value += f", {percent(best.values[key].mean / full.values[key].mean)} of full fine-tuning’s"
    if len(good) == 1:
        return Finding(title, best.label, f"{value}; the only method {words}.", (best.label,))
    if len(first) == 1:
        return Finding(title, best.label, f"{value}, the least of the {len(good)} methods {words}.", (best.label,))
    names = listed([row.label for row in first])
    if key in TIMED:
        alike = f"{listed([row.label for row in first[1:]])} within a tenth of it, which is what one timing can tell"
        sentence = f"{best.label} takes {value}, the least of {len(good)} methods {words}, with {alike}."
    else:
        sentence = f"{names} are equal, the least of {len(good)} methods {words}: {value}."
    return Finding(title, level(first), sentence, tuple(row.label for row in first))


def _against_full(full: Row, others: Sequence[Row]) -> Finding:
    compared = [row for row in others if row.to_full is not None]
    if all(row.to_full is None or row.to_full.low is None for row in compared):
        reason = unsaid([row.to_full for row in compared if row.to_full])
        return Finding("Against full fine-tuning", "Not to be told", f"{reason[0].upper()}{reason[1:]}.")
    told = [row for row in compared if row.to_full and row.to_full.sure]
    better, worse = [row for row in told if not below(row)], [row for row in told if below(row)]
    same = len(compared) - len(better) - len(worse)
    named = f" ({listed([row.label for row in better], 3)})" if better else ""
    ends = "is worse" if len(worse) == 1 else "are worse"
    sentence = (
        f"At {with_interval(full, 'quality')}: {len(better) or 'none'} of {len(compared)} methods "
        f"{'is' if len(better) == 1 else 'are'} better{named}, {same} cannot be told from it, {len(worse)} {ends}."
    )
    answer = f"{len(better)} better, {len(worse)} worse"
    return Finding("Against full fine-tuning", answer, sentence, (full.label,))


def with_interval(row: Row, key: str) -> str:
    """`83.1 % (82.6 to 83.5)`."""
    measure = next(one for one in MEASURES if one.key == key)
    unit, value = unit_of(measure, row.metric), row.values[key]
    if value.low is None or value.high is None:
        return shown(value.mean, unit)
    low, high = (shown(end, unit).removesuffix(" %") for end in (value.low, value.high))
    return f"{shown(value.mean, unit)} ({low} to {high})"


def shown_gap(value: float, unit: str) -> str:
    """A difference of two qualities."""
    return f"{100 * abs(value):.1f} points" if unit == "share" else f"{abs(value):.3f}"


def percent(share: float) -> str:
    """A share with two figures."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def level(rows: Sequence[Row]) -> str:
    """Methods that cannot be told apart: `a, b or c`, or how many there are."""
    labels = [row.label for row in rows]
    if len(labels) == 1:
        return labels[0]
    return f"{len(labels)} methods level" if len(labels) > 3 else " or ".join([", ".join(labels[:-1]), labels[-1]])


def listed(words: Sequence[str], most: int = 4) -> str:
    """`a, b and c`, or `a, b, c and 7 more`."""
    if len(words) > most:
        return f"{', '.join(words[:most])} and {len(words) - most} more"
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
