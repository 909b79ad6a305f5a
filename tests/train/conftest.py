"""Models of a few thousand parameters with real tokenizers, saved as any model is, and tables they can learn."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from attunement.train.recipe import Recipe
from attunement.train.run import train
from attunement.train.section import read

WORDS = [
    "good",
    "fine",
    "great",
    "bad",
    "poor",
    "awful",
    "the",
    "a",
    "film",
    "was",
    "very",
    "and",
    "plot",
    "user",
    "says",
]
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tokenizer(causal: bool) -> transformers.PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<user>", "<assistant>", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, *map(str, range(10))])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if causal:
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw, **names, bos_token="[CLS]", eos_token="[SEP]", chat_template=CHAT
        )
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names, cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return saved(transformers.BertModel(config), tokenizer(causal=False), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    model.lm_head.weight.data.mul_(50)  # fresh, it is so small that no adapter below it could make any token certain
    return saved(model, tokenizer(causal=True), tmp_path_factory.mktemp("llama"))


def saved(model: transformers.PreTrainedModel, processor: object, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def words(folder: Path) -> Path:
    """192 sentences of unlike lengths; one word decides the label."""
    draw = random.Random(0)
    rows = []
    for i in range(192):
        word = draw.choice(WORDS[:3] if i % 2 else WORDS[3:6])
        around = draw.choices(WORDS[6:], k=draw.randint(1, 4))
        around.insert(draw.randrange(len(around) + 1), word)
        rows.append({"text": " ".join(around), "label": "up" if i % 2 else "down"})
    return write(folder / "sentences.csv", rows)


def plain(folder: Path, model: Path) -> dict:
    """Plain data of a recipe that runs in a second or two: 144 rows to train on, 18 steps an epoch."""
    return {
        "model": str(model),
        "data": {"train": str(words(folder)), "holdout": 0.25},
        "task": {"kind": "classification", "pooling": "mean"},
        "adapter": {"method": "lora", "rank": 4, "on": "attention.{query,value}"},
        "training": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "use_cpu": True,
        },
        "output": str(folder / "run"),
    }


@pytest.fixture
def recipe(tmp_path: Path, bert: Path) -> dict:
    return plain(tmp_path, bert)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """The folder of a run that has learned its task; to be read, not written."""
    values = plain(tmp_path_factory.mktemp("trained"), bert)
    values["training"] |= {"num_train_epochs": 8}
    train(read(Recipe, values, "recipe"), Console(quiet=True))
    return Path(values["output"])


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> dict:
    """A recipe of two epochs, 36 steps, with dropout, that was run without a stop."""
    values = plain(tmp_path_factory.mktemp("straight"), bert)
    values["training"] |= {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 10, "eval_strategy": "no"}
    values["training"] |= {"load_best_model_at_end": False}
    train(read(Recipe, values, "recipe"), Console(quiet=True))
    return values
