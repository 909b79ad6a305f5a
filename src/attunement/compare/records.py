"""What a study leaves behind: one record a trial, and the files that hold them.

`study.yaml` has the settings, `trials.csv` one row a trial (readable by any program), `curves.json` the learning
curves by trial; where a budget was spent, `missing.json` says what it left out, and until all is done `progress.json`
how far it is. Each is written beside itself and then
renamed, so that a full disk or a kill leaves the last good one.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from attunement.errors import AttunementError, nearest
from attunement.train.recipe import written

ALL = "all tasks"
"""The task whose values are the means over the others."""
SETTINGS, TRIALS, CURVES = "study.yaml", "trials.csv", "curves.json"
MISSING, PROGRESS = "missing.json", "progress.json"
STAGES = ("search", "final")
STATES = ("done", "pruned", "failed", "diverged")
BASELINES = ("baseline/full", "baseline/probe", "baseline/zero-shot")

LATER = ("head_rate",)
"""Columns that the first studies did not have."""

Mark = tuple[int, float | None, float | None]
"""A point of a learning curve: step, loss, quality."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run of a study. What was not measured is None; figures that are not finite become None."""

    id: str
    task: str
    method: str
    """`low_rank/lora`, or one of `BASELINES`."""
    label: str
    """What the report calls the method; short, and of one method with one recipe in a study."""
    recipe: str = "{}"
    """The adapter section of the recipe as JSON."""
    stage: str = "final"
    """`search` (of the learning rate, measured on rows held out of the training rows) or `final`."""
    rate: float | None = None
    head_rate: float | None = None
    """That of the task head beside the method, where it has one of its own."""
    seed: int = 0
    state: str = "done"
    error: str = ""
    metric: str = "accuracy"
    quality: float | None = None
    calibration: float | None = None
    """Expected calibration error."""
    forgetting: float | None = None
    """Rise of the loss on the second data set, in nats."""
    trainable: int | None = None
    saved_bytes: int | None = None
    backward_bytes: int | None = None
    """What a step keeps for backward."""
    peak_memory: int | None = None
    flops: int | None = None
    """Of one step."""
    step: float | None = None
    """Time of a step as a ratio to full fine-tuning measured in the same process."""
    inference: float | None = None
    """Time of a forward pass as a ratio to the bare model's, not merged."""
    inference_merged: float | None = None
    seconds: float | None = None
    """Of the whole trial."""
    steps: int | None = None
    curve: tuple[Mark, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in columns():
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                object.__setattr__(self, name, None)
        object.__setattr__(self, "curve", tuple(_mark(mark) for mark in self.curve))
        for name, allowed in (("stage", STAGES), ("state", STATES)):
            if (got := getattr(self, name)) not in allowed:
                raise AttunementError(
                    f"trial {self.id}: {name} must be one of {', '.join(allowed)}, got {got!r}{nearest(got, allowed)}"
                )

    @property
    def adapter(self) -> dict[str, Any]:
        """The adapter section of the recipe."""
        return json.loads(self.recipe)


@dataclass(frozen=True)
class Progress:
    """How far a study is that is not finished: its trials, and its methods of which nothing is left to run."""

    done: int
    total: int
    complete: int
    methods: int

    @property
    def sentence(self) -> str:
        """In words, without a full stop."""
        share = f"{self.done:,} of {self.total:,} trials are done"
        return f"This study is not finished: {share}, and {self.complete} of {self.methods} methods are complete"


@dataclass(frozen=True)
class Study:
    """The settings and the trials of a study; what a spent budget left out, a sentence each; how far it is, if not done."""

    name: str
    settings: Mapping[str, Any]
    trials: tuple[Trial, ...]
    missing: tuple[str, ...] = ()
    progress: Progress | None = None


def columns() -> list[str]:
    """The columns of `trials.csv`, in order."""
    return [one.name for one in fields(Trial) if one.name != "curve"]


def read(folder: str | Path) -> Study:
    """The study in a folder. Raises `AttunementError` where a file is missing or was damaged."""
    folder = Path(folder)
    table = folder / TRIALS
    if not table.is_file():
        raise AttunementError(f"{folder} holds no study: {TRIALS} is not there{nearest(folder.name, _beside(folder))}")
    settings = _settings(folder / SETTINGS)
    curves = _json(folder / CURVES, {})
    with table.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if lacking := [name for name in columns() if name not in [*(rows.fieldnames or []), *LATER]]:
            raise AttunementError(f"{table}: expected the columns of a study, {', '.join(lacking)} missing")
        trials = tuple(_trial(row, curves, f"{table}, line {line}") for line, row in enumerate(rows, start=2))
    missing = tuple(_json(folder / MISSING, []))
    progress = _progress(folder / PROGRESS)
    return Study(str(settings.get("name") or folder.resolve().name), settings, trials, missing, progress)


def write(
    folder: str | Path,
    settings: Mapping[str, Any],
    trials: Iterable[Trial],
    missing: Sequence[str] = (),
    progress: Progress | None = None,
) -> None:
    """Write the files of a study, each whole or not at all."""
    folder, trials = Path(folder), tuple(trials)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(columns())
    rows.writerows([_cell(getattr(trial, name)) for name in columns()] for trial in trials)
    replace(folder / SETTINGS, written(dict(settings)))
    replace(folder / CURVES, json.dumps({trial.id: trial.curve for trial in trials if trial.curve}) + "\n")
    replace(folder / TRIALS, table.getvalue())
    left = {MISSING: list(missing), PROGRESS: None if progress is None else asdict(progress)}
    for name, value in left.items():
        if value:
            replace(folder / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        else:
            (folder / name).unlink(missing_ok=True)


def replace(path: Path, text: str | bytes) -> None:
    """Write a file beside itself, then rename it: it is the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only the owner may read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _mark(mark: Iterable[Any]) -> Mark:
    step, loss, quality = mark
    return int(step), *(None if v is None or not math.isfinite(v) else float(v) for v in (loss, quality))  # type: ignore[return-value]


def _cell(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


_KINDS = {one.name: str(one.type).partition(" ")[0] for one in fields(Trial)}


def _trial(row: Mapping[str, str], curves: Mapping[str, Any], where: str) -> Trial:
    values: dict[str, Any] = {}
    for name in columns():
        text, kind = row.get(name, ""), _KINDS[name]
        try:
            values[name] = text if kind == "str" else None if not text else int(text) if kind == "int" else float(text)
        except (TypeError, ValueError):
            said = "a whole number" if kind == "int" else "a number"
            raise AttunementError(f"{where}: {name} must be {said}, got {text!r}") from None
    return Trial(**values, curve=tuple(curves.get(values["id"], ())))


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise AttunementError(f"{path}: expected YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise AttunementError(f"{path}: expected the settings of a study, got {type(settings).__name__}")
    return settings


def _progress(path: Path) -> Progress | None:
    values = _json(path, None)
    try:
        return None if values is None else Progress(**{one.name: int(values[one.name]) for one in fields(Progress)})
    except (KeyError, TypeError, ValueError):
        raise AttunementError(f"{path}: expected how far a study is, got {json.dumps(values)[:60]}") from None


def _json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AttunementError(f"{path}: expected JSON, got {error}") from None


def _beside(folder: Path) -> list[str]:
    parent = folder.resolve().parent
    return [path.parent.name for path in parent.glob(f"*/{TRIALS}")] if parent.is_dir() else []
