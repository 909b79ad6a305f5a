"""The smallest random subspace that is enough, found by bisection; the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attunement as at
from attunement.adapter import Adapter


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias=False))


def test_it_finds_the_first_size_that_reaches_the_target() -> None:
    model, tried = net(), []
    W = model[0].weight.detach().clone()

    def score(adapter: Adapter) -> float:
        tried.append(adapter.parts[0].method.size)
        assert adapter.count() == tried[-1]
        for parameter in adapter.parameters():
            parameter.data += 1
        return min(tried[-1] / 50, 1.0)

    found = at.intrinsic_dimension(model, score, full=1.0, sizes=(5, 10, 20, 45, 60, 80), on="0", structured=False)
    assert found.size == 45
    assert found.target == 0.9
    assert len(tried) == 3
    assert found.scores == {size: min(size / 50, 1.0) for size in sorted(tried)}
    assert torch.equal(model[0].weight, W)
    assert not at.adapters(model)
    assert at.intrinsic_dimension(model, lambda adapter: 0.0, full=1.0, sizes=(5,), on="0").size is None


def test_a_linear_map_needs_as_many_dimensions_as_it_has_entries() -> None:
    model = net()
    x = torch.randn(64, 8)
    y = x @ torch.randn(8, 8)

    def score(adapter: Adapter) -> float:
        before = float((model(x) - y).square().mean())
        optimizer = torch.optim.LBFGS(adapter.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return 1 - float(closure()) / before

    found = at.intrinsic_dimension(model, score, full=1.0, share=0.99, sizes=(4, 16, 32, 64), on="0", structured=False)
    assert found.size == 64
    assert found.scores[64] > 0.999


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sizes": (10, 5)}, "sizes must ascend, got"),
        ({"share": 0.0}, "share must be above 0"),
        ({"score": lambda adapter: float("nan")}, "the score of 5 dimensions is nan"),
        ({"on": "1"}, "Nothing in Sequential matches"),
    ],
)
def test_refuses(wrong: dict, words: str) -> None:
    model = net()
    given = {"score": lambda adapter: 1.0, "full": 1.0, "sizes": (5,), "on": "0"} | wrong
    with pytest.raises(at.AttunementError, match=words):
        at.intrinsic_dimension(model, **given)
    assert not at.adapters(model)
