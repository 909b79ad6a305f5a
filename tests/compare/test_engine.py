"""The engine: what runs, in which order, what is stored, and what happens when something goes wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from tiny_studies import plain

import attunement as at
from attunement.compare import database, records, report
from attunement.compare import trial as trials
from attunement.compare.database import difference, good
from attunement.compare.engine import Engine, Tally, best_rate, spread
from attunement.compare.records import Progress, Trial
from attunement.compare.study import Study, entries, made

pytestmark = pytest.mark.usefixtures("no_pictures")

KILLED = """
import sys, yaml
from attunement.compare.engine import Engine
from attunement.compare.study import made
Engine(made(yaml.safe_load(open(sys.argv[1])), "study")).work()
"""


def figures(study: Study) -> list[tuple]:
    """What must be the same wherever and however often a study is run."""
    return [
        (one.id, one.state, one.rate, one.seed, one.quality, one.calibration, one.steps, one.curve)
        for one in sorted(records.read(study.folder).trials, key=lambda one: one.id)
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Study:
    """A study that was run without a stop."""
    study = made(plain(tmp_path_factory.mktemp("straight"), bert, search=SEARCH), "tiny")
    Engine(study).work()
    return study


SEARCH = {"trials": 3, "spread": 2, "evaluations": 2, "low": 1e-3, "high": 1e-1, "known": False}


@pytest.fixture
def registered() -> Iterator[Any]:
    """Registers methods for one test."""
    registry = sys.modules["attunement.method"]._registry
    before = dict(registry)
    yield at.register
    registry.clear()
    registry.update(before)


def test_a_study_runs_to_its_end(straight: Study) -> None:
    found = records.read(straight.folder)
    assert len(found.trials) == 3 * 5 + 2
    for label in ("linear probe", "full fine-tuning", "lora (rank=2)"):
        own = [one for one in found.trials if one.label == label]
        assert [one.stage for one in own] == ["search"] * 3 + ["final"] * 2
        assert len({one.rate for one in own[:3]}) == 3
        done = [one for one in own[:3] if one.state == "done"]
        best = max(done, key=lambda one: (one.quality, -one.rate))
        assert {one.rate for one in own[3:]} == {best.rate}
        assert [one.seed for one in own[3:]] == [0, 1]
        assert all(one.curve for one in own)
        assert all(one.steps == 6 for one in own if one.state == "done")
        assert all(one.error == "" for one in own)
        assert own[0].trainable > 0
        assert own[0].saved_bytes >= 4 * own[0].trainable
        assert own[0].peak_memory > own[0].backward_bytes > 0
        assert own[0].flops > 0
    full, probe = (next(one for one in found.trials if one.method == f"baseline/{word}") for word in ("full", "probe"))
    assert (full.step, full.inference_merged) == (1.0, None)
    assert full.backward_bytes > probe.backward_bytes
    assert full.flops > 2 * probe.flops
    assert [one.seed for one in found.trials if one.label == "zero-shot"] == [0, 1]
    page = (straight.folder / "report.html").read_text(encoding="utf-8")
    assert "full fine-tuning" in page


def test_the_same_seed_gives_the_same_figures_to_the_bit(straight: Study, tmp_path: Path) -> None:
    again = straight.model_copy(update={"output": str(tmp_path / "again")})
    Engine(again).work()
    assert figures(again) == figures(straight)
    other = straight.model_copy(update={"output": str(tmp_path / "other"), "seed": 1})
    Engine(other).work()
    assert figures(other) != figures(straight)


def test_a_killed_study_goes_on_where_it_was(straight: Study, tmp_path: Path) -> None:
    study = straight.model_copy(update={"output": str(tmp_path / "killed")})
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study.plain()), encoding="utf-8")
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(file)])
    table, rows = study.folder / records.TRIALS, 0
    try:
        deadline = time.monotonic() + 120
        while rows < 6 and child.poll() is None and time.monotonic() < deadline:
            rows = len(table.read_text().splitlines()) if table.exists() else 0
            time.sleep(0.02)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    before = {one.id: one for one in records.read(study.folder).trials}
    assert 5 <= len(before) < 17
    Engine(study).work()
    after = {one.id: one for one in records.read(study.folder).trials}
    assert figures(study) == figures(straight)
    assert all(after[key].seconds == one.seconds for key, one in before.items()), "a finished trial was run again"


def test_other_settings_under_one_name_are_refused_with_the_difference(straight: Study, tmp_path: Path) -> None:
    other = made(straight.plain() | {"seeds": 3}, "tiny")
    with pytest.raises(at.AttunementError, match=r"'tiny'.*began with other settings: seeds was 2 and is now 3"):
        Engine(other)
    fewer = made(straight.plain() | {"methods": ["ia3"]}, "tiny")
    with pytest.raises(at.AttunementError, match=r"methods had .*lora.* and now have not"):
        Engine(fewer)
    now = straight.settings()
    assert difference(now, now | {"budget": "1h", "storage": "x"}) == ""
    assert difference(now, now | {"methods": [*now["methods"], "ia3"]}) == ""


def test_a_damaged_database_gives_way_to_the_last_good_copy(straight: Study, tmp_path: Path) -> None:
    study = straight.model_copy(update={"output": str(tmp_path / "damaged")})
    study.folder.mkdir()
    (study.folder / "study.db").write_bytes(b"not a database at all" * 1000)
    with pytest.raises(at.AttunementError, match=r"study.db is damaged and there is no good copy"):
        Engine(study)
    for name in ("study.db", good(Path("study.db")).name):
        (study.folder / name).write_bytes((straight.folder / name).read_bytes())
    whole = (study.folder / "study.db").read_bytes()
    (study.folder / "study.db").write_bytes(whole[:4096] + b"\x17" * 8192 + whole[12288:])
    engine = Engine(study)
    assert "going on from the last good copy" in engine.base.told
    assert list(study.folder.glob("study.db.damaged-*"))
    engine.work()
    assert figures(study) == figures(straight)


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    straight: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = straight.model_copy(update={"output": str(tmp_path / "full")})
    real, calls = records.write, []

    def write(*args: Any) -> None:
        calls.append(args)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    monkeypatch.setattr(records, "write", write)
    with pytest.raises(at.AttunementError, match=r"^the disk of .* is full: finished trials are kept; make room"):
        Engine(study).work()
    monkeypatch.setattr(records, "write", real)
    error = sqlite3.OperationalError("database or disk is full")
    with pytest.raises(at.AttunementError, match="is full"), database.saying(study):
        raise optuna.exceptions.StorageInternalError("An exception") from error
    Engine(study).work()
    assert figures(study) == figures(straight)


def test_a_trial_waits_for_a_server_that_starts_again(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny(seeds=1))
    engine.base.file = None  # as where it is on a server
    line, slept, failures = engine.lines[0], [], [None, None]
    trial = line.claim("final", 0, optuna.samplers.RandomSampler())
    assert trial is not None
    real = optuna.Trial.set_user_attr

    def away(self: optuna.Trial, key: str, value: Any) -> None:
        if key == "record" and failures:
            failures.pop()
            raise optuna.exceptions.StorageInternalError("connection refused")
        real(self, key, value)

    monkeypatch.setattr(optuna.Trial, "set_user_attr", away)
    monkeypatch.setattr(database.time, "sleep", slept.append)
    record = Trial(id="x", task="tiny", method="baseline/zero-shot", label="zero-shot", quality=0.5)
    line.finish("final", trial, record)
    assert slept == [1.0, 2.0]
    assert [one.quality for one in line.records()] == [0.5]
    failures.extend([None] * 99)
    with pytest.raises(at.AttunementError, match="cannot be used: connection refused"):
        line.finish("final", trial, record)
    assert sum(slept) > 60


def test_what_crashes_diverges_or_cannot_act_is_recorded_and_the_study_goes_on(tiny: Any, registered: Any) -> None:
    @registered("test/crashing", source="here")
    class Crashing(at.WeightMethod):
        def tensors(self, site: Any) -> Any:
            return {"a": torch.zeros(site.inputs)}

        def delta(self, W: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(W) * a

        def before_step(self, adapter: Any, parts: Any) -> None:
            raise RuntimeError("no luck at step 1")

    @registered("test/diverging", source="here")
    class Diverging(at.WeightMethod):
        def tensors(self, site: Any) -> Any:
            return {"a": torch.zeros(site.outputs, 1)}

        def delta(self, W: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return a * torch.ones_like(W) / (a.detach().abs().sum() == 0)  # fine at the start

    study = tiny(methods=["crashing", "diverging", "prompts/vpt", "hyperformer", "lora"])
    tally = Engine(study).work()
    found = records.read(study.folder).trials
    of = {
        label: [one for one in found if one.label == label]
        for label in ("crashing", "diverging", "vpt", "hyperformer", "lora")
    }
    assert [one.state for one in of["crashing"]] == ["failed"] * 2
    assert "RuntimeError: no luck at step 1" in of["crashing"][0].error
    assert [one.state for one in of["diverging"]] == ["diverged"] * 2
    assert "nan" in of["diverging"][0].error
    assert [one.state for one in of["vpt"]] == ["failed"]
    assert [one.state for one in of["hyperformer"]] == ["failed"]
    assert "no site that it can act on" in of["hyperformer"][0].error
    assert [one.state for one in of["lora"]] == ["done"] * 4
    assert Engine(study).next() is None
    assert tally.missing == []


def test_where_every_method_is_refused_nothing_is_trained(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "run", lambda *_: pytest.fail("a trial began"))
    study = tiny(methods=["prompts/vpt", "hyperformer"])
    for _ in range(2):
        with pytest.raises(
            at.AttunementError, match=r"^study 'tiny': none of the methods can act on the model: vpt: .*; hyperformer: "
        ):
            Engine(study).work()
    assert {one.label for one in records.read(study.folder).trials} == {"vpt", "hyperformer"}


def test_a_study_that_was_stopped_says_how_far_it_is(tiny: Any, attune: Any) -> None:
    study = tiny(methods=[{"method": "lora", "rank": 2}, "ia3", "prompts/vpt"])
    seen: list[tuple[int, int]] = []

    def watch(tally: Tally) -> None:
        seen.append((tally.done, tally.total))
        if tally.done == 16 and len(seen) > 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine(study, watch).work()
    assert {total for done, total in seen if done} == {18}, "what is refused is known before the first trial"
    assert records.read(study.folder).progress == Progress(done=16, total=18, complete=2, methods=3)
    said = "This study is not finished: 16 of 18 trials are done, and 2 of 3 methods are complete"
    assert f"{said}; attune compare goes on with it." in attune("recommend", study.folder)[1]
    assert json.loads(attune("recommend", study.folder, "--json")[1])["notes"][0].startswith(said)
    report.write(study.folder)
    assert f"{said}." in (study.folder / "report.html").read_text(encoding="utf-8")
    tally = Engine(study).work()
    assert (tally.done, tally.total, tally.ahead) == (18, 18, 0.0)
    assert records.read(study.folder).progress is None
    assert "not finished" not in (study.folder / "report.html").read_text(encoding="utf-8")
    assert "not finished" not in attune("recommend", study.folder)[1]


def test_what_others_did_does_not_make_the_total_jump(tiny: Any) -> None:
    study = tiny()
    one, other = Engine(study), Engine(study)
    one.refresh(every=True)
    assert (one.tally.done, one.tally.total) == (0, 14)
    other.work()
    assert one.next() is None
    one.looking = 1e9  # it is not yet time to look at all of them
    one.refresh()
    assert (one.tally.done, one.tally.total) == (14, 14)


def test_the_time_to_come_is_that_of_trials_alike(straight: Study) -> None:
    engine = Engine(straight)
    lines = {line.entry.label: line for line in engine.lines}
    engine.found = {id(line): [] for line in engine.lines}
    common = {"task": "tiny", "quality": 0.5}

    def made(label: str, stage: str, seconds: float) -> Trial:
        method = lines[label].entry.method
        return Trial(id=f"{label}{stage}", label=label, method=method, stage=stage, seconds=seconds, **common)

    full, lora = lines["full fine-tuning"], lines["lora (rank=2)"]
    found = [made("full fine-tuning", "search", 10.0), made("lora (rank=2)", "search", 1.0)]
    engine._forecast(found, {id(line): (0, 0) for line in engine.lines} | {id(full): (2, 0), id(lora): (2, 0)})
    assert (engine.tally.spent, engine.tally.ahead) == (11.0, 22.0), "each takes what it took before"
    probe = lines["linear probe"]
    engine._forecast(found, {id(line): (0, 0) for line in engine.lines} | {id(probe): (1, 0)})
    assert engine.tally.ahead == 5.5, "one that is new takes what the others take"
    found.append(made("full fine-tuning", "final", 30.0))
    engine._forecast(found, {id(line): (0, 0) for line in engine.lines} | {id(lora): (0, 2)})
    assert engine.tally.ahead == 60.0, "a final run takes what final runs take"
    many = [replace(found[1], label=f"m{i}", seconds=2.0) for i in range(5)]
    engine._forecast([found[0], *many], {id(line): (0, 0) for line in engine.lines} | {id(lora): (3, 0)})
    assert engine.tally.ahead == 6.0, "of methods enough are known to leave full fine-tuning out"


def test_a_budget_ends_every_search_after_the_same_number(
    straight: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attune: Any
) -> None:
    study = straight.model_copy(update={"output": str(tmp_path / "budget"), "budget": "66m"})
    engine = Engine(study)
    real = trials.run

    def run(*args: Any) -> Any:
        assert engine.deadline is not None
        engine.deadline -= 240.0 if args[4] == "search" else 480.0  # every trial takes minutes
        return replace(real(*args), seconds=240.0)

    monkeypatch.setattr(trials, "run", run)
    tally = engine.work()
    found = records.read(study.folder).trials
    tried = {one.label: 0 for one in found if one.label != "zero-shot"}
    for one in found:
        tried[one.label] = tried.get(one.label, 0) + (one.stage == "search")
    assert tried.pop("linear probe") == 3, "it finds the rate of the heads"
    assert set(tried.values()) - {0} == {2}
    assert "every search ended after 2 of 3 rates" in tally.missing
    assert any("seeds" in said for said in tally.missing)
    assert list(records.read(study.folder).missing) == tally.missing
    assert "The budget was spent: every search ended after 2 of 3" in (study.folder / "report.html").read_text()
    assert "was spent: every search ended after 2 of 3 rates; tiny: " in attune("recommend", study.folder)[1]
    assert json.loads(attune("recommend", study.folder, "--json")[1])["missing"] == tally.missing
    finals = [one for one in found if one.stage == "final"]
    assert {one.label for one in finals} == {entry.label for entry in entries(study)}, "each had a seed before a second"
    monkeypatch.setattr(trials, "run", real)
    more = study.model_copy(update={"budget": None})
    assert Engine(more).work().missing == []
    assert records.read(study.folder).missing == ()
    assert not (study.folder / records.MISSING).exists()
    assert "budget was spent" not in (study.folder / "report.html").read_text()
    assert figures(more) == figures(straight), "final runs at a rate that is no longer the best do not count"


def test_the_rates_are_spread_from_the_middle_outwards() -> None:
    rates = spread(1e-4, 1.0, 4)
    assert rates == pytest.approx([10**-2.5, 10**-1.5, 10**-3.5, 10**-0.5])
    assert spread(1e-4, 1e-2, 1) == pytest.approx([1e-3])


def test_a_later_study_starts_from_the_rates_that_were_found(tiny: Any, tmp_path: Path) -> None:
    first = tiny()
    engine = Engine(first)
    engine.work()
    line = next(line for line in engine.lines if line.entry.method == "low_rank/lora")
    found = best_rate(line, 2)
    second = tiny(output=str(tmp_path / "second"), search={"trials": 1, "spread": 1, "low": 1e-3, "high": 1e-1})
    Engine(second).work()
    rates = [one.rate for one in records.read(second.folder).trials if one.method == "low_rank/lora"]
    assert rates == [found] * 3


def test_forgetting_is_the_rise_of_the_loss_on_other_rows(tiny: Any, tmp_path: Path) -> None:
    search = {"trials": 1, "spread": 1, "evaluations": 1}
    study = tiny(forgetting=str(tmp_path / "test.csv"), seeds=1, search=search)
    Engine(study).work()
    found = {one.label: one for one in records.read(study.folder).trials if one.stage == "final"}
    assert found["zero-shot"].forgetting == 0
    assert all(one.forgetting is not None for one in found.values())
    assert found["lora (rank=2)"].forgetting < 0, (
        "these rows are of the same task, so it is learned rather than forgotten"
    )
