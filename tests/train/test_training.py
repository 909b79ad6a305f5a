"""Runs from a recipe: they learn, they stop and go on bit for bit, they are asked afterwards."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from processes import killed, pair
from rich.console import Console
from safetensors.torch import load_file

import attunement as at
from attunement.method import _registry
from attunement.train.progress import Bar
from attunement.train.recipe import Recipe
from attunement.train.recipe import load as load_recipe
from attunement.train.run import check_folder, load, predict_folder, prepare, train
from attunement.train.section import read
from attunement.train.tasks import Regression
from attunement.train.trainer import last_checkpoint
from attunement.train.words import command

QUIET = Console(quiet=True)
Attune = Callable[..., tuple[int, str, str]]


def run(values: dict, **options: bool) -> dict:
    return train(read(Recipe, values, "recipe"), QUIET, **options)


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Another process, with as many threads as this one: how many there are decides the last bits of a sum."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "COLUMNS": "200"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def written(values: dict, folder: Path) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def final(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter" / "adapter.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_is_asked(trained: Path) -> None:
    assert json.loads((trained / "metrics.json").read_text())["eval"]["accuracy"] > 0.9
    _, answers = predict_folder(trained, ["a great film", "the awful plot"], None)
    assert [answer["label"] for answer in answers] == ["up", "down"]
    assert load(trained).recipe.task.labels == ("down", "up")


def test_the_base_is_never_written(recipe: dict) -> None:
    run(recipe)
    folder = Path(recipe["output"])
    kept = {str(path.relative_to(folder).name) for path in folder.rglob("*") if path.is_file()}
    assert not kept & {"model.safetensors", "pytorch_model.bin", "training_args.bin"}
    assert {"adapter.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= kept


@pytest.mark.parametrize("pooling", ["model", "cls"])
def test_other_poolings_train(recipe: dict, pooling: str) -> None:
    training = recipe["training"] | {"num_train_epochs": 5, "learning_rate": 0.03}
    metrics = run(recipe | {"task": {"kind": "classification", "pooling": pooling}, "training": training})
    assert metrics["eval"]["accuracy"] > 0.8


def test_mean_pooling_does_not_see_padding(recipe: dict) -> None:
    made = prepare(read(Recipe, recipe, "recipe"))
    made.model.eval()
    alone = made.processor(["a great film"], return_tensors="pt")
    padded = made.processor(["a great film"], return_tensors="pt", padding="max_length", max_length=12)
    torch.testing.assert_close(made.model(**padded).logits, made.model(**alone).logits)


def test_regression(recipe: dict, tmp_path: Path) -> None:
    rows = "text,score\n" + "".join(
        f"the film was {'good' if i % 2 else 'bad'},{0.9 if i % 2 else 0.1}\n" for i in range(64)
    )
    (tmp_path / "scores.csv").write_text(rows)
    data = {"train": str(tmp_path / "scores.csv"), "columns": {"label": "score"}}
    metrics = run(recipe | {"data": data, "task": {"kind": "regression", "pooling": "mean"}})
    assert metrics["eval"]["pearson"] > 0.9
    assert metrics["eval"]["rmse"] < 0.3


def test_equal_values_share_a_rank() -> None:
    pairs = transformers.EvalPrediction(
        predictions=np.array([[1.0], [2.0], [3.0]]), label_ids=np.array([0.0, 0.0, 1.0])
    )
    assert Regression().metrics(pairs)["spearman"] == pytest.approx(3**0.5 / 2)
    swapped = transformers.EvalPrediction(predictions=np.array([[2.0], [1.0], [3.0]]), label_ids=pairs.label_ids)
    assert Regression().metrics(swapped)["spearman"] == pytest.approx(3**0.5 / 2)


def test_causal_lm(recipe: dict, llama: Path, tmp_path: Path) -> None:
    """One of three tokens depends on the prompt: a model that does not read it stays above 2 ** (1 / 3) = 1.26."""
    rows = [{"prompt": f"film {i % 10} was", "completion": f"very {'good' if i % 2 else 'bad'}"} for i in range(64)]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    change = {
        "model": str(llama),
        "data": str(tmp_path / "talk.jsonl"),
        "task": "causal-lm",
        "adapter": {"method": "lora"},
    }
    training = recipe["training"] | {"num_train_epochs": 12, "learning_rate": 0.03}
    metrics = run(recipe | change | {"training": training})
    assert metrics["eval"]["token_accuracy"] == 1.0
    assert 1.0 < metrics["eval"]["perplexity"] < 1.1
    assert metrics["eval"]["perplexity"] == pytest.approx(math.exp(metrics["eval"]["loss"]))
    _, answers = predict_folder(Path(recipe["output"]), ["film 3 was", "film 8 was"], None)
    assert [answer["completion"] for answer in answers] == ["very good", "very bad"]


def test_image_classification(recipe: dict, tmp_path: Path) -> None:
    import datasets

    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    rows = []
    for i in range(64):
        path = tmp_path / f"{i}.png"
        image.new("RGB", (10, 10), (250, i, 0) if i % 2 else (0, i, 250)).save(path)
        rows.append({"picture": path.read_bytes(), "label": "red" if i % 2 else "blue"})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pictures.parquet")
    data = {"train": str(tmp_path / "pictures.parquet"), "columns": {"image": "picture"}}
    metrics = run(recipe | {"model": str(tmp_path / "vit"), "data": data, "task": "image-classification"})
    assert metrics["eval"]["accuracy"] > 0.9
    _, answers = predict_folder(Path(recipe["output"]), [str(tmp_path / "1.png")], None)
    assert answers[0]["label"] == "red"


def test_a_killed_run_goes_on_to_the_same_weights(attune: Attune, straight: dict, tmp_path: Path) -> None:
    """Killed in its second epoch: dropout, the order of rows and the schedule all go on as they were."""
    folder = tmp_path / "run"
    file = written(straight | {"output": str(folder)}, tmp_path)
    assert killed(file, 25)
    assert last_checkpoint(folder) == folder / "checkpoint-20"
    assert not (folder / "adapter").exists()

    code, said, errors = attune("train", file, "--resume")
    assert code == 0, errors
    assert f"Going on from {folder / 'checkpoint-20'}" in said.replace("\n", "")
    assert same(final(folder), final(straight["output"]))

    attune("train", file, "--resume")  # of a run that was done
    assert same(final(folder), final(straight["output"]))


def test_control_c_saves_and_says_how_to_go_on(
    attune: Attune, straight: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    file = written(straight | {"output": str(folder)}, tmp_path)
    before = signal.getsignal(signal.SIGINT)

    def interrupt(self: Bar, args: object, state: transformers.TrainerState, control: object, **_: object) -> None:
        if state.global_step == 23:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Bar, "on_step_end", interrupt)
        code, said, errors = attune("train", file)
    assert (code, errors) == (130, "")
    assert said.endswith(f"\nStopped and saved. Go on with: {command()} train {file} --resume\n")
    assert last_checkpoint(folder) == folder / "checkpoint-23"
    assert signal.getsignal(signal.SIGINT) is before
    code, _, errors = attune("train", file, "--resume")
    assert code == 0, errors
    assert same(final(folder), final(straight["output"]))


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A process that was started in the background ignores Ctrl-C from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_a_second_control_c_stops_at_once(
    attune: Attune, straight: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    file = written(straight | {"output": str(folder)}, tmp_path)

    def interrupt(self: Bar, args: object, state: transformers.TrainerState, control: object, **_: object) -> None:
        if state.global_step == stop:
            ours = signal.getsignal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is ours:  # signals that come before the handler has run count as one
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bar, "on_step_end", interrupt)
    stop = 5
    code, said, errors = attune("train", file)
    assert (code, errors) == (130, "")
    assert said.endswith("\nStopped before there was a checkpoint.\n")
    assert last_checkpoint(folder) is None
    stop = 15
    code, said, errors = attune("train", file, "--resume")
    assert (code, errors) == (130, "")
    assert said.endswith(f"\nStopped. Go on from the last checkpoint with: {command()} train {file} --resume\n")
    assert last_checkpoint(folder) == folder / "checkpoint-10"


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for number, text in ((5, "{}"), (10, '{"epoch'), (15, None)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_two_processes_train_one_adapter(recipe: dict, tmp_path: Path) -> None:
    """The same global batches as one process, so the same weights up to rounding; dropout off, or they would differ."""
    training = recipe["training"] | {"eval_strategy": "no", "load_best_model_at_end": False}
    training |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4, "optim": "sgd"}
    training |= {"length_column_name": "length"}
    config = Path(recipe["model"])
    model = tmp_path / "model"
    model.mkdir()
    for part in config.iterdir():
        (model / part.name).write_bytes(part.read_bytes())
    settings = json.loads((model / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(settings))
    values = recipe | {"model": str(model), "training": training}
    file = written(values, tmp_path)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "attunement")
    done = python(*launch, "train", file)
    assert done.returncode == 0, done.stderr[-3000:]

    alone = values | {"training": training | {"per_device_train_batch_size": 8}, "output": str(tmp_path / "alone")}
    run(alone)
    two, one = final(recipe["output"]), final(alone["output"])
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=name)


def test_two_processes_that_shard_the_model_train_one_adapter(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 through accelerate: the weights of one process, and those of a straight run after a resumption."""
    with (tmp_path / "rows.jsonl").open("w") as file:
        for i in range(32):
            row = {"prompt": f"the film was {i % 10}", "completion": " great" if i % 2 else " awful"}
            file.write(json.dumps(row) + "\n")
    training = {"use_cpu": True, "num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 0.01}
    training |= {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "load_best_model_at_end": False}
    values = {
        "model": str(llama),
        "data": {"train": str(tmp_path / "rows.jsonl"), "holdout": 0},
        "task": "causal-lm",
        "adapter": {"method": "dora", "rank": 4},
        "training": training | {"train_sampling_strategy": "sequential"},
        "output": str(tmp_path / "alone"),
    }
    run(values)
    one = final(values["output"])
    values |= {"training": values["training"] | {"per_device_train_batch_size": 4}, "output": str(tmp_path / "sharded")}
    file = written(values, tmp_path)
    sharding = {"USE_FSDP": "true", "USE_CPU": "true"}
    plugin = {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "STATE_DICT_TYPE": "FULL_STATE_DICT"}
    for prefix, settings in (("ACCELERATE", sharding), ("FSDP", plugin)):
        for key, value in settings.items():
            monkeypatch.setenv(f"{prefix}_{key}", value)
    script = Path(__file__).with_name("sharding_on_cpu.py")
    for resume in ((), ("--resume",)):
        assert pair(script, "train", file, *resume) == [0, 0]
        two = final(values["output"])
        assert two.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=name)
        shutil.rmtree(tmp_path / "sharded" / "adapter")
        shutil.rmtree(tmp_path / "sharded" / "checkpoint-4")


