"""A dense change is added to a weight in working precision and never rounded away in another."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attunement as at


def products(net: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops()


@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 1), (torch.float64, 1), (torch.bfloat16, 2)])
def test_one_product_in_working_precision(dtype: torch.dtype, times: int) -> None:
    net, x = nn.Sequential(nn.Linear(16, 16)).to(dtype), torch.randn(5, 16).to(dtype)
    base = products(net, x)
    at.adapt(net, at.Sparse(density=0.5), on="0")
    assert products(net, x) == times * base
    with torch.autocast("cpu", torch.bfloat16, enabled=times == 1):
        assert products(net, x) == 2 * base


def test_a_change_below_the_rounding_of_the_weight_is_seen() -> None:
    net = nn.Sequential(nn.Linear(2, 1, bias=False)).bfloat16()
    nn.init.ones_(net[0].weight)
    (part,) = at.adapt(net, at.Sparse(density=1.0), on="0").parts
    part.tensor("values").fill_(1e-3)  # 1 + 1e-3 is 1 in bfloat16
    x = torch.tensor([[64.0, -64.0]], dtype=torch.bfloat16)
    part.tensor("values")[1] = 0
    torch.testing.assert_close(net(x).float(), torch.full((1, 1), 0.064), atol=1e-3, rtol=0)


def test_changes_that_read_the_weight_all_read_the_bases() -> None:
    net = nn.Sequential(nn.Linear(8, 8)).double()
    W, b = net[0].weight.detach().clone(), net[0].bias.detach()
    expected = W.clone()
    for name, weight in (("a", 0.5), ("b", -2.0)):
        (part,) = at.adapt(net, at.HiRA(rank=2), on="0", name=name).parts
        part.tensor("B").normal_()
        expected += weight * W * (part.tensor("B") @ part.tensor("A"))
    x = torch.randn(3, 8, dtype=torch.float64)
    at.use(net, at.Weighted({"a": 0.5, "b": -2.0}))
    torch.testing.assert_close(net(x), x @ expected.T + b)


def test_dropout_stays_on_the_input_of_the_change_alone() -> None:
    net = nn.Sequential(nn.Linear(8, 8)).double()
    adapter = at.adapt(net, at.HiRA(rank=2, dropout=0.9), on="0")
    x = torch.randn(64, 8, dtype=torch.float64)
    before = net.train()(x)
    torch.testing.assert_close(before, nn.functional.linear(x, net[0]._parameters["weight"], net[0].bias))
    adapter.parts[0].tensor("B").normal_()
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_an_embedding_looks_up_whole_tokens_whatever_the_dropout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4)).double().train()
    adapter = at.adapt(model, at.LoRA(rank=2, dropout=0.5), on="0")
    for parameter in adapter.parameters():
        parameter.data += torch.randn_like(parameter)
    tokens = torch.arange(7)
    out = model(tokens)
    assert torch.equal(out, model.eval()(tokens))
