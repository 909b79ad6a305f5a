"""The rates that earlier studies found, from which later ones start."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from attunement.compare.records import replace
from attunement.compare.study import Entry, StudyTask

RATES = "rates.json"


def cache() -> Path:
    """The file of this user in which found rates are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "attunement" / RATES


def key(task: StudyTask, entry: Entry, heads: str) -> str:
    """What a rate is kept under: model, kind of task, what heads learn at, and the adapter section, whatever the method is
    called."""
    about = [Path(task.model.path).name, task.task.kind, entry.method if not entry.adapter else entry.adapter]
    about += [] if heads == "same" else [heads]
    text = json.dumps(about, sort_keys=True)
    return f"{about[0]} {about[1]} {entry.method} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def known(task: StudyTask, entry: Entry, heads: str) -> float | None:
    """The rate that was found last, inside the range that is searched now."""
    found = _read(cache()).get(key(task, entry, heads), {}).get("rate")
    return found if isinstance(found, float) and entry.low <= found <= entry.high else None


def store(folder: Path, task: StudyTask, entry: Entry, heads: str, rate: float) -> None:
    """Keep a found rate, in the study's folder and for later studies; a cache that cannot be written is passed over."""
    from attunement import __version__

    row = {"rate": rate, "method": entry.method, "version": __version__}
    for file in (folder / RATES, cache()):
        try:
            replace(file, json.dumps(_read(file) | {key(task, entry, heads): row}, indent=1) + "\n")
        except OSError:
            continue


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
