"""What a method costs, measured in one place for the arena and for the benchmarks.

Timings are interleaved: every round runs every case once, so that a drift of the machine meets all of them alike.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attunement.errors import AttunementError

BINS = 15


@dataclass(frozen=True)
class Case:
    """One side of a comparison. `run` is timed and gets what `setup`, which is not, gives anew for every call."""

    run: Callable[[Any], Any]
    setup: Callable[[], Any] = lambda: None
    calls: int = 1
    """Calls to one timing, for what takes less than a few milliseconds; the timing is divided by it."""


def interleaved(
    cases: Mapping[str, Case], seconds: float, least: int = 15, most: int = 400, before: int = 3
) -> dict[str, np.ndarray]:
    """Seconds per call of each case, one number a round: (rounds,).

    Every round runs every case once, in an order drawn anew, so that a drift of the machine meets all of them alike.
    `before` rounds go before as warm-up. Rounds end when the time is up, but there are `least` of them; the garbage
    collector runs between the timings, never within one.
    """
    order = random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in cases}
    gc.disable()
    try:
        for _ in range(before):
            for case in cases.values():
                _timed(case)
        gc.collect()
        gc.freeze()  # what stands is not walked again: that takes longer than a round, and empties the caches
        start, rounds = time.perf_counter(), 0
        while rounds < least or (rounds < most and time.perf_counter() - start < seconds):
            for name in order.sample(list(cases), len(cases)):
                taken[name].append(_timed(cases[name]))
            gc.collect()
            rounds += 1
    finally:
        gc.unfreeze()
        gc.enable()
    return {name: np.array(times) for name, times in taken.items()}


def _timed(case: Case) -> float:
    things = [case.setup() for _ in range(case.calls)]
    _finished()
    start = time.perf_counter()
    for thing in things:
        case.run(thing)
    _finished()
    return (time.perf_counter() - start) / case.calls


def _finished() -> None:
    """Wait for what a device still has to do; a CPU has done it."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass: each storage once, the model's own not at all."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage given back would lend its address to the next one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())


def peak_bytes(model: nn.Module, step: Callable[[], Any], optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes that are held at the worst moment of a step: the model, the optimizer's state, and what the step allocates.

    On CUDA it is `max_memory_allocated`, which counts whatever else lies on the device too. On a CPU every allocation
    and release that the profiler sees during the step is added up, those inside of operators included, on top of the
    bytes of the model and of the optimizer's state.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    from torch.profiler import ProfilerActivity, profile

    states = [] if optimizer is None else [t for s in optimizer.state.values() for t in s.values()]
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers(), *states)
        if isinstance(t, Tensor)
    }
    with _hushed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        step()
    events: Any = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return sum(held.values()) + most


@contextmanager
def _hushed() -> Iterator[None]:
    """The profiler of some builds writes two lines to the standard error stream, past Python's own."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def step_flops(model: nn.Module, step: Callable[[], Any]) -> int:
    """Floating point operations of a step, as `torch.utils.flop_counter` counts them: products and attentions."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: |accuracy - confidence| in bins of equal width, weighted by their rows.

    `logits` are (rows, classes); the confidence of a row is the softmax of its best class
    (https://arxiv.org/abs/1706.04599).
    """
    logits = np.asarray(logits, dtype=np.float64)
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    sure, right = share.max(-1), share.argmax(-1) == np.asarray(labels)
    bin_of = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = [np.abs(right[bin_of == i].mean() - sure[bin_of == i].mean()) * (bin_of == i).mean() for i in set(bin_of)]
    return float(sum(gaps))


@dataclass(frozen=True)
class Subject:
    """A model that stands ready to be trained, for measuring.

    Attributes:
        model: in train mode, on its device.
        loss: a forward pass over one batch in training, which gives the loss.
        forward: a forward pass over the same batch as it would be asked, without gradients.
        groups: what the optimizer gets.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    forward: Callable[[], Any]
    groups: list[Any]
    before_step: Callable[[], None] = lambda: None

    def stepper(self) -> tuple[Callable[[], None], torch.optim.Optimizer]:
        """A training step with AdamW, at a rate of zero so that measuring changes nothing, and the optimizer."""
        groups = [{**g, "lr": 0.0, "weight_decay": 0.0} if isinstance(g, dict) else g for g in self.groups]
        optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)

        def step() -> None:
            self.loss().backward()
            self.before_step()
            optimizer.step()
            optimizer.zero_grad()

        return step, optimizer


def costs(
    subject: Subject, full: Subject | None, bare: Subject, merged: Subject | None, rounds: int = 7
) -> dict[str, Any]:
    """`backward_bytes`, `peak_memory`, `flops`, `step`, `inference` and `inference_merged` of one method.

    Args:
        subject: what is measured, adapted. It is not changed but for what its `before_step` does.
        full: the same model with all its parameters training: the time of a step is a ratio to its step.
        bare: the model without an adapter, merged: the adapted model with its change in the weights, None where it
            cannot be.
        rounds: in which a step is timed; a forward pass is timed in twice as many. A ratio is the median of those of the
            rounds, so that what slows both sides of a round counts for neither.
    """
    found: dict[str, Any] = {"trainable": sum(p.numel() for g in subject.groups for p in _parameters(g))}
    if not found["trainable"]:
        return found | {"inference": 1.0}
    subject.model.train()
    found["backward_bytes"] = saved_bytes(subject.model, subject.loss)
    step, optimizer = subject.stepper()
    step()
    found["peak_memory"] = peak_bytes(subject.model, step, optimizer)
    found["flops"] = step_flops(subject.model, step)
    if full is None:
        found["step"] = 1.0
    else:
        full.model.train()
        beside, _ = full.stepper()
        cases = {"own": Case(lambda _: step()), "full": Case(lambda _: beside())}
        times = interleaved(cases, 0.0, least=rounds, before=1)
        found["step"] = float(np.median(times["own"] / times["full"]))
    del optimizer
    sides = {"bare": bare, "own": subject} | ({} if merged is None else {"merged": merged})
    with _evaluated(*sides.values()), torch.no_grad():
        cases = {name: Case(lambda _, s=side: s.forward()) for name, side in sides.items()}  # type: ignore[misc]
        times = interleaved(cases, 0.0, least=2 * rounds, before=1)
    ratio = {name: float(np.median(t / times["bare"])) for name, t in times.items()}
    return found | {"inference": ratio["own"], "inference_merged": ratio.get("merged")}


def merged_copy(model: nn.Module, name: str) -> nn.Module | None:
    """A copy of an adapted model with the adapter's change in its weights, or None where it cannot be merged."""
    import attunement as at

    made = copy.deepcopy(model)
    adapter = at.adapters(made)[name]
    try:
        adapter.merge(keep=False)
    except AttunementError:
        return None
    adapter.detach()
    return made


def _parameters(group: Any) -> list[Tensor]:
    return list(group["params"]) if isinstance(group, dict) else [group]


@contextmanager
def _evaluated(*subjects: Subject) -> Iterator[None]:
    for subject in subjects:
        subject.model.eval()
    try:
        yield
    finally:
        for subject in subjects:
            subject.model.train()
