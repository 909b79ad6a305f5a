"""The committed studies in one small file of the package, for `attune recommend` where there is no study of one's own.

`make results` brings what the studies of `docs/studies` have come to in `runs/compare` into their folders, with their pages,
and writes the file: the final runs alone, without curves.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attunement.compare import records
from attunement.compare.records import Study, Trial
from attunement.errors import AttunementError
from attunement.train.words import near

RESULTS = Path(__file__).parent / "data" / "results.json"


def publish(studies: Path, runs: Path) -> int:
    """Take over the trials of every study of a folder that has run, and write its page. Returns how many there were."""
    from attunement.compare import report

    found = [folder for folder in sorted(studies.iterdir()) if (runs / folder.name / records.TRIALS).is_file()]
    for folder in found:
        for name in (records.TRIALS, records.CURVES, records.MISSING, records.PROGRESS):
            if (runs / folder.name / name).is_file():
                shutil.copyfile(runs / folder.name / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        report.write(folder)
    return len(found)


def collect(studies: Path, path: Path = RESULTS) -> int:
    """Write the final runs of every study in a folder. Returns how many studies there were."""
    found = [records.read(table.parent) for table in sorted(studies.glob(f"*/{records.TRIALS}"))]
    if not found:
        raise AttunementError(f"{studies} holds no study: expected folders with {records.TRIALS} in it")
    columns = [name for name in records.columns() if name not in ("id", "error")]
    made = [
        {
            "name": study.name,
            "settings": dict(study.settings),
            "columns": columns,
            "trials": [[_short(getattr(t, name)) for name in columns] for t in study.trials if t.stage == "final"],
        }
        | ({} if study.progress is None else {"progress": dataclasses.asdict(study.progress)})
        for study in found
    ]
    text = json.dumps({"studies": made}, ensure_ascii=False, separators=(",", ":"))
    records.replace(path, text.replace("],[", "],\n[") + "\n")  # a line a run, so that changes can be read
    return len(made)


DATA = Path(__file__).parents[1] / "train" / "data"
MACHINE = ("use_cpu", "bf16")
"""Settings of training that are those of the machine on which the project measures."""


def elsewhere(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a committed study as they hold on another machine: rows of the package where it is installed."""
    made: dict[str, Any] = json.loads(json.dumps(settings))
    for task in made.get("tasks", {}).values():
        task["training"] = {key: value for key, value in task.get("training", {}).items() if key not in MACHINE}
        rows = task.get("data", {})
        for key in ("train", "eval", "test"):
            name = str(rows.get(key, "")).rpartition("/attunement/train/data/")[2]
            if name != rows.get(key) and (DATA / name).is_file():
                rows[key] = near(DATA / name)
    return made


def load(path: Path = RESULTS) -> list[Study]:
    """The committed studies; none where this installation has none."""
    if not path.is_file():
        return []
    return [_study(one) for one in json.loads(path.read_text(encoding="utf-8"))["studies"]]


def _study(one: dict[str, Any]) -> Study:
    known = {field.name for field in dataclasses.fields(Trial)}
    rows = (dict(zip(one["columns"], values, strict=True)) for values in one["trials"])
    trials = tuple(
        Trial(id=str(i), **{name: value for name, value in row.items() if name in known}) for i, row in enumerate(rows)
    )
    progress = records.Progress(**one["progress"]) if "progress" in one else None
    return Study(one["name"], elsewhere(one["settings"]), trials, progress=progress)


def _short(value: Any) -> Any:
    """Nine figures: means are compared to six, and those of rounded values should be equal where the means are."""
    return float(f"{value:.9g}") if isinstance(value, float) else value


if __name__ == "__main__":
    studies, runs = (Path(word) for word in [*sys.argv[1:], "docs/studies", "runs/compare"][:2])
    try:
        print(f"{publish(studies, runs)} studies brought up to date, {collect(studies)} in {RESULTS.name}")
    except AttunementError as error:
        sys.exit(str(error))
