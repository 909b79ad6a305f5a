"""Poly against its formula: the task of each row, splits, draws while training, and the weight of one task."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attunement as at

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(0))
TASKS = torch.tensor([2, 0, 2])


def llama(method: at.Method, name: str = "poly") -> tuple[LlamaForCausalLM, at.Adapter]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, **SIZES)).double().eval()
    adapter = at.adapt(model, {"attention.query|mlp": method}, name=name)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, adapter


@torch.no_grad()
def test_mixes_skills_by_task_and_split():
    method = at.Poly(tasks=3, rank=2, skills=4, splits=2, alpha=3.0)
    _, adapter = llama(method)
    sizes = [(16, 16), (24, 16), (24, 16), (16, 24)]
    assert adapter.count() == sum(4 * 2 * (out + inputs) + 3 * 2 * 4 for out, inputs in sizes)
    assert {group["lr"] for group in adapter.groups(lr=1e-3)} == {1e-3, 0.1}
    adapter.give(task=TASKS)
    for part in adapter.parts:
        A, B, logits = (part.tensor(name) for name in ("A", "B", "logits"))
        z = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        for rows in (3, 6):  # windows of one row stand together
            x = torch.randn(rows, 5, part.site.inputs, dtype=torch.float64)
            for row, got in enumerate(part.site.module(x)):
                left, right = z[TASKS[row * 3 // rows]]  # the first half of the columns, or of the rows, and the second
                At = torch.cat(
                    [torch.einsum("s,sri->ri", *h) for h in zip((left, right), A.chunk(2, 2), strict=True)], 1
                )
                Bt = torch.cat([torch.einsum("s,sor->or", *h) for h in zip((left, right), B.chunk(2, 1), strict=True)])
                W = part.site.weight + 3.0 / 2 * Bt @ At
                torch.testing.assert_close(got, x[row] @ W.T)


@torch.no_grad()
def test_a_row_in_training_has_a_draw_of_its_own():
    model, adapter = llama(at.Poly(tasks=2))
    adapter.give(task=torch.tensor([1, 1, 1]))
    same = IDS[:1].expand(3, -1)
    still = model(same).logits
    torch.testing.assert_close(still[0], still[1])
    model.train()
    drawn = model(same).logits
    assert not torch.allclose(drawn[0], drawn[1])
    adapter.give(task=1)  # one draw for all
    drawn = model(same).logits
    torch.testing.assert_close(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], still[0])

    model, adapter = llama(at.Poly(tasks=2, relaxed=False))
    adapter.give(task=1)
    torch.testing.assert_close(model.train()(same).logits, still)


@torch.no_grad()
def test_a_weight_is_of_one_task():
    model, adapter = llama(at.Poly(tasks=3, rank=2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = []
    for task in range(3):
        adapter.give(task=task)
        outputs.append(model(IDS).logits)
        adapter.merge()
        torch.testing.assert_close(model(IDS).logits, outputs[-1])
        adapter.unmerge()
    adapter.give(task=TASKS)
    torch.testing.assert_close(model(IDS).logits, torch.stack([outputs[t][row] for row, t in enumerate(TASKS)]))
    with pytest.raises(at.AttunementError, match="one matrix is of one task, and one each is told for 3 rows"):
        adapter.merge()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_the_task_reaches_it_beside_another_change_of_the_weight():
    model, adapter = llama(at.Poly(tasks=3))
    at.adapt(model, at.LoRA(rank=2), on="attention.query|mlp", name="lora")
    alone, beside = [], []
    for active in ("poly", at.Sum("poly", "lora")):
        at.use(model, active)
        for task in range(3):
            adapter.give(task=task)
            (alone if active == "poly" else beside).append(model(IDS).logits)
    torch.testing.assert_close(alone, beside)  # LoRA is at its start
    at.use(model, at.Rows([at.Sum("poly", "lora"), "lora", None]))
    for task in range(3):
        adapter.give(task=task)
        torch.testing.assert_close(model(IDS).logits[0], alone[task][0])


def test_says_what_it_is_not_told():
    model, adapter = llama(at.Poly(tasks=3))
    with pytest.raises(at.AttunementError, match="which of its 3 tasks"):
        model(IDS)
    adapter.give(task=3)
    with pytest.raises(at.AttunementError, match="from 0 to 2, got 3"):
        model(IDS)
    adapter.give(task=torch.tensor([0, 1]))
    with pytest.raises(at.AttunementError, match="told for 2 rows, and x has 3"):
        model(IDS)
    with pytest.raises(at.AttunementError, match="the nearest that does is 4"):
        at.adapt(model, at.Poly(splits=5), on="attention.query", name="other")
