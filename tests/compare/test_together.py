"""One trial over two processes: a launcher starts the command, and they train every trial together over gloo."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tiny_studies import plain
from torch import distributed

import attunement as at
from attunement.compare import records, together, trial
from attunement.compare.engine import Engine
from attunement.compare.records import Trial
from attunement.compare.study import Study, entries, made
from attunement.compare.trial import Ground

OWN = """
import os
import torch
import attunement as at

@at.register("test/crashing", source="here")
class Crashing(at.WeightMethod):
    def tensors(self, site):
        return {"a": torch.zeros(site.inputs)}

    def delta(self, W, a):
        return torch.zeros_like(W) * a

    def before_step(self, adapter, parts):
        if os.environ["RANK"] == "1":
            raise RuntimeError("no luck")

@at.register("test/diverging", source="here")
class Diverging(at.WeightMethod):
    def tensors(self, site):
        return {"a": torch.zeros(site.outputs, 1)}

    def delta(self, W, a):
        return a * torch.ones_like(W) / (a.detach().abs().sum() == 0)  # fine at the start
"""
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "attunement", "compare")
LABELS = ("linear probe", "full fine-tuning", "crashing", "diverging", "LoRA", "LoRA again")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Iterator[tuple[Study, str]]:
    """A study that two processes ran, and what they printed."""
    registry = sys.modules["attunement.method"]._registry  # type: ignore[attr-defined]
    before = dict(registry)
    folder = tmp_path_factory.mktemp("pair")
    model = folder / "model"
    model.mkdir()
    for file in bert.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # two processes draw unlike ones
    (model / "config.json").write_text(json.dumps(config))
    (folder / "own_of_two.py").write_text(OWN)
    lora = {"method": "lora", "rank": 2}
    values = plain(
        folder,
        model,
        methods=["crashing", "diverging", {**lora, "as": "LoRA"}, {**lora, "as": "LoRA again"}],
        imports=[str(folder / "own_of_two.py")],
        search={"trials": 1, "spread": 1, "evaluations": 2, "low": 1e-3, "high": 1e-1, "known": False},
    )
    values["training"] |= {"per_device_train_batch_size": 4, "logging_steps": 1}
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(values))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, *LAUNCH, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    yield made(values, "study").model_copy(update={"processes": 2}), done.stdout
    registry.clear()
    registry.update(before)


def test_two_processes_run_a_study_once(pair: tuple[Study, str]) -> None:
    study, said = pair
    found = records.read(study.folder)
    of = {label: [one for one in found.trials if one.label == label] for label in LABELS}
    finished = [label for label in LABELS if label not in ("crashing", "diverging")]
    assert {label: [one.stage for one in of[label]] for label in finished} == {
        label: ["search", "final", "final"] for label in finished
    }
    assert len(found.trials) == 3 * len(finished) + 2 + 2
    assert all(one.state == "done" for label in finished for one in of[label])
    assert all(one.steps == 6 for one in of["LoRA"]), "48 rows in batches of 4 on 2 processes"
    assert all(one.trainable and one.step and one.peak_memory for one in of["LoRA"])
    assert found.settings["processes"] == 2
    assert said.count("16/16 ") == 1, "one process shows the progress"
    assert (study.folder / "report.html").is_file()


def test_accelerate_starts_the_same(tmp_path: Path, bert: Path) -> None:
    search = {"trials": 1, "spread": 1, "evaluations": 1, "low": 1e-3, "high": 1e-1, "known": False}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain(tmp_path, bert, search=search, seeds=1)))
    launch = ("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2")
    given = ("--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")
    command = [sys.executable, *launch, *given, "-m", "attunement", "compare", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("7/7 ") == 1, "one process shows the progress"
    found = records.read(tmp_path / "study")
    assert (len(found.trials), found.settings["processes"]) == (7, 2)
    assert {one.steps for one in found.trials if one.stage == "final"} == {0, 3}, "48 rows, 16 a step"


def test_what_goes_wrong_in_one_of_them_is_recorded_and_the_study_goes_on(pair: tuple[Study, str]) -> None:
    found = {one.label: one for one in records.read(pair[0].folder).trials if one.stage == "search"}
    assert (found["crashing"].state, found["crashing"].error) == ("failed", "process 1: RuntimeError: no luck")
    assert found["diverging"].state == "diverged"
    assert found["diverging"].error.startswith("the loss")


def test_the_same_seed_gives_the_same_figures_to_the_bit(pair: tuple[Study, str]) -> None:
    def figures(label: str) -> list[tuple[Any, ...]]:
        own = [one for one in records.read(pair[0].folder).trials if one.label == label]
        return [(one.stage, one.rate, one.seed, one.quality, one.calibration, one.curve) for one in own]

    assert figures("LoRA") == figures("LoRA again")


def test_they_train_what_one_process_trains_with_their_batches_in_one(pair: tuple[Study, str]) -> None:
    study = pair[0]
    task = study.tasks["tiny"]
    whole = task.training.model_copy(update={"per_device_train_batch_size": 8})
    ground = Ground("tiny", task.model_copy(update={"training": whole}), study.search, study.folder)
    entry = next(entry for entry in entries(study) if entry.label == "LoRA")
    both: Trial = next(
        one for one in records.read(study.folder).trials if (one.label, one.stage, one.seed) == ("LoRA", "final", 1)
    )
    alone = trial.run(ground, entry, both.rate, 1, "final")
    losses = [loss for _, loss, _ in both.curve if loss is not None]
    assert losses == pytest.approx([loss for _, loss, _ in alone.curve if loss is not None], abs=2e-4)
    assert both.quality == pytest.approx(alone.quality)
    assert both.calibration == pytest.approx(alone.calibration, abs=1e-4)


def test_another_number_of_processes_is_refused(pair: tuple[Study, str]) -> None:
    study = pair[0]
    with pytest.raises(
        at.AttunementError, match=r"is 2, and 1 of them was started; use accelerate launch .* or torchrun"
    ):
        Engine(study)
    with pytest.raises(at.AttunementError, match=r"began with other settings: processes was 2 and is now 1"):
        Engine(study.model_copy(update={"processes": None}))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--workers", 2), "--workers: the 2 processes of this launch train every trial together"),
        (("--on", "ray"), "--on ray: the 2 processes of this launch train every trial together"),
        ((), "WORLD_SIZE is 2, and MASTER_ADDR, MASTER_PORT are not set; start it with accelerate launch or torchrun"),
    ],
)
def test_what_a_launch_cannot_do_is_refused(
    attune: Any, monkeypatch: pytest.MonkeyPatch, given: tuple[object, ...], sentence: str
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, said, errors = attune("compare", "--demo", *given)
    assert (code, said, errors.count("\n")) == (2, "", 1)
    assert sentence in errors
    monkeypatch.setenv("RANK", "1")
    if given:
        assert attune("compare", "--demo", *given) == (2, "", ""), "it is said once"


CLOSING = """
import gc, os, time, torch
from types import SimpleNamespace
import torch.distributed as distributed
from attunement.compare import together
together.STEP = 5.0
team = together.Team()
team._join(SimpleNamespace(training=SimpleNamespace(model_dump=lambda: {"use_cpu": True})))
distributed.barrier()
if team.rank == 0:
    work = distributed.all_reduce(torch.ones(4), async_op=True)  # the other process has left the trial
    time.sleep(0.2)
    began = time.monotonic()
    team._part()
    del work
    gc.collect()
    print("closed after", time.monotonic() - began, flush=True)
    team.store.set("closed", "")
team.store.wait(["closed"])
os._exit(0)
"""


def test_connections_close_though_something_is_pending(tmp_path: Path) -> None:
    file = tmp_path / "closing.py"
    file.write_text(CLOSING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    assert float(done.stdout.rpartition("closed after")[2]) < 20


def test_connections_are_not_closed_under_the_interpreters_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP's reducer would do so, were it the last to hold them, while a thread that closing waits for wants the lock."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    team = together.Team()
    team._join(SimpleNamespace(training=SimpleNamespace(model_dump=lambda: {"use_cpu": True})))  # type: ignore[arg-type]
    trained: list[Any] = [torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))]
    trained.append(trained)  # a cycle, as a trial that failed leaves them
    reducer, connections = weakref.ref(trained[0].reducer), weakref.ref(distributed.group.WORLD)
    del trained
    collect, held = gc.collect, []

    def watched() -> None:
        collect()
        held.append((reducer() is None, connections() is not None))

    monkeypatch.setattr(together.gc, "collect", watched)
    team._part()
    assert held == [(True, True)], "the reducer has gone, and the connections are still held by name"
    assert connections() is None
