"""Runs from a recipe: they learn, they stop and go on bit for bit, they are asked afterwards."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import attunement as at
from attunement.train.recipe import Recipe
from attunement.train.run import load, predict_folder, prepare, train
from attunement.train.section import read

QUIET = Console(quiet=True)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(values: dict, **options: bool) -> dict:
    return train(read(Recipe, values, "recipe"), QUIET, **options)


def attune(*arguments: object, launcher: Sequence[str] = (), **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, "-m", "attunement", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False, **options)


def written(values: dict, folder: Path) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def final(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter" / "adapter.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_is_asked(recipe: dict) -> None:
    metrics = run(recipe | {"training": recipe["training"] | {"num_train_epochs": 10, "learning_rate": 0.03}})
    assert metrics["eval"]["accuracy"] > 0.9
    _, answers = predict_folder(Path(recipe["output"]), ["a great film", "the awful plot"], None)
    assert [answer["label"] for answer in answers] == ["up", "down"]
    assert load(recipe["output"]).recipe.task.labels == ("down", "up")


def test_the_base_is_never_written(recipe: dict) -> None:
    run(recipe | {"training": recipe["training"] | {"num_train_epochs": 1}})
    folder = Path(recipe["output"])
    kept = {str(path.relative_to(folder).name) for path in folder.rglob("*") if path.is_file()}
    assert not kept & {"model.safetensors", "pytorch_model.bin", "training_args.bin"}
    assert {"adapter.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= kept


@pytest.mark.parametrize("pooling", ["model", "cls"])
def test_other_poolings_train(recipe: dict, pooling: str) -> None:
    training = recipe["training"] | {"num_train_epochs": 1}
    metrics = run(recipe | {"task": {"kind": "classification", "pooling": pooling}, "training": training})
    assert metrics["eval"]["accuracy"] >= 0.4


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


def test_causal_lm(recipe: dict, llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 10} film was", "completion": "very good"} for i in range(64)]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    change = {
        "model": str(llama),
        "data": str(tmp_path / "talk.jsonl"),
        "task": "causal-lm",
        "adapter": {"method": "lora"},
    }
    training = recipe["training"] | {"num_train_epochs": 8, "learning_rate": 0.03}
    metrics = run(recipe | change | {"training": training})
    assert metrics["eval"]["token_accuracy"] > 0.9
    assert metrics["eval"]["perplexity"] == pytest.approx(math.exp(metrics["eval"]["loss"]))
    _, answers = predict_folder(Path(recipe["output"]), ["3 film was"], None)
    assert answers[0]["completion"] == "very good"


def test_image_classification(recipe: dict, tmp_path: Path) -> None:
    import datasets
    import transformers

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


def test_a_killed_run_goes_on_to_the_same_weights(recipe: dict, tmp_path: Path) -> None:
    """Killed in its second epoch: dropout, the order of rows and the schedule all go on as they were."""
    training = recipe["training"] | {
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 5,
        "eval_strategy": "no",
    }
    training |= {"load_best_model_at_end": False}
    straight = recipe | {"training": training, "output": str(tmp_path / "straight")}
    run(straight)

    file = written(recipe | {"training": training}, tmp_path)
    command = [sys.executable, "-m", "attunement", "train", str(file)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = Path(recipe["output"]) / "checkpoint-15" / "trainer_state.json"
    until = time.monotonic() + 240
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    assert checkpoint.exists()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (Path(recipe["output"]) / "adapter").exists()

    done = attune("train", file, "--resume")
    assert done.returncode == 0, done.stderr
    assert "Going on from" in done.stdout
    assert same(final(recipe["output"]), final(straight["output"]))


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    from attunement.train.trainer import last_checkpoint

    for number, text in ((5, "{}"), (10, '{"epoch'), (15, None)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_control_c_saves_and_says_how_to_go_on(recipe: dict, tmp_path: Path) -> None:
    training = recipe["training"] | {"num_train_epochs": 60, "eval_strategy": "no", "load_best_model_at_end": False}
    file = written(recipe | {"training": training}, tmp_path)
    command = [sys.executable, "-m", "attunement", "train", str(file)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = Path(recipe["output"])
    until = time.monotonic() + 240
    while not list(folder.glob("checkpoint-*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"attune train {file} --resume" in said
    assert "Traceback" not in errors
    done = attune("train", file, "training.num_train_epochs=60", "--resume")
    assert done.returncode == 0, done.stderr
    assert (folder / "adapter" / "adapter.safetensors").exists()


def test_two_processes_train_one_adapter(recipe: dict, tmp_path: Path) -> None:
    """The same global batches as one process, so the same weights up to rounding; dropout off, or they would differ."""
    training = recipe["training"] | {"num_train_epochs": 1, "eval_strategy": "no", "load_best_model_at_end": False}
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
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = attune("train", file, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]

    alone = values | {"training": training | {"per_device_train_batch_size": 8}, "output": str(tmp_path / "alone")}
    run(alone)
    two, one = final(recipe["output"]), final(alone["output"])
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=name)


def test_two_runs_are_not_mixed(recipe: dict) -> None:
    short = recipe | {"training": recipe["training"] | {"num_train_epochs": 1}}
    run(short)
    with pytest.raises(at.AttunementError, match=r"already holds a run: --resume .* --overwrite"):
        run(short)
    with pytest.raises(at.AttunementError, match=r"began with adapter\.rank=4, now it is 8"):
        run(short | {"adapter": recipe["adapter"] | {"rank": 8}}, resume=True)
    run(short, overwrite=True)


def test_bad_rows_are_refused_before_anything_is_written(recipe: dict, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\nthe film,up\n,down\n")
    done = attune("train", written(recipe | {"data": {"train": str(bad), "holdout": 0}}, tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip() == f"{bad}: row 2 has no text in the column of the role 'text' (it is None)"
    assert not Path(recipe["output"]).exists()
