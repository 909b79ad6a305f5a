"""The table of a study: a row for each method on each task, every measurement with its interval."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from attunement.compare.records import ALL, Study, Trial
from attunement.compare.statistics import Difference, Estimate, compare, estimate, front, prior
from attunement.summary import size_of
from attunement.train.recipe import written

FULL, STILL = "baseline/full", "baseline/zero-shot"
LOWER = ("loss", "perplexity", "error", "mse", "rmse", "mae", "wer", "cer")
FAMILIES = (
    "low_rank",
    "orthogonal",
    "prompts",
    "bottleneck",
    "scaling",
    "side",
    "spectral",
    "sparse",
    "selective",
    "baseline",
    "recipes",
)
"""In the order of their colours and marks; families of third parties take the marks that are left."""
SHARES = ("accuracy", "f1", "precision", "recall", "auc", "exact_match")


@dataclass(frozen=True)
class Measure:
    """A column: what it is called, how it is written and which way is better."""

    key: str
    title: str
    said: str
    """One sentence for who does not know it."""
    unit: str
    """`share`, `number`, `bytes`, `count`, `ratio`, `seconds` or `rate`."""
    best: str = "low"
    """`low` or `high`."""


MEASURES = (
    Measure("quality", "Quality", "The metric of the task on rows that the search never saw.", "share", "high"),
    Measure(
        "calibration", "Calibration error", "Expected calibration error: stated confidence minus accuracy.", "number"
    ),
    Measure("forgetting", "Forgetting", "Rise of the loss on the second data set, in nats.", "number"),
    Measure("backward_bytes", "Kept for backward", "Bytes that a training step keeps for its backward pass.", "bytes"),
    Measure("peak_memory", "Peak memory", "The most memory in use during a training step.", "bytes"),
    Measure("step", "Step time", "Time of a training step over that of full fine-tuning, same process.", "ratio"),
    Measure("flops", "FLOPs a step", "Floating-point operations of a training step.", "count"),
    Measure("trainable", "Trained", "Numbers that are trained.", "count"),
    Measure("saved_bytes", "Saved", "Bytes of the saved adapter.", "bytes"),
    Measure("inference", "Inference", "Time of a forward pass over the bare model's.", "ratio"),
    Measure("inference_merged", "Inference merged", "The same once merged; empty where it cannot be merged.", "ratio"),
    Measure("seconds", "Seconds", "Of a whole final run, the median.", "seconds"),
    Measure("rate", "Learning rate", "The rate that the search chose.", "rate"),
)
COSTS = ("backward_bytes", "peak_memory", "step", "trainable")
"""What quality is drawn against."""


EXACT = ("trainable", "saved_bytes", "backward_bytes", "flops")
"""Counted, not timed: one run says it."""

TIMED, RESOLUTION = ("step", "inference", "inference_merged"), 0.1
"""Timed once for each method: what lies within a tenth of another is not told from it."""

SPREAD = ("quality", "calibration", "forgetting", "step")
"""What is shown with its interval."""

BOUNDS = {"calibration": (0.0, 1.0), "step": (0.0, math.inf), "inference": (0.0, math.inf)}
"""Between which values a measure can lie; an interval is cut off there."""


@dataclass(frozen=True)
class Row:
    """A method on a task."""

    task: str
    label: str
    method: str
    recipe: str
    metric: str
    values: Mapping[str, Estimate]
    """By key of `MEASURES`; what was not measured is not there."""
    states: Mapping[str, int]
    """How many final runs ended in which state."""
    lost: int = 0
    """Trials of any stage that failed or diverged."""
    error: str = ""
    """Of the first of them."""
    to_best: Difference | None = None
    """The best method's quality minus this one's; None for the best itself and where it cannot be compared."""
    to_full: Difference | None = None
    """This one's quality minus that of full fine-tuning."""
    to_still: Difference | None = None
    """This one's quality minus that of the model as it is."""
    first: bool = False
    """Whether its mean quality is the highest of the task."""
    level: bool = False
    """Whether its quality cannot be told from the best, and its mean lies within the interval of the best."""
    front: tuple[str, ...] = field(default=())
    """The costs against which it is on the Pareto front."""

    @property
    def family(self) -> str:
        """`low_rank` of `low_rank/lora`."""
        return self.method.partition("/")[0]

    @property
    def among_best(self) -> bool:
        """Whether it is the best or level with it."""
        return self.first or self.level

    @property
    def quality(self) -> Estimate | None:
        """The task metric."""
        return self.values.get("quality")


