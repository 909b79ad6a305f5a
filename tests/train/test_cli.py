"""The command `attune`: what it prints, and what it says when it refuses."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

import attunement as at
from attunement import cli
from attunement.train.recipe import load as load_recipe
from attunement.train.recipe import written
from attunement.train.run import load as load_run
from attunement.train.run import write_merged
from attunement.train.words import command

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


def test_version(attune) -> None:
    from importlib.metadata import version

    assert attune("--version") == (0, f"attune {version('attunement')}\n", "")


@pytest.mark.parametrize("name", at.methods())
def test_every_method_is_shown_in_full(attune, name: str) -> None:
    code, said, errors = attune("methods", name)
    assert code == 0, errors
    assert said.startswith(f"{name}\n")
    words = said.split()
    assert at.method(name).source in words
    assert set(at.method(name).__pydantic_fields__) <= set(words)


def test_a_field_is_shown_with_its_bounds_and_default(attune) -> None:
    _, said, _ = attune("methods", "lora")
    rows = [line.split("  ") for line in said.splitlines()]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows if row[0]}
    assert cells["rank"] == ["int > 0", "8"]
    assert cells["alpha"] == ["float > 0, or None", "None"]
    assert cells["dropout"] == ["float >= 0 and < 1", "0"]


def test_kinds_are_written_as_a_person_does() -> None:
    def kind(name: str, field: str) -> str:
        found = at.method(name).__pydantic_fields__[field]
        return cli.kind_of(found.annotation, found.metadata)

    assert kind("sparse", "entries") == "tuple of (int >= 0, int >= 0), or None"
    assert kind("train", "rows") == "tuple of int, or None"
    assert kind("fish_mask", "kept") == "dict of str to int > 0, or None"
    assert kind("hra", "rank") == "int > 0 and a multiple of 2"
    kinds = {kind(name, field) for name in at.methods() for field in at.method(name).__pydantic_fields__}
    assert [said for said in kinds if "[" in said or "Annotated" in said] == []


@pytest.mark.parametrize("name", at.methods())
def test_each_field_has_a_line_of_its_own(name: str) -> None:
    lines = inspect.cleandoc(at.method(name).__doc__).partition("Args:\n")[2].partition("\n\n")[0].splitlines()
    several = [line for line in lines if len(re.findall(r"(?:^ {4}|[.;] )[a-z_0-9]+(?:, [a-z_0-9]+)*: ", line)) > 1]
    assert several == []


@pytest.mark.parametrize("width", [30, 40, 50, 60])
def test_figures_are_never_cut(width: int) -> None:
    narrow = Console(width=width)
    answer = {"label": "verify_source_of_funds", "probability": 0.9764}
    with narrow.capture() as caught:
        narrow.print(cli.answer_table([{"text": "a film " * 20}], [answer]))
    assert [row.split()[-1] for row in caught.get().splitlines()[:2]] == ["probability", "0.976"]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_figure_or_address_is_cut(width: int) -> None:
    narrow = Console(width=width)
    with narrow.capture() as caught:
        narrow.print(cli.method_card(at.method("bottleneck")))
        narrow.print(cli.answer_table([{"text": "a film " * 20}], [{"label": "verify_source_of_funds", "p": 0.9764}]))
    said = caught.get()
    assert "https://arxiv.org/abs/1902.00751" in said
    assert "0.976" in said
    assert "verify_source_of_funds" in said
    assert "…" not in said


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
    code, _, errors = attune("inspect", tmp_path / "config.json")
    assert (code, "is a file; expected the folder of a model" in errors) == (2, True)
    (tmp_path / "empty").mkdir()
    code, _, errors = attune("inspect", tmp_path / "empty")
    assert (code, "holds no model: it has no config.json" in errors) == (2, True)


def test_schema_is_json(attune) -> None:
    assert "adapter" in json.loads(attune("schema")[1])["properties"]


def test_eval_and_predict(attune, trained: Path, tmp_path: Path) -> None:
    rows = trained.parent / "sentences.csv"
    _, said, _ = attune("eval", trained, "--data", rows)
    assert "accuracy" in said
    _, said, _ = attune("predict", trained, "a great film", "the awful plot", "--json")
    lines = [json.loads(line) for line in said.splitlines()]
    assert [(line["text"], line["label"]) for line in lines] == [("a great film", "up"), ("the awful plot", "down")]
    _, said, _ = attune("predict", trained, "--file", rows, "--out", tmp_path / "out" / "answers.jsonl")
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 192
    code, said, errors = attune("predict", trained, "a film", "--out", tmp_path)
    assert (code, said, errors) == (2, "", f"predict: --out {tmp_path} is a folder; give a file\n")
    code, said, errors = attune("predict", trained, "a film", "--out", rows / "answers.jsonl")
    assert (code, said, errors) == (2, "", f"predict: --out: {rows} is a file; give another folder\n")


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
        code, _, errors = attune("merge", trained, tmp_path / "merged")
        assert code == 0, errors
        merged = PooledForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(**asked).logits, expected, rtol=1e-4, atol=1e-4)
        auto = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(auto(**asked).logits, expected, rtol=1e-4, atol=1e-4)
        assert not [key for key in load_file(tmp_path / "merged" / "model.safetensors") if "attuned" in key]

        for to in ("peft", "lora"):
            code, _, errors = attune("export", trained, tmp_path / to, "--to", to)
            assert code == 0, errors
            ours = fresh()
            at.load(ours, tmp_path / to)
            torch.testing.assert_close(ours(**asked).logits, expected, rtol=1e-4, atol=1e-4)
            theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path / to).eval()
            torch.testing.assert_close(theirs(**asked).logits, expected, rtol=1e-4, atol=1e-4)
    code, _, errors = attune("export", trained, tmp_path / "x", "--to", "pft")
    assert (code, "nearest: 'peft'" in errors) == (2, True)
    code, _, errors = attune("merge", trained, tmp_path / "merged")
    assert (code, "is not empty" in errors) == (2, True)


def test_a_merged_run_is_asked_like_any_other(attune, trained: Path, tmp_path: Path) -> None:
    merged, texts = tmp_path / "merged", ["a great film", "the awful plot was bad"]
    code, said, errors = attune("merge", trained, merged)
    assert (code, "import attunement.train.pooling" in said) == (0, True), errors
    before, after = (at.open_run(folder).predict(texts) for folder in (trained, merged))
    assert [answer["label"] for answer in before] == [answer["label"] for answer in after] == ["up", "down"]
    for a, b in zip(before, after, strict=True):
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)
    pipe = transformers.pipeline("text-classification", model=str(merged))
    assert [answer["label"] for answer in pipe(texts)] == ["up", "down"]
    assert attune("eval", merged)[0] == 0
    assert "attention.query" in attune("inspect", merged)[1]
    code, _, errors = attune("export", merged, tmp_path / "x", "--to", "peft")
    assert (code, "in which there is no adapter any more" in errors) == (2, True)


def test_what_is_to_be_typed_can_be_typed(attune, recipe: dict, tmp_path: Path) -> None:
    """Paths with spaces, as the shell takes them."""
    folder, merged = tmp_path / "a run", tmp_path / "my model"
    (tmp_path / "recipe.yaml").write_text(written(recipe | {"output": str(folder)}))
    _, said, _ = attune("train", tmp_path / "recipe.yaml")
    assert said.endswith(f"ask it: {command()} predict '{folder}' TEXT\n")
    _, said, _ = attune("merge", folder, merged)
    assert said.endswith(f"Or ask it: {command()} predict '{merged}' TEXT\n")


def test_a_merged_run_is_refused_rather_than_drawn_afresh_without_this_library(trained: Path, tmp_path: Path) -> None:
    """What transformers alone makes of it must not be a model with random weights."""
    write_merged(load_run(trained), tmp_path / "merged")
    script = (
        "import sys, transformers; transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]); "
        "print('loaded')"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "loaded" in done.stdout) == (1, False)
    assert "attunement_pooled" in done.stderr


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_are_recipes(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.output == str(Path("runs") / file.stem)
    assert recipe.methods()
    transformers.TrainingArguments(**recipe.arguments() | {"bf16": False, "output_dir": "unused"})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
