"""A run: from a recipe to a folder that holds an adapter, and back from the folder to answers.

runs/banking/recipe.yaml       the recipe, labels filled in: all that is needed to use the adapter
runs/banking/adapter/          the adapter
runs/banking/metrics.json      figures of the evaluation and test rows
runs/banking/curve.png         loss and evaluations over the steps
runs/banking/checkpoint-N/     to resume from

A folder that `attune merge` wrote is opened as a run too: it holds a recipe, and a whole model in place of the adapter.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attunement as at
from attunement.errors import AttunementError, nearest
from attunement.train.recipe import Recipe, import_all, mapping, placed, written
from attunement.train.section import read
from attunement.train.tasks import Classification, Regression
from attunement.train.words import command, near

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from transformers import PreTrainedModel

    from attunement.adapter import Adapter
    from attunement.train.trainer import Trainer


@dataclass
class Run:
    """A recipe made real.

    Attributes:
        recipe: what it was made from.
        model: the model, in eval mode where a finished run was opened.
        adapter: its adapter, active on the model; None where the run is a merged model.
        processor: the tokenizer or image processor that goes with the model.
        splits: encoded rows by split, of a run that is to be trained.
    """

    recipe: Recipe
    model: PreTrainedModel
    adapter: Adapter | None
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

        task = self.recipe.task
        given = {"logging_nan_inf_filter": False} | self.recipe.arguments() | arguments  # the filter hides divergence
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
            head_learning_rate=self.recipe.training.head_learning_rate,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def evaluate(self, split: str) -> dict[str, float]:
        """The metrics of one split."""
        trainer = self.trainer(eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
        return figures(trainer.evaluate(self.splits[split]))

    def predict(self, texts: list[str]) -> list[dict[str, Any]]:
        """What the model says of each text, or of the image in each file: `[{"label": ..., "probability": ...}]`."""
        from datasets import Dataset

        return self.answers(Dataset.from_dict({next(iter(self.recipe.task.roles)): list(texts)}))

    def answers(self, rows: Dataset) -> list[dict[str, Any]]:
        """What the model says of every row."""
        size = self.recipe.training.per_device_eval_batch_size
        self.model.eval()
        return self.recipe.task.answers(self.model, rows, self.processor, size)

    def save(self, metrics: dict[str, dict[str, float]]) -> None:
        """The adapter, the recipe and the figures into the folder; every process calls it, and the first one writes."""
        assert self.adapter is not None
        known = {
            split: {name: value if math.isfinite(value) else None for name, value in row.items()}
            for split, row in metrics.items()
        }
        self.adapter.metrics = {
            f"{split}_{name}": value for split, row in known.items() for name, value in row.items() if value is not None
        }
        self.save_adapter()
        if first_process():
            self.write_recipe()
            (self.folder / "metrics.json").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")

    def save_adapter(self) -> None:
        """The adapter into the folder; every process calls it, and the first one writes."""
        assert self.adapter is not None
        if first_process() or any(hasattr(p, "placements") for p in self.adapter.parameters()):
            self.adapter.save(self.folder / "adapter")  # all take part in gathering shards

    def write_recipe(self) -> None:
        """The recipe into the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.yaml").write_text(written(self.recipe.plain()), encoding="utf-8")


