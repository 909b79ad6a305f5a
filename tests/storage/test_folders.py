"""What a folder holds, what its header must say, and which base it belongs to: refusals are sentences, and nothing is lost."""

import copy
import json

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import attunement as at


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, **tokens))


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("formats", [("attunement", "peft"), ("peft", "attunement")], ids=repr)
def test_a_folder_holds_one_adapter(formats, tmp_path):
    first, second = formats
    adapter = at.adapt(gpt2(), at.LoRA(rank=2), on="attention.qkv")
    adapter.save(tmp_path / "out", first)
    before = files(tmp_path / "out")
    with pytest.raises(at.AttunementError, match="holds an adapter in the other format, in 'adapter"):
        adapter.save(tmp_path / "out", second)
    assert files(tmp_path / "out") == before
    for parameter in adapter.parameters():
        parameter.data += 1.0
    adapter.save(tmp_path / "out", first)
    again = at.load(gpt2(), tmp_path / "out")
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), adapter.parameters(), strict=True))


def test_metrics_are_numbers_of_any_kind(tmp_path):
    adapter = at.adapt(gpt2(), at.LoRA(rank=2))
    adapter.metrics = {"numpy": numpy.float32(0.5), "torch": torch.tensor(0.25), "one": torch.tensor([2]), "plain": 3}
    adapter.save(tmp_path / "out")
    assert at.load(gpt2(), tmp_path / "out").metrics == {"numpy": 0.5, "torch": 0.25, "one": 2, "plain": 3}
    before = files(tmp_path / "out")
    for value, said in ((torch.ones(2), r"Tensor\[2\]"), (object(), "object"), ({"a": numpy.float32(1)}, "dict")):
        adapter.metrics = {"accuracy": value}
        with pytest.raises(at.AttunementError, match=rf"metrics\['accuracy'\] must be a number, got {said}"):
            adapter.save(tmp_path / "out")
    assert files(tmp_path / "out") == before


def without(*path):
    def change(said):
        for word in path[:-1]:
            said = said[word]
        del said[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("name"), "name in the header of .*adapter.safetensors' is missing"),
        (without("methods", 0, "on"), r"methods\[0\].on in the header of .* is missing"),
        (without("methods", 0, "method"), r"methods\[0\].method in the header of .* is missing"),
        (without("methods", 0, "method", "method"), r"methods\[0\].method.method in the header of .* is missing"),
        (without("methods", 0, "sites", 0, "role"), r"methods\[0\].sites\[0\].role in the header of .* is missing"),
        (without("methods", 0, "sites", 0, "view", 2), r"sites\[0\].view\[2\] in the header of .* is missing"),
        (lambda said: said.update(methods={}), "methods in the header of .* must be a list, got {}"),
        (lambda said: said.update(fingerprint=3), "fingerprint in the header of .* must be a mapping, got 3"),
    ],
)
def test_a_header_that_was_spoilt_is_refused_by_the_name_of_its_key(change, words, tmp_path):
    at.adapt(gpt2(), at.LoRA(rank=2), on="attention.query").save(tmp_path)
    said = json.loads((tmp_path / "adapter.json").read_text())
    change(said)
    file = tmp_path / "adapter.safetensors"
    save_file(load_file(file), file, metadata={"attunement": json.dumps(said)})
    model = gpt2()
    with pytest.raises(at.AttunementError, match=words):
        at.load(model, tmp_path)
    assert at.adapters(model) == {}


def test_what_was_tied_belongs_to_a_base_that_ties_it(tmp_path):
    tied, untied = gpt2(), gpt2()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    bases = {"tied": tied, "untied": untied}
    for kind, base in bases.items():
        at.adapt(copy.deepcopy(base), at.Train(), on="transformer.wte").save(tmp_path / kind)
        at.load(copy.deepcopy(base), tmp_path / kind)
    for kind, other, words in (
        ("tied", "untied", "tied to nothing here and was to lm_head in"),
        ("untied", "tied", "tied to lm_head here and was to nothing in"),
    ):
        with pytest.raises(at.AttunementError, match=words):
            at.load(bases[other], tmp_path / kind)
        assert at.adapters(bases[other]) == {}
        at.load(bases[other], tmp_path / kind, strict=False)
