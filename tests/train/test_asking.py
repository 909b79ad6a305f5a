"""A language model is asked what it was trained on: the same tokens stand before an answer."""

from __future__ import annotations

from pathlib import Path

import datasets
import torch
import transformers
import yaml
from rich.console import Console
from torch import Tensor

import attunement as at
from attunement.train.recipe import Recipe
from attunement.train.run import predict_folder, train
from attunement.train.section import read
from attunement.train.tasks import Base, CausalLM


class Listens(torch.nn.Linear):
    """A model that keeps what it was asked, and says nothing."""

    def generate(self, input_ids: Tensor, **options: object) -> Tensor:
        self.asked = input_ids[0].tolist()
        return input_ids


def asked(task: CausalLM, tokenizer: object, **columns: list) -> list[int]:
    model = Listens(1, 1)
    task.answers(model, datasets.Dataset.from_dict(columns), tokenizer, 1)
    return model.asked


def before_the_answer(task: CausalLM, tokenizer: object, **columns: list) -> list[int]:
    (row,) = task.encode(datasets.Dataset.from_dict(columns), tokenizer, "rows").to_list()
    return [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0]


def test_a_token_that_ends_every_text_is_not_asked(bert: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert, eos_token="[SEP]")
    assert tokenizer("the film").input_ids[-1] == tokenizer.eos_token_id
    taught = before_the_answer(CausalLM(), tokenizer, prompt=["the film was"], completion=["good"])
    assert asked(CausalLM(), tokenizer, prompt=["the film was"]) == taught


def test_what_messages_taught_is_asked_as_a_message(llama: Path) -> None:
    tokenizer = CausalLM().processor(Base(path=str(llama)))
    talk = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}]
    rows = datasets.Dataset.from_dict({"messages": [talk]})
    task = CausalLM().resolved(rows, "rows")
    assert asked(task, tokenizer, prompt=["the film"]) == before_the_answer(task, tokenizer, messages=[talk])
    assert asked(task, tokenizer, messages=[talk]) == before_the_answer(task, tokenizer, messages=[talk])
    assert CausalLM(chat=False).resolved(rows, "rows").chat is False
    assert CausalLM().resolved(datasets.Dataset.from_dict({"prompt": ["a"]}), "rows").chat is None


def test_a_run_keeps_that_it_was_trained_on_messages(tmp_path: Path, llama: Path) -> None:
    turns = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}]
    datasets.Dataset.from_dict({"messages": [turns] * 8}).to_json(tmp_path / "talks.jsonl")
    values = {
        "model": str(llama),
        "data": {"train": str(tmp_path / "talks.jsonl"), "holdout": 0},
        "task": {"kind": "causal-lm", "max_new_tokens": 2},
        "adapter": {"method": "lora", "rank": 2},
        "training": {"num_train_epochs": 1, "use_cpu": True, "save_strategy": "epoch"},
        "output": str(tmp_path / "run"),
    }
    recipe = read(Recipe, values, "recipe")
    train(recipe, Console(quiet=True))
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["task"]["chat"] is True
    run = at.open_run(tmp_path / "run")
    talk = datasets.Dataset.from_dict({"messages": [turns[:1]]})
    assert run.predict(["the film"]) == run.answers(talk)
    assert predict_folder(tmp_path / "run", ["the film"], None)[1] == run.answers(talk)
    train(recipe, Console(quiet=True), resume=True)  # the recipe that says nothing of it goes on
