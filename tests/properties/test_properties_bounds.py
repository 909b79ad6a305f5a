"""How much is trained, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace

import pytest
import third_party
import torch
from grid import REFUSED, SAMPLES, adapted, every_cell, every_sample, promise
from toy_model import HIDDEN, LAYERS, WIDTH, bits, look, out, same_bits, toy

import attunement as at
from attunement.method import tagged

# what each published method trains at a matrix (out, in), as its paper counts
FORMULAS = {
    "bottleneck/bottleneck": lambda m, out, width, size: 2 * m.size * width + m.size + out,
    "low_rank/dora": lambda m, out, inputs, size: m.rank * (out + inputs) + out,
    "low_rank/lora": lambda m, out, inputs, size: m.rank * (out + inputs),
    "low_rank/svfit": lambda m, out, inputs, size: m.rank,
    "low_rank/vera": lambda m, out, inputs, size: m.rank + out,
    "orthogonal/hra": lambda m, out, inputs, size: m.rank * inputs,
    "scaling/ia3": lambda m, out, inputs, size: inputs if m.side == "input" else out,
    "scaling/ssf": lambda m, out, inputs, size: 2 * out,
    "selective/train": lambda m, out, inputs, size: 2 * size // out if m.rows else size,
}


@every_cell
@promise("count")
def test_the_number_of_trained_parameters_is_exact(sample, layer):
    model = toy()
    adapter = adapted(model, sample, layer)
    expected = 0
    for part in adapter.parts:
        site, copies = part.site, part.site.batch[0] if part.site.batch else 1
        each = [site.single(i) for i in range(copies)] if site.batch else [site]
        expected += sum(
            t.value.numel() for one in each for t in tagged(sample.method.tensors(one)).values() if t.kind == "trained"
        )
    shared = tagged(sample.method.shared([part.site for part in adapter.parts]))
    expected += sum(tensor.value.numel() for tensor in shared.values() if tensor.kind == "trained")
    assert adapter.count() == expected
    assert adapter.summary().trainable == expected
    assert expected == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.name in FORMULAS], ids=lambda sample: sample.id)
def test_the_number_of_trained_parameters_is_the_papers(sample):
    layer = "mlp_sublayer" if sample.method.acts_on == "output" else "fused_qkv"
    out_, inputs = (WIDTH, WIDTH) if sample.method.acts_on == "output" else (3 * WIDTH, WIDTH)
    expected = FORMULAS[sample.name](sample.method, out_, inputs, out_ * inputs)
    if sample.name == "selective/train" and sample.method.only == "all":
        expected += 2 if sample.method.rows else out_  # the bias
    assert adapted(toy(), sample, layer).count() == expected


@pytest.mark.parametrize(("sample", "layer"), REFUSED, ids=[f"{sample.id}-{layer}" for sample, layer in REFUSED])
def test_what_a_kind_of_method_cannot_take_is_refused_in_a_sentence(sample, layer):
    model = toy()
    if sample.method.acts_on == "parameter" and layer.endswith("sublayer"):
        assert adapted(model, sample, layer).count() > 0, "the parameters inside"
        return
    if sample.method.acts_on == "matrix" and layer.endswith("sublayer"):
        assert {part.site.parameter for part in adapted(model, sample, layer).parts} - {None}, "the matrices inside"
        return
    untouched(model, lambda: at.adapt(model, sample.method, on=LAYERS[layer]))


@every_sample
def test_a_refusal_changes_nothing(sample):
    model = toy()
    places = [
        lambda: at.adapt(model, {"dens": sample.method}),
        lambda: at.adapt(model, sample.method, on="blocks[7].mlp"),
        lambda: at.adapt(model, sample.method, on=sample.everywhere(), name="no such name!"),
        lambda: at.adapt(model, {"mlp": at.Bottleneck(size=2), "attention.querry": sample.method}),
        lambda: at.adapt(model, sample.method, on=sample.everywhere(), name=""),
    ]
    for wrong in places:
        untouched(model, wrong)
    adapter = adapted(model, sample)
    state = {key: value + 1 for key, value in adapter.state().items()}
    first = next(iter(state))
    wrongs = [
        {k: v for k, v in state.items() if k != first},
        state | {"stranger": torch.zeros(1)},
        state | {first: torch.zeros(2, 3, 5, 7)},
        state | {first: state[first].to(torch.float64) * float("nan")},
    ]
    for wrong in wrongs:
        untouched(model, lambda wrong=wrong: adapter.load_state(wrong))
    more = [
        lambda: adapted(model, sample),  # the name is taken
        lambda: at.use(model, at.Sum("a", "b")),
        lambda: at.use(model, 3),
        lambda: at.load(model, "no/such/folder"),
        lambda: adapter.unmerge(),
    ]
    for wrong in more:
        untouched(model, wrong)


def untouched(model, wrong) -> None:
    expected, seen, before = out(model), look(model), bits(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(at.AttunementError) as caught:
        wrong()
    assert "\n" not in str(caught.value)
    assert look(model) == seen
    assert same_bits(bits(model), before)
    assert same_bits(model.state_dict(), state)
    assert torch.equal(out(model), expected)


def test_a_method_of_somebody_else_is_short():
    for cls in (third_party.Tint, third_party.Gate, third_party.Common):
        assert len([line for line in inspect.getsource(cls).splitlines() if line.strip()]) <= 15
        assert any(sample.name == cls.name for sample in SAMPLES)


@every_sample
def test_a_declaration_that_is_not_true_fails(sample):
    liar = copy.copy(sample)
    liar.method = SimpleNamespace(cannot={"merge": "so it says"})
    promised = promise("merge")(lambda sample: None)
    with pytest.raises(pytest.fail.Exception, match="so it says"):
        promised(sample=liar)
    promise("save")(lambda sample: None)(sample=liar)


def test_the_toy_model_has_every_layer_once():
    model = toy()
    for name, layer in LAYERS.items():
        assert len([place for place in at.anatomy(model).places if layer(place)]) == 1, name
    assert HIDDEN != WIDTH
