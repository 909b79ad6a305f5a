"""A cartridge that a text's cache fills is that text before the prompt; its first tokens stay."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import attunement as at

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))
IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=2, **SIZES)).double().eval()


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).double().eval()


@torch.no_grad()
def filled(model, count: int, frozen: int = 1) -> at.Adapter:
    adapter = at.adapt(model, at.Cartridge(count=count, frozen=frozen))
    with at.using(model, None):
        cache = model(TEXT, use_cache=True).past_key_values
    at.Cartridge.fill(adapter, cache)
    return adapter


@pytest.mark.parametrize("made", [llama, gpt2])
@pytest.mark.parametrize("frozen", [0, 1, 4])
@torch.no_grad()
def test_starts_as_the_text_whose_cache_it_takes(made, frozen):
    model = made()
    expected = model(torch.cat((TEXT.expand(2, -1), IDS), dim=1)).logits[:, 9:]
    filled(model, 9, frozen)
    torch.testing.assert_close(model(IDS).logits, expected)
    alone = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 6:]
    with at.using(model, None):
        both = model.generate(torch.cat((TEXT, IDS[:1]), dim=1), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(alone, both[0, 15:])


def test_takes_the_first_tokens_and_trains_all_but_the_frozen_ones(tmp_path):
    model = llama()
    adapter = filled(model, 5, 2)
    with torch.no_grad(), at.using(model, None):
        first = model(TEXT[:, :5], use_cache=True).past_key_values.layers[1]
    part = adapter.parts[1]
    torch.testing.assert_close(torch.cat((part.tensor("K0"), part.tensor("K")), dim=1), first.keys[0])
    assert adapter.count() == 2 * 2 * 3 * 2 * 8  # layers, K and V, tokens that train, heads, width
    model(IDS).logits.sum().backward()
    assert {name.rpartition(".")[2] for name, p in adapter.named_parameters() if p.grad.any()} == {"K", "V"}
    expected = model(IDS).logits
    adapter.save(tmp_path / "out")
    adapter.detach()
    at.load(model, tmp_path / "out")
    assert torch.equal(model(IDS).logits, expected)


def test_refuses_a_cache_that_does_not_fill_it():
    model = llama()
    adapter = at.adapt(model, at.Cartridge(count=10))
    with torch.no_grad(), at.using(model, None):
        short, two = (model(ids, use_cache=True).past_key_values for ids in (TEXT, IDS.repeat(1, 2)))
    before = {key: value.clone() for key, value in adapter.state().items()}
    for cache, words in ((short, "10 tokens of one text, and the cache has 9 of 1"), (two, "has 12 of 2")):
        with pytest.raises(at.AttunementError, match=words):
            at.Cartridge.fill(adapter, cache)
    assert all(torch.equal(value, before[key]) for key, value in adapter.state().items())
    with pytest.raises(at.AttunementError, match="no cartridge"):
        at.Cartridge.fill(at.adapt(model, at.LoRA(), name="other"), short)
    with pytest.raises(at.AttunementError, match="frozen=3 of count=3 leaves none to train"):
        at.adapt(model, at.Cartridge(count=3, frozen=3), name="third")
