"""The command `attune`: what it prints, and what it says when it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import attunement as at
from attunement.train.recipe import load as load_recipe
from attunement.train.run import load as load_run

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def test_help_is_quick_and_names_every_command(attune) -> None:
    code, said, _ = attune("--help")
    assert code == 0
    assert all(
        word in said for word in ("demo", "inspect", "methods", "train", "eval", "predict", "merge", "export", "schema")
    )


def test_methods(attune) -> None:
    _, said, _ = attune("methods", "low_rank/*")
    assert "lora" in said
    assert "ia3" not in said
    _, said, _ = attune("methods", "ia3")
    assert "https://arxiv.org/abs/2205.05638" in said
    code, _, errors = attune("methods", "lorra")
    assert (code, errors.count("\n")) == (2, 1)


def test_inspect_reads_no_weights(attune, bert: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    _, said, _ = attune("inspect", tmp_path)
    assert "attention.query" in said
    _, said, _ = attune("inspect", tmp_path, "--method", "lora", "--on", "attention.key")
    assert "trainable parameters" in said
    assert [line for line in said.splitlines() if line.endswith("LoRA")]
    code, _, errors = attune("inspect", tmp_path, "--on", "attention.qery")
    assert code == 2
    assert "query" in errors
    code, _, errors = attune("inspect", tmp_path / "nowhere")
    assert (code, errors) == (2, f"inspect: there is no folder {str(tmp_path / 'nowhere')!r}\n")


def test_schema_is_json(attune) -> None:
    assert "adapter" in json.loads(attune("schema")[1])["properties"]


def test_eval_and_predict(attune, trained: Path, tmp_path: Path) -> None:
    rows = trained.parent / "sentences.csv"
    _, said, _ = attune("eval", trained, "--data", rows)
    assert "accuracy" in said
    _, said, _ = attune("predict", trained, "a great film", "the awful plot", "--json")
    assert [json.loads(line)["label"] for line in said.splitlines()] == ["up", "down"]
    _, said, _ = attune("predict", trained, "--file", rows, "--out", tmp_path / "out" / "answers.jsonl")
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 192


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["predict", "nowhere", "x"], "'nowhere' is not the folder of a run: it has no recipe.yaml"),
        (["predict", "nowhere"], "predict: expected either texts or --file, got neither"),
        (["train", "nowhere.yaml"], "there is no recipe file 'nowhere.yaml'"),
        (["demo", "--method", "lorra"], "there is no 'lorra'; nearest: 'lora'"),
    ],
)
def test_a_refusal_is_one_sentence(attune, arguments: list[str], sentence: str) -> None:
    code, said, errors = attune(*arguments)
    assert (code, said, errors.count("\n")) == (2, "", 1)
    assert sentence in errors


def test_merge_and_export_give_the_same_answers(attune, trained: Path, tmp_path: Path) -> None:
    import peft

    from attunement.train.pooling import PooledForSequenceClassification

    run = load_run(trained)
    asked = run.processor(["a great film", "the awful plot was bad"], padding=True, return_tensors="pt")

    def fresh() -> transformers.PreTrainedModel:
        torch.manual_seed(1)  # another head than that of the run
        return run.recipe.task.model(run.recipe.model, run.processor).eval()

    with torch.no_grad():
        expected = run.model(**asked).logits
        assert (fresh()(**asked).logits - expected).abs().max() > 0.1
        code, _, errors = attune("merge", trained, "--out", tmp_path / "merged")
        assert code == 0, errors
        merged = PooledForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(**asked).logits, expected, rtol=1e-4, atol=1e-4)
        assert not [key for key in load_file(tmp_path / "merged" / "model.safetensors") if "attuned" in key]

        for to in ("peft", "lora"):
            code, _, errors = attune("export", trained, "--to", to, "--out", tmp_path / to)
            assert code == 0, errors
            ours = fresh()
            at.load(ours, tmp_path / to)
            torch.testing.assert_close(ours(**asked).logits, expected, rtol=1e-4, atol=1e-4)
            theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path / to).eval()
            torch.testing.assert_close(theirs(**asked).logits, expected, rtol=1e-4, atol=1e-4)
    code, _, errors = attune("export", trained, "--to", "pft", "--out", tmp_path / "x")
    assert (code, "nearest: 'peft'" in errors) == (2, True)
    code, _, errors = attune("merge", trained, "--out", tmp_path / "merged")
    assert (code, "is not empty" in errors) == (2, True)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_are_recipes(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.output == str(Path("runs") / file.stem)
    assert recipe.methods()
    transformers.TrainingArguments(**recipe.arguments() | {"bf16": False, "output_dir": "unused"})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