def higher(metric: str) -> bool:
    """Whether more of a metric is better."""
    return metric.rpartition("_")[2] not in LOWER


def tasks(study: Study) -> list[str]:
    """The tasks in their order, `ALL` first where there are several."""
    found = list(dict.fromkeys(trial.task for trial in study.trials))
    return [ALL, *found] if len(found) > 1 else found


def rows(study: Study) -> dict[str, list[Row]]:
    """The rows of each task, the best first, those without a result last."""
    named = tasks(study)
    labels = list(dict.fromkeys(trial.label for trial in study.trials))
    by: dict[tuple[str, str], list[Trial]] = {}
    for trial in study.trials:
        by.setdefault((trial.task, trial.label), []).append(trial)
    made = {}
    for task in named:
        parts = [one for one in named if one != ALL] if task == ALL else [task]
        groups = {label: [t for part in parts for t in by.get((part, label), [])] for label in labels}
        made[task] = _of_task(task, parts, {label: found for label, found in groups.items() if found})
    return made


def _of_task(task: str, parts: list[str], groups: Mapping[str, list[Trial]]) -> list[Row]:
    seeds = sorted({trial.seed for found in groups.values() for trial in found if trial.stage == "final"})
    found = [_row(task, parts, trials) for trials in groups.values()]
    quality = {row.label: _values(groups[row.label], "quality") for row in found if row.quality}
    for row in found:
        if row.method == STILL and row.quality:  # nothing about it is random: one run stands for every seed
            mine = {part: value for (part, _), value in quality[row.label].items()}
            own = {(part, seed): value for part, value in mine.items() for seed in seeds}
            quality[row.label] = own | quality[row.label]
    sign = 1.0 if all(higher(row.metric) for row in found) else -1.0
    ranked = sorted(
        (row for row in found if row.quality), key=lambda row: (_figures(-sign * _mean(row, "quality")), *_cheap(row))
    )
    if not ranked:
        return sorted(found, key=lambda row: row.label)
    common = prior(list(quality.values()))
    best, full = ranked[0], next((row for row in ranked if row.method == FULL), None)
    to_best = compare(quality[best.label], {row.label: quality[row.label] for row in ranked[1:]}, common, chosen=True)
    others = {row.label: quality[row.label] for row in ranked if full is not None and row is not full}
    to_full = compare(quality[full.label], others, common) if full is not None else {}
    still = next((row for row in ranked if row.method == STILL), None)
    trained = {row.label: quality[row.label] for row in ranked if row is not still}
    to_still = compare(quality[still.label], trained, common) if still is not None else {}
    fronts: dict[str, list[str]] = {}
    for cost in COSTS:
        able = [row for row in ranked if cost in row.values]
        for place in front([(_mean(row, cost), sign * _mean(row, "quality")) for row in able]):
            fronts.setdefault(able[place].label, []).append(cost)
    rest = sorted((row for row in found if not row.quality), key=lambda row: row.label)
    return [
        *(
            replace(
                row,
                to_best=to_best.get(row.label),
                level=row is not best and not _sure(to_best, row) and within(best, row),
                to_full=_turned(to_full.get(row.label)),
                to_still=_turned(to_still.get(row.label)),
                first=row is best,
                front=tuple(fronts.get(row.label, ())),
            )
            for row in ranked
        ),
        *rest,
    ]


def _row(task: str, parts: list[str], trials: Sequence[Trial]) -> Row:
    final = [trial for trial in trials if trial.stage == "final"]
    done = [trial for trial in final if trial.state == "done"]
    states = {state: sum(trial.state == state for trial in final) for state in dict.fromkeys(t.state for t in final)}
    metrics = list(dict.fromkeys(trial.metric for trial in trials))
    values = {}
    for measure in MEASURES:
        found = _values(done, measure.key)
        if found and {part for part, _ in found} == set(parts):  # a mean over some of the tasks would be of others
            typical = _typical(found) if measure.key == "seconds" else estimate(found)
            values[measure.key] = typical.within(*_bounds(measure, metrics))
    if task == ALL:
        values.pop("rate", None)
    first = (final or trials)[0]
    lost = [trial.error for trial in trials if trial.state in ("failed", "diverged")]
    error = next(filter(None, lost), "")
    return Row(task, first.label, first.method, first.recipe, " and ".join(metrics), values, states, len(lost), error)


def _typical(found: Mapping[tuple[str, int], float]) -> Estimate:
    """The median over seeds, its mean over tasks: one run may have stood still while its machine slept."""
    parts = dict.fromkeys(part for part, _ in found)
    each = [statistics.median(value for (task, _), value in found.items() if task == part) for part in parts]
    return Estimate(statistics.fmean(each), None, None, len(found))


