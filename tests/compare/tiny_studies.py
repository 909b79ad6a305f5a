"""Rows that a tiny model can learn, and studies over them that take seconds."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "the", "a", "film", "was", "very", "and", "plot"]


def sentences(path: Path, count: int, seed: int) -> Path:
    """Sentences of unlike lengths; one word decides the label."""
    draw = random.Random(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for i in range(count):
            words = draw.choices(WORDS[6:], k=draw.randint(1, 4))
            words.insert(draw.randrange(len(words) + 1), draw.choice(WORDS[:3] if i % 2 else WORDS[3:6]))
            rows.writerow([" ".join(words), "up" if i % 2 else "down"])
    return path


def plain(folder: Path, bert: Path, **changes: Any) -> dict[str, Any]:
    """Plain data of a study: 48 rows to train on, 6 steps a trial."""
    values: dict[str, Any] = {
        "name": "tiny",
        "model": str(bert),
        "data": {
            "train": str(sentences(folder / "train.csv", 96, 0)),
            "test": str(sentences(folder / "test.csv", 64, 1)),
        },
        "task": {"kind": "classification", "pooling": "mean"},
        "training": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 8,
            "logging_steps": 2,
            "use_cpu": True,
        },
        "rows": 48,
        "methods": [{"method": "lora", "rank": 2}],
        "search": {"trials": 2, "spread": 2, "evaluations": 2, "low": 1e-3, "high": 1e-1},
        "seeds": 2,
        "output": str(folder / "study"),
    }
    return values | changes