def test_two_runs_are_not_mixed(recipe: dict) -> None:
    folder = Path(recipe["output"])
    (folder / "checkpoint-1").mkdir(parents=True)
    written(recipe, folder)
    with pytest.raises(at.AttunementError, match=r"already holds a run: --resume .* --overwrite"):
        run(recipe)
    with pytest.raises(at.AttunementError, match=r"began with adapter\.rank=4, now it is 8"):
        run(recipe | {"adapter": recipe["adapter"] | {"rank": 8}}, resume=True)
    run(recipe | {"adapter": recipe["adapter"] | {"rank": 8}}, overwrite=True)
    assert load(folder).recipe.adapter["rank"] == 8


def stopped(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_stopped_run_has_nothing_of_the_one_that_it_overwrites(
    attune: Attune, recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(recipe["output"])
    file = written(recipe, tmp_path)
    assert attune("train", file)[0] == 0
    (folder / "notes.txt").write_text("mine")
    rows = Path(recipe["data"]["train"])
    (tmp_path / "other.csv").write_text(rows.read_text().replace("up", "north").replace("down", "south"))
    monkeypatch.setattr(Bar, "on_train_begin", stopped)
    arguments = ("train", file, f"data.train={tmp_path / 'other.csv'}", "--overwrite")
    assert attune(*arguments, "training.optim=nonsense")[0] == 2
    assert attune("predict", folder, "a great film")[0] == 0, "one that is refused leaves all as it was"
    assert attune(*arguments)[0] == 130
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "recipe.yaml"]
    code, _, errors = attune("predict", folder, "a great film")
    assert (code, "holds a run that has not finished" in errors) == (2, True)


def test_a_run_overwrites_a_merged_one_and_no_other_model(
    attune: Attune, recipe: dict, trained: Path, bert: Path, tmp_path: Path
) -> None:
    folder, file = Path(recipe["output"]), written(recipe, tmp_path)
    assert attune("merge", trained, folder)[0] == 0
    (folder / "notes.txt").write_text("mine")
    code, _, errors = attune("train", file)
    assert (code, "already holds a run" in errors) == (2, True)
    code, _, errors = attune("train", file, f"model={folder}", "--overwrite")
    assert (code, errors) == (
        2,
        f"output: {folder} holds a model, beside which a run cannot be kept; give another folder\n",
    )
    code, _, errors = attune("train", file, "--overwrite")
    assert code == 0, errors
    kept = {"adapter", "checkpoint-18", "curve.png", "metrics.json", "notes.txt", "recipe.yaml"}
    assert {path.name for path in folder.iterdir()} == kept
    assert load(folder).adapter is not None

    shutil.copytree(bert, tmp_path / "model")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    code, _, errors = attune("train", file, f"output={tmp_path / 'model'}", "--overwrite")
    assert (code, "holds a model, beside which a run cannot be kept" in errors) == (2, True)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before


@pytest.mark.parametrize("place", ["rows.csv", "rows.csv/run"])
def test_a_run_cannot_be_where_a_file_is(attune: Attune, recipe: dict, tmp_path: Path, place: str) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n")
    code, _, errors = attune("train", written(recipe | {"output": str(tmp_path / place)}, tmp_path))
    assert (code, errors) == (2, f"output: {tmp_path / 'rows.csv'} is a file; give another folder\n")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"training": {"weight_decay": 0.5}}, r"training.weight_decay=0.0, now it is 0.5"),
        ({"training": {"gradient_accumulation_steps": 2}}, r"training.gradient_accumulation_steps=1, now it is 2"),
        ({"data": {"eval": "rows.csv"}}, r"began without data.eval, now it is 'rows.csv'"),
        ({"adapter": {"alpha": 3.0}}, r"began without adapter.alpha, now it is 3.0"),
        ({"adapter": {"dropout": 0.1}}, r"adapter.dropout=0.0, now it is 0.1"),
        ({"task": {"labels": ["up", "down"]}}, r"task.labels=\['down', 'up'\], now it is \['up', 'down'\]"),
        ({"model": {"dtype": "bfloat16"}}, r"model.dtype='auto', now it is 'bfloat16'"),
    ],
)
def test_a_run_is_not_resumed_with_settings_that_were_added(recipe: dict, settings: dict, sentence: str) -> None:
    recipe |= {"model": {"path": recipe["model"]}}
    folder = Path(recipe["output"])
    (folder / "checkpoint-1").mkdir(parents=True)
    written({**recipe, "task": recipe["task"] | {"labels": ["down", "up"]}}, folder)  # as the first run has found them
    now = {**recipe, **{key: {**recipe[key], **values} for key, values in settings.items()}}
    with pytest.raises(at.AttunementError, match=f"--resume: the run in .*{sentence}$"):
        check_folder(read(Recipe, now, "recipe"), folder, resume=True, overwrite=False)
    given = {
        "training": recipe["training"] | {"weight_decay": 0, "gradient_accumulation_steps": 1},
        "adapter": recipe["adapter"] | {"method": "low_rank/lora", "dropout": 0},
    }
    check_folder(read(Recipe, recipe | given, "recipe"), folder, resume=True, overwrite=False)


