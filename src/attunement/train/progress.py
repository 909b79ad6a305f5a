"""What a person sees and does while a run goes on: a progress bar, and Ctrl-C."""

from __future__ import annotations

import signal
import time
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Bar(transformers.TrainerCallback):
    """Steps, loss, metric, examples a second and the time left; a line every tenth of a run that has no terminal.

    `metric` is the name of the figure to show, as the evaluation gives it, without `eval_`. `marks` keeps
    (step, name, value) of every loss and metric for a picture.
    """

    def __init__(self, console: Console, metric: str):
        self.console, self.metric = console, metric
        self.marks: list[tuple[int, str, float]] = []
        self.shown = {"loss": "–", metric: "–"}
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.start, self.first, self.paused, self.line = time.monotonic(), state.global_step, 0.0, state.global_step
        if not state.is_world_process_zero:
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        detail = TextColumn("[dim]{task.fields[detail]}")
        self.bar = Progress(*columns, detail, TimeRemainingColumn(), console=self.console)
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, detail="")
        if self.console.is_terminal:
            self.bar.start()

    def _detail(self, step: int) -> str:
        seconds = time.monotonic() - self.start - self.paused
        speed = (step - self.first) * self.rows / seconds if seconds > 0 else 0.0
        figures = "  ".join(f"{name} {value}" for name, value in self.shown.items() if value != "–")
        return f"{figures}  {speed:,.0f} examples/s".strip()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, detail=self._detail(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        for key, value in (logs or {}).items():
            name = "loss" if key == "loss" else self.metric if key == f"eval_{self.metric}" else None
            if name is not None and isinstance(value, int | float):
                self.shown[name] = f"{value:.3f}"
                self.marks.append((state.global_step, key, float(value)))
        if self.bar is None:
            return
        self.bar.update(self.task, detail=self._detail(state.global_step))
        if (
            not self.console.is_terminal
            and (state.global_step - self.line) * 10 >= state.max_steps
            and "loss" in (logs or {})
        ):
            self.line = state.global_step
            self.console.print(f"step {state.global_step}/{state.max_steps}  {self._detail(state.global_step)}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None and self.bar.tasks[self.task].description == "training":
            self.bar.update(self.task, description="evaluating")
            self.evaluating = time.monotonic()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None and self.bar.tasks[self.task].description == "evaluating":
            self.bar.update(self.task, description="training")
            self.paused += time.monotonic() - self.evaluating

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def say(self, what: str) -> None:
        """`what` in front of the bar, drawn at its next turn."""
        if self.bar is not None:
            self.bar.update(self.task, description=what)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None and self.console.is_terminal:
            self.bar.stop()
        self.bar = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after a checkpoint of the step it came in was written."""


class SaveOnInterrupt(transformers.TrainerCallback):
    """Ctrl-C finishes the step, writes a checkpoint and raises `Interrupted`; a second one stops at once.

    Not in distributed runs, whose processes would stop at different steps: there the last checkpoint is what remains.
    """

    def __init__(self, bar: Bar) -> None:
        self.bar, self.asked = bar, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size == 1:
            self.before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        self.bar.say("stopping after this step")  # drawn by the bar's own thread: a handler must not print
        self.restore()

    def restore(self) -> None:
        """Give Ctrl-C back to whoever had it."""
        if hasattr(self, "before"):
            signal.signal(signal.SIGINT, self.before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            raise Interrupted

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()
