"""Several adapters at once: weights, ranks, rows, unlike methods."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from grid import (
    CELLS,
    LIVES,
    SAMPLES,
    STRUCTURES,
    adapted,
    every_cell,
    every_home,
    gradients,
    loss,
    perturb,
    promise,
)
from homes import HOMES, PLACES, SPOTS, alone, data, given, home, out, run, some
from torch import Tensor, nn
from toy_model import TIED, bits, distance, same_bits, toy

import attunement as at
from attunement.method import weight_form

EXACT = 1e-10


def under(model: nn.Module, active, inputs=None) -> Tensor:
    with at.using(model, active):
        return out(model, inputs)


def one_is_the_adapter_and_nought_is_the_base(sample, layer) -> tuple[nn.Module, Tensor]:
    model = home(PLACES[layer].home)
    base = alone(model.home)
    a, b = (adapted(model, sample, layer, name) for name in "ab")
    b.load_state(a.state())
    with_it = under(model, "a")
    for active in (at.Weighted({"a": 1.0}), at.Sum("a"), at.Stack("a"), at.Stack(None, "a"), at.Sum("a", None)):
        assert distance(under(model, active), with_it) <= EXACT, active
    for active in (at.Weighted({"a": 0.0}), at.Sum(), at.Average(None, None)):
        assert distance(under(model, active), base) <= EXACT, active
    assert torch.equal(under(model, None), base)
    return model, with_it


@every_cell
@promise("combine")
def test_weights_are_weights(sample, layer):
    model, with_it = one_is_the_adapter_and_nought_is_the_base(sample, layer)
    halves = at.Sum(at.Weighted({"a": 0.5}), at.Weighted({"b": 0.5}))
    for active in (at.Weighted({"a": 0.3, "b": 0.7}), at.Average("a", "b"), halves):
        assert distance(under(model, active), with_it) <= EXACT, active
    assert distance(under(model, at.Weighted({"a": 0.7, "b": -0.7})), alone(model.home)) <= EXACT


def effect(model: nn.Module, layer: str, called: bool, active) -> Tensor:
    """What a layer gives on its first call, or, where it is not called, the weight that is read.

    What an attention gives is what enters the matrix behind it.
    """
    place = next(one for one in STRUCTURES[model.home].places if PLACES[layer](one))
    seen: list[Tensor] = []
    with at.using(model, active):
        module = model.get_submodule(place.name)
        if not called:
            return getattr(module, place.parameter or "weight").detach()
        if layer in SPOTS and PLACES[layer].kinds == ("attention",):
            hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        else:
            hook = module.register_forward_hook(lambda m, args, y: seen.append(y if isinstance(y, Tensor) else y[0]))
        with hook:
            out(model)
        return seen[0]


# a sum of changes of what enters a layer is a sum behind it where the layer is affine; tokens have none at all
AFFINE = [
    c
    for c in CELLS
    if c[0].method.acts_on not in ("output", "sequence")
    or hasattr(c[0].method, "output")
    or c[1] in ("linear", "linear_down", "conv1D_of_gpt2", "conv1d", "conv2d", "conv3d", "fused_qkv")
]


def larger(sample):
    """The same method with other sizes."""
    fields = {"rank": 4, "size": 5} | ({"count": 5} if sample.spotted else {})
    known = {field.name for field in dataclasses.fields(sample.method)}
    other = copy.copy(sample)
    other.method = dataclasses.replace(sample.method, **{k: v for k, v in fields.items() if k in known})
    return other


@pytest.mark.parametrize(("sample", "layer"), AFFINE, ids=[f"{sample.id}-{layer}" for sample, layer in AFFINE])
@promise("combine")
def test_different_sizes_sum(sample, layer):
    """A sum of changes: of weights, or of outputs given the same input, which is the same thing where both exist."""
    model = home(PLACES[layer].home)
    called = not getattr(PLACES[layer], "read", False)
    called = called and not (sample.method.acts_on == "parameter" and layer in TIED)
    adapted(model, sample, layer, "a")
    adapted(model, larger(sample) if layer not in (*TIED, "embedding") else sample, layer, "b", seed=1)
    seen = {
        name: effect(model, layer, called, active)
        for name, active in (("0", None), ("a", "a"), ("b", "b"), ("sum", at.Sum("a", "b")))
    }
    changed = seen["a"] - seen["0"] + seen["b"] - seen["0"]
    assert distance(seen["sum"], seen["0"] + changed) <= EXACT
    assert distance(under(model, at.Sum("a", "b")), under(model, at.Sum("b", "a"))) <= EXACT


SPOTTED = [(sample, layer) for sample, layer in CELLS if sample.spotted]
every_spot = pytest.mark.parametrize(
    ("sample", "layer"), SPOTTED, ids=[f"{sample.id}-{layer}" for sample, layer in SPOTTED]
)


@every_spot
def test_different_sizes_stack(sample, layer):
    model = home(PLACES[layer].home)
    base = alone(model.home)
    adapted(model, sample, layer, "a")
    adapted(model, larger(sample), layer, "b", seed=1)
    a, b = (under(model, name) for name in "ab")
    one, other = under(model, at.Stack("a", "b")), under(model, at.Stack("b", "a"))
    for both, first, last in ((one, a, b), (other, b, a)):
        assert both.shape == base.shape
        assert distance(both, base) > 1e-4
        assert distance(both, first) > 1e-4
        assert distance(both, last) > 1e-4 or sample.method.acts_on == "network", (
            "which may take the place of all before"
        )
    assert distance(under(model, at.Stack("a", None, "b")), one) <= EXACT


UNWEIGHED = [(sample, layer) for sample, layer in SPOTTED if "combine" in sample.method.cannot]


@pytest.mark.parametrize(("sample", "layer"), UNWEIGHED, ids=[f"{sample.id}-{layer}" for sample, layer in UNWEIGHED])
def test_what_has_no_weight_says_so_and_a_sum_of_it_is_a_stack(sample, layer):
    model, _ = one_is_the_adapter_and_nought_is_the_base(sample, layer)
    perturb(at.adapters(model)["b"], seed=1)
    at.use(model, "b")
    with_it = out(model)
    for active in (
        at.Weighted({"a": 0.5}),
        at.Weighted({"a": 0.3, "b": 0.7}),
        at.Average("a", "b"),
        at.Average("a", None),
    ):
        with pytest.raises(at.AttunementError, match="weight"):
            at.use(model, active)
        assert torch.equal(out(model), with_it), "the adapter that was active still is"
    assert torch.equal(under(model, at.Sum("a", "b")), under(model, at.Stack("a", "b")))


ROWS = ("a", "b", None, "a", at.Stack("a", "b"))


@every_cell
@promise("rows")
def test_rows_are_a_loop_over_rows(sample, layer):
    model = home(PLACES[layer].home)
    adapted(model, sample, layer, "a")
    adapted(model, sample, layer, "b", seed=1)
    _rows_equal_a_loop(model)


BATCHES = [
    (sample, where, first) for sample, where in LIVES for first in ((True, False) if where == "toy" else (True,))
]


@pytest.mark.parametrize(
    ("sample", "where", "batch_first"),
    BATCHES,
    ids=[f"{sample.id}-{where}-{first}" for sample, where, first in BATCHES],
)
@promise("rows")
def test_rows_train_as_a_loop_over_rows(sample, where, batch_first):
    model = toy(batch_first=batch_first) if where == "toy" else home(where)
    adapters = [adapted(model, sample, name="a"), adapted(model, sample, name="b", seed=1)]
    _rows_equal_a_loop(model)
    batch = given(model, len(ROWS))
    with at.using(model, at.Rows(ROWS)):
        logits = run(model, batch)
    loss(logits).backward()
    together = [gradients(adapter) for adapter in adapters]
    model.zero_grad()
    rows = []
    for row, item in enumerate(ROWS):
        with at.using(model, item):
            rows.append(run(model, some(batch, slice(row, row + 1))))
    loss(torch.cat(rows)).backward()
    for found, expected in zip(together, map(gradients, adapters), strict=True):
        largest = max(gradient.abs().max() for gradient in expected.values())  # that of a bias of keys is all rounding
        for name, gradient in found.items():
            assert (gradient - expected[name]).abs().max() <= 1e-8 * largest, name


def _rows_equal_a_loop(model: nn.Module) -> None:
    batch = given(model, len(ROWS))
    rows = under(model, at.Rows(ROWS), batch)
    for row, item in enumerate(ROWS):
        by_itself = under(model, item, some(batch, slice(row, row + 1)))[0]
        assert distance(rows[row], by_itself) <= EXACT, item
    with pytest.raises(at.AttunementError, match="rows"):
        under(model, at.Rows(ROWS), some(batch, slice(-1)))


FIRST = [sample for sample in SAMPLES if sample.first]


def like(sample) -> tuple:
    """What decides how a method meets another: methods that are alike in this meet others alike."""
    return sample.method.acts_on, weight_form(sample.method) in ("factors", "delta")


REPRESENTATIVES = list({like(sample): sample for sample in reversed(FIRST)}.values())


def common(one, two) -> list[str]:
    """The first model in which two methods can meet."""
    homes = [{name for s, name in LIVES if s is sample} if sample.spotted else set(HOMES) for sample in (one, two)]
    asked = one.spotted or two.spotted
    return [name for name in HOMES if name in set.intersection(*homes) and asked <= (name != "toy")][:1]


UNORDERED = {frozenset((one, two)): (one, two) for one in FIRST for two in REPRESENTATIVES if one is not two}
MEETINGS = [
    (*(pair if turn % 2 else pair[::-1]), where)  # which of them is the first: half of them so, half so
    for turn, pair in enumerate(UNORDERED.values())
    for where in common(*pair)
]


@pytest.mark.parametrize(
    ("one", "two", "where"), MEETINGS, ids=[f"{one.id}+{two.id}-{where}" for one, two, where in MEETINGS]
)
def test_unlike_methods_compose_train_and_merge(one, two, where):
    model = home(where)
    base, before = alone(where), bits(model)
    a, b = adapted(model, one, name="a"), adapted(model, two, name="b", seed=1)
    actives = [at.Sum("a", "b"), at.Stack("a", "b"), at.Stack("b", "a")]
    if not any("combine" in sample.method.cannot for sample in (one, two)):
        nested = at.Average(at.Stack("a", "b"), at.Weighted({at.Sum("a", "b"): 0.5, "b": -0.25}), None)
        actives += [at.Average("a", "b"), nested]
    for active in actives:
        mixed = under(model, active)
        assert torch.isfinite(mixed).all(), active
        assert distance(mixed, base) > 1e-4, active
    if not any("compose" in sample.method.cannot for sample in (one, two)):
        at.use(model, actives[-1])
        loss(run(model)).backward()
        for adapter in (a, b):
            assert all(gradient.abs().max() > 0 for gradient in gradients(adapter).values())
    at.use(model, at.Stack("a", "b"))
    expected = out(model)
    merged = [x for x, sample in ((a, one), (b, two)) if "merge" not in sample.method.cannot]
    if a in merged or b not in merged:  # what acts first is merged first
        for adapter in merged:
            adapter.merge()
        assert distance(out(model), expected) <= EXACT
        for adapter in reversed(merged):
            adapter.unmerge()
        assert torch.equal(out(model), expected)
    at.use(model, None)
    assert torch.equal(out(model), base)
    assert same_bits(bits(model), before)


@every_home
@promise("compose")
def test_one_adapter_of_unlike_methods(sample, where, tmp_path):
    """A method beside others in one recipe: trained, saved and merged as one, loaded as one."""
    model = home(where)
    before = bits(model)
    adapter = perturb(at.adapt(model, beside(sample, where), data=data(model)))
    assert len({type(part.method) for part in adapter.parts}) >= 3
    loss(run(model)).backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients(adapter).values())
    torch.optim.SGD(adapter.groups(lr=0.01)).step()
    expected = out(model)
    adapter.save(tmp_path / "mixed")
    fresh = home(where)
    at.load(fresh, tmp_path / "mixed")
    assert distance(out(fresh), expected) <= 1e-12
    adapter.merge(partial=True)
    assert distance(out(model), expected) <= EXACT
    adapter.unmerge()
    assert torch.equal(out(model), expected)
    adapter.detach()
    assert same_bits(bits(model), before)
    assert torch.equal(out(model), alone(where))


def beside(sample, where: str) -> dict:
    """A recipe of a method with others of every kind: at the toy's layers, or what has a place in this model."""
    if where == "toy":
        recipe = {"spread": at.LoRA(rank=3), "blocks[1].mlp": at.Bottleneck(size=6), "blocks.1.mlp_norm": at.Train()}
    else:
        recipe = {"mlp.up": at.LoRA(rank=3), "blocks[1].mlp": at.Bottleneck(size=6), "blocks[0].norm": at.Train()}
    if where != "toy" or sample.spotted:
        able = [s for s in REPRESENTATIVES if s.spotted and (s, where) in LIVES and "compose" not in s.method.cannot]
        only = sample.method.acts_on == "network"  # of two networks the later takes the place of the earlier
        alike = [s for s in able if not (only and s.method.acts_on == "network")]
        recipe |= {s.everywhere(where): s.method for s in alike}
    recipe = {on: method for on, method in recipe.items() if type(method) is not type(sample.method)}
    return {sample.everywhere(where): sample.method, **recipe}
