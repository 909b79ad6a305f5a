"""`report.html`: one page with nothing outside it, readable without JavaScript; and the tables beside it.

Everything that is text is written by `markup.py`, so that the page says it even where no script runs; `page/report.js`
sorts, chooses the task and draws the charts from the JSON in the page.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from attunement.compare import markup, records
from attunement.compare.records import Study, Trial
from attunement.compare.table import (
    ALL,
    COSTS,
    MEASURES,
    Row,
    families,
    higher,
    measures,
    plain,
    recipe,
    rows,
    unit_of,
    window,
)

CURVE_POINTS = 60


def write(folder: str | Path, study: Study | None = None, pictures: bool = True) -> Path:
    """Write report.html, table.csv, table.json and the pictures of the study in `folder`. Returns the page's path."""
    folder = Path(folder)
    study = study or records.read(folder)
    found = rows(study)
    table = plain(found)
    records.replace(folder / "table.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    records.replace(folder / "table.csv", as_csv(table))
    if pictures:
        from attunement.compare import pictures as drawn

        drawn.write(folder / "pictures", study, found)
    path = folder / "report.html"
    records.replace(path, page(study, found))
    return path


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV; what is not known is empty."""
    text = io.StringIO()
    if table:
        writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return text.getvalue()


def page(study: Study, found: Mapping[str, list[Row]] | None = None) -> str:
    """The page as text; the same for the same study."""
    found = found or rows(study)
    own = files(__package__) / "page"
    parts = {
        "title": escape(f"{study.name}: comparison of adaptation methods"),
        "name": escape(study.name),
        "lead": markup.lead(study, found),
        "chooser": markup.chooser(found),
        "findings": markup.each(
            found, lambda task, one: markup.findings(study, one) + (markup.by_task(study, found) if task == ALL else "")
        ),
        "tables": markup.each(found, lambda task, one: markup.table(task, one, found)),
        "rates": markup.each(found, lambda task, one: escape(markup.rates(study, task, one)), "span"),
        "cut": markup.each(found, lambda task, one: markup.cut(study, task)),
        "settings": markup.settings(study, found),
        "footer": markup.footer(),
        "css": (own / "report.css").read_text(encoding="utf-8"),
        "js": (own / "report.js").read_text(encoding="utf-8"),
        "data": in_script(data(study, found)),
    }
    text = (own / "report.html").read_text(encoding="utf-8")
    pieces = text.split("@@")  # what is filled in is never looked at again: a label may hold anything
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def in_script(value: Any) -> str:
    """JSON that may stand within a script element: no `<`, so that nothing in it ends the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def data(study: Study, found: Mapping[str, list[Row]]) -> dict[str, Any]:
    """What the charts are drawn from."""
    numbers = families(found)
    return {
        "measures": [{"key": m.key, "title": m.title, "unit": m.unit, "best": m.best} for m in measures(found)],
        "costs": [key for key in COSTS if any(key in row.values for one in found.values() for row in one)],
        "families": [{"name": name, "mark": mark} for name, mark in numbers.items()],
        "shapes": markup.SHAPES,
        "tasks": [_task(study, task, one) for task, one in found.items()],
    }


def _task(study: Study, task: str, found: Sequence[Row]) -> dict[str, Any]:
    ranked = [row for row in found if row.quality]
    made: dict[str, Any] = {
        "name": task,
        "metric": found[0].metric if found else "",
        "unit": unit_of(MEASURES[0], found[0].metric) if found else "number",
        "up": all(higher(row.metric) for row in found),
        "window": window(found),
        "all": task == ALL,
    }
    by: dict[str, list[Trial]] = {}
    for trial in study.trials:
        if trial.task == task:
            by.setdefault(trial.label, []).append(trial)
    made["rows"] = [
        {
            "label": row.label,
            "method": row.method,
            "family": row.family,
            "v": {key: [_short(v) for v in (one.mean, one.low, one.high)] for key, one in row.values.items()},
            "runs": row.states.get("done", 0),
            "front": row.front,
            "top": row.among_best,
            "recipe": recipe(study, row),
            "curve": curve([t for t in by.get(row.label, []) if t.stage == "final" and t.state == "done"]),
            "rates": [
                [_short(t.rate), _short(t.quality if t.quality is not None else _last(t)), t.state]
                for t in sorted(by.get(row.label, []), key=lambda t: t.rate or 0)
                if t.stage == "search" and t.rate
            ],
        }
        for row in [*ranked, *(row for row in found if not row.quality)]
    ]
    return made


def curve(trials: Sequence[Trial]) -> list[list[float | None]]:
    """Mean loss and quality by step, over runs that all have that step; thinned to what a chart can show."""
    if not trials:
        return []
    marks: dict[int, list[tuple[float | None, float | None]]] = {}
    for trial in trials:
        for step, loss, quality in trial.curve:
            marks.setdefault(step, []).append((loss, quality))
    made: list[list[float | None]] = []
    for step in sorted(marks):
        means = []
        for values in zip(*marks[step], strict=True):
            known = [value for value in values if value is not None]
            means.append(_short(statistics.fmean(known)) if len(known) == len(trials) else None)
        if any(mean is not None for mean in means):
            made.append([step, *means])
    every = math.ceil(len(made) / CURVE_POINTS)
    return [mark for i, mark in enumerate(made) if i % every == 0 or mark[2] is not None or i == len(made) - 1]


def _last(trial: Trial) -> float | None:
    return next((quality for _, _, quality in reversed(trial.curve) if quality is not None), None)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
