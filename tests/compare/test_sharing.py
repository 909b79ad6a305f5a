"""Two processes on one study: nothing is run twice, nothing is left out, and the figures are those of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from attunement.compare import records
from attunement.compare.engine import Engine
from attunement.compare.fan_out import on_processes
from attunement.compare.records import Trial

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
Engine(made(yaml.safe_load(open(sys.argv[1])), "study")).work()
"""


def figures(trials: tuple[Trial, ...]) -> list[tuple]:
    found = sorted(trials, key=lambda one: one.id)
    return [(one.id, one.state, one.rate, one.seed, one.quality, one.curve) for one in found]


def test_two_commands_share_one_study(tiny: Any, tmp_path: Path) -> None:
    study = tiny(search={"trials": 3, "spread": 2, "evaluations": 2, "low": 1e-3, "high": 1e-1, "known": False})
    file = tmp_path / "shared.yaml"
    file.write_text(yaml.safe_dump(study.plain()), encoding="utf-8")
    arguments = [sys.executable, "-c", WORK, str(file)]
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=280)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(said), "one of them did nothing"
    ran = said[0] + said[1]
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
