"""What is measured, against what can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from attunement.compare import measure


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 32, bias=False))


def subject(model: nn.Module, rows: int = 16) -> measure.Subject:
    x = torch.ones(rows, 64)
    trained = [p for p in model.parameters() if p.requires_grad]
    return measure.Subject(model, lambda: model(x).sum(), lambda: model(x), trained)


def test_bytes_kept_for_backward_are_each_storage_once(model: nn.Module) -> None:
    x = torch.ones(16, 64)
    kept = measure.saved_bytes(model, lambda: model(x).sum())
    assert kept == 4 * (16 * 64 + 16 * 128), "the input and what tanh gives; the weights are the model's own"
    model[0].weight.requires_grad_(False)
    assert measure.saved_bytes(model, lambda: model(x).sum()) == 4 * 16 * 128


def test_flops_of_a_step(model: nn.Module) -> None:
    step, _ = subject(model).stepper()
    forward = 2 * 16 * (64 * 128 + 128 * 32)
    backward = 2 * 16 * (64 * 128 + 2 * 128 * 32)  # nothing goes to the input
    assert measure.step_flops(model, step) == forward + backward


def test_the_peak_holds_model_state_gradients_and_activations() -> None:
    big = nn.Linear(1000, 1000, bias=False)
    x = torch.ones(500, 1000)
    one = measure.Subject(big, lambda: big(x).sum(), lambda: big(x), list(big.parameters()))
    step, optimizer = one.stepper()
    step()
    weight, activation = 4_000_000, 2_000_000
    peak = measure.peak_bytes(big, step, optimizer)
    assert peak >= 3 * weight + weight, "the weight, Adam's two states, the gradient"
    assert peak < 8 * weight + 3 * activation
    big.requires_grad_(False)
    idle = measure.peak_bytes(big, lambda: big(x))
    assert weight + activation <= idle < 2 * weight


def test_what_a_method_costs_beside_full_fine_tuning(model: nn.Module) -> None:
    import copy

    full, bare = subject(copy.deepcopy(model)), subject(copy.deepcopy(model))
    model[0].weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = measure.costs(subject(model), full, bare, None)
    assert found["trainable"] == 128 * 32
    assert found["step"] > 0
    assert found["inference"] == pytest.approx(1.0, abs=0.9)
    assert found["inference_merged"] is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "measuring changes nothing"


def test_what_slows_both_sides_of_a_round_counts_for_neither(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    import copy

    slow = np.array([1.0, 10.0, 1.0, 10.0, 10.0])

    def rounds(cases: dict, *_: object, **__: object) -> dict:
        return {name: (0.5 if name == "own" else 1.0) * slow for name in cases}

    monkeypatch.setattr(measure, "interleaved", rounds)
    found = measure.costs(subject(model), subject(copy.deepcopy(model)), subject(copy.deepcopy(model)), None)
    assert (found["step"], found["inference"]) == (0.5, 0.5)


def test_calibration_error() -> None:
    sure = np.log(np.array([[0.9, 0.1]] * 10))
    assert measure.calibration_error(sure, np.array([0] * 9 + [1])) == pytest.approx(0.0, abs=1e-9)
    assert measure.calibration_error(sure, np.array([0] * 5 + [1] * 5)) == pytest.approx(0.4)
    assert measure.calibration_error(np.array([[800.0, 0.0]]), np.array([1])) == pytest.approx(1.0)
    draw = np.random.default_rng(0)
    share = draw.uniform(0.5, 1.0, 20000)
    labels = (draw.uniform(size=20000) > share).astype(int)
    logits = np.log(np.stack([share, 1 - share], 1))
    assert measure.calibration_error(logits, labels) < 0.02


def test_timings_are_interleaved() -> None:
    order: list[str] = []
    cases = {name: measure.Case(lambda _, n=name: order.append(n)) for name in "ab"}
    times = measure.interleaved(cases, 0.0, least=4, before=1)
    assert [len(times[name]) for name in "ab"] == [4, 4]
    assert all(sorted(order[i : i + 2]) == ["a", "b"] for i in range(0, 10, 2))
