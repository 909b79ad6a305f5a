"""One trial: a method at a rate and a seed, trained and measured. Model and data are loaded once a process."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import nn

import attunement as at
from attunement.compare import measure
from attunement.compare.study import FULL, LOWER, ZERO, Entry, StudyTask
from attunement.errors import AttunementError
from attunement.summary import Summary
from attunement.train.run import Run, by_length, calibration, figures, quiet
from attunement.train.tasks import Classification, ImageClassification
from attunement.train.trainer import Trainer

if TYPE_CHECKING:
    from attunement.compare.study import Search


class Pruned(Exception):  # noqa: N818 - it is not an error
    """The pruner stopped a trial."""


class Diverged(Exception):  # noqa: N818 - it is a result
    """The loss of a trial is no longer a number."""


class Plain(transformers.Trainer):
    """The trainer of full fine-tuning, which has no adapter; batches come in the order in which `at.Trainer` has them."""

    _get_train_sampler = Trainer._get_train_sampler  # type: ignore[assignment]
    head_learning_rate: float | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.head_learning_rate is None:
            return optimizer
        places = at.anatomy(self.model).task_heads  # type: ignore[arg-type]
        heads = {id(p) for place in places for p in place.module.parameters()}
        for group in list(optimizer.param_groups):
            if own := [p for p in group["params"] if id(p) in heads]:
                group["params"] = [p for p in group["params"] if id(p) not in heads]
                optimizer.add_param_group({**group, "params": own, "lr": self.head_learning_rate})
        return optimizer


@dataclass
class Outcome:
    """What a trial came to; the figures as in a record."""

    state: str = "done"
    error: str = ""
    quality: float | None = None
    calibration: float | None = None
    forgetting: float | None = None
    steps: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    """Seconds of it spent in attaching, training and evaluating."""
    curve: list[tuple[int, float | None, float | None]] = field(default_factory=list)


class Ground:
    """A task with its model and rows in memory, from which every trial of it starts.

    Attributes:
        heads: whether the model has task heads, which train beside a method.
        head_rate: their rate, where it is not the method's own.

    Raises `AttunementError` for data that cannot be used: one class, a missing column, no rows to measure on.
    """

    def __init__(self, name: str, task: StudyTask, search: Search, folder: Path):
        quiet()
        self.name, self.folder, self.search = name, folder, search
        self.head_rate: float | None = None
        where = f"task {name!r}"
        tables = split(task, search, where)
        resolved = task.task.resolved(tables["all"], task.data.train)
        self.task = task.model_copy(update={"task": resolved})
        self.processor = resolved.processor(task.model)
        source = {"test": task.data.test or task.data.eval or task.data.train}
        self.rows = {
            part: resolved.encode(table, self.processor, source.get(part, task.data.train))
            for part, table in tables.items()
            if part != "all"
        }
        for part in ("measured", "test", "forgetting"):
            if part in self.rows:
                self.rows[part] = by_length(self.rows[part])
        self.base = self._loaded(0)
        self.heads = bool(at.anatomy(self.base).task_heads)
        self.fresh: dict[int, dict[str, torch.Tensor]] = {0: {}}
        for part in ("search", "train"):
            self.rows[part] = resolved.for_training(self.rows[part], self.base, resolved.collator(self.processor))

    def _loaded(self, seed: int) -> Any:
        transformers.set_seed(seed)
        return self.task.task.model(self.task.model, self.processor)

    def model(self, seed: int) -> Any:
        """A copy of the model, its untrained parts (a head) drawn by the seed."""
        if seed not in self.fresh:
            known, drawn = self.base.state_dict(), self._loaded(seed).state_dict()
            self.fresh[seed] = {k: v for k, v in drawn.items() if not torch.equal(v, known[k])}
        made = copy.deepcopy(self.base)
        with torch.no_grad():
            for key, value in self.fresh[seed].items():
                made.state_dict()[key].copy_(value)
        return made

    def run(self, entry: Entry, rate: float | None, seed: int, stage: str) -> Run:
        """Everything but the training of a trial."""
        head_rate = self.head_rate if entry.leaves_head else None
        section, output = entry.adapter or {"method": "linear_probe"}, str(self.folder / "work")
        recipe = self.task.recipe(section, rate, seed, output, head_rate)
        train, measured = ("search", "measured") if stage == "search" else ("train", "test")
        splits = {"train": self.rows[train], "eval": self.rows[measured]}
        model = self.model(seed)
        adapter = None
        if entry.method == ZERO:
            name_classes(model, self.task.task, self.processor)
        elif entry.method == FULL:
            model.requires_grad_(True)
        else:
            method, on = self.task.task.recipe(model, self.processor, *recipe.methods())
            transformers.set_seed(seed)
            size = recipe.training.per_device_train_batch_size
            rows = calibration(model, self.rows[train], self.task.task, self.processor, size)
            adapter = at.adapt(model, method, on=on, data=rows)
        return Run(recipe, model, adapter, self.processor, splits)

    def batch(self, device: torch.device) -> dict[str, Any]:
        """The rows of one step, of middling length: what costs are measured on."""
        rows, task = by_length(self.rows["train"]), self.task.task
        size = self.task.training.per_device_train_batch_size
        first = max(0, (len(rows) - size) // 2)
        chosen = [rows[i] for i in range(first, min(first + size, len(rows)))]
        if not task.lazy:
            chosen = [{k: v for k, v in row.items() if k != "length"} for row in chosen]
        batch = task.collator(self.processor)(chosen)
        return {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}


def split(task: StudyTask, search: Search, where: str) -> dict[str, Any]:
    """The rows of a task: `all` training rows; `search` and `measured` for the search; `train` and `test` for the seeds.

    No row of `test` is in any other.
    """
    data, roles = task.data, task.task.roles
    every = data.read(data.train, roles)
    final = data.test or data.eval
    if final:
        test = data.read(final, roles)
        pool = np.random.default_rng(data.seed).permutation(len(every))
    else:
        order = np.random.default_rng(data.seed).permutation(len(every))
        cut = max(1, round(len(every) * search.holdout))
        test, pool = every.select(sorted(order[:cut])), order[cut:]
    if len(pool) < 2:
        raise AttunementError(f"{where}: {data.train} has {len(every)} rows, too few to train and to measure on")
    if not len(test):
        raise AttunementError(f"{where}: {final} has no rows to measure on")
    if task.test_rows is not None and task.test_rows < len(test):
        test = test.select(sorted(np.random.default_rng(data.seed).permutation(len(test))[: task.test_rows]))
    chosen = pool
    if task.per_class is not None:
        if "label" not in every.column_names:
            raise AttunementError(f"{where}: per_class needs rows with a label")
        chosen = _of_each(every["label"], pool, task.per_class, where)
    chosen = chosen[: task.rows] if task.rows is not None else chosen
    taken = set(chosen.tolist())
    left = [i for i in pool.tolist() if i not in taken]
    train = every.select(sorted(taken))
    if data.test and data.eval:
        measured, kept = data.read(data.eval, roles), train
        measured = measured.select(range(min(search.rows, len(measured))))
    elif len(left) >= min(search.rows, search.holdout * len(chosen)):
        measured, kept = every.select(sorted(left[: search.rows])), train
    else:
        cut = min(search.rows, max(1, round(len(chosen) * search.holdout)))
        measured, kept = every.select(sorted(chosen[:cut])), every.select(sorted(chosen[cut:]))
    found = {"all": every, "train": train, "test": test, "search": kept, "measured": measured}
    if task.forgetting is not None:
        second = task.forgetting
        found["forgetting"] = second.read(second.test or second.eval or second.train, roles)
    return found


def _of_each(labels: list[Any], pool: np.ndarray, count: int, where: str) -> np.ndarray:
    """The first rows of the pool of every class, the classes in turn, so that a cut leaves all of them."""
    of: dict[Any, list[int]] = {}
    for i in pool.tolist():
        of.setdefault(labels[i], []).append(i)
    few = min(of, key=lambda label: len(of[label]))
    if len(of[few]) < count:
        raise AttunementError(f"{where}: per_class is {count}, and the class {few!r} has {len(of[few])} rows")
    return np.array([rows[turn] for turn in range(count) for rows in of.values()])


@torch.no_grad()
def name_classes(model: Any, task: Any, processor: Any) -> None:
    """Make the head of a pooled classifier read the names of its classes: their features are its rows.

    Any other model answers as it is.
    """
    if not isinstance(task, Classification) or task.pooling == "model" or not task.labels:
        return
    names = [" ".join(label.replace("_", " ").replace("-", " ").split()) for label in task.labels]
    features: list[torch.Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    batch = processor(names, padding=True, truncation=True, return_tensors="pt")
    model.eval()
    model(**{k: v.to(model.head.weight.device) for k, v in batch.items()})
    hook.remove()
    model.head.weight.copy_(features[0] / task.scale)  # (classes, width), of length one
    model.head.bias.zero_()


Report = Callable[[int, float], bool]
"""Told the number of an evaluation and its quality; says whether to stop there."""


def run(
    ground: Ground, entry: Entry, rate: float | None, seed: int, stage: str, report: Report = lambda *_: False
) -> Outcome:
    """Train and measure. What goes wrong is in the outcome; only Ctrl-C and the like are raised."""
    began, outcome, clock = time.perf_counter(), Outcome(), _Clock()
    try:
        _run(ground, entry, rate, seed, stage, report, outcome, clock)
        if outcome.quality is not None and not math.isfinite(outcome.quality):
            raise Diverged("the quality is not a number")
    except Pruned:
        outcome.state = "pruned"
    except Diverged as error:
        outcome.state, outcome.error, outcome.quality = "diverged", str(error), None
    except Exception as error:  # of any kind: it is recorded, and the study goes on
        text = " ".join(str(error).split())[:300]
        said = text if isinstance(error, AttunementError) else f"{type(error).__name__}: {text}"
        outcome.state, outcome.error, outcome.quality = "failed", said, None
    outcome.seconds, outcome.busy = time.perf_counter() - began, clock.seconds
    return outcome


class _Clock:
    seconds = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def _run(
    ground: Ground,
    entry: Entry,
    rate: float | None,
    seed: int,
    stage: str,
    report: Report,
    outcome: Outcome,
    clock: _Clock,
) -> None:
    made = ground.run(entry, rate, seed, stage)
    watch = _Watch(ground.task, report, outcome)
    options: dict[str, Any] = {"logging_nan_inf_filter": False}
    if not ground.task.training.model_dump().get("gradient_checkpointing"):
        options["ddp_find_unused_parameters"] = True  # full fine-tuning trains poolers that the task does not read
    if stage == "search":
        options |= {"eval_strategy": "steps", "eval_steps": 1 / ground.search.evaluations}
    trainer = trainer_of(made, entry, [watch], **options)
    judge = _Judge(ground.task)
    trainer.compute_metrics = judge
    forgotten = ground.rows.get("forgetting") if stage == "final" else None
    before = None
    with clock():
        if forgotten is not None:
            before = _bare_loss(trainer, made, forgotten)
        if entry.method != ZERO:
            trainer.train()
        outcome.steps = watch.offset + trainer.state.global_step
        if watch.measured != outcome.steps or entry.method == ZERO:
            found = figures(trainer.evaluate(made.splits["eval"]))
            watch.judged(found, outcome.steps)
        outcome.quality, outcome.calibration = watch.quality, judge.calibration
        if before is not None:
            outcome.forgetting = figures(trainer.evaluate(forgotten))["loss"] - before


def trainer_of(made: Run, entry: Entry, callbacks: list[Any], **options: Any) -> Any:
    """The trainer of a trial: `at.Trainer`, or for what has no adapter a plain one with the same arguments."""
    if made.adapter is not None:
        return made.trainer(callbacks, **options)
    task = made.recipe.task
    args = transformers.TrainingArguments(**made.recipe.arguments() | options, disable_tqdm=True)
    trainer = Plain(
        made.model,
        args,
        train_dataset=made.splits["train"],
        eval_dataset=made.splits["eval"],
        data_collator=task.collator(made.processor),
        preprocess_logits_for_metrics=task.for_metrics,
        callbacks=list(callbacks),
    )
    trainer.head_learning_rate = made.recipe.training.head_learning_rate
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _bare_loss(trainer: Any, made: Run, rows: Any) -> float:
    if made.adapter is None:
        return figures(trainer.evaluate(rows))["loss"]
    with at.using(made.model, None):
        return figures(trainer.evaluate(rows))["loss"]


class _Judge:
    """The metrics of a task, and the calibration error of the last evaluation."""

    def __init__(self, task: StudyTask):
        self.task = task.task
        self.calibration: float | None = None

    def __call__(self, prediction: Any) -> dict[str, float]:
        if isinstance(self.task, Classification | ImageClassification):
            logits = np.asarray(prediction.predictions)
            finite = bool(np.isfinite(logits).all())
            self.calibration = measure.calibration_error(logits, prediction.label_ids) if finite else None
        return self.task.metrics(prediction)


class _Watch(transformers.TrainerCallback):
    """Keeps the curve, tells the pruner, and stops what has diverged."""

    def __init__(self, task: StudyTask, report: Report, outcome: Outcome):
        self.metric, self.report, self.outcome = task.metric or task.task.metric, report, outcome
        self.offset = self.last = self.evaluations = 0
        self.measured, self.quality, self.training = -1, float("nan"), False

    def judged(self, found: dict[str, float], step: int) -> None:
        value = found[self.metric]
        if not math.isfinite(found.get("loss", 0.0)):
            raise Diverged(f"the loss on the held-out rows is {found['loss']} after {step} steps")
        self.measured, self.quality = step, -value if self.metric in LOWER else value
        self.outcome.curve.append((step, None, self.quality))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.offset += self.last  # of the phases before
        self.last, self.training = 0, True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last, self.training = state.global_step, False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        step = self.offset + state.global_step
        if logs and "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise Diverged(f"the loss is {logs['loss']} after {step} steps")
            self.outcome.curve.append((step, float(logs["loss"]), None))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        if not self.training or not metrics:
            return
        self.judged(figures(metrics), self.offset + state.global_step)
        stop = self.report(self.evaluations, self.quality)
        self.evaluations += 1
        if stop and state.global_step < state.max_steps:
            self.outcome.steps = self.offset + state.global_step
            self.outcome.quality = self.quality
            raise Pruned


def costs(ground: Ground, entry: Entry) -> dict[str, Any]:
    """What a method costs whatever its rate: `trainable`, `saved_bytes` and what `measure.costs` gives.

    Raises `AttunementError` where the method cannot act on the model: the reason.
    """
    device = _device(ground.task)
    made = ground.run(entry, 1e-3, 0, "search")
    if entry.method == ZERO:
        return {"trainable": 0, "saved_bytes": 0, "inference": 1.0}
    batch = ground.batch(device)
    model: Any = made.model
    own = _subject(model.to(device), made.adapter, batch)
    full = None if entry.method == FULL else _subject(ground.model(0).to(device).requires_grad_(True), None, batch)
    bare = _subject(ground.model(0).to(device), None, batch)
    after = None if made.adapter is None else measure.merged_copy(made.model, made.adapter.name)
    merged = None if after is None else _subject(after, None, batch)
    if made.adapter is None:
        saved = sum(p.numel() * p.element_size() for p in made.model.parameters())
    else:
        saved = Summary(made.adapter).saved_bytes
    return {"saved_bytes": saved} | measure.costs(own, full, bare, merged)


def _subject(model: nn.Module, adapter: Any, batch: dict[str, Any]) -> measure.Subject:
    asked = {k: v for k, v in batch.items() if k != "labels"}

    def loss() -> torch.Tensor:
        return model(**batch).loss

    groups: list[Any] = list(model.parameters())
    before: Callable[[], None] = lambda: None  # noqa: E731
    if adapter is not None:
        adapter.total_steps, adapter.objective = 1000, loss
        adapter.begin()
        groups, before = adapter.groups(lr=0.0), adapter.before_step
    return measure.Subject(model, loss, lambda: model(**asked), groups, before)


def _device(task: StudyTask) -> torch.device:
    on_cpu = task.training.model_dump().get("use_cpu", False)
    return torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")