def _bounds(measure: Measure, metrics: Sequence[str]) -> tuple[float, float]:
    if measure.key == "quality" and unit_of(measure, " and ".join(metrics)) == "share":
        return 0.0, 1.0
    return BOUNDS.get(measure.key, (-math.inf, math.inf))


def _values(trials: Sequence[Trial], key: str) -> dict[tuple[str, int], float]:
    return {
        (trial.task, trial.seed): float(value)
        for trial in trials
        if trial.stage == "final" and trial.state == "done" and (value := getattr(trial, key)) is not None
    }


def _mean(row: Row, key: str) -> float:
    return row.values[key].mean


def _figures(value: float) -> float:
    """Without what rounding leaves in means of equal values."""
    return float(f"{value:.6g}")


def _cheap(row: Row) -> tuple[float, str]:
    """The order of rows of equal means: what keeps less for backward first."""
    kept = row.values.get("backward_bytes")
    return math.inf if kept is None else kept.mean, row.label


def _turned(one: Difference | None) -> Difference | None:
    if one is None:
        return None
    low, high = (None if value is None else -value for value in (one.high, one.low))
    return Difference(-one.mean, low, high, one.p, one.pairs)


def shown(value: float | None, unit: str) -> str:
    """A value as a person reads it."""
    if value is None:
        return "–"
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "bytes":
        return size_of(value)
    if unit == "count":
        for size, word in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= size:
                return f"{value / size:.3g} {word}" if value < 999.5 * size else f"{value / size:.0f} {word}"
        return f"{value:.0f}"
    if unit == "ratio":
        return f"{value:.2f}×"
    if unit == "seconds":
        return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"
    if unit == "rate":
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e+")
    return f"{value:.3f}"


def families(found: Mapping[str, list[Row]]) -> dict[str, int]:
    """The families of the rows, each with the number of its colour and mark."""
    present = list(dict.fromkeys(row.family for rows in found.values() for row in rows))
    known = [one for one in FAMILIES if one in present]
    free = [i for i, one in enumerate(FAMILIES) if one not in known] or list(range(len(FAMILIES)))
    others = [one for one in present if one not in known]
    return {one: FAMILIES.index(one) for one in known} | {one: free[i % len(free)] for i, one in enumerate(others)}


def window(rows: Sequence[Row]) -> tuple[float, float]:
    """From where to where qualities are drawn: all of them but those far below the rest (Tukey's fence), or above it
    where less is better."""
    qualities = [row.quality for row in rows if row.quality]
    if not qualities:
        return 0.0, 1.0
    means = [one.mean for one in qualities]
    first, third = numpy.quantile(means, (0.25, 0.75))
    reach = 1.5 * max(third - first, 0.01 * abs(third))
    low, high = min(means), max(means)
    if all(higher(row.metric) for row in rows):
        low = max(low, first - reach)
    else:
        high = min(high, third + reach)
    ends = [end for one in qualities if low <= one.mean <= high for end in (one.low, one.high) if end is not None]
    beyond = reach / 3 if len(means) > 12 else math.inf  # of many, one wide interval shall not flatten the rest
    inside = [end for end in ends if low - beyond <= end <= high + beyond]
    low, high = min([low, *inside]), max([high, *inside])
    edge = 0.04 * (high - low) or 0.02 * abs(high) or 0.5
    least, most = _bounds(MEASURES[0], [row.metric for row in rows])
    return max(float(low - edge), least), min(float(high + edge), most)


def unit_of(measure: Measure, metric: str) -> str:
    """The unit of a measure where quality is measured by `metric`: a share, or a plain number."""
    if measure.key != "quality":
        return measure.unit
    words = metric.split(" and ")
    return "share" if all(word.removeprefix("macro_").removeprefix("eval_") in SHARES for word in words) else "number"


def measures(found: Mapping[str, list[Row]]) -> list[Measure]:
    """The measures that any row has."""
    return [one for one in MEASURES if any(one.key in row.values for rows in found.values() for row in rows)]


def plain(found: Mapping[str, list[Row]]) -> list[dict[str, Any]]:
    """The table as plain data, one record a row: what `table.json` and `table.csv` hold."""
    records = []
    for task, rows in found.items():
        for row in rows:
            record: dict[str, Any] = {"task": task, "label": row.label, "method": row.method, "metric": row.metric}
            record["runs"] = row.states.get("done", 0)
            for measure in measures(found):
                value = row.values.get(measure.key)
                record[measure.key] = value and value.mean
                if measure.key in SPREAD:
                    record |= {f"{measure.key}_low": value and value.low, f"{measure.key}_high": value and value.high}
            for word, one in (("behind_best", row.to_best), ("over_full", row.to_full)):
                for key in ("mean", "low", "high", "p"):
                    record[word if key == "mean" else f"{word}_{key}"] = one and getattr(one, key)
            record["among_best"] = row.among_best
            record["pareto"] = " ".join(row.front)
            record["recipe"] = row.recipe
            records.append(record)
    return records


