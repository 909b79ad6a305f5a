"""A multitask prompt against its formula: each row its own task, and the mean of all where none is told."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attunement as at

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IDS = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_is_the_shared_prompt_times_that_of_the_task():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, **SIZES)).double().eval()
    adapter = at.adapt(model, at.MultitaskPrompt(count=4, tasks=3, rank=2))
    assert adapter.count() == 4 * 32 + 3 * 2 * (4 + 32)
    (part,) = adapter.parts
    P, U, V = (part.tensor(name).normal_() for name in "PUV")

    def expected(prompts: torch.Tensor) -> torch.Tensor:
        with at.using(model, None):
            embeds = torch.cat((prompts.expand(3, -1, -1), model.get_input_embeddings()(IDS)), dim=1)
            return model(inputs_embeds=embeds).logits[:, 4:]

    torch.testing.assert_close(model(IDS).logits, expected(P * (U.mean(0) @ V.mean(0))))
    adapter.give(task=1)
    torch.testing.assert_close(model(IDS).logits, expected(P * (U[1] @ V[1])))
    adapter.give(task=torch.tensor([2, 0, 2]))
    torch.testing.assert_close(model(IDS).logits, expected(torch.stack([P * (U[k] @ V[k]) for k in (2, 0, 2)])))
    at.use(model, adapter.name)  # resolved anew, with a task for each row told
    two = torch.cat((IDS, IDS)).unflatten(0, (2, 3)).transpose(0, 1).flatten(0, 1)  # each row twice, as beams have it
    torch.testing.assert_close(model(two).logits[::2], model(IDS).logits)
    with pytest.raises(at.AttunementError, match="tokens are made for 3 rows, and the batch has 4"):
        model(IDS[[0, 1, 2, 0]])
    adapter.give(task=3)
    with pytest.raises(at.AttunementError, match="task must be from 0 to 2, got 3"):
        model(IDS)