def test_a_run_that_broke_off_leaves_nothing_in_the_way(attune: Attune, recipe: dict, tmp_path: Path) -> None:
    folder = Path(recipe["output"])
    folder.mkdir()
    written(recipe, folder)
    code, _, errors = attune("predict", folder, "a film")
    assert (code, "has not finished: it has no adapter yet" in errors) == (2, True)
    code, _, errors = attune("train", written(recipe, tmp_path))
    assert code == 0, errors
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_draws_what_came_before_it_too(
    attune: Attune, straight: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[int]] = []
    monkeypatch.setattr("attunement.train.curve.draw", lambda loss, *_: drawn.append([step for step, _ in loss]))
    folder = tmp_path / "run"
    shutil.copytree(straight["output"], folder)
    shutil.rmtree(folder / "checkpoint-36", ignore_errors=True)
    kept = folder / "recipe.yaml"
    kept.write_text(kept.read_text().replace(straight["output"], str(folder)))
    code, _, errors = attune("train", written(straight | {"output": str(folder)}, tmp_path), "--resume")
    assert code == 0, errors
    assert drawn == [list(range(1, 37))]


def test_a_causal_task_refuses_an_encoder_and_a_tokenizer_without_an_end(
    attune: Attune, recipe: dict, bert: Path, llama: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"film {i % 10} was", "completion": "very good"} for i in range(16)]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = recipe | {"data": str(tmp_path / "talk.jsonl"), "task": "causal-lm", "adapter": "lora"}
    code, _, errors = attune("train", written(values | {"model": str(bert)}, tmp_path))
    assert (code, errors.count("\n")) == (2, 1)
    assert "is an encoder, whose tokens see the ones that follow" in errors
    endless = tmp_path / "endless"
    shutil.copytree(llama, endless)
    tokenizer = transformers.AutoTokenizer.from_pretrained(endless)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(endless)
    file = written(values | {"model": str(endless)}, tmp_path)
    code, _, errors = attune("train", file)
    assert (code, errors.count("\n")) == (2, 1)
    assert "names no token that ends a text" in errors
    assert not Path(recipe["output"]).exists()
    code, _, errors = attune("train", file, "task.end=[SEPP]")
    assert "task.end must be a text" in errors
    code, _, errors = attune("train", file, "task.end='[SEPP]'")
    assert "'[SEPP]' is no token of" in errors
    code, _, errors = attune("train", file, "task.end='[SEP]'")
    assert code == 0, errors


