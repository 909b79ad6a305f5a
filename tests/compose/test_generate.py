"""Rows while a language model generates: each row as if its adapter had generated alone."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attunement as at

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0, eos_token_id=59)).eval()
    for name, method in {"a": at.LoRA(rank=2), "b": at.LoRA(rank=4), "c": at.HRA(rank=4)}.items():
        for parameter in at.adapt(model, method, name=name).parameters():
            parameter.data.normal_(std=0.5)
    return model


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_rows_generate_as_alone(model, how):
    ids = torch.randint(1, 59, (4, 5), generator=torch.Generator().manual_seed(1))
    rows, copies = ["a", "b", None, "c"], how.get("num_return_sequences", 1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **how}
    with at.using(model, at.Rows(rows)):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for row, name in enumerate(rows):
        with at.using(model, name):
            alone = model.generate(ids[row : row + 1], attention_mask=torch.ones(1, 5), **options)
        assert torch.equal(together[row * copies : (row + 1) * copies], alone)


def test_a_composition_reads_back_and_prints():
    from attunement.compose import composition_from

    active = at.Sum(at.Stack("a", "b"), at.Weighted({"a": 0.5, at.Average("b", "c"): -1.0}), None)
    assert eval(repr(active), vars(at)) == active
    assert composition_from(active.describe()) == active
    assert hash(active) == hash(eval(repr(active), vars(at)))
    rows = at.Rows(["a", None, at.Sum("a", "b")])
    assert composition_from(rows.describe()) == rows != at.Rows(["a", None, "b"])


def test_the_active_set_is_told_as_it_was_made():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert at.active(net) is None
    for name in ("a", "b"):
        at.adapt(net, at.LoRA(rank=2), on="0", name=name)
    assert at.active(net) == "b"
    with at.using(net, at.Sum("a", "b")):
        assert at.active(net) == at.Sum("a", "b")
    assert at.active(net) == "b"
