"""A study that nobody ran: sixty methods on two tasks, with pruned, failed and diverged trials, for tests of the report.

Two of the methods are the same function under two names, `same_as` says which.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy

from attunement.compare import records
from attunement.compare.records import Trial

NAMES = """
bottleneck: adapter_bias bottleneck hyperformer compacter krona adapter_drop
low_rank: lora rslora pissa olora adalora autolora bone corda delora dora eva gralora hira increlora loha lokr miss
          randlora svfit vb_lora vera vb_lora_plus lora_fa lora_xs sharelora lotr mos nola
orthogonal: boft clover hra oft osf road tarot
prompts: dept llama_adapter p_tuning prefix prompt vpt
scaling: ia3 ssf layer_scale
selective: ist lisa bitfit norms
side: lst unipt vqt
sparse: lt_sft sparse
spectral: c3a fourierft waveft
"""
SAME = ("low_rank/lora", "LoRA again")
"""A method and the label under which it takes part a second time."""
BROKEN = "selective/norms"
FAILING = "spectral/c3a"
UNSTABLE = "low_rank/hira"
SHAPES = {  # of a family: exponent of the trainable numbers, share of backward bytes, of a step's time, quality
    "baseline": (7.35, 1.0, 1.0, 0.0),
    "bottleneck": (5.6, 0.62, 0.72, 0.01),
    "low_rank": (5.1, 0.66, 0.78, 0.012),
    "orthogonal": (5.2, 0.68, 0.95, 0.006),
    "prompts": (4.4, 0.74, 0.9, -0.05),
    "scaling": (4.3, 0.60, 0.68, -0.03),
    "selective": (5.9, 0.55, 0.6, -0.01),
    "side": (5.8, 0.12, 0.35, -0.04),
    "sparse": (5.0, 0.95, 1.1, 0.0),
    "spectral": (4.2, 0.70, 0.85, -0.02),
}
FULL_BACKWARD, FULL_PEAK, FULL_FLOPS = 96_000_000, 610_000_000, 41_000_000_000
TASKS = {"banking77": ("accuracy", 0.82, 20), "mrpc": ("f1", 0.86, 12)}


def names(count: int = 60) -> list[str]:
    """`family/name` of `count` methods; the ones that tests look for come first."""
    found = []
    for line in NAMES.replace("\n          ", " ").strip().splitlines():
        family, _, words = line.partition(":")
        found += [f"{family}/{word}" for word in words.split()]
    first = [SAME[0], BROKEN, FAILING, UNSTABLE, "scaling/ia3", "side/lst"]
    return [*first, *(name for name in found if name not in first)][:count]


def study(
    count: int = 60, tasks: int = 2, seeds: int = 3, search: int = 6, seed: int = 0
) -> tuple[dict[str, Any], list[Trial]]:
    """The settings and the trials of a made-up study of `count` methods and the three baselines."""
    chosen = dict(list(TASKS.items())[:tasks])
    settings = {
        "name": "made up",
        "tasks": {name: {"model": "all-MiniLM-L6-v2", "data": {"train": f"{name}.csv"}} for name in chosen},
        "methods": names(count),
        "search": {"trials": search, "low": 1e-4, "high": 3e-2, "pruner": True},
        "seeds": seeds,
        "budget": None,
    }
    entries = [(name, name.partition("/")[2].replace("_", " ")) for name in names(count)]
    entries = [*entries[: count - 1], SAME] if count > 1 else entries
    entries += [
        ("baseline/full", "full fine-tuning"),
        ("baseline/probe", "linear probe"),
        ("baseline/zero-shot", "zero-shot"),
    ]
    trials: list[Trial] = []
    for task, (metric, top, steps) in chosen.items():
        for method, label in entries:
            trials += _method(f"{seed}{task}", task, metric, top, steps * 30, method, label, seeds, search)
    return settings, [*trials]


def write(folder: Path, **how: Any) -> Path:
    """A study in a folder, as the arena leaves it."""
    settings, trials = study(**how)
    records.write(folder, settings, trials)
    return folder


def _method(
    salt: str, task: str, metric: str, top: float, steps: int, method: str, label: str, seeds: int, search: int
) -> list[Trial]:
    # a name seeds its own numbers, so that the same method under two names has the same ones
    own = numpy.random.default_rng(sum(ord(c) * 31**i for i, c in enumerate(f"{salt}{method}")) % 2**32)
    family, _, name = method.partition("/")
    exponent, backward, step, shift = SHAPES[family]
    best = top + shift + own.normal(0, 0.012)
    width, centre = own.uniform(0.5, 1.1), own.uniform(-3.4, -2.1)
    if name == "full":
        best, centre = top, -3.6
    if name == "probe":
        best, exponent, backward, step = top - 0.11, 4.5, 0.01, 0.3
    if name == "zero-shot":
        best, exponent, backward, step = 0.31, -9, 0.0, 0.0
    if method == BROKEN:
        best = 0.02
    if method == SAME[0]:
        best, centre = top + 0.012, -2.8
    trainable = 0 if name == "zero-shot" else int(10 ** (exponent + own.normal(0, 0.25 if family != "baseline" else 0)))
    costs = {
        "trainable": trainable,
        "saved_bytes": trainable * 4 + (900 if trainable else 0),
        "backward_bytes": int(FULL_BACKWARD * backward * own.uniform(0.6, 1.3)),
        "peak_memory": int(FULL_PEAK * (0.35 + 0.5 * backward) + 12 * trainable),
        "flops": int(FULL_FLOPS * (0.34 + 0.66 * step)),
    }
    ratio, merged = step * own.uniform(0.8, 1.3), family in ("low_rank", "orthogonal", "spectral", "sparse")
    adapter = (
        {"method": method} if family == "baseline" else {"method": method, "rank": 8, "on": "attention.{query,value}"}
    )
    base = {"task": task, "method": method, "label": label, "recipe": json.dumps(adapter), "metric": metric}

    def made(stage: str, number: int, rate: float, used: int, **more: Any) -> Trial:
        fall = ((math.log10(rate) - centre) / width) ** 2 if name not in ("probe", "zero-shot") else 0.0
        reach = max(best - 0.12 * fall, 0.02)
        quality = float(numpy.round(min(reach + own.normal(0, 0.0045), 0.999) * 3080) / 3080)
        done = more.get("state", "done") == "done"
        marks = []
        for i in range(0, used + 1, max(steps // 20, 1)):
            share = i / steps
            loss = 0.25 + 3.9 * math.exp(-5 * share) * (1 + 0.3 * fall) + own.normal(0, 0.03)
            seen = quality * (1 - math.exp(-6 * share)) if i % max(steps // 10, 1) == 0 else None
            marks.append((i, loss, seen))
        if name == "zero-shot":
            marks = []
        values = {
            "quality": quality if done else None,
            "calibration": float(abs(own.normal(0.05, 0.02))) if done else None,
            "forgetting": float(abs(own.normal(0.2 * backward, 0.05))) if done else None,
            "step": ratio * own.uniform(0.98, 1.02) if name != "full" else 1.0,
            "inference": float(own.uniform(1.0, 1.3)) if family != "baseline" else 1.0,
            "inference_merged": float(own.uniform(0.99, 1.01)) if merged else None,
            "seconds": 20 * step * used / steps + 2,
        }
        where = f"{task}:{label}:{stage}:{number}"
        return Trial(
            id=where, stage=stage, rate=rate, steps=used, curve=tuple(marks), **base, **costs, **(values | more)
        )

    if name == "zero-shot":
        return [_still(made("final", 0, 1e-3, 1))]
    if method == FAILING:
        error = "RuntimeError: The size of tensor a (384) must match the size of tensor b (1536) at dimension 1"
        return [
            Trial(
                id=f"{task}:{label}:search:{i}",
                stage="search",
                rate=10 ** (-4 + 0.4 * i),
                state="failed",
                error=error,
                **base,
            )
            for i in range(search)
        ]
    trials, finished = [], []
    for i in range(search):
        rate = float(10 ** own.uniform(-4, math.log10(3e-2)))
        if method == UNSTABLE and rate > 3e-3:
            error = "the loss became nan at step 41"
            trials.append(made("search", i, rate, 41, state="diverged", error=error))
        elif i > 1 and abs(math.log10(rate) - centre) > 0.75:
            trials.append(made("search", i, rate, steps // 5, state="pruned"))
        else:
            trials.append(made("search", i, rate, steps))
            finished.append(trials[-1])
    chosen = max(finished, key=lambda trial: trial.quality or 0).rate if finished else 10**centre
    for i in range(seeds):
        if method == UNSTABLE and i == 1:
            trials.append(
                made("final", i, chosen, 77, seed=i, state="diverged", error="the loss became nan at step 77")
            )
        else:
            trials.append(made("final", i, chosen, steps, seed=i))
    return trials


def _still(trial: Trial) -> Trial:
    """A trial that trained nothing."""
    import dataclasses

    return dataclasses.replace(trial, rate=None, steps=0, step=None, seconds=1.0)
