"""`--retry`: what failed is run again and counts as if it had not."""

from __future__ import annotations

from typing import Any

import pytest

from attunement.compare import records
from attunement.compare import trial as trials
from attunement.compare.engine import Engine

pytestmark = pytest.mark.usefixtures("no_pictures")

SEARCH = {"trials": 2, "spread": 2, "evaluations": 2, "low": 1e-3, "high": 1e-1, "known": False}
METHODS = [{"method": "lora", "rank": 2}, {"method": "ia3"}]


def figures(study: Any) -> list[tuple]:
    found = records.read(study.folder).trials
    return sorted((one.id, one.state, one.rate, one.head_rate, one.seed, one.quality, one.curve) for one in found)


@pytest.mark.parametrize("failing", ["everything", "lora"])
def test_what_failed_is_run_again(tiny: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, failing: str) -> None:
    whole = tiny(methods=METHODS, search=SEARCH, output=str(tmp_path / "whole"))
    Engine(whole).work()

    study, real = tiny(methods=METHODS, search=SEARCH, output=str(tmp_path / "broken")), trials._run

    def broken(ground: Any, entry: Any, *more: Any) -> None:
        if failing == "everything" or entry.label.startswith("lora"):
            raise RuntimeError("the disk was away")
        real(ground, entry, *more)

    monkeypatch.setattr(trials, "_run", broken)
    Engine(study).work()
    before = records.read(study.folder).trials
    failed = [one for one in before if one.state == "failed"]
    assert len(failed) == (2 if failing == "lora" else 2 + 4 * 2)  # zero-shot's seeds, and every search
    monkeypatch.setattr(trials, "_run", real)

    assert Engine(study).next() is None, "nothing is run again unless that is asked for"
    assert Engine(study).retry() == len(failed)
    Engine(study).work()
    assert figures(study) == figures(whole)
    assert Engine(study).retry() == 0


def test_what_was_refused_is_tried_again(tiny: Any, monkeypatch: pytest.MonkeyPatch, attune: Any) -> None:
    study = tiny(methods=[*METHODS, "vpt"], search=SEARCH)
    Engine(study).work()
    assert [one.id for one in records.read(study.folder).trials if one.state == "failed"] == ["tiny/vpt/refused"]
    assert Engine(study).retry() == 1
    Engine(study).work()
    assert [one.id for one in records.read(study.folder).trials if one.state == "failed"] == ["tiny/vpt/refused"]


def test_another_process_that_is_running_hears_of_it(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    study, real = tiny(methods=METHODS, search=SEARCH), trials._run

    def broken(*_: Any) -> None:
        raise RuntimeError("the disk was away")

    running = Engine(study)
    monkeypatch.setattr(trials, "_run", broken)
    running.work()
    monkeypatch.setattr(trials, "_run", real)
    assert running.next() is None
    assert Engine(study).retry() > 0
    running.work()
    assert {one.state for one in records.read(study.folder).trials} == {"done"}