def prepare(recipe: Recipe) -> Run:
    """Data, then model, then adapter: what is quickest to be wrong is looked at first.

    Raises `AttunementError` for data, models and adapters that do not fit the recipe.
    """
    import transformers
    from datasets import concatenate_datasets

    quiet()
    with main_process_first():
        tables = recipe.data.load(recipe.task.roles)
    where = {split: getattr(recipe.data, split) or recipe.data.train for split in tables}
    held = "eval" in tables and not recipe.data.eval
    every = concatenate_datasets([tables["train"], tables["eval"]]) if held else tables["train"]
    task = recipe.task.resolved(every, where["train"])
    recipe = recipe.model_copy(update={"task": task})
    processor = task.processor(recipe.model)
    splits = {split: task.encode(table, processor, where[split]) for split, table in tables.items()}
    splits = {s: rows if s == "train" else by_length(rows) for s, rows in splits.items()}
    transformers.set_seed(recipe.seed)  # the head and the adapter start from the same values in every process
    model = task.model(recipe.model, processor)
    for split, rows in splits.items():
        task.fits(rows, model, processor, where[split])
    method, on = task.recipe(model, processor, *recipe.methods())
    data = calibration(model, splits["train"], task, processor, recipe.training.per_device_train_batch_size)
    adapter = at.adapt(model, method, on=on, name=recipe.name, data=data)
    splits["train"] = task.for_training(splits["train"], model, task.collator(processor))
    return Run(recipe, model, adapter, processor, splits)


def calibration(
    model: PreTrainedModel, rows: Dataset, task: Any, processor: Any, size: int, count: int = 256
) -> Iterator[dict[str, Any]]:
    """Batches of training rows, evenly over all of them, for methods that start from data; made as they are asked for."""
    reads, collate = inspect.signature(model.forward).parameters, task.collator(processor)
    chosen = [int(i * len(rows) / count) for i in range(count)] if len(rows) > count else list(range(len(rows)))
    for start in range(0, len(chosen), size):
        batch = [rows[i] for i in chosen[start : start + size]]
        if not task.lazy:
            batch = [{name: value for name, value in row.items() if name in reads} for row in batch]
        yield {name: value for name, value in collate(batch).items() if name in reads}


def train(
    recipe: Recipe, console: Console, resume: bool = False, overwrite: bool = False
) -> dict[str, dict[str, float]]:
    """Train, save, and give the figures of the evaluation and test rows.

    `resume` goes on from the last whole checkpoint of the run's folder, or starts where there is none yet.
    Raises `AttunementError` where the folder holds a run already, where the run that is resumed had another recipe, and
    where the loss or the adapter is no longer finite.
    """
    from attunement.train.progress import Bar, SaveOnInterrupt
    from attunement.train.trainer import StopOnDivergence, diverged, last_checkpoint

    folder = Path(recipe.output or "runs/default")
    first = first_process()
    if first:
        check_folder(recipe, folder, resume, overwrite)
    run = prepare(recipe)
    assert run.adapter is not None
    bar = Bar(console, run.recipe.task.metric)
    interrupt = SaveOnInterrupt(bar)
    trainer = run.trainer(callbacks=[bar, interrupt, StopOnDivergence()])
    if first:
        console.print(run.adapter.summary())
        if not resume:
            clear(folder)
        run.write_recipe()
    checkpoint = last_checkpoint(folder) if resume else None
    if first and resume:
        console.print(
            f"Going on from [bold]{checkpoint}[/]." if checkpoint else "No checkpoint yet: starting from the beginning."
        )
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.close()
        interrupt.restore()
    trainer.remove_callback(StopOnDivergence)
    if bad := next((key for key, value in run.adapter.state().items() if not value.isfinite().all()), None):
        raise diverged(f"{bad!r} of the adapter, which is not saved, is not finite", trainer.args)
    run.save_adapter()
    log = list(trainer.state.log_history)
    measured: list[str] = [split for split in ("eval", "test") if split in run.splits]
    metrics = {split: figures(trainer.evaluate(run.splits[split])) for split in measured}
    run.save(metrics)
    if first:
        draw_log(log, run)
    for split, row in metrics.items():
        for name in dict.fromkeys(("loss", run.recipe.task.metric)):
            if not math.isfinite(row.get(name, 0.0)):
                raise diverged(f"the {name} on the {split} rows is {row[name]}", trainer.args)
    return metrics