def test_files_are_found_beside_the_recipe_and_kept_in_full(
    attune: Attune, recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    shutil.copy(recipe["data"]["train"], home / "rows.csv")
    shutil.copy(recipe["data"]["train"], elsewhere / "other.csv")
    file = written(recipe | {"data": {"train": "rows.csv", "holdout": 0.25}}, home)
    monkeypatch.chdir(elsewhere)
    found = load_recipe(file)
    assert found.data.train == str(home / "rows.csv")
    assert load_recipe(file, ["data.train=other.csv"]).data.train == str(elsewhere / "other.csv")
    monkeypatch.chdir(home)
    train(found, QUIET)
    monkeypatch.chdir(elsewhere)
    code, said, errors = attune("eval", recipe["output"])
    assert (code, "eval" in said) == (0, True), errors
    code, said, errors = attune("eval", recipe["output"], "--data", "train")
    assert (code, "train" in said) == (0, True), errors
    code, _, errors = attune("eval", recipe["output"], "--data", "test")
    assert (code, "names no test rows" in errors) == (2, True)


OWN = """
import torch
import attunement as at

@at.register("third_party/{name}", source="https://example.org")
class {name}(at.WeightMethod):
    def tensors(self, site):
        return {{"D": torch.zeros(site.outputs, site.inputs)}}  # (out, in)

    def delta(self, _, D):
        return D
"""


def test_methods_of_ones_own_are_imported_by_a_recipe_and_never_by_a_finished_run(
    attune: Attune, recipe: dict, tmp_path: Path
) -> None:
    def forget() -> None:
        sys.modules.pop("own_shift", None)
        _registry.pop("third_party/shift_of_mine", None)

    own = tmp_path / "own_shift.py"
    own.write_text(OWN.format(name="shift_of_mine"))
    values = recipe | {"imports": "own_shift.py", "adapter": {"method": "shift_of_mine", "on": "attention.query"}}
    try:
        code, said, errors = attune("train", written(values, tmp_path))
        assert code == 0, errors
        assert f"TEXT --import {own}" in said
        assert at.open_run(recipe["output"]).recipe.imports == [str(own)]
        forget()
        code, _, errors = attune("predict", recipe["output"], "a great film")
        assert (code, errors.count("\n")) == (2, 1)
        assert f"if you trust them, add --import {own}" in errors
        assert "own_shift" not in sys.modules
        code, said, errors = attune("predict", recipe["output"], "a great film", "--import", own)
        assert (code, "probability" in said) == (0, True), errors
    finally:
        forget()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "import attunement as at\nat.LoRa\n",
            r"broken_0.py cannot be imported: AttributeError: .*broken_0.py, line 2",
        ),
        (None, "imports: there is no file 'broken_1.py'"),
    ],
)
def test_what_cannot_be_imported_is_a_sentence(recipe: dict, tmp_path: Path, text: str | None, sentence: str) -> None:
    name = f"broken_{int(text is None)}.py"
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(at.AttunementError, match=sentence):
        load_recipe(written(recipe | {"imports": name}, tmp_path))
    assert Path(name).stem not in sys.modules


