"""Methods that measure losses of their own are given what they measure with, and a resumed run measures the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_trainer import arguments, model, rows, values

import attunement as at

MEASURING = {
    "autolora": at.AutoLoRA(rank=4),
    "flexora": at.Flexora(rank=2, batches=2),
    "ramt": at.RAMT(norm=0.0),
}


class Watched(at.Trainer):
    """Keeps the rows of every batch, by whether it was trained on or measured on."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.trained: list[set[tuple[int, ...]]] = []
        self.measured: list[set[tuple[int, ...]]] = []
        self.measuring = False

    def _loss_on(self, *args: Any) -> torch.Tensor:
        self.measuring = True
        try:
            return super()._loss_on(*args)
        finally:
            self.measuring = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = {tuple(row) for row in inputs["input_ids"].tolist()}
        if self.measuring or model.training:
            (self.measured if self.measuring else self.trained).append(found)
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("name", MEASURING)
def test_a_run_that_stopped_goes_on_to_the_same_weights(tmp_path: Path, name: str) -> None:
    straight = model()
    adapter = at.adapt(straight, MEASURING[name])
    at.Trainer(straight, arguments(tmp_path, save_steps=2, save_strategy="steps"), train_dataset=rows()).train()
    expected = values(adapter)
    assert adapter.objective is None, "nothing of the trainer stays"

    again = model()
    resumed = at.adapt(again, MEASURING[name])
    trainer = at.Trainer(again, arguments(tmp_path, save_strategy="no"), train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = values(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["autolora", "flexora"])
def test_what_is_measured_on_is_never_trained_on_until_the_next_phase(tmp_path: Path, name: str) -> None:
    adapted, data = model(), rows(40)
    at.adapt(adapted, MEASURING[name])
    trainer = Watched(adapted, arguments(tmp_path, save_strategy="no"), train_dataset=data)
    trainer.train()
    steps = -(-28 // 8)  # 30 % of 40 rows are held out
    first, second = set().union(*trainer.trained[:steps]), set().union(*trainer.trained[steps:])
    measured = set().union(*trainer.measured)
    everything = {tuple(row) for row in data["input_ids"]}
    assert len(first) == 28
    assert measured
    assert measured <= everything - first
    assert second == everything
    if name == "flexora":
        assert trainer.measured[0] != trainer.measured[1], "each batch of a step is another"
    assert trainer.train_dataset is data
    assert trainer.held is None


def test_the_departure_is_that_of_the_predictions_from_the_bare_models(tmp_path: Path) -> None:
    adapted = model()
    bare = model()
    bare.load_state_dict(adapted.state_dict())
    adapter = at.adapt(adapted, at.RAMT())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(torch.rand_like(parameter))  # about half of the masks are off
    found: list[tuple[float, float]] = []

    class Compared(at.Trainer):
        def departure(self) -> torch.Tensor:
            measured = super().departure()
            ids = self.step_inputs["input_ids"]  # type: ignore[index]
            with torch.no_grad():
                ours, theirs = adapted.eval()(input_ids=ids).logits, bare.eval()(input_ids=ids).logits
                adapted.train()
            found.append((measured.item(), float(F.cross_entropy(ours, theirs.softmax(-1)))))
            return measured

    adapted.config.hidden_dropout_prob = 0.0
    for module in [*adapted.modules(), *bare.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    Compared(adapted, arguments(tmp_path, save_strategy="no"), train_dataset=rows(16)).train()
    assert len(found) == 2
    for measured, expected in found:
        assert measured == pytest.approx(expected, abs=1e-5)


def test_rows_cannot_be_held_out_of_a_stream(tmp_path: Path) -> None:
    adapted = model()
    at.adapt(adapted, at.AutoLoRA(rank=2))
    stream = rows().to_iterable_dataset()
    trainer = at.Trainer(adapted, arguments(tmp_path, save_strategy="no", max_steps=2), train_dataset=stream)
    with pytest.raises(at.AttunementError, match="not of a stream; set the adapter's objective"):
        trainer.train()