def first_process() -> bool:
    """Whether this process is the one of a launch that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def draw_log(log: list[dict[str, Any]], run: Run) -> None:
    """`curve.png` from what the trainer logged, before a resumption too."""
    from attunement.train.curve import draw

    metric = run.recipe.task.metric
    known = [row for row in log if all(math.isfinite(row.get(key, 0.0)) for key in ("loss", f"eval_{metric}"))]
    loss = [(row["step"], row["loss"]) for row in known if "loss" in row]
    score = [(row["step"], row[f"eval_{metric}"]) for row in known if f"eval_{metric}" in row]
    assert run.adapter is not None
    methods = dict.fromkeys(type(part.method).__name__ for part in run.adapter.parts)
    title = f"{run.folder.name}: {', '.join(methods)} on {Path(run.recipe.model.path).name}"
    draw(loss, score, metric, title, run.folder / "curve.png")


def check_folder(recipe: Recipe, folder: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to mix two runs in one folder, or a run with a model."""
    check_place(folder, "output")
    own = folder.resolve() == Path(recipe.model.path).resolve()
    if (folder / "config.json").exists() and (own or not is_merged(folder)):
        raise AttunementError(f"output: {folder} holds a model, beside which a run cannot be kept; give another folder")
    old = folder / "recipe.yaml"
    begun = (folder / "adapter").exists() or any(folder.glob("checkpoint-*")) or (folder / "config.json").exists()
    if overwrite or not begun:  # a run that stopped before its first checkpoint left nothing to mix
        return
    if not resume:
        raise AttunementError(
            f"{folder} already holds a run: --resume goes on with it, --overwrite starts anew, output=... goes "
            "elsewhere"
        )
    if not old.exists():
        return
    before, now = read(Recipe, mapping(old, "recipe", "model, data, task"), str(old)).settings(), recipe.settings()
    for found in ("labels", "chat"):  # in the rows, by the first run
        if getattr(recipe.task, found, None) is None:
            before.pop(f"task.{found}", None)
    for key in dict.fromkeys([*before, *now]):
        was, given = before.get(key), now.get(key)
        if was != given:
            began = f"without {key}" if was is None else f"with {key}={was!r}"
            raise AttunementError(
                f"--resume: the run in {folder} began {began}, now it is {'left out' if given is None else repr(given)}"
            )


def check_place(folder: Path, where: str) -> None:
    """Refuse a folder that cannot be made, because it or one above it is a file."""
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not standing.is_dir():
        raise AttunementError(f"{where}: {standing} is a file; give another folder")


def is_merged(folder: Path) -> bool:
    """Whether a folder holds what `attune merge` wrote; any other model in it is none of ours."""
    try:
        values = mapping(folder / "recipe.yaml", "recipe", "model, data, task")
    except AttunementError:
        return False
    return values.get("model") == {"path": "."} and (folder / "config.json").is_file()


OWN = ("adapter", "metrics.json", "curve.png", "checkpoint-*", "phase-*")
"""What a run writes, beside its recipe."""

MERGED = (
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model"),
    *("spiece.model", "sentencepiece.bpe.model", "preprocessor_config.json", "processor_config.json"),
)
"""What `attune merge` writes, beside the recipe."""


def clear(folder: Path) -> None:
    """Remove what the run before left, so that nothing of it stands under the recipe of the next; nothing else."""
    names = (*OWN, *MERGED) if is_merged(folder) else OWN
    for old in [path for name in names for path in folder.glob(name)]:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()