def test_open_run_and_load_say_where_the_other_is(trained: Path) -> None:
    run = at.open_run(trained)
    assert [answer["label"] for answer in run.predict(["a great film", "the awful plot"])] == ["up", "down"]
    assert at.adapters(run.model) == {run.adapter.name: run.adapter}
    bare = transformers.AutoModelForSequenceClassification.from_pretrained(run.recipe.model.path)
    with pytest.raises(at.AttunementError, match=r"is the folder of a run: at.open_run\(.*gives its model"):
        at.load(bare, trained)
    with pytest.raises(at.AttunementError, match=r"made on a PooledForSequenceClassification; at.open_run\("):
        at.load(bare, trained / "adapter")
    with pytest.raises(at.AttunementError, match="is the adapter of a run; the run is"):
        at.open_run(trained / "adapter")


@pytest.fixture
def numbers(recipe: dict, tmp_path: Path) -> dict:
    """The recipe with numbers for labels."""
    rows = Path(recipe["data"]["train"])
    rows.write_text(rows.read_text().replace(",up", ",1").replace(",down", ",0"))
    return recipe | {"task": {"kind": "regression", "pooling": "mean"}}


@pytest.mark.parametrize("given", [{}, {"logging_nan_inf_filter": True, "eval_strategy": "no"}])
def test_a_run_that_diverges_says_so_and_saves_nothing(
    attune: Attune, numbers: dict, tmp_path: Path, given: dict
) -> None:
    more = {"learning_rate": 1e30, "load_best_model_at_end": False, **given}
    code, said, errors = attune("train", written(numbers | {"training": numbers["training"] | more}, tmp_path))
    assert (code, "Saved" in said, errors.count("\n")) == (2, False, 1)
    what = "of the adapter, which is not saved, is not finite" if given else "the loss on the training rows is"
    assert errors.startswith(f"train: the run in {numbers['output']} has diverged: ")
    assert what in errors
    assert errors.endswith("; start anew (--overwrite) with training.learning_rate below 1e+30\n")
    assert not (Path(numbers["output"]) / "adapter").exists()


