"""Fairness: what is the same comes out the same, what is broken comes last, and all get the same trials."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

import attunement as at
from attunement.compare import records
from attunement.compare.engine import Engine
from attunement.compare.records import Trial
from attunement.compare.statistics import compare
from attunement.method import kaiming

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def broken() -> Iterator[str]:
    """A LoRA whose gradients are lost, while the test runs."""
    registry = sys.modules["attunement.method"]._registry  # type: ignore[attr-defined]
    before = dict(registry)

    @at.register("test/broken", source="here")
    class Broken(at.WeightMethod):
        placement = "attention.{query,value}"

        def tensors(self, site: Any) -> Any:
            return {"A": kaiming(4, site.inputs), "B": kaiming(site.outputs, 4) * 0}

        def factors(self, _: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
            return B, A

        def gradient(self, part: Any, name: str, g: Tensor) -> Tensor:
            return g * 0

    yield "broken"
    registry.clear()
    registry.update(before)


@pytest.fixture
def found(tiny: Any, broken: str) -> list[Trial]:
    lora = {"method": "lora", "rank": 2}
    study = tiny(
        methods=[
            {**lora, "as": "A new method"},
            {"attention.{query,value}": {"method": broken}, "head": None, "as": "broken"},
            "ia3",
            {**lora, "as": "LoRA"},
        ],
        rows=72,
        training={"num_train_epochs": 3, "per_device_train_batch_size": 8, "use_cpu": True},
        search={"trials": 4, "spread": 3, "evaluations": 3, "low": 3e-3, "high": 1e-1, "known": False},
        seeds=3,
    )
    Engine(study).work()
    return list(records.read(study.folder).trials)


def test_the_arena_is_fair(found: list[Trial]) -> None:
    def of(label: str, stage: str) -> list[Trial]:
        return [one for one in found if (one.label, one.stage) == (label, stage)]

    labels = {one.label for one in found if one.label != "zero-shot"}
    assert {len(of(label, "search")) for label in labels} == {4}
    assert {len(of(label, "final")) for label in labels} == {3}

    def figures(label: str) -> list[tuple]:
        both = of(label, "search") + of(label, "final")
        return [(one.stage, one.state, one.rate, one.seed, one.quality, one.calibration, one.curve) for one in both]

    assert figures("LoRA") == figures("A new method"), "one function under two names"
    values: Any = {label: {("tiny", one.seed): one.quality for one in of(label, "final")} for label in labels}
    others = {label: own for label, own in values.items() if label != "LoRA"}
    apart = compare(values["LoRA"], others)
    assert (apart["A new method"].mean, apart["A new method"].sure) == (0.0, False)

    mean = {label: statistics.mean(one.quality or 0.0 for one in of(label, "final")) for label in labels}
    last = min(mean, key=lambda label: mean[label])
    assert last == "broken", mean
    assert mean["broken"] < mean["LoRA"] - 0.1