def load(folder: str | Path, imports: list[str] | None = None) -> Run:
    """Open a finished run: its base with its head, its adapter frozen on it, and its tokenizer or image processor.

        run = at.open_run("runs/banking")
        run.predict(["where is my card?"])
        run.model, run.adapter, run.processor

    Args:
        folder: what `attune train` wrote (`runs/banking`), or what `attune merge` wrote.
        imports: modules or Python files that register methods of your own, as in a recipe. What the recipe in the folder
            imports is never imported from here: opening a run that somebody sent runs no code of theirs.

    Raises:
        AttunementError: no run or an unfinished one, a method that is not registered, a base that is not the same.
    """
    folder = Path(folder)
    file = folder / "recipe.yaml"
    if not file.is_file():
        beside = [str(p.parent) for p in Path("runs").glob("*/recipe.yaml")]
        if folder.name == "adapter" and (folder.parent / "recipe.yaml").is_file():
            raise AttunementError(f"{str(folder)!r} is the adapter of a run; the run is {str(folder.parent)!r}")
        raise AttunementError(
            f"{str(folder)!r} is not the folder of a run: it has no recipe.yaml{nearest(str(folder), beside)}"
        )
    quiet()
    import_all(imports, "open_run")
    values = mapping(file, "recipe", "model, data, task")
    values["output"] = str(folder)
    merged = (folder / "config.json").is_file()
    if merged:  # the folder may have been moved since it was written
        values["model"] = {"path": str(folder)}
    elif not (folder / "adapter").is_dir():
        begun = f"{command()} train RECIPE.yaml --resume goes on with it"
        raise AttunementError(f"{str(folder)!r} holds a run that has not finished: it has no adapter yet; {begun}")
    placed(values, folder)
    try:
        recipe: Recipe = read(Recipe, values, str(file))
    except AttunementError as error:
        theirs = values.get("imports")
        if not theirs or "there is no" not in str(error):
            raise
        named = shlex.join(
            w for x in ([theirs] if isinstance(theirs, str) else theirs) for w in ("--import", near(str(x)))
        )
        raise AttunementError(
            f"{error}: this run was trained with imports; if you trust them, add {named} "
            "(in Python: import them first, or open_run(..., imports=[...]))"
        ) from None
    processor = recipe.task.processor(recipe.model)
    model = recipe.task.model(recipe.model, processor)
    adapter = None if merged else at.load(model, folder / "adapter")
    model.eval()
    return Run(recipe, model, adapter, processor, {})


def evaluate_folder(folder: Path, where: str | None, imports: list[str] | None = None) -> dict[str, dict[str, float]]:
    """The metrics of a run on a file or split, by default its test or else its evaluation rows.

    `train`, `eval` and `test` are the run's own rows; any other word is a split of the recipe's `source`, or a file.
    """
    run = load(folder, imports)
    data, task = run.recipe.data, run.recipe.task
    where = where or ("test" if data.test else "eval")
    own = {"train": True, "eval": bool(data.eval or data.holdout), "test": bool(data.test)}
    if where in own and not own[where] and not data.source:
        raise AttunementError(f"eval: the recipe in {folder} names no {where} rows; give a file to --data")
    if own.get(where):
        tables = data.load(task.roles, only=where)
        if where not in tables:
            raise AttunementError(
                f"eval: the recipe in {folder} has too few rows to hold any out; give a file to --data"
            )
        table = tables[where]
    else:
        table = data.read(where, task.roles)
    rows = task.encode(table, run.processor, near(where))
    run.splits[where] = by_length(rows)
    return {where: run.evaluate(where)}


def predict_folder(
    folder: Path, texts: list[str] | None, file: str | None, imports: list[str] | None = None
) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """What a run says of texts, or of the rows of a file: what was asked, by role, and an answer for each."""
    from datasets import Dataset

    run = load(folder, imports)
    roles = run.recipe.task.roles
    if file is not None:
        asking = {role: required for role, required in roles.items() if role not in ("label", "completion")}
        columns = {role: column for role, column in run.recipe.data.columns.items() if role in asking}
        data = run.recipe.data.model_copy(update={"columns": columns})
        rows = data.read(file, asking)
    else:
        rows = Dataset.from_dict({next(iter(roles)): texts})
    answers = run.answers(rows)
    if run.recipe.task.lazy and not texts:  # pictures
        return [{"row": str(i)} for i in range(1, len(answers) + 1)], answers
    return [dict(row) for row in rows], answers


