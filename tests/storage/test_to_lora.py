"""Conversion to plain LoRA: exact where the factors allow, else the best of that rank with its error said."""

import pytest
import torch
from torch import nn

import attunement as at


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6)).double().eval()


def perturbed(adapter):
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    return adapter


X = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "method", [at.LoRA(rank=3, alpha=6), at.HRA(rank=4), at.VeRA(rank=5), at.SVFit(rank=2)], ids=repr
)
def test_factors_convert_exactly(model, method):
    adapter = perturbed(at.adapt(model, {"*": method, "head": None}, name="a"))
    wanted = model(X)
    lora = at.to_lora(adapter)
    assert at.adapters(model)["a-lora"] is lora
    assert {type(part.method) for part in lora.parts} == {at.LoRA}
    assert lora.info["error"] == 0
    assert torch.allclose(model(X), wanted, atol=1e-10)
    lora.merge()
    assert torch.allclose(model(X), wanted, atol=1e-10)


def test_full_rank_is_cut_with_its_error(model):
    adapter = perturbed(at.adapt(model, {"*": at.DoRA(rank=2), "head": None}, name="a"))
    wanted = model(X)
    with pytest.raises(at.AttunementError, match="which rank"):
        at.to_lora(adapter)
    whole = at.to_lora(adapter, rank=12, name="whole")
    assert whole.info["error"] < 1e-10
    assert torch.allclose(model(X), wanted, atol=1e-9)
    cut = at.to_lora(adapter, rank=1, name="cut")
    base = {part.key: part.site.weight for part in adapter.parts}
    for part in adapter.parts:
        D = part.value(base[part.key]) - base[part.key]
        twin = next(p for p in cut.parts if p.key == part.key)
        error = torch.linalg.norm(D - twin.change(base[part.key])) / torch.linalg.norm(D)
        assert abs(float(error) - cut.info["errors"][part.key]) < 1e-9
        assert 0 < error < 1


def test_a_trained_head_comes_along(model):
    adapter = perturbed(at.adapt(model, {"0": at.LoRA(rank=2), "2": at.Train()}, name="a"))
    wanted = model(X)
    at.to_lora(adapter)
    assert torch.allclose(model(X), wanted, atol=1e-10)


def test_what_lora_cannot_be(model):
    adapter = perturbed(at.adapt(model, {"*": at.SSF(), "head": None}, name="a"))
    with pytest.raises(at.AttunementError, match="bias"):
        at.to_lora(adapter, rank=2)
    bottleneck = at.adapt(model, at.Bottleneck(size=2), on="0", name="b")
    with pytest.raises(at.AttunementError, match="Bottleneck"):
        at.to_lora(bottleneck, rank=2)
    assert list(at.adapters(model)) == ["a", "b"]


@pytest.mark.parametrize("method", [at.DoRA(rank=2), at.HiRA(rank=2), at.IA3(side="output")], ids=repr)
def test_what_reads_the_weight_is_refused_while_something_is_merged_there(model, method):
    adapter = perturbed(at.adapt(model, {"0": method}, name="a"))
    adapter.merge()
    with pytest.raises(at.AttunementError, match="'a' is merged; unmerge it first"):
        at.to_lora(adapter, rank=2)
    assert list(at.adapters(model)) == ["a"]


def test_lora_converts_while_merged(model):
    adapter = perturbed(at.adapt(model, {"0": at.LoRA(rank=2)}, name="a"))
    wanted = model(X)
    adapter.merge()
    at.to_lora(adapter)
    adapter.unmerge()
    at.use(model, "a-lora")
    assert torch.allclose(model(X), wanted, atol=1e-10)
