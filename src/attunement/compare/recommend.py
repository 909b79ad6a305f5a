"""`attune recommend`: the three best choices under a limit, with the reason for each and its recipe.

Imports of what computes are in the functions: the command line is built from this file, and help comes at once.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attunement.errors import AttunementError, nearest

if TYPE_CHECKING:
    from attunement.compare.records import Study
    from attunement.compare.table import Row

LIMITS = {  # of an option: the measure, and what is limited in a sentence
    "memory": ("peak_memory", "peak memory"),
    "backward": ("backward_bytes", "kept for backward"),
    "time": ("step", "the step time of full fine-tuning"),
    "saved": ("saved_bytes", "saved"),
    "trainable": ("trainable", "trained numbers"),
    "inference": ("inference", "the bare model's inference time"),
}
SIZES = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
COUNTS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}
RATIOS = {"": 1, "x": 1, "×": 1, "%": 0.01}


@dataclass(frozen=True)
class Choice:
    """A method that fits, why it is named, and its recipe as YAML."""

    label: str
    method: str
    reason: str
    recipe: str
    values: Mapping[str, float]


def amount(text: str, option: str) -> float:
    """The number of a limit: `2GB`, `300k`, `0.8`, `80%`. Raises `AttunementError` for anything else."""
    key = LIMITS[option][0]
    units = RATIOS if key in ("step", "inference") else COUNTS if key == "trainable" else SIZES
    example = "0.8" if units is RATIOS else "300k" if units is COUNTS else "2GB"
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*([a-z×%]*)\s*", text, re.IGNORECASE)
    if found is None:
        raise AttunementError(f"--{option} must be a number with its unit, such as {example}, got {text!r}")
    number, unit = float(found[1]), found[2].lower()
    if unit not in units:
        names = [one.upper().replace("I", "i") if units is SIZES else one for one in units if one]
        close = nearest(found[2], names, 1)
        raise AttunementError(f"--{option}: the unit must be one of {', '.join(names)}, got {found[2]!r}{close}")
    if not number > 0:
        raise AttunementError(f"--{option} must be greater than 0, got {text!r}")
    return number * units[unit]


def choices(
    study: Study, limits: Mapping[str, float], task: str | None = None, count: int = 3
) -> tuple[str, list[Choice]]:
    """The task that was decided on, and up to `count` choices whose means stay within the limits.

    First the highest quality; then, of those that are level with it, the ones that need least of what is limited
    (of what is kept for backward where nothing is); then the next in quality. Zero-shot adapts nothing and is left out.
    """
    from attunement.compare.table import STILL, rows

    found = rows(study)
    task = task or next(iter(found), "")
    if task not in found:
        raise AttunementError(
            f"recommend: {study.name} has no task {task!r}; it has {', '.join(found)}{nearest(task, found)}"
        )
    measured = [row for row in found[task] if row.quality and row.method != STILL]
    if not measured:
        how = f"; {study.progress.sentence[0].lower()}{study.progress.sentence[1:]}" if study.progress else ""
        raise AttunementError(f"recommend: no final run of {study.name} has finished on {task} yet{how}")
    fitting = _fitting(study, measured, limits)
    return task, _ranked(study, fitting, limits, count)


def _fitting(study: Study, measured: Sequence[Row], limits: Mapping[str, float]) -> list[Row]:
    for option, limit in limits.items():
        key, words = LIMITS[option]
        known = [row for row in measured if key in row.values]
        if not known:
            raise AttunementError(f"recommend: {study.name} did not measure what --{option} limits")
        least = min(known, key=lambda row: row.values[key].mean)
        if least.values[key].mean > limit:
            raise AttunementError(
                f"recommend: no method of {study.name} stays within {_said(key, limit)} {words}; "
                f"nearest: {least.label} with {_said(key, least.values[key].mean)}"
            )
    fitting = [
        row
        for row in measured
        if all((value := row.values.get(LIMITS[o][0])) is not None and value.mean <= v for o, v in limits.items())
    ]
    if not fitting:
        raise AttunementError(
            f"recommend: no method of {study.name} stays within all limits at once; loosen one of them"
        )
    return fitting


def _ranked(study: Study, fitting: Sequence[Row], limits: Mapping[str, float], count: int) -> list[Choice]:
    from attunement.compare.findings import shown_gap, with_interval
    from attunement.compare.table import MEASURES, RESOLUTION, TIMED, leaders, unit_of

    alike, behind = leaders(study, fitting, "quality")
    best = alike[0]
    costs = [LIMITS[option][0] for option in limits] or ["backward_bytes"]
    words = [LIMITS[option][1] for option in limits] or [LIMITS["backward"][1]]

    def cost(row: Row) -> float:
        ends = [row.values[key].mean / max(best.values[key].mean, 1e-12) for key in costs if key in row.values]
        return sum(ends) / len(ends) if ends else float("inf")

    def spent(row: Row) -> str:
        said = [
            f"{_said(key, row.values[key].mean)} {word}"
            for key, word in zip(costs, words, strict=True)
            if key in row.values
        ]
        return " and ".join(said) or "unknown cost"

    metric, unit = best.metric.replace("_", " "), unit_of(MEASURES[0], best.metric)
    others, told = len(fitting) - 1, len(behind)
    within = "within the limit" if limits else "of all"
    beats = (
        "it is the only one that fits"
        if not others
        else (
            f"it is better than each of the {others} others"
            if told == others and others > 1
            else f"it is better than {told or 'none'} of the {others} others"
        )
    )
    made = [(best, f"The highest mean {metric} {within}, {with_interval(best, 'quality')}, at {spent(best)}; {beats}.")]
    enough = 1 - RESOLUTION * any(key in TIMED for key in costs)  # a time that is hardly less may be no less
    for row in sorted(alike[1:], key=lambda row: (cost(row), row.label)):
        if cost(row) < enough * cost(best):
            how = "needs less" if len(made) == 1 else "also needs less"
            text = f"Its {metric} of {with_interval(row, 'quality')} cannot be told from that of {best.label}, "
            text += f"and it {how}: {spent(row)}."
            made.append((row, text))
    rest = [row for row in fitting if all(row is not one for one, _ in made)]
    for row in rest:
        gap = shown_gap(row.values["quality"].mean - best.values["quality"].mean, unit)
        away = f"{gap} below {best.label} for sure" if row in behind else f"{gap} from {best.label}, which is not sure"
        made.append((row, f"The next in {metric}, {with_interval(row, 'quality')}: {away}, at {spent(row)}."))
    return [_choice(study, row, text) for row, text in made[:count]]


def standing(study: Study, task: str) -> list[str]:
    """What is to be known beside the choices: that a study is not finished, and that nothing beats the model as it is."""
    from attunement.compare.findings import no_gain
    from attunement.compare.markup import unfinished
    from attunement.compare.table import ALL, rows

    said = []
    if study.missing:
        said.append(f"The budget of the study was spent: {'; '.join(study.missing)}.")
    elif study.progress is not None:
        said.append(f"{study.progress.sentence}; attune compare goes on with it.")
    elif short := unfinished([trial for trial in study.trials if task in (ALL, trial.task)]):
        said.append(f"This study is not finished: {', '.join(short)}.")
    if found := no_gain([row for row in rows(study)[task] if row.quality]):
        said.append(f"{found.answer}. {found.sentence}")
    return said


def _left_out(study: Study, task: str) -> list[str]:
    """The methods that have results on some of the tasks, and so no mean over them."""
    from attunement.compare.table import rows

    return [row.label for row in rows(study)[task] if not row.quality and row.states.get("done")]


def _choice(study: Study, row: Row, reason: str) -> Choice:
    from attunement.compare.table import recipe

    values = {key: value.mean for key, value in row.values.items()}
    return Choice(row.label, row.method, reason, recipe(study, row), values)


def _said(key: str, value: float) -> str:
    from attunement.compare.table import MEASURES, shown

    return shown(value, next(one.unit for one in MEASURES if one.key == key))


def find(study: str | None, task: str | None) -> tuple[Study, str]:
    """The study that is asked: a folder, the name of one in runs/compare, or a committed one. With what to call it."""
    from attunement.compare import records, shipped

    if study is not None:
        own = Path("runs/compare") / study
        if not (Path(study) / records.TRIALS).is_file() and (own / records.TRIALS).is_file():
            return records.read(own), str(own)
        if not Path(study).exists() and not own.exists():
            names = [path.parent.name for path in own.parent.glob(f"*/{records.TRIALS}")]
            known = f"; known: {', '.join(sorted(names))}" if names else ""
            raise AttunementError(f"recommend: {study!r} is no folder of a study{known}{nearest(study, names)}")
        return records.read(study), study
    committed = shipped.load()
    if not committed:
        raise AttunementError(
            "recommend: no study was named and this installation holds no committed results; "
            "name the folder of a study, or make one with attune compare"
        )
    with_task = [one for one in committed if task is None or any(trial.task == task for trial in one.trials)]
    if not with_task:
        tasks = sorted({trial.task for one in committed for trial in one.trials})
        raise AttunementError(
            f"recommend: no committed study has a task {task!r}; they have {', '.join(tasks)}{nearest(task or '', tasks)}"
        )
    return max(with_task, key=lambda one: len({trial.label for trial in one.trials})), "the committed results"


def recommend(
    study: Annotated[
        str | None,
        typer.Argument(metavar="STUDY", help="The folder of a study; by default this project's committed results."),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Peak memory of a step at most: 2GB.")] = None,
    backward: Annotated[str | None, typer.Option(help="Kept for backward at most: 300MB.")] = None,
    time: Annotated[str | None, typer.Option(help="Time of a step over that of full fine-tuning: 0.8.")] = None,
    saved: Annotated[str | None, typer.Option(help="Saved adapter at most: 1MB.")] = None,
    trainable: Annotated[str | None, typer.Option(help="Trained numbers at most: 300k.")] = None,
    inference: Annotated[str | None, typer.Option(help="Time of inference over the bare model's: 1.1.")] = None,
    task: Annotated[str | None, typer.Option(help="One task of a study with several.")] = None,
    recipe: Annotated[
        int | None, typer.Option(min=1, help="Print nothing but the recipe of this choice: > recipe.yaml.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Name the three best methods within limits on memory, time or size, with reasons and recipes."""
    given = {
        "memory": memory,
        "backward": backward,
        "time": time,
        "saved": saved,
        "trainable": trainable,
        "inference": inference,
    }
    limits = {option: amount(text, option) for option, text in given.items() if text is not None}
    asked, called = find(study, task)
    task, found = choices(asked, limits, task)
    if recipe is not None:
        if recipe > len(found):
            raise AttunementError(f"--recipe must be at most {len(found)}, the number of choices, got {recipe}")
        sys.stdout.write(found[recipe - 1].recipe)
    elif as_json:
        records = [
            {"label": c.label, "method": c.method, "reason": c.reason, "recipe": c.recipe, **c.values} for c in found
        ]
        left: dict[str, object] = {"missing": list(asked.missing)} if asked.missing else {}
        left |= {"notes": notes} if (notes := standing(asked, task)) else {}
        sys.stdout.write(json.dumps({"study": asked.name, "task": task, "choices": records} | left, indent=2) + "\n")
    else:
        _show(asked, called, task, limits, found)


