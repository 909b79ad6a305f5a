"""Sparse: which entries, and nothing but them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attunement as at
from attunement.method import method_from

OUT, IN = 6, 10


def adapted(method: at.Method) -> tuple[Tensor, Tensor, Tensor]:
    """The weight before and after, and the positions, row by row."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, OUT, dtype=torch.float64))
    W = net[0].weight.detach().clone()
    adapter = at.adapt(net, method, on="0")
    (part,) = adapter.parts
    index = part.tensor("index").long()
    part.tensor("values").copy_(torch.arange(1, len(index) + 1))
    x = torch.randn(3, IN, dtype=torch.float64)
    expected = net(x)
    adapter.merge()
    torch.testing.assert_close(net(x), expected)
    return W, net[0].weight.detach(), index


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (at.Sparse(), 1),
        (at.Sparse(density=0.3), 18),
        (at.Sparse(lora_rank=2), 32),
        (at.Sparse(density=1.0, choice="smallest"), 60),
    ],
    ids=repr,
)
def test_changes_so_many_entries_and_no_other(method: at.Sparse, count: int) -> None:
    W, new, index = adapted(method)
    assert index.tolist() == sorted(set(index.tolist()))
    expected = torch.zeros(OUT * IN, dtype=torch.float64)
    expected[index] = torch.arange(1, count + 1, dtype=torch.float64)
    torch.testing.assert_close(new - W, expected.view(OUT, IN))


@pytest.mark.parametrize(("choice", "descending"), [("magnitude", True), ("smallest", False)])
def test_chooses_by_magnitude(choice: str, descending: bool) -> None:
    W, _, index = adapted(at.Sparse(density=0.2, choice=choice))
    assert set(index.tolist()) == set(W.abs().flatten().argsort(descending=descending)[:12].tolist())


def test_takes_the_entries_that_are_given() -> None:
    W, new, _ = adapted(at.Sparse(entries=((5, 9), (0, 3), (5, 9))))
    assert (new != W).nonzero().tolist() == [[0, 3], [5, 9]]


def test_chooses_what_peft_chooses_with_the_same_seed() -> None:
    functions = pytest.importorskip("peft.tuners.shira.mask_functions", reason="the peft package is the reference")
    mask = functions.random_mask(nn.Linear(IN, OUT), r=2, random_seed=7)
    _, _, index = adapted(at.Sparse(lora_rank=2, seed=7))
    assert torch.equal(mask.flatten().nonzero().flatten(), index)


@pytest.mark.parametrize(
    "method", [at.Sparse(lora_rank=2), at.Sparse(density=0.3), at.Sparse(entries=((1, 2),))], ids=repr
)
def test_what_says_the_count_is_read_back(method: at.Sparse) -> None:
    assert method_from(method.describe()) == method


def test_a_small_change_is_not_lost_in_bfloat16() -> None:
    """1 + 1e-3 is 1 in bfloat16, so the change must not go through the weight."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16))
    nn.init.ones_(net[0].weight)
    adapter = at.adapt(net, at.Sparse(entries=((1, 2),)), on="0")
    adapter.parts[0].tensor("values").fill_(1e-3)
    x = torch.tensor([[-1.0, 0.5, 1.0, -0.5]], dtype=torch.bfloat16)  # which the base makes zero
    assert net(x)[0].tolist() == pytest.approx([0, 1e-3, 0, 0], rel=1e-2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_rank": 4}, "lora_rank 4 is more entries than a 6 x 10 matrix has; the largest is 3"),
        ({"entries": ((0, 0), (6, 0))}, r"entry \(6, 0\) is outside of 6 x 10; the last is \(5, 9\)"),
    ],
)
def test_refuses_what_does_not_fit(fields: dict, words: str) -> None:
    with pytest.raises(at.AttunementError, match=words):
        at.adapt(nn.Sequential(nn.Linear(IN, OUT)), at.Sparse(**fields), on="0")
