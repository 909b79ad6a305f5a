"""What a beginner and an author of methods get wrong first: one sentence each, which says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attunement as at
from attunement.method import _registry


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture(autouse=True)
def _methods_stay_here():
    before = dict(_registry)
    yield
    _registry.clear()
    _registry.update(before)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda net: at.adapt(net, at.LoRA), r"LoRA is a class; call it for a method, as in LoRA\(\)"),
        (lambda net: at.adapt(net, "lora"), r"a method by name is at.method\('lora'\)\(\)$"),
        (lambda net: at.adapt(net, "BitFit"), r"a recipe by name is at.recipes.bitfit\(\)$"),
        (lambda net: at.adapt(net, "new_tokens"), r"a recipe by name is at.recipes.new_tokens\(count\)$"),
        (lambda net: at.adapt(net, "bitfitt"), r"at.recipes.name\(\); nearest: 'bitfit'"),
        (lambda net: at.HRA(rank=3), r"^HRA: rank must be a multiple of 2, got 3; the nearest is 4$"),
        (lambda net: at.HRA(rank=-3), r"^HRA: rank must be .*; the nearest is 2$"),
        (
            lambda net: at.Sparse(density=0.1, lora_rank=4),
            r"^Sparse: density and lora_rank each say .*; give one of them$",
        ),
        (lambda net: at.Sparse(lora_rank=4, entries=((0, 0),)), r"lora_rank and entries each say"),
        (
            lambda net: at.adapt(net, at.LoRA()),
            r"LoRA goes to 'attention.\{query,value\}' by default, .*say where with on=.*modules are 'first', 'second'",
        ),
        (lambda net: at.LoRA(8, 16, 2), r"LoRA: rank_stabilised must be a boolean, got 2"),
        (lambda net: at.LoRA(1, 2, True, 0.0, 1.0, 6, 7, 8, 9, 10), r"fields and got more values: .*give them by name"),
        (lambda net: at.LoRA(rank="x"), r"LoRA: rank must be an integer, got 'x'"),
        (lambda net: at.anatomy("bert"), r"expected a model, got str 'bert'; load it first"),
        (
            lambda net: at.adapt(net, at.LoRA(rank=2), on="first").groups(lr="x"),
            r"groups: lr must be a number, got 'x'",
        ),
        (
            lambda net: (at.adapt(net, at.LoRA(rank=2), on="first"), at.detach(net, "b")),
            r"^detach: there is no adapter 'b'",
        ),
    ],
)
def test_what_a_beginner_gets_wrong(net: Net, call, sentence: str) -> None:
    with pytest.raises(at.AttunementError, match=sentence) as caught:
        call(net)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "hint"), [("LoRa", "LoRA"), ("Vera", "VeRA"), ("adaptt", "adapt"), ("Traner", "Trainer")]
)
def test_a_misspelt_name_of_the_package_names_the_nearest(word: str, hint: str) -> None:
    with pytest.raises(AttributeError, match=f"^module 'attunement' has no attribute '{word}'; nearest: '{hint}'"):
        getattr(at, word)


def test_what_completes_is_what_is_public() -> None:
    assert dir(at) == sorted(at.__all__)
    assert {"Trainer", "Callback", "open_run"} < set(dir(at))
    assert all(hasattr(at, word) for word in dir(at))


def test_a_misspelt_hook_is_refused_when_it_is_registered() -> None:
    with pytest.raises(at.AttunementError, match=r"nothing calls Typo.tensor; did you mean 'tensors'\?"):

        @at.register("mine/typo", source="-")
        class Typo(at.WeightMethod):
            def tensor(self, site):
                return {"D": torch.zeros(site.outputs, site.inputs)}

            def delta(self, _, D):
                return D

    assert "mine/typo" not in at.methods()


def test_a_tensor_that_is_not_made_and_a_field_without_a_value(net: Net) -> None:
    @at.register("mine/other_name", source="-")
    class OtherName(at.WeightMethod):
        rank: int

        def tensors(self, site):
            return {"D": torch.zeros(site.outputs, site.inputs)}

        def delta(self, _, d):
            return d

    with pytest.raises(at.AttunementError, match=r"OtherName needs its field 'rank', which has no default"):
        OtherName()
    with pytest.raises(at.AttunementError, match=r"first.weight: OtherName.delta takes 'd', and its tensors are D"):
        at.adapt(net, OtherName(rank=2), on="first")
    assert at.adapters(net) == {}
    assert type(net) is Net


def test_an_output_has_no_weight(net: Net) -> None:
    @at.register("mine/by_weight", source="-")
    class ByWeight(at.OutputMethod):
        def tensors(self, site):
            return {"g": site.weight[0]}

        def output(self, _, y, g):
            return y + g

    with pytest.raises(at.AttunementError, match="a place for outputs, which has no weight of its own"):
        at.adapt(net, ByWeight(), on="first")
