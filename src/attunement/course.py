"""What the adapted modules of a model share with its root: the batch under way, and what was active when.

Checkpoints compute a forward again in the backward pass, when another set may be active. Autograd numbers its operations
as it makes them, and tells which of them a backward pass is at: so a module finds the plan that it had.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from attunement.compose import Active, checked
from attunement.errors import AttunementError

if TYPE_CHECKING:
    from attunement.root import Bench

PAST = 10_000
"""How many active sets back a backward pass may reach."""


class Batch(NamedTuple):
    """What the root was given in the forward under way.

    Attributes:
        size: how many rows, copies included; 0 where the root was not called.
        lengths: how many entries each row has in the tensors that have one line for each row.
        loose: whether the entries of a tensor belong to rows in a way that its shape does not tell.
    """

    size: int = 0
    lengths: tuple[int, ...] = ()
    loose: bool = False


class Course:
    """What the adapted modules of a model share with its root. A copy begins anew.

    Attributes:
        batch: what the forward under way was given, where it distinguishes rows.
        batch_first: whether a site was seen that has rows first (True), or one that seems to have tokens first (False).
        past: which active set was in place from which of autograd's operations on; each thread counts its own.
        threads: whether several have switched or run the model, so that the count says nothing.
        task: the backward pass in which somebody has switched, who knows best what is computed again.
    """

    def __init__(self, bench: Bench | None = None) -> None:
        self.bench = bench
        self.batch = Batch()
        self.batch_first: bool | None = None
        self.past: collections.deque[tuple[int, Active, Batch]] = collections.deque(maxlen=PAST)
        self.thread: int | None = None
        self.threads = False
        self.task = -1
        self._kept: tuple[Active, dict[nn.Module, Any]] | None = None

    def __reduce__(self) -> tuple[type[Course], tuple[()]]:
        return Course, ()

    def note(self, tree: Active) -> None:
        """Remember that an active set is in place from here on."""
        if torch.compiler.is_compiling():
            return
        self._kept = None
        if (task := torch._C._current_graph_task_id()) != -1:
            self.task = task
            return
        self.meet()
        if not self.past or self.past[-1][1:] != (tree, self.batch):
            number = torch._C._autograd._get_sequence_nr() if self.past else 0
            self.past.append((number, tree, self.batch))

    def meet(self) -> None:
        """Look which thread runs the model."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:
            self.thread = threading.get_ident() if self.thread is None else self.thread
            self.threads |= self.thread != threading.get_ident()

    def recall(self, module: Any) -> tuple[Any, Batch]:
        """The plan that a module had in the forward whose gradient is being computed, and what the root was given then."""
        node, bench = torch._C._current_autograd_node(), self.bench
        if bench is None or node is None or self.threads or self.task == torch._C._current_graph_task_id():
            return module._attuned_plan, self.batch
        number = node._sequence_nr()
        then = next((some for some in reversed(self.past) if some[0] <= number), None)
        try:
            if then is None:
                raise AttunementError(f"the active set was exchanged {PAST} times since")
            if then is self.past[-1] or then[1] == bench.applied:
                return module._attuned_plan, then[2]
            if self._kept is None or self._kept[0] != then[1]:
                checked(then[1], bench.adapters)
                self._kept = then[1], bench.plans(then[1])
                bench.train(then[1])
        except AttunementError as error:
            raise AttunementError(f"backward: a forward cannot be computed again as it was: {error}") from None
        return self._kept[1].get(module), then[2]

    def again(self, forward: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module's forward in a backward pass: checkpoints compute it again, whatever is active by then."""
        now, its = module._attuned_plan, self.batch
        module._attuned_plan, self.batch = self.recall(module)
        module._attuned_course = None
        try:
            return forward(module, *args, **kwargs)
        finally:
            module._attuned_plan, module._attuned_course, self.batch = now, self, its