def task_settings(study: Study, task: str) -> dict[str, Any]:
    """The part of a study's settings that is about one task: model, data, task and training, where they are given."""
    several = study.settings.get("tasks")
    own = several.get(task, {}) if isinstance(several, Mapping) else study.settings
    words = ("model", "data", "task", "training")
    found = {word: own[word] for word in words if isinstance(own, Mapping) and own.get(word)}
    imports = study.settings.get("imports")  # of the study as a whole
    return found | ({"imports": imports} if found and imports else {})


def recipe(study: Study, row: Row) -> str:
    """The recipe of a row as YAML: what `attune train` takes, with the learning rate that the search chose.

    For a row of `ALL` the adapter section alone, as model and data differ between its tasks.
    """
    adapter = json.loads(row.recipe or "{}")
    given = {} if row.task == ALL else task_settings(study, row.task)
    rate = row.values.get("rate")
    training = {**(given.pop("training", None) or {}), **({"learning_rate": float(f"{rate.mean:.6g}")} if rate else {})}
    alike = (t for t in study.trials if (t.label, t.task) == (row.label, row.task) and t.stage == "final")
    head_rate = next((t.head_rate for t in alike if t.head_rate is not None), None)
    training |= {} if head_rate is None else {"head_learning_rate": float(f"{head_rate:.6g}")}
    whole = {**given, **({"adapter": adapter} if adapter else {}), **({"training": training} if training else {})}
    text = written(whole, width=100) if whole else ""
    return (_fewer(study, row.task) if given else "") + text


def _fewer(study: Study, task: str) -> str:
    """A comment for a recipe where the study has trained on fewer rows than the recipe does, for which recipes have no word."""
    several = study.settings.get("tasks")
    own = several.get(task, {}) if isinstance(several, Mapping) else study.settings
    cuts = [
        f"{own[key]} rows {word}" for key, word in (("per_class", "of each class"), ("rows", "in all")) if own.get(key)
    ]
    return f"# The study trained on {', '.join(cuts)}; this takes all rows.\n" if cuts else ""


def leaders(study: Study, rows: Sequence[Row], key: str) -> tuple[list[Row], list[Row]]:
    """Of rows of one task, the best in a measure and those level with it, the best first; and those that surely are not.

    What is neither varies too much from seed to seed to be judged, with a mean that the best's interval leaves out. Times
    are taken once, so that those within a tenth of the best are level with it.
    """
    able = [row for row in rows if key in row.values]
    measure = next(one for one in MEASURES if one.key == key)
    up = measure.best == "high" and all(higher(row.metric) for row in able)
    able.sort(key=lambda row: (_figures(-_mean(row, key) if up else _mean(row, key)), *_cheap(row)))
    if not able or key in (*EXACT, *TIMED):
        most = _mean(able[0], key) * (1 + RESOLUTION * (key in TIMED)) if able else 0.0
        level = [row for row in able if _mean(row, key) <= most]
        return level, [row for row in able if row not in level]
    values = {
        row.label: _values([t for t in study.trials if t.label == row.label and row.task in (ALL, t.task)], key)
        for row in able
    }
    common = prior(list(values.values()))
    found = compare(values[able[0].label], {row.label: values[row.label] for row in able[1:]}, common, chosen=True)
    behind = [row for row in able[1:] if _sure(found, row)]
    level = [row for row in able[1:] if not _sure(found, row) and (key != "quality" or within(able[0], row))]
    return [able[0], *level], behind


def _sure(differences: Mapping[str, Difference], row: Row) -> bool:
    return row.label in differences and differences[row.label].sure


def within(best: Row, row: Row) -> bool:
    """Whether the mean quality of a row lies within the interval of the best; where that has none, as it has from equal
    seeds, whether that of the best lies within the row's. Where neither has one, equal means alone are level."""
    for one, other in ((best, row), (row, best)):
        low, high = one.values["quality"].low, one.values["quality"].high
        if low is not None and high is not None:
            return low <= _mean(other, "quality") <= high
    return _figures(_mean(best, "quality")) == _figures(_mean(row, "quality"))
