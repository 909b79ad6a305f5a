"""A run: from a recipe to a folder that holds an adapter, and back from the folder to answers.

runs/banking/recipe.yaml       the recipe, labels filled in: all that is needed to use the adapter
runs/banking/adapter/          the adapter
runs/banking/metrics.json      figures of the training, evaluation and test rows
runs/banking/checkpoint-N/     to resume from
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import attunement as at
from attunement.errors import AttunementError, nearest
from attunement.train.recipe import Recipe, parse
from attunement.train.section import read

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from transformers import PreTrainedModel

    from attunement.adapter import Adapter
    from attunement.train.trainer import Trainer


@dataclass
class Run:
    """A recipe made real: its model, adapter, processor and encoded rows."""

    recipe: Recipe
    model: PreTrainedModel
    adapter: Adapter
    processor: Any
    splits: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where everything of the run is written."""
        return Path(self.recipe.output or "runs/default")

    def trainer(self, callbacks: list[Any] = (), **arguments: Any) -> Trainer:  # type: ignore[assignment]
        """An `at.Trainer` over the run; `arguments` go over those of the recipe."""
        import transformers

        from attunement.train.trainer import Trainer

        task, given = self.recipe.task, self.recipe.arguments() | arguments
        if "eval" not in self.splits:
            given |= {"eval_strategy": "no", "load_best_model_at_end": False}
        if given["load_best_model_at_end"]:
            given = {"metric_for_best_model": task.metric, "greater_is_better": task.greater_is_better} | given
        try:
            args = transformers.TrainingArguments(**given, disable_tqdm=True)
        except (ValueError, TypeError) as error:
            raise AttunementError(f"training: {error}") from None
        trainer = Trainer(
            self.model,
            args,
            train_dataset=self.splits.get("train"),
            eval_dataset=self.splits.get("eval"),
            data_collator=task.collator(self.processor),
            compute_metrics=task.metrics,
            preprocess_logits_for_metrics=task.for_metrics,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def evaluate(self, split: str) -> dict[str, float]:
        """The metrics of one split."""
        trainer = self.trainer(eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
        return figures(trainer.evaluate(self.splits[split]))

    def answers(self, rows: Dataset) -> list[dict[str, Any]]:
        """What the model says of every row."""
        size = self.recipe.training.per_device_eval_batch_size
        self.model.eval()
        return self.recipe.task.answers(self.model, rows, self.processor, size)

    def save(self, metrics: dict[str, dict[str, float]]) -> None:
        """The adapter, the recipe and the figures into the folder."""
        self.adapter.metrics = {
            f"{split}_{name}": value for split, row in metrics.items() for name, value in row.items()
        }
        self.adapter.save(self.folder / "adapter")
        self.write_recipe()
        (self.folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")

    def write_recipe(self) -> None:
        """The recipe into the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.recipe.plain(), sort_keys=False, allow_unicode=True)
        (self.folder / "recipe.yaml").write_text(text, encoding="utf-8")


def prepare(recipe: Recipe) -> Run:
    """Data, then model, then adapter: what is quickest to be wrong is looked at first.

    Raises `AttunementError` for data, models and adapters that do not fit the recipe.
    """
    import transformers

    quiet()
    with main_process_first():
        tables = recipe.data.load(recipe.task.roles)
    where = {split: getattr(recipe.data, split) or recipe.data.train for split in tables}
    task = recipe.task.resolved(tables["train"], where["train"])
    recipe = recipe.model_copy(update={"task": task})
    processor = task.processor(recipe.model)
    splits = {split: task.encode(table, processor, where[split]) for split, table in tables.items()}
    splits = {s: rows if s == "train" else by_length(rows) for s, rows in splits.items()}
    transformers.set_seed(recipe.seed)  # the head and the adapter start from the same values in every process
    model = task.model(recipe.model, processor)
    method, on = recipe.methods()
    adapter = at.adapt(model, method, on=on, name=recipe.name)
    return Run(recipe, model, adapter, processor, splits)


def train(
    recipe: Recipe, console: Console, resume: bool = False, overwrite: bool = False
) -> dict[str, dict[str, float]]:
    """Train, save, and give the figures of the evaluation and test rows.

    `resume` goes on from the last whole checkpoint of the run's folder, or starts where there is none yet.
    Raises `AttunementError` where the folder holds a run already, or where the run that is resumed had another recipe.
    """
    from attunement.train.progress import Bar, SaveOnInterrupt
    from attunement.train.trainer import last_checkpoint

    folder = Path(recipe.output or "runs/default")
    first = os.environ.get("RANK", "0") == "0"
    if first:
        check_folder(recipe, folder, resume, overwrite)
    run = prepare(recipe)
    if first:
        console.print(run.adapter.summary())
        if not resume:
            for old in folder.glob("checkpoint-*"):
                _remove(old)
        run.write_recipe()
    checkpoint = last_checkpoint(folder) if resume else None
    if first and resume:
        console.print(
            f"Going on from [bold]{checkpoint}[/]." if checkpoint else "No checkpoint yet: starting from the beginning."
        )
    bar = Bar(console, run.recipe.task.metric)
    interrupt = SaveOnInterrupt(bar)
    trainer = run.trainer(callbacks=[bar, interrupt])
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.close()
        interrupt.restore()
    measured: list[str] = [split for split in ("eval", "test") if split in run.splits]
    metrics = {split: figures(trainer.evaluate(run.splits[split])) for split in measured}
    if first:
        run.save(metrics)
    return metrics


def check_folder(recipe: Recipe, folder: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to mix two runs in one folder."""
    old = folder / "recipe.yaml"
    if not old.exists() or overwrite:
        return
    if not resume:
        raise AttunementError(
            f"{folder} already holds a run: --resume goes on with it, --overwrite starts anew, output=... goes "
            "elsewhere"
        )
    before, now = parse(old.read_text(encoding="utf-8")), recipe.plain()
    if getattr(recipe.task, "labels", None) is None:
        before["task"].pop("labels", None)  # found in the rows by the first run
    for key, was in _flat(before).items():
        given = _flat(now).get(key)
        if given != was:
            raise AttunementError(f"--resume: the run in {folder} began with {key}={was!r}, now it is {given!r}")


def load(folder: str | Path, data: dict[str, Any] | None = None) -> Run:
    """The run in a folder, its adapter frozen on a fresh base; `data` replaces parts of the recipe's data section."""
    folder = Path(folder)
    file = folder / "recipe.yaml"
    if not file.is_file():
        beside = [str(p.parent) for p in Path("runs").glob("*/recipe.yaml")]
        raise AttunementError(
            f"{str(folder)!r} is not the folder of a run: it has no recipe.yaml{nearest(str(folder), beside)}"
        )
    quiet()
    values = parse(file.read_text(encoding="utf-8")) | {"output": str(folder)}
    values["data"] |= data or {}
    recipe: Recipe = read(Recipe, values, str(file))
    processor = recipe.task.processor(recipe.model)
    model = recipe.task.model(recipe.model, processor)
    adapter = at.load(model, folder / "adapter")
    model.eval()
    return Run(recipe, model, adapter, processor, {})


def evaluate_folder(folder: Path, where: str | None) -> dict[str, dict[str, float]]:
    """The metrics of a run on a file or split, by default its test or else its evaluation rows."""
    run = load(folder)
    data, task = run.recipe.data, run.recipe.task
    if where is None and not data.test:
        tables, where = data.load(task.roles), "eval"
        if "eval" not in tables:
            raise AttunementError(f"eval: the recipe in {folder} names no eval or test rows; give --data")
        table = tables["eval"]
    else:
        where = where or data.test or ""
        table = data.read(where, task.roles)
    rows = task.encode(table, run.processor, where)
    run.splits[where] = by_length(rows)
    return {where: run.evaluate(where)}


def predict_folder(folder: Path, texts: list[str] | None, file: str | None) -> tuple[list[str], list[dict[str, Any]]]:
    """What a run says of texts, or of the rows of a file: the questions as shown, and an answer for each."""
    from datasets import Dataset

    run = load(folder)
    roles = run.recipe.task.roles
    if file is not None:
        asking = {role: required for role, required in roles.items() if role not in ("label", "completion")}
        columns = {role: column for role, column in run.recipe.data.columns.items() if role in asking}
        data = run.recipe.data.model_copy(update={"columns": columns})
        rows = data.read(file, asking)
    else:
        rows = Dataset.from_dict({next(iter(roles)): texts})
    asked = [str(value) for value in rows[rows.column_names[0]]] if not run.recipe.task.lazy or texts else []
    answers = run.answers(rows)
    return asked or [f"row {i}" for i in range(1, len(answers) + 1)], answers


def export_folder(folder: Path, to: str, out: Path, rank: int | None = None) -> str:
    """Write a run's adapter for other programs and say, in a sentence, what was written."""
    kinds = ("peft", "lora", "merged")
    if to not in kinds:
        raise AttunementError(f"export: --to must be one of {', '.join(kinds)}, got {to!r}{nearest(to, kinds)}")
    if out.exists() and any(out.iterdir()):
        raise AttunementError(f"export: {out} is not empty; give another --out")
    run = load(folder)
    if to == "merged":
        run.adapter.merge(keep=False)
        run.adapter.detach()
        run.model.save_pretrained(out)
        run.processor.save_pretrained(out)
        return f"The merged {type(run.model).__name__} is in {out}."
    adapter = at.to_lora(run.adapter, rank=rank) if to == "lora" else run.adapter
    adapter.save(out, format="peft")
    error = f"; the largest relative error of a site is {adapter.info['error']:.2g}" if to == "lora" else ""
    return f"The adapter is in {out}, in PEFT's format{error}."


def quiet() -> None:
    """Leave the terminal to what a person wants to read."""
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=".*null_placement.*")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


def figures(metrics: dict[str, float]) -> dict[str, float]:
    """What an evaluation found, without its clock, and with the perplexity where the loss is one of tokens."""
    clock = ("runtime", "_per_second", "preparation_time", "epoch")
    kept = {k.removeprefix("eval_"): v for k, v in metrics.items() if not k.endswith(clock)}
    if "token_accuracy" in kept:
        kept["perplexity"] = math.exp(kept["loss"])
    return kept


def by_length(rows: Dataset) -> Dataset:
    """Evaluation batches of rows of like length: the order does not matter to a metric, the padding to the clock."""
    return rows.sort("length") if "length" in rows.column_names else rows


def main_process_first() -> Any:
    """Files are read and cached by one process, then found in the cache by the others."""
    from accelerate import PartialState

    return PartialState().main_process_first()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)
