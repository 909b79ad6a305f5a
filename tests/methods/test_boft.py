"""BOFT against the product of permuted block-diagonal matrices that its authors' code writes out, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attunement as at

OUT = 5


def permutation(inputs: int, b: int, level: int) -> Tensor:
    """P with P[a, order[a]] = 1: within b * 2^level inputs the halves at even places, then those at odd ones."""
    if not level:
        return torch.eye(inputs, dtype=torch.float64)
    halves = torch.arange(inputs).view(-1, 2 ** (level + 1), b // 2)
    return torch.eye(inputs, dtype=torch.float64)[torch.cat((halves[:, 0::2], halves[:, 1::2]), dim=1).flatten()]


def rotation(Q: Tensor, b: int, inputs: int) -> Tensor:
    R = torch.eye(inputs, dtype=torch.float64)
    for level, blocks in enumerate(Q):
        made = []
        for upper in blocks:
            S = torch.zeros(b, b, dtype=Q.dtype)
            S[tuple(torch.triu_indices(b, b, 1))] = upper
            S = S - S.T
            made.append((torch.eye(b) + S) @ torch.linalg.inv(torch.eye(b) - S))
        P = permutation(inputs, b, level)
        R = P @ torch.block_diag(*made) @ P.T @ R
    return R


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("inputs", "b", "levels"), [(16, 4, 3), (16, 4, 2), (24, 2, 3), (9, 3, 1)])
def test_is_the_product_of_the_authors_code(inputs: int, b: int, levels: int, scaled: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, OUT, dtype=torch.float64))
    W, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    adapter = at.adapt(model, at.BOFT(block_size=b, levels=levels, scaled=scaled), on="0")
    (part,) = adapter.parts
    Q = part.tensor("Q").normal_(0, 0.3)
    s = part.tensor("scale").normal_(1, 0.3) if scaled else torch.ones(OUT, dtype=torch.float64)
    R, x = rotation(Q, b, inputs), torch.randn(4, inputs, dtype=torch.float64)
    expected = (x @ R @ W.T) * s + bias
    torch.testing.assert_close(model(x), expected)
    adapter.merge()
    torch.testing.assert_close(model[0].weight.detach(), s[:, None] * W @ R.T)
    torch.testing.assert_close(model(x), expected)
    assert adapter.count() == levels * inputs * (b - 1) // 2 + (OUT if scaled else 0)
    mixed = (R.abs() > 1e-12).sum(1)
    assert (mixed == b * 2 ** (levels - 1)).all()


@pytest.mark.parametrize(
    ("inputs", "fields", "words"),
    [
        (12, {"block_size": 3, "levels": 2}, "no halves"),
        (12, {"block_size": 8}, "does not divide its 12 inputs; the nearest that does is 6"),
        (24, {"block_size": 4, "levels": 3}, "the most are 2"),
    ],
)
def test_refuses_what_does_not_fit(inputs: int, fields: dict[str, int], words: str) -> None:
    with pytest.raises(at.AttunementError, match=words):
        at.adapt(nn.Sequential(nn.Linear(inputs, 3)), at.BOFT(**fields), on="0")
