"""`attune compare` as a person types it."""

from __future__ import annotations

import os
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

from attunement.compare import command, records, trial
from attunement.compare.command import Display
from attunement.compare.engine import Tally
from attunement.compare.study import Study
from attunement.compare.together import launcher
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
        (["study.yaml", "--columns", "text=a"], "--columns goes with --model and --data; study.yaml has its own"),
        (
            ["--model", "m", "--data", "d.csv", "--columns", "question"],
            "must be ROLE=COLUMN,..., such as text=question",
        ),
        (["--model", "m", "--data", "d.csv", "--columns", "txt=a"], "has no role 'txt'; it has text, text_pair, label"),
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
    counts = [line.split()[0] for line in said.splitlines() if "/7 " in line]
    assert counts == [f"{done}/7" for done in range(1, 8)], "what is refused is never counted"
    last = next(line for line in said.splitlines() if line.startswith("7/7 "))
    assert "left" not in last
    assert ": wide: adapt: LoRA" in said
    assert "with one seed nothing can be said of the differences" in said
    assert "; the arena itself added " in said
    assert "%" not in said.partition("the arena itself added ")[2].partition("\n")[0], "a share of a few seconds"
    assert str(tmp_path / "study" / "report.html") in said
    code, said, _ = attune("compare", file)
    assert (code, "/7 " in said) == (0, False), "nothing was left to do"
    code, said, _ = attune("compare", file, "--retry")
    assert (code, said.splitlines()[0]) == (0, "1 of what failed or was refused is tried again.")
    code, _, errors = attune("compare", file, "--retry", "--report")
    assert (code, "expected one of them" in errors) == (2, True)
    (tmp_path / "study" / "report.html").unlink()
    before = (tmp_path / "study" / "trials.csv").read_text().splitlines()
    code, said, _ = attune("compare", file, "--measure")
    assert [line.split("  measuring ")[0] for line in said.splitlines()[:4]] == ["1/4", "2/4", "3/4", "4/4"]
    assert (code, said.splitlines()[4]) == (0, "What 4 methods cost was measured again.")
    after = (tmp_path / "study" / "trials.csv").read_text().splitlines()
    assert len(before) == len(after)
    assert before != after, "times are taken anew"
    code, _, errors = attune("compare", file, "--measure", "--workers", "2")
    assert (code, "--measure goes by itself" in errors) == (2, True)
    assert attune("compare", file, "--report")[0] == 0
    page = tmp_path / "study" / "report.html"
    before = page.read_text()
    file.write_text(yaml.safe_dump(values | {"seeds": 2}))
    code, said, errors = attune("compare", file, "--report")
    assert (code, said, errors.count("\n")) == (2, "", 1)
    assert "was found with other settings: seeds was 1 and is now 2; set them back" in errors
    file.write_text(yaml.safe_dump(values | {"methods": [*values["methods"], "ia3"]}))
    code, said, _ = attune("compare", file, "--report")
    assert code == 0
    assert "Not on the page, as they have not run: 'ia3'; without --report they are run." in said
    assert page.read_text() == before


def test_columns_are_named_on_the_command_line(attune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text("question,intent\nwhere is it?,card\nhow much?,fee\n")
    asked: list[Study] = []
    monkeypatch.setattr(command, "run", lambda _console, study, *_: asked.append(study))
    options = ("--model", "m", "--data", tmp_path / "rows.csv", "--columns", "text=question, label=intent")
    assert attune("compare", *options)[0] == 0
    task = asked[0].tasks["rows"]
    assert task.data.read(task.data.train, task.task.roles)["label"] == ["card", "fee"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch --num_processes 3 --multi_gpu -m attunement"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun --nproc-per-node 3 -m attunement"),
        ({}, "accelerate launch --num_processes 3 -m attunement, or torchrun --nproc-per-node 3 -m attunement"),
    ],
)
def test_a_study_of_several_processes_goes_on_as_it_was_started(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str
) -> None:
    for name in [one for one in os.environ if one.startswith(("ACCELERATE_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert launcher(3) == expected


@pytest.mark.parametrize("command", [("compare", "--demo"), ("train", "recipe.yaml")])
def test_several_processes_that_accelerate_did_not_start_are_missed(
    attune: Any, monkeypatch: pytest.MonkeyPatch, command: tuple[str, str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    code, said, errors = attune(*command)
    assert (code, said, errors.count("\n")) == (2, "", 1)
    assert f"use torchrun --nproc-per-node 2 -m attunement {command[0]}" in errors
    assert "it started one, as it does where there are no several GPUs" in errors


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
    for now[0], done, spent in ((0, 10, 1000), (1, 13, 1000), (600, 15, 1200), (1200, 17, 1400)):
        tally = Tally(total=37, done=done, still=3 * (done > 10), spent=spent, ahead=3400 - spent)
        display(tally)
        said.append(display._left(tally))
    assert said == ["", "", "about 1.8 h left", "about 1.7 h left"], "of 200 s of trials every 600 s, by any process"
    assert display._left(Tally(done=17, still=3, spent=1400, ahead=2000, left=90)) == "about 2 min left", "the budget"
    assert display._left(Tally(done=17, still=3, spent=1400, ahead=10)) == "less than a minute left"
    assert display._left(Tally(done=37, still=3, spent=3400)) == "", "nothing is left"


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(
    attune: Any, tmp_path: Path, bert: Path, no_pictures: None
) -> None:
    values = plain(tmp_path, bert, search={"trials": 1, "spread": 1}, seeds=1)
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(values))
    typed = [sys.executable, "-m", "attunement", "compare", str(file)]
    running = subprocess.Popen(typed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