def export_folder(folder: Path, to: str, out: Path, rank: int | None = None, imports: list[str] | None = None) -> str:
    """Write a run's adapter for other programs and say what was written and how it is loaded."""
    kinds = ("peft", "lora", "merged")
    if to not in kinds:
        raise AttunementError(f"export: --to must be one of {', '.join(kinds)}, got {to!r}{nearest(to, kinds)}")
    check_place(out, "export")
    if out.exists() and any(out.iterdir()):
        raise AttunementError(f"export: {out} is not empty; give another folder")
    run = load(folder, imports)
    if run.adapter is None:
        raise AttunementError(f"export: {folder} holds a merged model, in which there is no adapter any more")
    try:
        return write_merged(run, out) if to == "merged" else _write_peft(run, to, out, rank)
    except AttunementError as error:  # what the Python call would take is not what the command takes
        said = str(error).partition("; partial=True")[0].replace("say which rank to convert to", "give its --rank")
        if said != str(error) and "partial" in str(error):
            said += f"; {command()} predict asks the run as it is"
        raise AttunementError(said) from None


def write_merged(run: Run, out: Path) -> str:
    """Write a run as one model without adapters, and say how it is loaded."""
    assert run.adapter is not None
    run.adapter.merge(keep=False)
    run.adapter.detach()
    run.model.save_pretrained(out)
    run.processor.save_pretrained(out)
    recipe = run.recipe.plain() | {"model": {"path": "."}}
    task = dict(recipe["task"])
    pooled = task.pop("pooling", "model") != "model"
    recipe |= {"task": task, "output": None}
    text = written({k: v for k, v in recipe.items() if v is not None})
    (out / "recipe.yaml").write_text(text, encoding="utf-8")
    kind = type(run.model).__name__
    first = "  import attunement.train.pooling  # makes its pooled head known to transformers\n" if pooled else ""
    kinds = {"causal-lm": "AutoModelForCausalLM", "image-classification": "AutoModelForImageClassification"}
    auto = kinds.get(run.recipe.task.kind, "AutoModelForSequenceClassification")
    question = "IMAGE" if run.recipe.task.lazy else "TEXT"
    return (
        f"The merged {kind} is in {out}. In Python:\n{first}  transformers.{auto}.from_pretrained({str(out)!r})\n"
        f"Or ask it: {command()} predict {shlex.quote(str(out))} {question}"
    )


def _write_peft(run: Run, to: str, out: Path, rank: int | None) -> str:
    assert run.adapter is not None
    adapter = at.to_lora(run.adapter, rank=rank) if to == "lora" else run.adapter
    adapter.save(out, format="peft")
    error = f"; the largest relative error of a site is {adapter.info['error']:.2g}" if to == "lora" else ""
    said = f"The adapter is in {out}, in PEFT's format{error}."
    task = run.recipe.task
    if not isinstance(task, Classification | Regression) or task.pooling == "model":
        return said
    labels = run.model.config.num_labels
    return (
        f"{said} It was trained under a pooled head; in Python its model is\n"
        f"  attunement.train.pooling.PooledForSequenceClassification.from_backbone(\n"
        f"      {run.recipe.model.path!r}, pooling={task.pooling!r}, scale={task.scale:g}, num_labels={labels})"
    )


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
        kept["perplexity"] = math.inf  # of a loss whose power is beyond floats
        with contextlib.suppress(OverflowError):
            kept["perplexity"] = math.exp(kept["loss"])
    return kept


def by_length(rows: Dataset) -> Dataset:
    """Evaluation batches of rows of like length: the order does not matter to a metric, the padding to the clock."""
    return rows.sort("length") if "length" in rows.column_names else rows


def main_process_first() -> Any:
    """Files are read and cached by one process, then found in the cache by the others."""
    from accelerate import PartialState

    return PartialState().main_process_first()
