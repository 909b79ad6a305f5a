"""The study of `attune compare --demo`: four methods on MiniLM and a part of banking77, with no network."""

from __future__ import annotations

from pathlib import Path

from attunement.compare.study import Study, made
from attunement.train.demo import DATA, minilm

METHODS = ["lora", "ia3", "bottleneck", {"method": "lst", "as": "LST (side network)"}]


def study(out: Path | None = None) -> Study:
    """Four questions of each of the 77 intents to learn from, three rates for each method, two seeds."""
    values = {
        "name": "demo",
        "model": minilm(),
        "data": {
            "train": str(DATA / "banking77-train.csv.gz"),
            "test": str(DATA / "banking77-test.csv.gz"),
            "columns": {"label": "category"},
        },
        "task": {"kind": "classification", "pooling": "mean", "max_length": 64},
        "training": {"num_train_epochs": 2, "logging_steps": 4},
        "per_class": 4,
        "test_rows": 616,
        "methods": METHODS,
        "search": {"trials": 3, "spread": 3, "low": 3e-4, "high": 3e-2, "evaluations": 2, "rows": 154, "known": False},
        "seeds": 2,
        "output": str(out or Path("runs/compare/demo")),
    }
    return made(values, "demo")
