"""Measuring callables side by side: interleaved rounds, medians, and the interval of their ratio."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One side of a comparison. `run` is timed and gets what `setup`, which is not, gives anew for every call."""

    run: Callable[[Any], Any]
    setup: Callable[[], Any] = lambda: None
    calls: int = 1
    """Calls to one timing, for what takes less than a few milliseconds; the timing is divided by it."""


def interleaved(cases: Mapping[str, Case], seconds: float, least: int = 15, most: int = 400) -> dict[str, np.ndarray]:
    """Seconds per call of each case, one number a round: (rounds,).

    Every round runs every case once, in an order drawn anew, so that a drift of the machine meets all of them alike.
    Three rounds go before as warm-up. Rounds end when the time is up, but there are `least` of them; the garbage
    collector runs between the timings, never within one.
    """
    order = random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in cases}
    gc.disable()
    try:
        for _ in range(3):
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
    start = time.perf_counter()
    for thing in things:
        case.run(thing)
    return (time.perf_counter() - start) / case.calls


Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]


def ratio_of(times: Mapping[str, np.ndarray], draws: int = 4000) -> tuple[float, float, float, float, float]:
    """(ours, theirs, their ratio, low, high) from medians, with the ratio's 95 % bootstrap interval.

    Where the bare model was timed too (a case "bare"), its median is first taken off both: the ratio of the overheads.
    Rounds are drawn whole, so that what slowed all cases of a round down counts once.
    """
    ours, theirs = times["ours"], times["peft"]
    bare = times.get("bare", np.zeros_like(ours))
    picks = np.random.default_rng(0).integers(len(ours), size=(draws, len(ours)))  # (draws, rounds)
    a, b, c = (np.median(t[picks], axis=1) for t in (ours, theirs, bare))  # (draws,)
    low, high = np.percentile((a - c) / (b - c), (2.5, 97.5))
    own, other = (float(np.median(t) - np.median(bare)) for t in (ours, theirs))
    return own, other, own / other, float(low), float(high)


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
