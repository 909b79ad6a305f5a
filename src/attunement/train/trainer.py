"""`Trainer`: the trainer of `transformers` that knows adapters. `Callback`: what a plain one needs to keep them."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Sampler
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import TrainOutput

import attunement as at
from attunement.errors import AttunementError
from attunement.phases import become
from attunement.root import bench_of
from attunement.storage import TENSORS, describe, opened, rebuilt, write_atomically

if TYPE_CHECKING:
    from attunement.adapter import Adapter


RUNNING = "running.safetensors"
_PHASE = re.compile(r"phase-(\d+)")


def trained_adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model that would change in training: active, and not loaded frozen."""
    return {
        name: adapter
        for name, adapter in at.adapters(model).items()
        if any(p.requires_grad for p in adapter.parameters())
    }


def check_trains(model: nn.Module) -> dict[str, Adapter]:
    """`trained_adapters`, of which there is at least one, and which are all that trains.

    Raises `AttunementError` where nothing would train, or where something would that no adapter saves.
    """
    every, training = at.adapters(model), trained_adapters(model)
    if not every:
        raise AttunementError(
            f"Trainer: the {type(model).__name__} has no adapter, so nothing would train; call at.adapt first"
        )
    if not training:
        raise AttunementError(
            f"Trainer: nothing would train, for every adapter ({', '.join(every)}) is frozen or inactive; load with "
            "trainable=True, set adapter.trainable = True, or make one active with at.use"
        )
    held = {id(p) for adapter in training.values() for p in adapter.parameters()}
    loose = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if loose:
        raise AttunementError(
            f"Trainer: {', '.join(map(repr, loose[:3]))} ({len(loose)} in all) would train without belonging to an "
            "adapter and would not be saved; give it to one with at.Train()"
        )
    return training