def test_a_run_that_diverges_at_last_names_what_was_best(
    attune: Attune, recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(recipe["output"])

    def spoil(self: Bar, args: object, state: transformers.TrainerState, control: object, **given: Any) -> None:
        if state.global_step == 20:
            next(iter(at.adapters(given["model"])["default"].parameters())).data.fill_(math.inf)

    monkeypatch.setattr(Bar, "on_step_end", spoil)
    file = written(recipe | {"training": recipe["training"] | {"num_train_epochs": 2}}, tmp_path)
    code, _, errors = attune("train", file)
    best = folder / "checkpoint-18" / "adapter"
    assert (code, f"is nan after 21 steps; what it was at its best before is in {best}; start" in errors) == (2, True)
    assert all(value.isfinite().all() for value in load_file(best / "adapter.safetensors").values())


def test_an_adapter_is_kept_whatever_its_evaluation_comes_to(
    recipe: dict, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "texts.csv"
    rows.write_text("text\n" + "the film was good\n" * 16)
    recipe |= {"model": str(llama), "task": "causal-lm", "data": {"train": str(rows), "holdout": 0.25}}
    recipe["training"] |= {"eval_strategy": "no", "load_best_model_at_end": False}
    folder, measured = Path(recipe["output"]), {"eval_token_accuracy": 0.5, "eval_loss": 800.0}
    monkeypatch.setattr(at.Trainer, "evaluate", lambda *_: measured)
    assert run(recipe)["eval"]["perplexity"] == math.inf
    assert json.loads((folder / "metrics.json").read_text())["eval"]["perplexity"] is None
    assert load(folder).adapter.metrics == {"eval_token_accuracy": 0.5, "eval_loss": 800.0}
    measured["eval_loss"] = math.nan
    with pytest.raises(at.AttunementError, match="has diverged: the loss on the eval rows is nan; start anew"):
        run(recipe, overwrite=True)
    assert json.loads((folder / "metrics.json").read_text())["eval"]["loss"] is None
    assert load(folder).adapter is not None
    monkeypatch.setattr(at.Trainer, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, overwrite=True)
    assert load(folder).adapter is not None


def test_labels_that_look_like_numbers_are_read_back(recipe: dict) -> None:
    rows = Path(recipe["data"]["train"])
    rows.write_text(rows.read_text().replace(",up", ",12e4x").replace(",down", ",no"))
    text = recipe | {"task": {"kind": "classification", "labels": ["12e4x", "no", "12e4", "1:30"]}, "name": "1e5"}
    run(text)
    opened = load(recipe["output"])
    assert (opened.recipe.task.labels, opened.recipe.name) == (("12e4x", "no", "12e4", "1:30"), "1e5")


def test_bad_rows_are_refused_before_anything_is_written(attune: Attune, recipe: dict, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\nthe film,up\n,down\n")
    code, _, errors = attune("train", written(recipe | {"data": {"train": str(bad), "holdout": 0}}, tmp_path))
    assert code == 2
    assert errors == f"{bad}: row 2 has no text in the column of the role 'text' (it is None)\n"
    assert not Path(recipe["output"]).exists()


@pytest.mark.parametrize("seed", range(3))
def test_the_classes_are_those_of_all_rows_that_are_split(recipe: dict, tmp_path: Path, seed: int) -> None:
    words = [*["up", "down"] * 4, "rare"]
    (tmp_path / "few.csv").write_text("text,label\n" + "".join(f"a film,{word}\n" for word in words))
    recipe["data"] = {"train": str(tmp_path / "few.csv"), "holdout": 0.5, "seed": seed}
    assert prepare(read(Recipe, recipe, "recipe")).recipe.task.labels == ("down", "rare", "up")


def test_rows_longer_than_the_positions_are_refused_before_training(recipe: dict, tmp_path: Path) -> None:
    rows = ["text,label", "the film,up", f"{'the film ' * 300},down"]
    (tmp_path / "long.csv").write_text("\n".join(rows))
    recipe["data"] |= {"test": str(tmp_path / "long.csv")}
    prepare(read(Recipe, recipe, "recipe"))
    recipe["task"] |= {"max_length": 1024}
    with pytest.raises(at.AttunementError, match=r"long.csv has a row of 602 tokens and the model reads at most 512"):
        prepare(read(Recipe, recipe, "recipe"))
    recipe["task"] |= {"max_length": 512}
    prepare(read(Recipe, recipe, "recipe"))


def test_a_model_that_reads_past_what_it_says_is_not_refused(recipe: dict, tmp_path: Path, llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"max_position_embeddings": 16}
    shutil.copytree(llama, tmp_path / "short")
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "the film " * 20}) + "\n")
    recipe |= {"model": str(tmp_path / "short"), "task": "causal-lm"}
    prepare(read(Recipe, recipe | {"data": {"train": str(tmp_path / "long.jsonl"), "holdout": 0}}, "recipe"))
