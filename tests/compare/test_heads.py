"""Task heads beside a method: at the rate that the linear probe's search found, the same for all methods."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from attunement.compare import records, table
from attunement.compare.engine import Engine
from attunement.compare.study import entries
from attunement.compare.trial import Ground, trainer_of
from attunement.errors import AttunementError

pytestmark = pytest.mark.usefixtures("no_pictures")

OWN = {"attention.query": {"method": "lora", "rank": 3}, "head": {"method": "train", "rate": 3}, "as": "own"}
LORA = {"method": "lora", "rank": 3}
SEARCH = {"trials": 2, "spread": 2, "evaluations": 2, "low": 1e-3, "high": 1e-1, "known": False}


@pytest.fixture
def rates_of(tiny: Any) -> Any:
    """The rates in the optimizer of a trial, by whether they are those of the head."""

    def found(label: str, head_rate: float | None) -> dict[bool, set[float]]:
        study = tiny(methods=[LORA, OWN])
        ground = Ground("tiny", study.tasks["tiny"], study.search, study.folder)
        ground.head_rate = head_rate
        entry = next(one for one in entries(study) if one.label == label)
        made = ground.run(entry, 1e-3, 0, "search")
        trainer = trainer_of(made, entry, [])
        owner: Any = made.model if made.adapter is None else made.adapter
        heads = {id(parameter) for name, parameter in owner.named_parameters() if name.startswith("head.")}
        rates: dict[bool, set[float]] = {}
        for group in trainer.create_optimizer().param_groups:
            for parameter in group["params"]:
                rates.setdefault(id(parameter) in heads, set()).add(round(group["lr"], 9))
        return rates

    return found


def test_the_head_has_the_rate_that_is_given_whatever_is_trained_beside_it(rates_of: Any) -> None:
    for label in ("lora (rank=3)", "full fine-tuning"):
        assert rates_of(label, 0.05) == {True: {0.05}, False: {1e-3}}
        assert rates_of(label, None) == {True: {1e-3}, False: {1e-3}}
    assert rates_of("linear probe", 0.05) == {True: {1e-3}}, "its head is the method"
    assert rates_of("own", 0.05) == {True: {3e-3}, False: {1e-3}}, "its recipe says how the head is trained"


def test_every_trial_waits_for_the_rate_that_the_probe_finds(tiny: Any) -> None:
    study = tiny(methods=[LORA, OWN], search=SEARCH)
    Engine(study).work()
    found = records.read(study.folder)
    probe = [one for one in found.trials if one.label == "linear probe"]
    best = min((one for one in probe if one.stage == "search"), key=lambda one: (-(one.quality or 0), one.rate)).rate
    labels = {one.label for one in found.trials}
    rates = {label: {one.head_rate for one in found.trials if one.label == label} for label in labels}
    assert rates == {
        "zero-shot": {None},
        "linear probe": {None},
        "own": {None},
        "full fine-tuning": {best},
        "lora (rank=3)": {best},
    }
    row = next(row for row in table.rows(found)["tiny"] if row.label == "lora (rank=3)")
    recipe = yaml.safe_load(table.recipe(found, row))
    assert recipe["training"]["head_learning_rate"] == pytest.approx(best, rel=1e-5)
    tried = {one.rate for one in found.trials if one.label == row.label}
    assert any(recipe["training"]["learning_rate"] == pytest.approx(rate, rel=1e-5) for rate in tried)


def test_without_a_head_there_is_no_rate_of_it(tiny: Any) -> None:
    study = tiny(methods=[LORA], search=SEARCH)
    engine = Engine(study)
    assert engine.ground("tiny").heads
    engine.ground("tiny").heads = False  # as in a language model
    engine.work()
    assert {one.head_rate for one in records.read(study.folder).trials} == {None}


def test_two_processes_learn_of_the_same_rate(tiny: Any) -> None:
    study = tiny(methods=[LORA], search=SEARCH)
    first, second = Engine(study), Engine(study)
    job = first.next()
    assert job.line.entry.label == "zero-shot"  # type: ignore[union-attr]
    first.work()
    assert second.head_rate("tiny") == first.head_rate("tiny") > 0


def test_nobody_searches_before_the_probe_is_done(tiny: Any) -> None:
    engine = Engine(tiny(methods=[LORA], search=SEARCH))
    open_ = [line.entry.label for line in engine.lines if engine._open(line, 2)[1]]
    assert open_ == ["zero-shot", "linear probe"]
    engine = Engine(tiny(name="same", methods=[LORA], search={**SEARCH, "heads": "same"}))
    open_ = [line.entry.label for line in engine.lines if engine._open(line, 2)[1]]
    assert open_ == ["zero-shot", "linear probe", "full fine-tuning", "lora (rank=3)"]


def test_a_study_that_began_with_one_rate_for_both_does_not_go_on_with_two(tiny: Any) -> None:
    study = tiny(methods=[LORA], search={**SEARCH, "heads": "same"})
    engine = Engine(study)
    settings = study.settings()
    del settings["search"]["heads"]  # as it was written before there was a choice
    engine.base.head.set_user_attr("settings", json.loads(json.dumps(settings)))
    Engine(study)
    with pytest.raises(AttunementError, match=r"search\.heads was 'same' and is now 'probe'"):
        Engine(tiny(methods=[LORA], search=SEARCH))


def test_the_rate_of_heads_is_no_setting_of_the_training(tiny: Any) -> None:
    with pytest.raises(AttunementError, match=r"search\.heads"):
        tiny(training={"head_learning_rate": 0.1})
