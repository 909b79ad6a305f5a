"""Two processes on one study: nothing is run twice, nothing is left out, and the figures are those of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from attunement.compare import records, trial
from attunement.compare.engine import Engine
from attunement.compare.fan_out import on_processes
from attunement.compare.records import Trial

pytestmark = pytest.mark.usefixtures("no_pictures")

WORK = """
import os, sys, yaml
from attunement.compare import trial
from attunement.compare.engine import Engine
from attunement.compare.fan_out import on_processes
from attunement.compare.study import made
real = trial.run
def run(ground, entry, rate, seed, stage, *more):
    print(entry.label, stage, rate, seed, flush=True)
    return real(ground, entry, rate, seed, stage, *more)
trial.run = run
print("ready", flush=True)
Engine(made(yaml.safe_load(open(sys.argv[1])), "study")).work()
"""


def figures(trials: tuple[Trial, ...]) -> list[tuple]:
    found = sorted(trials, key=lambda one: one.id)
    return [(one.id, one.state, one.rate, one.seed, one.quality, one.curve) for one in found]


def test_two_processes_share_one_study(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = {"trials": 3, "spread": 2, "evaluations": 2, "low": 1e-3, "high": 1e-1, "known": False}
    study = tiny(search=search)
    file = tmp_path / "shared.yaml"
    file.write_text(yaml.safe_dump(study.plain()), encoding="utf-8")
    other = subprocess.Popen([sys.executable, "-c", WORK, str(file)], stdout=subprocess.PIPE, text=True)
    own, real = [], trial.run

    def run(ground: Any, entry: Any, rate: Any, seed: int, stage: str, *more: Any) -> Any:
        own.append(f"{entry.label} {stage} {rate} {seed}")
        return real(ground, entry, rate, seed, stage, *more)

    monkeypatch.setattr(trial, "run", run)
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    Engine(study).work()
    others = other.communicate(timeout=280)[0].splitlines()
    assert other.returncode == 0
    assert own, "this process did nothing"
    assert others, "the other process did nothing"
    ran = own + others
    assert len(ran) == len(set(ran)) == 3 * 5 + 2, "a trial was run twice"
    shared = records.read(study.folder).trials
    alone = study.model_copy(update={"output": str(tmp_path / "alone")})
    Engine(alone).work()
    assert figures(shared) == figures(records.read(alone.folder).trials)


def test_workers_of_one_command_share_its_study(tiny: Any) -> None:
    study = tiny(search={"trials": 1, "spread": 1, "evaluations": 1, "known": False}, seeds=1)
    shown: list[int] = []
    tally = on_processes(study, 2, lambda tally: shown.append(tally.done))
    found = records.read(study.folder).trials
    assert tally.done == tally.total == len(found) == 3 * 2 + 1
    assert all(one.state == "done" for one in found)
    assert shown == sorted(shown)
    assert (study.folder / "report.html").is_file()
