"""An adapter whose method changes no weight belongs to the base that it was made on all the same."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import attunement as at


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "method",
    [at.Prompt(count=2), at.Prefix(count=2), at.Bottleneck(size=4), at.LST(), at.UniPT()],
    ids=lambda m: m.name,
)
def test_another_base_is_refused(method, tmp_path):
    at.adapt(llama(0), method).save(tmp_path / "saved")
    with pytest.raises(at.AttunementError, match=r"the base differs from the one the adapter was made on: .* beneath"):
        at.load(llama(1), tmp_path / "saved")
    other = llama(1)
    at.load(other, tmp_path / "saved", strict=False)
    more_words = llama(0)
    more_words.resize_token_embeddings(48)
    at.load(more_words, tmp_path / "saved")


def test_the_summary_gives_the_size_of_the_tensors_in_the_file(tmp_path):
    adapter = at.adapt(llama(0), at.VeRA(rank=4))
    adapter.save(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "adapter.safetensors").values()
    assert adapter.summary().saved_bytes == sum(tensor.nbytes for tensor in tensors)
    assert str(adapter.summary()).endswith("576 bytes of tensors when saved")


def test_a_forward_that_somebody_else_put_on_the_model_stays(tmp_path):
    model = llama(0)
    at.adapt(model, at.LoRA(rank=2))
    below = model.forward
    theirs = lambda self, *args, **kwargs: below(*args, **kwargs)  # noqa: E731
    model.forward = theirs.__get__(model)
    at.adapt(model, at.LoRA(rank=2), name="second")
    at.detach(model, "second")
    at.detach(model)
    assert model.forward.__func__ is theirs
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 40), "what it calls works without adapters"
