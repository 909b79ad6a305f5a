"""Recipes by name: what trains under each, by the names of the model's parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import attunement as at
from attunement.root import bench_of


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))


def trained(model: nn.Module, recipe: Any) -> set[str]:
    """The base's parameters that have a part in the adapter."""
    adapter = at.adapt(model, recipe)
    return {f"{part.site.name}.{part.site.parameter}" for part in adapter.parts}


HEAD = {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        (at.recipes.bitfit(), lambda name: name.endswith("bias")),
        (at.recipes.norm_tuning(), lambda name: "LayerNorm" in name),
        (at.recipes.attention_tuning(), lambda name: ".attention." in name and "LayerNorm" not in name),
        (at.recipes.linear_probe(), lambda name: name in HEAD),
        (at.recipes.full(), lambda name: True),
    ],
)
def test_trains_these_and_the_head(recipe: Any, wanted: Any) -> None:
    model = bert()
    names = {name for name, _ in model.named_parameters()}
    assert trained(model, recipe) == {name for name in names if wanted(name)} | HEAD


def test_lora_everywhere_takes_the_matrices_of_every_block() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )
    names = {name for name, parameter in model.named_parameters() if "layers." in name and parameter.dim() == 2}
    assert trained(model, at.recipes.lora_everywhere(rank=4)) == names


def test_new_tokens_train_and_old_ones_stay() -> None:
    model = bert()
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    adapter = at.adapt(model, {**at.recipes.new_tokens(2), "head": None})
    model(input_ids=torch.tensor([[5, 62, 63]])).logits.sum().backward()
    (gradient,) = (parameter.grad for parameter in adapter.parameters())
    assert gradient.shape == (2, 16)
    assert (gradient.abs().sum(1) > 0).all()
    with torch.no_grad():
        next(iter(adapter.parameters())).add_(1.0)
    now = model.get_input_embeddings().weight
    assert torch.equal(now[:62], before[:62])
    torch.testing.assert_close(now[62:], before[62:] + 1)


def test_heads_compose_as_changes_of_the_head() -> None:
    torch.manual_seed(0)
    model = bert().eval()
    heads: dict[str | None, torch.Tensor] = {None: model.classifier.weight.detach().clone()}
    for name in "ab":
        adapter = at.adapt(model, at.LoRA(rank=2), on="attention.query", name=name)
        for parameter in adapter.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        heads[name] = adapter.state()["classifier.weight.copy"].clone()
    base, a, b = heads.values()
    wanted = {
        at.Sum("a", "b"): a + b - base,
        at.Stack("a", "b"): b,
        at.Weighted({"a": 0.7, "b": 0.3}): 0.7 * a + 0.3 * b,
        at.Average("a", "b"): (a + b) / 2,
    }
    for active, head in wanted.items():
        with at.using(model, active), torch.no_grad():
            assert bench_of(model).active == active
            own = model.classifier(torch.eye(16)) - model.classifier(torch.zeros(1, 16))
        torch.testing.assert_close(own.T, head, atol=1e-5, rtol=1e-5)


def test_without_an_active_adapter_a_merged_one_still_stands_in_the_weights() -> None:
    torch.manual_seed(0)
    model, ids = bert().eval(), torch.arange(5, 11).view(2, 3)
    for name in "ab":
        for parameter in at.adapt(model, at.LoRA(rank=2), on="attention.query", name=name).parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))

    def logits(active: Any) -> torch.Tensor:
        with at.using(model, active), torch.no_grad():
            return model(ids).logits

    with_a, stacked, bare = logits("a"), logits(at.Stack("a", "b")), logits(None)
    at.adapters(model)["a"].merge()
    torch.testing.assert_close(logits(None), with_a)
    torch.testing.assert_close(logits("b"), stacked)
    at.adapters(model)["a"].unmerge()
    assert torch.equal(logits(None), bare)


@pytest.mark.parametrize("count", [0, -1, True, 1.5])
def test_refuses_a_count_of_tokens(count: Any) -> None:
    with pytest.raises(at.AttunementError, match="positive whole number"):
        at.recipes.new_tokens(count)
