"""`attune compare` as a person types it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tiny_studies import plain

from attunement.compare import records, trial
from attunement.compare.command import Display
from attunement.compare.engine import Tally
from attunement.compare.trial import Outcome


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "expected one of STUDY.yaml, --model with --data, and --demo; got none of them"),
        (["--demo", "--model", "x"], "got several of them"),
        (["--demo", "--methods", "lorra"], "--methods goes with --model and --data; the demo has its own"),
        (["study.yaml", "--task", "regression"], "--task goes with --model and --data; study.yaml has its own"),
        (["--model", "m", "--data", "d.csv", "--methods", "LoRA"], "there is no 'LoRA'; nearest: 'low_rank/lora'"),
        (["--model", "x"], "compare: --data is missing"),
        (["nowhere.yaml"], "there is no study file 'nowhere.yaml'"),
        (["--demo", "--on", "rey"], "--on must be one of local, ray, got 'rey'; nearest: 'ray'"),
        (["--model", "m", "--data", "d.csv", "--methods", "lorra"], "there is no 'lorra'; nearest: "),
        (["--model", "m", "--data", "d.csv", "--budget", "soon"], "got 'soon'"),
    ],
)
def test_a_refusal_is_one_sentence(attune: Any, arguments: list[str], sentence: str) -> None:
    code, said, errors = attune("compare", *arguments)
    assert (code, said, errors.count("\n")) == (2, "", 1)
    assert sentence in errors


def test_a_study_from_the_command_line(attune: Any, tmp_path: Path, bert: Path, no_pictures: None) -> None:
    values = plain(tmp_path, bert, search={"trials": 1, "spread": 1}, seeds=1)
    values["methods"] = [{"method": "lora", "rank": 500, "as": "wide"}, *values["methods"]]
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values))
    code, said, errors = attune("compare", file)
    assert code == 0, errors
    assert "7/7" in said
    assert ": wide: adapt: LoRA" in said
    assert "with one seed nothing can be said of the differences" in said
    assert "the arena itself added" in said
    assert str(tmp_path / "study" / "report.html") in said
    code, said, _ = attune("compare", file)
    assert (code, "/7 " in said) == (0, False), "nothing was left to do"
    (tmp_path / "study" / "report.html").unlink()
    assert attune("compare", file, "--report")[0] == 0
    assert (tmp_path / "study" / "report.html").is_file()


def test_a_model_that_is_not_there_is_one_sentence(attune: Any, tmp_path: Path, bert: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain(tmp_path, bert, model="nobody/no-such-model")))
    code, said, errors = attune("compare", file)
    assert (code, said, errors.count("\n")) == (2, "", 1)
    assert "'nobody/no-such-model' cannot be loaded: " in errors


def test_the_time_left_is_that_of_trials_that_train(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = Display(Console(quiet=True))
    said = []
    for now[0], done, still in ((0, 10, 0), (1, 13, 3), (600, 15, 3), (1200, 17, 3)):
        tally = Tally(total=37, done=done, still=still)
        display(tally)
        said.append(display._left(tally))
    assert said == ["", "", "about 1.8 h left", "about 1.7 h left"], "two were done every 600 s, by any process"


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(
    attune: Any, tmp_path: Path, bert: Path, no_pictures: None
) -> None:
    values = plain(tmp_path, bert, search={"trials": 1, "spread": 1}, seeds=1)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "attunement", "compare", str(file)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    table = tmp_path / "study" / records.TRIALS
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.poll() is None:
        if table.exists() and len(table.read_text().splitlines()) > 2:
            break
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    said, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert "Traceback" not in errors
    assert "finished trials are kept in" in said
    assert "Go on with: " in said
    assert f"compare {file}" in said
    assert 2 <= len(records.read(tmp_path / "study").trials) < 7
    code, _, errors = attune("compare", file)
    assert code == 0, errors
    assert len(records.read(tmp_path / "study").trials) == 7


def test_ctrl_c_is_not_lost_in_a_finalizer(
    attune: Any, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0)  # Python runs the handler here, and drops what it raises

    def run(*_: Any) -> Outcome:
        Late()
        return Outcome(quality=0.5)

    monkeypatch.setattr(trial, "run", run)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain(tmp_path, bert)))
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    code, said, _ = attune("compare", file)
    assert (code, signal.getsignal(signal.SIGINT)) == (130, before)
    assert "1 finished trials are kept" in said
    assert len(records.read(tmp_path / "study").trials) == 1


def test_the_demo_is_a_study_of_four_methods() -> None:
    from attunement.compare import demo
    from attunement.compare.study import entries

    study = demo.study()
    assert len(entries(study)) == 4 + 3
    assert study.folder == Path("runs/compare/demo")


def test_minilm_learns_from_real_questions_and_is_measured(tmp_path: Path) -> None:
    from attunement.compare import demo
    from attunement.compare.study import entries
    from attunement.compare.trial import Ground, costs, run

    study = demo.study(tmp_path / "study")
    task = study.tasks["demo"].model_copy(update={"per_class": 2, "test_rows": 154})
    ground = Ground("demo", task, study.search.model_copy(update={"rows": 77}), tmp_path)
    of = {entry.label: entry for entry in entries(study)}
    bare = run(ground, of["zero-shot"], None, 0, "final")
    assert (bare.state, bare.steps) == ("done", 0)
    assert bare.quality > 0.4, "the names of the intents say much"
    trained = run(ground, of["lora"], 1e-2, 0, "final")
    assert (trained.state, trained.steps) == ("done", 10)
    assert trained.quality > 0.2
    assert 0 <= trained.calibration <= 1
    found = costs(ground, of["lora"])
    assert found["trainable"] == 2 * 8 * 2 * 384 * 6 + 385 * 77
    assert 0 < found["step"] < 1
    assert found["inference_merged"] is not None
