"""Point 5: any identifier is a name for an adapter, whatever nn.Module calls its own methods."""

import copy

import pytest
import torch
from hostile import adapted, adapter_keys, base_state, ids, logits, look, perturb, same_bits, tower
from torch import nn

import attunement as at

NAMES = [
    "train",
    "type",
    "keys",
    "to",
    "forward",
    "weight",
    "bias",
    "training",
    "attuned",
    "values",
    "items",
    "pop",
    "default",
    "output",
    "A",
    "modules",
    "state_dict",
    "requires_grad_",
    "half",
    "in_proj_weight",
    "_x-1",
]


@pytest.mark.parametrize("name", NAMES)
def test_awkward_names(name, tmp_path):
    model = tower()
    bare, state = logits(model, ids()), base_state(model)
    adapter = adapted(model, "mixed", name)
    adapted(model, "mixed", "other", seed=1)
    at.use(model, name)
    out = logits(model, ids())
    assert not torch.equal(out, bare)
    assert list(at.adapters(model)) == [name, "other"]
    assert adapter_keys(model, name)
    assert same_bits(base_state(model), state)
    for key in model.state_dict():  # distributed checkpoints and FSDP walk a key attribute by attribute
        owner, _, last = key.rpartition(".")
        assert last in {**model.get_submodule(owner)._parameters, **model.get_submodule(owner)._buffers}
    model.train().eval().to(torch.float32)
    assert torch.equal(logits(copy.deepcopy(model), ids()), out)
    with at.using(model, at.Sum(name, "other")):
        assert not torch.equal(logits(model, ids()), out)
    adapter.save(tmp_path / "saved")
    at.detach(model)
    assert torch.equal(logits(model, ids()), bare)
    at.load(model, tmp_path / "saved")
    assert list(at.adapters(model)) == [name]
    assert torch.equal(logits(model, ids()), out)


def test_all_of_them_at_once():
    model = tower()
    outs = {}
    for i, name in enumerate(NAMES):
        adapted(model, "lora", name, seed=i)
        outs[name] = logits(model, ids())
    for name in NAMES:
        at.use(model, name)
        assert torch.equal(logits(model, ids()), outs[name])


UNSAFE = ["", "a.b", "../x", "a/b", "/", ".", "..", " ", "a\\b", "a\nb", "a\0b", "ünïcode", "-a", "a\n", "a" * 300]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names_are_refused(name):
    model = tower()
    seen = look(model)
    with pytest.raises(at.AttunementError):
        at.adapt(model, at.LoRA(rank=2), on="*.query", name=name)
    assert look(model) == seen


@pytest.mark.parametrize("name", [None, 3, ("a",)])
def test_a_name_that_is_no_string_is_refused(name):
    with pytest.raises(at.AttunementError):
        at.adapt(tower(), at.LoRA(rank=2), on="*.query", name=name)


def test_a_name_that_is_taken_is_refused():
    model = tower()
    adapted(model, "lora", "a")
    out, keys = logits(model, ids()), list(model.state_dict())
    with pytest.raises(at.AttunementError, match="a"):
        at.adapt(model, at.LoRA(rank=3), on="*.key", name="a")
    assert torch.equal(logits(model, ids()), out)
    assert list(model.state_dict()) == keys


def test_a_module_that_owns_several_sites():
    """The two matrices of nn.MultiheadAttention hang on one module; each has its own slot."""
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    model = nn.ModuleDict({"attention": attention})
    x = torch.randn(2, 5, 16)
    bare = attention(x, x, x)[0].detach()
    outs = []
    for name, selection in {"in": "attention.{query,value}", "out": "attention.output"}.items():
        perturb(at.adapt(model, {selection: at.LoRA(rank=2)}, name=name))
        outs.append(attention(x, x, x)[0].detach())
        assert adapter_keys(model, name)
    assert not torch.equal(outs[0], bare)
    assert not torch.equal(outs[1], bare)
    assert not torch.equal(outs[0], outs[1])
    at.use(model, at.Sum("in", "out"))
    assert not torch.equal(attention(x, x, x)[0], outs[1])
    at.detach(model)
    assert torch.equal(attention(x, x, x)[0], bare)
    assert type(attention) is nn.MultiheadAttention
