"""The texts of the page as HTML: findings, tables, what was cut, settings. All of it is read without a script."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from attunement.compare import findings as found_out
from attunement.compare import records
from attunement.compare.findings import listed, shown_gap
from attunement.compare.records import Study, Trial
from attunement.compare.statistics import Difference
from attunement.compare.table import (
    ALL,
    MEASURES,
    SPREAD,
    STILL,
    Measure,
    Row,
    families,
    higher,
    measures,
    shown,
    unit_of,
    window,
)

SHAPES = (  # of the families in their order, about the origin, 11 units wide
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z",
    "M-4.5,-4.5H4.5V4.5H-4.5Z",
    "M0,-5.8L5.4,3.8H-5.4Z",
    "M0,-6.2L6.2,0L0,6.2L-6.2,0Z",
    "M0,5.8L5.4,-3.8H-5.4Z",
    "M-1.9,-5.5H1.9V-1.9H5.5V1.9H1.9V5.5H-1.9V1.9H-5.5V-1.9H-1.9Z",
    "M0,-5.8L5.5,-1.8L3.4,4.7H-3.4L-5.5,-1.8Z",
    "M-5.2,-2.6L-2.6,-5.2L0,-2.6L2.6,-5.2L5.2,-2.6L2.6,0L5.2,2.6L2.6,5.2L0,2.6L-2.6,5.2L-5.2,2.6L-2.6,0Z",
    "M0,-6.4L1.7,-2.1L6.2,-1.9L2.7,1L3.8,5.4L0,2.9L-3.8,5.4L-2.7,1L-6.2,-1.9L-1.7,-2.1Z",
    "M-5.8,-2.4H5.8V2.4H-5.8Z",
    "M-5.8,0L3.8,-5.4V5.4Z",
)


FEW = 20
"""Rows that are shown without being asked for."""


def each(found: Mapping[str, list[Row]], made: Any, tag: str = "div") -> str:
    """A piece for each task: the page shows that of the chosen one, all of them without a script."""
    several = len(found) > 1
    pieces = []
    for i, (task, one) in enumerate(found.items()):
        title = f'<h3 class="task">{escape(task)}</h3>' if several and tag == "div" else ""
        lead = f"{escape(task)}: " if several and tag == "span" else ""
        lead = f'<b class="task">{lead}</b>' if lead else ""
        pieces.append(f'<{tag} data-task="{i}">{title}{lead}{made(task, one)}</{tag}>')
    return "\n".join(pieces)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def lead(study: Study, found: Mapping[str, list[Row]]) -> str:
    """What was compared, in two sentences."""
    labels = {trial.label: trial.method for trial in study.trials}
    baselines = sum(method in records.BASELINES for method in labels.values())
    named = [task for task in found if task != ALL]
    where = f"{len(named)} tasks ({', '.join(named)})" if len(named) > 1 else "".join(named)
    search = [t for t in study.trials if t.stage == "search"]
    tried = max(
        (sum(t.label == label and t.task == task for t in search) for label in labels for task in named), default=0
    )
    seeds = len({t.seed for t in study.trials if t.stage == "final"})
    text = f"{_count(len(labels) - baselines, 'method')} and {_count(baselines, 'baseline')} on {where}. "
    text += f"Each had its own search over up to {_count(tried, 'learning rate')}, " if tried else "Each had "
    text += f"{'then ' if tried else ''}{_count(seeds, 'run')}{' with different seeds' if seeds > 1 else ''}, "
    text += "measured on rows that the search never saw."
    if study.progress is not None:
        text += f" {study.progress.sentence}."
    return escape(text)


def chooser(found: Mapping[str, list[Row]]) -> str:
    """The choice of the task, where there is one."""
    if len(found) < 2:
        return ""
    made = "".join(
        f'<label><input type="radio" name="task" value="{i}"{" checked" if not i else ""}>'
        f"<span>{escape(task[0].upper() + task[1:] if task == ALL else task)}</span></label>"
        for i, task in enumerate(found)
    )
    return f'<fieldset class="tasks"><legend class="away">Task</legend>{made}</fieldset>'


def findings(study: Study, one: Sequence[Row]) -> str:
    """The findings of a task."""
    found = found_out.findings(study, one)
    if not found:
        return '<p class="note">No final run has finished yet.</p>'
    made = []
    for finding in found:
        names = ""
        if len(finding.labels) > 3:
            names = (
                f'<dd class="names"><details><summary>All {len(finding.labels)}</summary>'
                f"{escape(', '.join(finding.labels))}</details></dd>"
            )
        made.append(
            f'<div><dt>{escape(finding.title)}</dt><dd class="answer">{escape(finding.answer)}</dd>'
            f"<dd>{escape(_kept(finding.sentence))}</dd>{names}</div>"
        )
    return f'<dl class="findings">{"".join(made)}</dl>'


def by_task(study: Study, found: Mapping[str, list[Row]]) -> str:
    """What each task is and what was found on it, a line each."""
    given = study.settings.get("tasks")
    body = []
    for task, rows in found.items():
        ranked = [row for row in rows if row.quality]
        if task == ALL or not ranked:
            continue
        best, full = ranked[0], next((row for row in ranked if row.method == "baseline/full"), None)
        level = sum(row.among_best for row in ranked) - 1
        own = given.get(task, {}) if isinstance(given, Mapping) else {}
        body.append(
            (
                task,
                _metric(best.metric),
                _trained_on(own),
                best.label,
                found_out.with_interval(best, "quality"),
                f"{level} of {len(ranked) - 1}",
                found_out.with_interval(full, "quality") if full else "–",
            )
        )
    heads = ("Task", "Metric", "Training rows", "Best", "Its mean", "Cannot be told from it", "Full fine-tuning")
    left = [row.label for row in found.get(ALL, []) if not row.quality and row.states]
    said = (
        f'<p class="note">Not in what is said of all tasks, for want of a result on one: {escape(", ".join(left))}.</p>'
    )
    return f"{said if left else ''}<h3>Task by task</h3>{_grid('Task by task', heads, body, 4)}" if body else ""


def _trained_on(task: Any) -> str:
    rows, each_class = (task.get("rows"), task.get("per_class")) if isinstance(task, Mapping) else (None, None)
    if each_class is not None:
        return f"{each_class:,} of each class" + (f", at most {rows:,}" if rows is not None else "")
    return "all" if rows is None else f"{rows:,}"


def _kept(sentence: str) -> str:
    """The sentence with its numbers and their units never on two lines."""
    return re.sub(r"(\d) (%|[kMGT]?B\b|bytes|[kMGT]\b)", "\\1\u00a0\\2", sentence)


def table(task: str, one: Sequence[Row], found: Mapping[str, list[Row]]) -> str:
    """The rows of a task, with everything that was measured."""
    numbers, columns = families(found), [m for m in measures(found) if any(m.key in row.values for row in one)]
    low, high = window(one)
    best = one[0] if one and one[0].quality else None
    band = (best.quality.low, best.quality.high) if best and best.quality else (None, None)
    heads = [("Method", "label", "ascending"), ("Family", "family", "ascending")]
    heads += [(_title(columns[0], one), "quality", _first(columns[0], one))] if columns else []
    head = "".join(_head(*words) for words in heads)
    parts = {name: {row.label: row for row in own} for name, own in found.items() if task == ALL and name != ALL}
    if columns:
        unit = unit_of(columns[0], one[0].metric)
        ends = " to ".join(shown(end, unit).removesuffix(" %") for end in (low, high))
        head += f'<th scope="col" class="text">95 % interval<small>{ends}</small></th>' + _head(
            "Behind best", "behind", "ascending"
        )
        head += _head("Over full", "over", "descending")
        for place, (name, own) in enumerate(parts.items()):
            metric = next(iter(own.values())).metric
            said = f"{_metric(metric)[0].upper()}{_metric(metric)[1:]} on {name}."
            head += _head(name, f"task-{place}", "descending" if higher(metric) else "ascending", said)
        head += "".join(_head(m.title, m.key, _first(m, one), m.said) for m in columns[1:])
    head += _head("Runs", "runs", "descending") + '<th scope="col">Recipe</th>'
    body = "".join(_row(i, row, columns, numbers, (low, high), band, parts) for i, row in enumerate(one))
    name = "" if len(found) == 1 else f" on {task}"
    caption = (
        f"Means over final runs{escape(name)}, ± half of the 95 % interval, which is written out where it ends at what is "
        "possible and is left out where all runs came to the same. “≈” where the corrected interval of the paired "
        "difference holds zero; behind the best and over full fine-tuning, in points of quality."
    )
    if parts:
        caption += (
            f" Each value is the mean over the tasks’ means, of {_metric(one[0].metric)} and of costs; a method that lacks "
            "a task has none. The columns with the names of tasks are the means there."
        )
        if len({unit_of(MEASURES[0], metric) for metric in one[0].metric.split(" and ")}) > 1:
            caption += " These metrics are not of one scale: read the tasks one by one."
    return (
        f'<div class="wide" role="region" aria-label="{escape(f"All measurements{name}, scrolls")}" tabindex="0"><table>'
        f"<caption><span>{caption}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _title(measure: Measure, one: Sequence[Row]) -> str:
    if measure.key != "quality" or not one:
        return measure.title
    if one[0].task == ALL:
        return "Mean quality" if " and " in one[0].metric else f"Mean {_metric(one[0].metric)}"
    return _metric(one[0].metric).capitalize()


def _metric(name: str) -> str:
    return name.replace("_", " ")


def _first(measure: Measure, one: Sequence[Row]) -> str:
    up = measure.best == "high" and all(higher(row.metric) for row in one)
    return "descending" if up else "ascending"


def _head(title: str, key: str, first: str, said: str = "") -> str:
    now = ' aria-sort="descending"' if key == "quality" and first == "descending" else ""
    now = ' aria-sort="ascending"' if key == "quality" and first == "ascending" else now
    hint = f' title="{escape(said)}"' if said else ""
    text = ' class="text"' if key == "family" else ""
    return f'<th scope="col"{text} data-key="{key}" data-first="{first}"{now}{hint}>{escape(title)}</th>'


def _row(
    place: int,
    row: Row,
    columns: Sequence[Measure],
    numbers: Mapping[str, int],
    span: tuple[float, float],
    band: tuple[float | None, float | None],
    parts: Mapping[str, Mapping[str, Row]],
) -> str:
    mark = numbers[row.family]
    shape = f'<path class="shape" d="{SHAPES[mark]}"/>'
    dot = f'<svg class="dot" viewBox="-7 -7 14 14" aria-hidden="true" style="--c:var(--f{mark})">{shape}</svg>'
    cells = [
        f'<th scope="row" data-v="{escape(row.label.lower())}">'
        f'<span class="who">{dot}<span class="label">{escape(row.label)}</span></span></th>',
        f'<td class="text" data-v="{escape(row.family)}">{escape(row.family.replace("_", " "))}</td>',
    ]
    single = [_single(own.get(row.label)) for own in parts.values()]
    if not row.quality:
        said = _why(row, [name for name, own in parts.items() if row.label not in own or not own[row.label].quality])
        if columns and len(parts) > 1 and row.states:
            cells.append(f'<td class="error" colspan="4">{escape(said)}</td>{"<td hidden></td>" * 3}')
            cells += [*single, *(_value(row, measure, measure.unit) for measure in columns[1:])]
        else:
            wide = len(columns) + 3 + len(single) if columns else 1
            cells.append(f'<td class="error" colspan="{wide}">{escape(said)}</td>')
    else:
        unit = unit_of(MEASURES[0], row.metric)
        cells.append(_value(row, columns[0], unit))
        cells.append(f"<td class=text>{_forest(row, span, band)}</td>")
        cells.append(_difference(row.to_best, unit, "behind", row.first))
        cells.append(_difference(row.to_full, unit, "over", row.method == "baseline/full", higher(row.metric)))
        cells += [*single, *(_value(row, measure, measure.unit) for measure in columns[1:])]
    runs = (
        ", ".join(f"{count} {state}" if state != "done" else str(count) for state, count in row.states.items()) or "0"
    )
    cells.append(f'<td data-v="{row.states.get("done", 0)}">{escape(runs)}</td>')
    cells.append("<td></td>")
    classes = " ".join(word for word, is_so in (("top", row.among_best), ("base", row.family == "baseline")) if is_so)
    return f'<tr data-row="{place}" class="{classes}">{"".join(cells)}</tr>'


def _single(row: Row | None) -> str:
    """The mean on one task, in the table of all of them."""
    if row is None or not row.quality:
        reason = "" if row is None else f' title="{escape(_why(row, []))}"'
        return f'<td class="none" data-v=""{reason}>–</td>'
    bold = ' class="best"' if row.first else ""
    return f'<td{bold} data-v="{row.quality.mean!r}">{escape(shown(row.quality.mean, unit_of(MEASURES[0], row.metric)))}</td>'


def _why(row: Row, lacking: Sequence[str]) -> str:
    ended = {state: count for state, count in row.states.items() if state != "done"}
    if row.states and lacking:
        return f"No mean: it has no result on {found_out.listed(lacking)}"
    if not row.lost:
        return "No final run yet"
    said = ", ".join(f"{_count(n, 'final run')} {state}" for state, n in ended.items()) or "no final run"
    return f"{said[0].upper()}{said[1:]}: {row.error or 'no message'}"


def _value(row: Row, measure: Measure, unit: str) -> str:
    value = row.values.get(measure.key)
    if value is None:
        return '<td class="none" data-v="">–</td>'
    half = ""
    if measure.key in SPREAD and value.low is not None and value.high is not None:
        below, above = value.mean - value.low, value.high - value.mean
        if abs(above - below) < 1e-6 * (above + below):
            said = f"± {_plain(above, unit)}"
        else:
            said = f"{_plain(value.low, unit)} to {_plain(value.high, unit)}"
        half = f' <span class="half">{said}</span>'
    return f'<td data-v="{value.mean!r}">{escape(shown(value.mean, unit))}{half}</td>'


def _plain(value: float, unit: str) -> str:
    return f"{100 * value:.1f}" if unit == "share" else f"{value:.2f}" if unit == "ratio" else f"{value:.3f}"


def _difference(one: Difference | None, unit: str, word: str, own: bool, up: bool = True) -> str:
    if own:
        return '<td class="none" data-v="0">–</td>'
    if one is None or one.pairs < 2:
        return '<td class="none" data-v="">–</td>'
    gap = f"{100 * one.mean:+.1f}" if unit == "share" else f"{one.mean:+.3f}"
    gap = gap.replace("-", "−").removeprefix("+") if word == "behind" else gap.replace("-", "−")
    if one.low is None or one.high is None:
        detail = f"{shown_gap(one.mean, unit)}; no interval, as each of {one.pairs} runs came to the same difference"
    else:
        span = f"{_end(one.low, unit)} to {_end(one.high, unit)}"
        detail = f"{shown_gap(one.mean, unit)}; corrected interval {span}, p {_p(one.p)}"
    if not one.sure:
        sign = '<span aria-hidden="true">≈ </span><span class="away">cannot be told from it, </span>'
        return f'<td class="none" data-v="{one.mean!r}" title="{escape(detail)}">{sign}{gap}</td>'
    kind = "" if word == "behind" else ' class="up"' if (one.mean > 0) == up else ' class="down"'
    return f'<td{kind} data-v="{one.mean!r}" title="{escape(detail)}">{gap}</td>'


def _end(value: float, unit: str) -> str:
    return (f"{100 * value:.1f}" if unit == "share" else f"{value:.3f}").replace("-", "−")


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _forest(row: Row, span: tuple[float, float], band: tuple[float | None, float | None]) -> str:
    """The interval as a line with its mean, over the interval of the best as a band."""
    width, value = 150, row.quality
    assert value is not None
    low, high = span

    def x(v: float) -> float:
        return round(min(max((v - low) / (high - low), -0.2), 1.2) * width, 1)

    shade = ""
    if band[0] is not None and band[1] is not None:
        shade = f'<rect class="band" x="{x(band[0])}" y="0" width="{round(x(band[1]) - x(band[0]), 1)}" height="18"/>'
    if not low <= value.mean <= high:
        end = 4 if value.mean < low else width - 4
        turn = -1 if value.mean < low else 1
        dot = (
            f'<path d="M{end - 3 * turn},5L{end + 2 * turn},9L{end - 3 * turn},13" fill="none" stroke="currentColor"/>'
        )
    else:
        dot = f'<circle cx="{x(value.mean)}" cy="9" r="3"/>'
    line = ""
    if value.low is not None and value.high is not None:
        line = f'<line x1="{x(value.low)}" x2="{x(value.high)}" y1="9" y2="9"/>'
    box = f'width="{width}" height="18" viewBox="0 0 {width} 18"'
    return f'<svg class="forest" {box} aria-hidden="true">{shade}{line}{dot}</svg>'


def rates(study: Study, task: str, one: Sequence[Row]) -> str:
    """What the chosen rates say together, and where the best lies at an end of what was tried."""
    chosen = sorted(row.values["rate"].mean for row in one if "rate" in row.values and row.family != "baseline")
    text = "Quality on the held-out rows of the search, for each rate that was tried. "
    if len(chosen) > 1 and chosen[-1] > 1.5 * chosen[0]:
        text += (
            f"The rates that were chosen go from {shown(chosen[0], 'rate')} to {shown(chosen[-1], 'rate')}, "
            f"a factor of {chosen[-1] / chosen[0]:,.0f}: one rate for all would decide the order."
        )
    ends: dict[str, list[str]] = {"lowest": [], "highest": []}
    for row in one:
        mine = (t.rate for t in study.trials if (t.stage, t.task, t.label) == ("search", task, row.label))
        tried = sorted(rate for rate in mine if rate is not None)
        if "rate" in row.values and len(tried) > 1 and tried[0] < tried[-1]:
            for word, end in zip(ends, (tried[0], tried[-1]), strict=True):
                if math.isclose(row.values["rate"].mean, end):
                    ends[word].append(row.label)
    said = [f"the {word} that was tried for {listed(labels, 8)}" for word, labels in ends.items() if labels]
    if said:
        text += f" The best rate is {', and '.join(said)}: further rates may serve them better."
    return text


def cut(study: Study, task: str) -> str:
    """What the pruner stopped, and what failed with which error."""
    trials = [t for t in study.trials if task in (ALL, t.task)]
    refused = [t for t in trials if _refused(t)]
    search = [t for t in trials if t.stage == "search" and not _refused(t)]
    pruned = [t for t in search if t.state == "pruned"]
    lost = [t for t in trials if t.state in ("failed", "diverged") and not _refused(t)]
    made = []
    if not search:
        made.append("<p>There was no search.</p>")
    elif not pruned:
        made.append(f"<p>The pruner stopped none of {_count(len(search), 'search trial')}.</p>")
    else:
        whole = {(t.task, t.label): t.steps for t in search if t.state == "done" and t.steps}
        spent = [(t.steps or 0, whole[t.task, t.label]) for t in pruned if (t.task, t.label) in whole]
        saved = ""
        if sum(full for _, full in spent):
            share = 1 - sum(own for own, _ in spent) / sum(full for _, full in spent)
            saved = f" On average it did so after {100 * (1 - share):.0f} % of the steps."
        made.append(f"<p>The pruner stopped {len(pruned):,} of {_count(len(search), 'search trial')}.{saved}</p>")
        count = len({t.label for t in pruned})
        made.append(_details(f"Pruned trials of {_count(count, 'method')}", _pruned(pruned, search), count <= FEW))
    if refused:
        count = len({t.label for t in refused})
        where = "" if task != ALL else " of " + found_out.listed(list(dict.fromkeys(t.task for t in refused)))
        made.append(f"<p>{_count(count, 'method')} cannot act on the model{escape(where)}.</p>")
        made.append(_details("Refusals and their reasons", _refusals(refused), count <= FEW))
    if lost:
        made.append(f"<p>{_count(len(lost), 'trial')} failed or diverged; the study went on without them.</p>")
        made.append(_details("Failures and their errors", _lost(lost), True))
    else:
        made.append("<p>No trial failed.</p>")
    if study.missing:
        made.append(f"<p>The budget was spent: {escape('; '.join(study.missing))}.</p>")
    if open_ := unfinished(trials):
        made.append(f"<p>Not finished: {escape(', '.join(open_))}.</p>")
    return "".join(made)


def _refused(trial: Trial) -> bool:
    """Whether it stands for a method that could not even be attached."""
    return trial.id.endswith("/refused")


def _refusals(refused: Sequence[Trial]) -> str:
    body = [(t.label, t.task, t.error or "no message") for t in sorted(refused, key=lambda t: (t.label, t.task))]
    return _grid("Methods that cannot act on the model", ("Method", "Task", "Reason"), body, 3)


def unfinished(trials: Sequence[Trial]) -> list[str]:
    """Methods that have fewer final runs than others have on the same task, though none of theirs was lost."""
    runs: dict[str, dict[str, int]] = {}
    for trial in trials:
        own = runs.setdefault(trial.task, {})
        own[trial.label] = own.get(trial.label, 0) + (trial.stage == "final")
    excused = {(t.task, t.label) for t in trials if t.state in ("failed", "diverged") or t.method == STILL}
    return [
        f"{label}{f' on {task}' if len(runs) > 1 else ''} ({count} of {max(own.values())} final runs)"
        for task, own in runs.items()
        for label, count in own.items()
        if count < max(own.values()) and (task, label) not in excused
    ]


def _details(title: str, body: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{body}</details>"


def _grid(title: str, heads: Sequence[str], body: Iterable[Sequence[str]], left: int) -> str:
    head = "".join(
        f'<th scope="col" class="{"text" if i < left else ""}">{escape(h)}</th>' for i, h in enumerate(heads)
    )
    lines = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(cell)}</th>'
            if not i
            else f"<td{' class=text' if i < left else ''}>{escape(cell)}</td>"
            for i, cell in enumerate(cells)
        )
        + "</tr>"
        for cells in body
    )
    return (
        f'<div class="wide" role="region" aria-label="{escape(title)}" tabindex="0"><table>'
        f'<caption class="away">{escape(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _pruned(pruned: Sequence[Trial], search: Sequence[Trial]) -> str:
    body, several = [], len({t.task for t in search}) > 1
    for label in sorted({t.label for t in pruned}, key=str.lower):
        own = [t for t in pruned if t.label == label]
        rates = sorted(t.rate for t in own if t.rate)
        steps = sorted(t.steps for t in own if t.steps is not None)
        tried = sum(t.label == label for t in search)
        counts = {task: sum(t.task == task for t in own) for task in dict.fromkeys(t.task for t in own)}
        on = [", ".join(f"{task} {n}" for task, n in counts.items())] if several else []
        body.append((label, f"{len(own)} of {tried}", *on, ", ".join(shown(r, "rate") for r in rates), _span(steps)))
    heads = ("Method", "Pruned", *(["On tasks"] if several else []), "At rates", "After steps")
    return _grid("Pruned trials by method", heads, body, len(heads) - 1)


def _span(values: Sequence[int]) -> str:
    return "" if not values else f"{values[0]}" if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _lost(lost: Sequence[Trial]) -> str:
    groups: dict[tuple[str, ...], list[Trial]] = {}
    for trial in lost:
        groups.setdefault((trial.label, trial.task, trial.stage, trial.state, trial.error), []).append(trial)
    body = []
    for (label, task, stage, state, error), own in sorted(groups.items()):
        rates = sorted({t.rate for t in own if t.rate})
        ends = [shown(rate, "rate") for rate in (rates if len(rates) < 3 else (rates[0], rates[-1]))]
        said = " to ".join(ends) if len(rates) > 2 else ", ".join(ends)
        body.append((label, task, stage, f"{len(own)} {state}", said, error or "no message"))
    return _grid("Failed and diverged trials", ("Method", "Task", "Stage", "Trials", "At rates", "Error"), body, 6)


def settings(study: Study, found: Mapping[str, list[Row]]) -> str:
    """How to read the statistics, what each measurement is, and the settings."""
    first = next(iter(found.values()), [])
    terms = "".join(
        f"<dt>{escape(m.title)}</dt>"
        f"<dd>{escape(m.said)} {'More' if _first(m, first) == 'descending' else 'Less'} is better.</dd>"
        for m in measures(found)
        if m.key != "rate"
    )
    told = (
        "Intervals are Student’s t at 95 % over the seeds; they end where no value can be, and runs that all came to the same "
        "have none. Methods are compared by paired differences at the same task and "
        "seed; with few seeds the variance of a difference is drawn towards that of all pairs of methods (the moderated t of "
        "Smyth, 2004). The comparisons with full fine-tuning are corrected by Holm’s steps for their number, those with the "
        "best method, which was found by looking, for all pairs. A method is called better only where the corrected interval "
        "of the difference excludes zero. “All tasks” speaks of these tasks with other seeds, not of other tasks."
    )
    text = (
        yaml.safe_dump(dict(study.settings), sort_keys=False, allow_unicode=True, width=100) if study.settings else ""
    )
    shown_text = (
        f'<pre tabindex="0" aria-label="Settings of the study">{escape(text)}</pre>'
        if text
        else "<p>None were kept.</p>"
    )
    return (
        f'<p class="prose">{told}</p>{_details("What each measurement is", f"<dl class=terms>{terms}</dl>")}'
        f"{_details('Settings of the study', shown_text)}"
    )


def footer() -> str:
    """The files beside the page."""
    links = {"trials.csv": "every trial", "table.csv": "this table", "table.json": "the same as JSON"}
    named = ", ".join(f'<a href="{name}">{name}</a> ({said})' for name, said in links.items())
    return f'Beside this page: {named} and the charts as PNG and SVG in <a href="pictures/">pictures</a>.'
