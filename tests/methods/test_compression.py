"""Factorised layers, tied blocks, and batch norms of a new domain."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import attunement as at
from attunement import batch_norm
from attunement.compression import LowRankLinear, drift, factorise, relax, tie

IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(3))
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=4, **SIZES, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaForCausalLM(config).double().eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).double().eval()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_factorised_layers_have_the_published_rank_and_are_the_truncated_svd(make):
    model, original = make(), make()
    done = factorise(model, ratio=2.0)
    assert done.before == sum(p.numel() for p in original.parameters())
    assert done.after == sum(p.numel() for p in model.parameters()) < done.before
    name = done.matrices[-1]
    layer, old = model.get_submodule(name), original.get_submodule(name)
    W = old.weight if make is llama else old.weight.T  # (out, in)
    out, inputs = W.shape
    rank = out * inputs // (2 * (out + inputs))
    assert isinstance(layer, LowRankLinear)
    assert layer[0].weight.shape == (rank, inputs)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(layer.weight, U[:, :rank] * S[:rank] @ Vh[:rank])
    torch.testing.assert_close(layer[0].weight.norm(dim=1), S[:rank].sqrt())
    assert model(IDS).logits.shape == original(IDS).logits.shape
    assert 0 < done.error < 1
    largest = [(model.get_submodule(n).weight - (w if make is llama else w.T)).abs().max() for n in done.matrices
               for w in [original.get_submodule(n).weight]]  # fmt: skip
    torch.testing.assert_close(drift(model, original), torch.stack([(e - 1e-3) ** 2 for e in largest]).mean())
    empty = make()
    factorise(empty, ratio=2.0, values=False)
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(IDS).logits, model(IDS).logits)
    base = model(IDS).logits
    adapter = at.adapt(model, at.LoRA(rank=2), on="type:Linear")
    assert any(part.site.name.endswith(".0") for part in adapter.parts)
    torch.testing.assert_close(model(IDS).logits, base)


def test_factorise_says_what_it_cannot_do_and_then_does_nothing():
    model = llama()
    before = dict(model.named_modules())
    with pytest.raises(at.AttunementError, match="no rank left at a ratio of 50"):
        factorise(model, ratio=50)
    with pytest.raises(at.AttunementError, match="at least 1"):
        factorise(model, ratio=0.5)
    at.adapt(model, at.LoRA(rank=1))
    with pytest.raises(at.AttunementError, match="detach them first"):
        factorise(model)
    at.detach(model)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    ("start", "sources"),
    [("average", [[0, 2], [1, 3]]), ("stepwise", [[0], [3]]), ("lower", [[0], [1]])],
)
def test_tied_blocks_have_the_shared_matrices_once(make, start, sources):
    model, original = make(), make()
    done = tie(model, loops=2, start=start)
    name = done.matrices[0].replace(".0.", ".{}.")
    for block in range(4):
        expected = torch.stack([original.get_submodule(name.format(i)).weight for i in sources[block % 2]]).mean(0)
        torch.testing.assert_close(model.get_submodule(name.format(block)).weight, expected)
    matrices = sum(original.get_submodule(n).weight.numel() for n in done.matrices)
    assert done.after == done.before - matrices // 2 == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_relaxed_model_is_the_original_at_full_rank_and_comes_back_from_a_file(make, tmp_path):
    original = make()(IDS).logits
    model = make()
    relax(model, loops=2, rank=16)
    torch.testing.assert_close(model(IDS).logits, original)
    errors = []
    for rank in (2, 8):
        model = make()
        adapter = relax(model, loops=2, rank=rank)
        errors.append(float((model(IDS).logits - original).norm().detach()))
        assert adapter.count() == sum(rank * (p.site.outputs + p.site.inputs) for p in adapter.parts)
    assert errors[1] < errors[0]
    adapter.save(tmp_path / "a")
    fresh = make()
    with pytest.raises(at.AttunementError):
        at.load(fresh, tmp_path / "a")
    tie(fresh, loops=2)
    at.load(fresh, tmp_path / "a")
    torch.testing.assert_close(fresh(IDS).logits, model(IDS).logits)


def test_tie_refuses_blocks_that_do_not_divide():
    with pytest.raises(at.AttunementError, match="loops may be 2, 4"):
        tie(llama(), loops=3)
    model = llama()
    at.adapt(model, at.LoRA(rank=1))
    with pytest.raises(at.AttunementError, match="detach them first"):
        relax(model, loops=2, name="other")


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.last, self.end = nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x):
        return self.end(self.last(torch.relu(self.norm(self.conv(x)))))


def test_batch_norms_take_the_statistics_of_new_data_and_give_them_back():
    model = Images().eval()
    old = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [3 + 2 * torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    before = batch_norm.estimate(model, batches)
    seen = [model.conv(x).movedim(1, 0).flatten(1) for x in batches]
    torch.testing.assert_close(model.norm.running_mean, torch.stack([s.mean(1) for s in seen]).mean(0))
    torch.testing.assert_close(model.norm.running_var, torch.stack([s.var(1) for s in seen]).mean(0))
    assert not model.norm.training
    assert model.norm.momentum == 0.1
    assert abs(float(model(torch.cat(batches)).detach().mean())) < 0.05, "the last norm centres what it sees"
    batch_norm.restore(model, before)
    assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items())
    with pytest.raises(at.AttunementError, match="no batch"):
        batch_norm.estimate(model, [])
    assert all(torch.equal(value, old[key]) for key, value in model.state_dict().items())
    with pytest.raises(at.AttunementError, match="no batch norm"):
        batch_norm.estimate(nn.Linear(2, 2), batches)


def test_conv_lora_is_that_of_the_published_shapes():
    model = Images()
    adapter = at.adapt(model, at.ConvLoRA(rank=1), on="conv|last")
    conv = adapter.parts[0]
    k, r = 3, 1
    assert conv.tensor("A").shape == (r * k, 2 * k)
    assert conv.tensor("B").shape == (3 * k, r * k)
    assert adapter.count() == sum(r * k * k * (c.in_channels + c.out_channels) for c in (model.conv, model.last))
    with torch.no_grad():
        conv.tensor("B").normal_()
    expected = Images().conv.weight + (conv.tensor("B") @ conv.tensor("A")).view(3, 2, 3, 3)
    torch.testing.assert_close(model.conv.weight, expected)
    with pytest.raises(at.AttunementError, match="the largest is 3"):
        at.adapt(Images(), at.ConvLoRA(rank=4), on="conv")


def test_mt_lora_has_parts_for_tasks_in_the_last_block_and_rows_of_several_tasks():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=40, num_labels=3, **{**SIZES, "num_hidden_layers": 2})
    model = transformers.BertForSequenceClassification(config).eval()
    adapter = at.adapt(model, {"attention.*|mlp.*": at.MTLoRA(tasks=3, rank=4, task_rank=2), "head": None})
    special = {part.site.name for part in adapter.parts if "task_A" in part.kinds}
    layer = "bert.encoder.layer.1."
    assert special == {layer + word for word in ("attention.output.dense", "intermediate.dense", "output.dense")}
    assert adapter.count() == 4 * (3 * 32 + 32 + 2 * 40 + 3 * 32) + 3 * 2 * (32 + 2 * 40)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    one = []
    for task in range(3):
        adapter.give(task=task)
        one.append(model(IDS).logits)
    assert not torch.allclose(one[0], one[1])
    adapter.give(task=torch.tensor([2, 0]))
    torch.testing.assert_close(model(IDS).logits, torch.stack([one[2][0], one[0][1]]))
    part = next(part for part in adapter.parts if part.site.name == layer + "output.dense")
    x = torch.randn(2, 5, 24)
    adapter.give(task=1)
    A, B = part.tensor("task_A")[1], part.tensor("task_B")[1]
    dense = model.bert.encoder.layer[1].output.dense
    torch.testing.assert_close(dense(x), nn.functional.linear(x, dense.weight, dense.bias) + 4.0 * x @ A.T @ B.T)