def _show(study: Study, called: str, task: str, limits: Mapping[str, float], found: Sequence[Choice]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from attunement.cli import console

    bounds = ", ".join(f"{_said(LIMITS[o][0], v)} {LIMITS[o][1]}" for o, v in limits.items()) or "no limit"
    console.print(Text(f"{study.name}, {task} ({called}): {bounds}", style="dim"), soft_wrap=True)
    for said in standing(study, task):
        console.print(Text(said, style="yellow"), soft_wrap=True)
    for i, one in enumerate(found, start=1):
        console.print(
            Text.assemble(
                f"\n{i}. ", (one.label, "bold cyan"), ("" if one.label == one.method else f"  {one.method}", "dim")
            )
        )
        console.print(Padding(Text(one.reason), (0, 0, 0, 3)))
        text = "\n".join(f"   {line}" for line in (one.recipe.rstrip() or "no recipe").splitlines())
        console.print(Text(f"\n{text}", style="green"), soft_wrap=True)  # whole lines, which can be copied
    if left := _left_out(study, task):
        said = f"\nWithout a result on every task, and so not compared here: {', '.join(left)}; --task asks about one."
        console.print(Text(said, style="dim"), soft_wrap=True)
    if called == "the committed results":
        console.print(Text("\nMeasured on other data than yours: attune compare measures on your own.", style="dim"))