class Trainer(transformers.Trainer):
    """`transformers.Trainer` for adapted models; takes and gives the same, and `head_learning_rate` for task heads.

    What differs: the optimizer gets the learning rate and weight decay of each method (`adapter.groups`); the loss gets
    `adapter.penalty()`; columns that a method asks for (`task`) go to `adapter.give`; `adapter.before_step()` runs when
    gradients are there; a checkpoint holds the adapter
    (`checkpoint-N/adapter`), the optimizer, the schedule and the random state and never the frozen base, and resuming
    from it gives the same weights, bit for bit on a CPU; the best adapter is loaded at the end where asked; batches
    grouped by length come in an order that depends on seed and epoch alone, the same on every process.

    Several trained adapters are kept in `checkpoint-N/adapter-<name>`.

    Methods that measure (IST, AutoLoRA, R-AMT) are given what they measure with, see `Method.measures`: for losses on rows
    that the other tensors never see, a share of `unseen` of the training rows is held out while such a method trains.

    Methods with several phases (LT-SFT, AutoLoRA) are trained through all of them, each with an optimizer and a schedule
    of its own, as long as the arguments say, and with checkpoints in `phase-2/` and so on. A run that was killed inside a
    phase or between two resumes to the same weights.

    Raises `AttunementError` in `train` where nothing would train, and where a trained parameter belongs to no adapter.
    """

    phase = 1
    unseen = 0.3
    """The share of the training rows that is held out for methods that measure the loss on such; AutoLoRA's."""
    held: Any = None
    asked = (-1, 0)
    step_inputs: dict[str, Any] | None = None

    def __init__(
        self, model: nn.Module | None = None, *args: Any, head_learning_rate: float | None = None, **kwargs: Any
    ):
        self.head_learning_rate = head_learning_rate
        # `transformers` refuses to train a quantised base unless this attribute says that something else is trained.
        # It stays for the check alone: `save_pretrained` and others read it as "PEFT is in here".
        quantised = getattr(model, "is_quantized", False) and bool(at.adapters(model)) if model is not None else False
        if quantised:
            model._hf_peft_config_loaded = True  # type: ignore[union-attr]
        if model is not None:
            self.adapted: nn.Module = model
        try:
            super().__init__(model, *args, **kwargs)
        finally:
            if quantised:
                model._hf_peft_config_loaded = False  # type: ignore[union-attr]
        self.add_callback(_BeforeStep(self))

    def call_model_init(self, trial: Any = None) -> Any:
        self.adapted = super().call_model_init(trial)
        return self.adapted

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        check_trains(self.adapted)
        if resume_from_checkpoint is True and self.phased:
            found = last_checkpoint(Path(self.args.output_dir or "."))
            resume_from_checkpoint = str(found) if found else True
        resumed = Path(str(resume_from_checkpoint)) if resume_from_checkpoint not in (None, False, True) else None
        numbered = None if resumed is None else _PHASE.fullmatch(resumed.parent.name)
        self.phase = 1
        if resumed is not None:
            enter_phase(self.adapted, resumed)
        if numbered is not None:
            self._set_phase(int(numbered[1]))
        made, done, rows = self.model_init, self._finished(resumed), self.train_dataset
        try:
            while True:
                self.train_dataset = self._held_out(rows)
                training = check_trains(self.adapted)
                if self.args.ddp_find_unused_parameters is None and any(a.chooses for a in training.values()):
                    self.args.ddp_find_unused_parameters = True  # every step leaves other parameters out
                result = done or super().train(resume_from_checkpoint, *args, **kwargs)
                following = [adapter.succeed() for adapter in trained_adapters(self.adapted).values()]
                if not any(following):
                    return result
                self._set_phase(self.phase + 1)
                resume_from_checkpoint = done = None
                self.optimizer = self.lr_scheduler = None
                self.model_init = None  # type: ignore[assignment] # it would make another model
                self.model_wrapped = self.model  # type: ignore[assignment]
        finally:
            self.model_init, self.train_dataset, self.asked = made, rows, (-1, 0)
            self.held = self.step_inputs = None
            for adapter in at.adapters(self.adapted).values():
                for part in adapter.parts if adapter.chooses else ():
                    part.rest(False)
                if adapter.objective in (self.training_loss, self.unseen_loss, self.departure):
                    adapter.objective = None
            bench_of(self.adapted).mark()

    def _set_phase(self, phase: int) -> None:
        """Each phase has a seed of its own, so that it is the same after the one before and after a resumption."""
        self.phase = phase
        transformers.set_seed(self.args.seed + phase)

    @property
    def phased(self) -> bool:
        """Whether a method has phases, each of which is trained for the whole length that the arguments say."""
        groups = [g for a in trained_adapters(self.adapted).values() for g in a.groups_]
        return any(type(g.method).succeed is not at.Method.succeed for g in groups)

    def _finished(self, checkpoint: Path | None) -> TrainOutput | None:
        """What a phase came to that a checkpoint holds the end of, loaded; None where it goes on."""
        if checkpoint is None or not self.phased:
            return None
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.state.global_step < self.state.max_steps:
            return None
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        load_adapters(self.adapted, Path(best or checkpoint))
        return TrainOutput(self.state.global_step, 0.0, {})

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return folder if self.phase == 1 else str(Path(folder) / f"phase-{self.phase}")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            chosen = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args,
                self.model,  # type: ignore[arg-type]
            )
            make, options = chosen
            if {"params", "model", "optimizer_dict"} & set(options):
                raise AttunementError(
                    f"Trainer: the optimizer {self.args.optim!r} arranges the parameters itself and would pass over "
                    "the rates of the methods; expected one such as 'adamw_torch', 'adafactor' or 'sgd'"
                )
            rates: dict[str, Any] = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
            rates["head_lr"] = self.head_learning_rate
            groups = [g for adapter in trained_adapters(self.adapted).values() for g in adapter.groups(**rates)]
            self.optimizer = make(groups, **options)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        self._give(inputs)
        adapters = trained_adapters(self.adapted).values()
        if model.training and any(group.method.measures == "departure" for a in adapters for group in a.groups_):
            self.step_inputs = dict(inputs)
        made: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = made if return_outputs else (made, None)
        if model.training:
            # A loss that is already a share of the whole accumulated batch is not divided again by the trainer.
            whole = getattr(self, "loss_is_scaled_for_ga", None)
            if whole is None:
                shared = self.model_accepts_loss_kwargs and num_items_in_batch is not None
                whole = shared or self.compute_loss_func is not None
            steps = self.current_gradient_accumulation_steps if whole else 1
            for adapter in adapters:
                loss = loss + adapter.penalty() / steps
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._give(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _give(self, inputs: dict[str, Any]) -> None:
        """Columns that a method asks for, such as the task of each row, go to the adapters and not to the model."""
        for adapter in at.adapters(self.adapted).values():
            if given := {name: inputs[name] for name in adapter.asks if name in inputs}:
                adapter.give(**given)
        for name in {name for adapter in at.adapters(self.adapted).values() for name in adapter.asks}:
            inputs.pop(name, None)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        asked = {name for adapter in at.adapters(self.adapted).values() for name in adapter.asks}
        columns: list[str] = self._signature_columns or []
        self._signature_columns = [*columns, *sorted(asked.difference(columns))]  # type: ignore[assignment]

    def measure_of(self, adapter: Adapter) -> Callable[[], torch.Tensor] | None:
        """What a trained adapter measures with: its own `objective`, else that of the word its methods say, or None."""
        if adapter.objective is not None:
            return adapter.objective
        words = {group.method.measures for group in adapter.groups_} - {""}
        if len(words) > 1:
            raise AttunementError(
                f"Trainer: the methods of {adapter.name!r} measure with {' and '.join(sorted(words))}, and an adapter has "
                "one objective; set it"
            )
        known = {"training": self.training_loss, "unseen": self.unseen_loss, "departure": self.departure}
        return known[words.pop()] if words else None

    def training_loss(self) -> torch.Tensor:
        """The loss on 16 training rows, drawn by the seed and the step alone."""
        return self._loss_on(self.train_dataset, 16, 0)

    def unseen_loss(self) -> torch.Tensor:
        """The loss on a batch of the rows that are held out, drawn by the seed, the step and how often it asks in a step."""
        assert self.held is not None
        before, times = self.asked
        self.asked = (self.state.global_step, times + 1 if before == self.state.global_step else 0)
        return self._loss_on(self.held, self.args.train_batch_size, self.asked[1])

    def departure(self) -> torch.Tensor:
        """The cross-entropy of the predictions on the step's last batch from those of the model without adapters."""
        inputs = {name: value for name, value in (self.step_inputs or {}).items() if name != "labels"}
        labels: Any = (self.step_inputs or {}).get("labels")
        with torch.no_grad(), at.using(self.adapted, None):
            teacher = self.adapted(**inputs).logits.float().softmax(-1)
        apart = -(teacher * self.adapted(**inputs).logits.float().log_softmax(-1)).sum(
            -1
        )  # (batch,) or (batch, tokens)
        return apart[labels != -100].mean() if labels is not None and labels.shape == apart.shape else apart.mean()

    def _loss_on(self, data: Any, count: int, draw: int) -> torch.Tensor:
        if not hasattr(data, "__len__"):
            raise AttunementError(
                "Trainer: rows to measure a loss on cannot be drawn from a stream; set the adapter's objective"
            )
        seed = (self.args.seed * 1_000_003 + self.state.global_step + draw * 7_368_787) % 2**32
        index = torch.randint(len(data), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
        collate = self._get_collator_with_removed_columns(self.data_collator)
        loss: torch.Tensor = self.compute_loss(self.adapted, self._prepare_inputs(collate([data[i] for i in index])))
        return loss

    def _held_out(self, rows: Any) -> Any:
        """The rows that are trained on: all, or without those that a method measures on, which are drawn by the seed."""
        self.held = None
        adapters = trained_adapters(self.adapted).values()
        if all(a.objective or all(g.method.measures != "unseen" for g in a.groups_) for a in adapters):
            return rows
        if not hasattr(rows, "__len__") or len(rows) < 2:
            raise AttunementError(
                "Trainer: rows for a method that measures on unseen ones are held out of a data set of at least two, not of "
                "a stream; set the adapter's objective"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.args.seed)).tolist()
        count = min(max(round(self.unseen * len(rows)), 1), len(rows) - 1)
        take: Any = getattr(rows, "select", None) or functools.partial(torch.utils.data.Subset, rows)
        self.held = take(sorted(order[:count]))
        return take(sorted(order[count:]))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trained adapters and the tokenizer; never the base."""
        folder = Path(output_dir or self.args.output_dir or ".")
        save_adapters(self.adapted, folder, writes=self.args.should_save)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapters(self.adapted, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_adapters(self.adapted, Path(str(self.state.best_model_checkpoint)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # `transformers` would write the whole sharded model beside the optimizer
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows: Any = self.train_dataset  # `train_dataset` is the same without the columns that the model does not read
        grouped = getattr(self.args, "train_sampling_strategy", "random") == "group_by_length"
        column = self.args.length_column_name
        if grouped and column in getattr(rows, "column_names", ()):
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return LengthGrouped(list(rows[column]), size, seed)
        return transformers.Trainer._get_train_sampler(self, train_dataset)  # `self` may be of another subclass of it


class LengthGrouped(Sampler[int]):
    """Rows in random order, neighbours of like length; the order depends on the seed and the epoch alone.

    The one of `transformers` draws from the global generator, so a run resumed in its second epoch meets other batches,
    and the processes of a distributed run meet each other's rows twice.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class _BeforeStep(transformers.TrainerCallback):
    """Schedules that look at gradients need the moment before the step: at the end of a step they are gone."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for adapter in _stepped(self.trainer.adapted, state):
            adapter.objective = self.trainer.measure_of(adapter)
            adapter.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for adapter in _stepped(self.trainer.adapted, state):
            adapter.before_step()


def _stepped(model: nn.Module, state: Any) -> Iterator[Adapter]:
    """The trained adapters, each told where in its schedule it is."""
    for adapter in trained_adapters(model).values():
        adapter.step, adapter.total_steps = state.global_step, state.max_steps
        yield adapter


class StopOnDivergence(transformers.TrainerCallback):
    """Ends a run whose loss is no longer a number, at the first report of it.

    Raises `AttunementError` where the loss of the training or the evaluation rows is infinite or not a number.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        for key, rows in (("loss", "training"), ("eval_loss", "evaluation")):
            loss = (logs or {}).get(key, 0.0)
            if not math.isfinite(loss):
                best = state.best_model_checkpoint
                kept = f"; what it was at its best before is in {Path(best) / 'adapter'}" if best else ""
                raise diverged(f"the loss on the {rows} rows is {loss} after {state.global_step} steps", args, kept)


def diverged(what: str, args: transformers.TrainingArguments, kept: str = "") -> AttunementError:
    """The sentence for a run that came to nothing."""
    return AttunementError(
        f"train: the run in {args.output_dir} has diverged: {what}{kept}; start anew (--overwrite) with "
        f"training.learning_rate below {args.learning_rate:g}"
    )


class Callback(transformers.TrainerCallback):
    """Keeps adapters in a plain `transformers.Trainer`: `Trainer(..., callbacks=[at.Callback()])`.

    Every checkpoint gets its `adapter` folder, `adapter.before_step()` is called, and a run in which nothing trains is
    refused. A plain trainer has no place for a term of the loss, for rates per method, or for resuming an adapter:
    methods with a penalty or with rates are refused with a sentence that names `at.Trainer`.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert model is not None
        for name, adapter in check_trains(model).items():
            needs = "adds a penalty to the loss" if adapter.penalty().requires_grad else ""
            plain = {(group.get("lr"), group.get("weight_decay")) for group in adapter.groups(lr=1.0, weight_decay=1.0)}
            needs = needs or ("has learning rates of its own" if len({lr for lr, _ in plain}) > 1 else "")
            if needs:
                raise AttunementError(
                    f"Callback: the adapter {name!r} {needs}, for which a plain trainer has no place; use at.Trainer"
                )
            if any(type(group.method).succeed is not at.Method.succeed for group in adapter.groups_):
                raise AttunementError(
                    f"Callback: the adapter {name!r} is trained in phases, of which a plain trainer knows the first alone; "
                    "use at.Trainer"
                )
        if state.global_step:
            raise AttunementError("Callback: a plain trainer cannot resume an adapter; use at.Trainer")
        for adapter in _stepped(model, state):
            adapter.begin()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert model is not None
        for adapter in _stepped(model, state):
            adapter.before_step()

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_adapters(model, folder, writes=args.should_save)


def save_adapters(model: nn.Module, folder: Path, writes: bool = True) -> None:
    """The trained adapters into `folder/adapter`, or `folder/adapter-<name>` where there are several."""
    training = trained_adapters(model)
    for name, adapter in training.items():
        place, running = _place(folder, name, len(training)), adapter.state(["running"])
        if writes:
            adapter.save(place)
            if running:
                write_atomically(place.with_name(f"{place.name}-schedule"), running, {}, {}, RUNNING)
        else:  # sharded tensors are gathered by all processes together
            describe(adapter), adapter.state()


def load_adapters(model: nn.Module, folder: Path) -> None:
    """The values of the trained adapters from a checkpoint. Raises `AttunementError` where it lacks one of them."""
    training = trained_adapters(model)
    found = {name: _place(folder, name, len(training)) / "adapter.safetensors" for name in training}
    for name, file in found.items():
        if not file.is_file():
            raise AttunementError(f"Trainer: {folder} holds no adapter {name!r}: expected {file}")
    for name, file in found.items():
        training[name].load_state(load_file(file))
        if training[name].state(["running"]):
            running = file.parent.with_name(f"{file.parent.name}-schedule") / RUNNING
            if not running.is_file():
                raise AttunementError(f"Trainer: {folder} holds no statistics of {name!r}: expected {running}")
            training[name].load_state(load_file(running), ["running"])


def _place(folder: Path, name: str, count: int) -> Path:
    return folder / ("adapter" if count == 1 else f"adapter-{name}")


def enter_phase(model: nn.Module, folder: Path) -> None:
    """Bring the trained adapters to the phase in which a checkpoint was written: to its methods, where they are others."""
    training = trained_adapters(model)
    for name, adapter in training.items():
        if not ((place := _place(folder, name, len(training))) / TENSORS).is_file():
            continue  # `load_adapters` says what is missing
        tensors, said = opened(place)
        now = json.loads(json.dumps(describe(adapter)["methods"]))
        if said["methods"] != now:
            if not any(type(group.method).succeed is not at.Method.succeed for group in adapter.groups_):
                raise AttunementError(
                    f"Trainer: {folder} was written by {_told(said['methods'])}, and adapter {name!r} is {_told(now)}; "
                    "adapt as the run began, or begin anew without resume_from_checkpoint"
                )
            become(adapter, rebuilt(model, tensors, said, name))


def _told(methods: list[dict[str, Any]]) -> str:
    """The methods of a saved adapter, as a person would write them."""
    said = []
    for entry in methods:
        fields = {**entry["method"]}
        word = at.method(fields.pop("method")).__name__
        said.append(f"{word}({', '.join(f'{key}={value!r}' for key, value in fields.items())}) on {entry['on']!r}")
    return ", ".join(said)


def _number(path: Path) -> int:
    return int(path.name.partition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; one that a killed run left half-written is passed over."""
    phases = [p for p in folder.glob("phase-*") if _PHASE.fullmatch(p.name)]
    for phase in sorted(phases, key=_number, reverse=True):
        if (found := last_checkpoint(phase)) is not None:
            return found
    numbered = [p for p in folder.glob("checkpoint-*") if p.name.partition("-")[2].isdigit()]
    for path in sorted(numbered, key=_number, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # written last
        except (OSError, ValueError):
            continue
        return path
    return None
