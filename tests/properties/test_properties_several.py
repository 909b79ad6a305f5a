"""Several adapters at once: weights, ranks, rows, unlike methods."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from grid import CELLS, SAMPLES, adapted, every_cell, every_sample, gradients, loss, perturb, promise
from torch import Tensor, nn
from toy_model import LAYERS, TIED, bits, distance, ids, out, same_bits, toy

import attunement as at

EXACT = 1e-10


def under(model: nn.Module, active, given: Tensor | None = None) -> Tensor:
    with at.using(model, active):
        return out(model, given)


@every_cell
@promise("combine")
def test_weights_are_weights(sample, layer):
    model = toy()
    base = out(model)
    a, b = (adapted(model, sample, layer, name) for name in "ab")
    b.load_state(a.state())
    alone = under(model, "a")
    same = [at.Weighted({"a": 1.0}), at.Sum("a"), at.Stack("a"), at.Stack(None, "a"), at.Sum("a", None)]
    same += [
        at.Weighted({"a": 0.3, "b": 0.7}),
        at.Average("a", "b"),
        at.Sum(at.Weighted({"a": 0.5}), at.Weighted({"b": 0.5})),
    ]
    for active in same:
        assert distance(under(model, active), alone) <= EXACT, active
    none = [at.Weighted({"a": 0.0}), at.Weighted({"a": 0.7, "b": -0.7}), at.Sum(), at.Average(None, None)]
    for active in none:
        assert distance(under(model, active), base) <= EXACT, active
    assert torch.equal(under(model, None), base)


def effect(model: nn.Module, path: str, parameter: str, called: bool, active) -> Tensor:
    """What a layer gives on its first call, or, where it is not called, the weight that is read."""
    with at.using(model, active):
        module = model.get_submodule(path)
        if not called:
            return getattr(module, parameter).detach()
        seen: list[Tensor] = []
        with module.register_forward_hook(lambda m, args, y: seen.append(y[0] if isinstance(y, tuple) else y)):
            out(model)
        return seen[0]


# a sum of changes of what enters a layer is a sum behind it where the layer is affine
AFFINE = [
    c
    for c in CELLS
    if c[0].method.acts_on != "output"
    or hasattr(c[0].method, "output")
    or c[1] in ("linear", "linear_down", "conv1D_of_gpt2", "conv1d", "conv2d", "conv3d", "fused_qkv")
]


@pytest.mark.parametrize(("sample", "layer"), AFFINE, ids=[f"{sample.id}-{layer}" for sample, layer in AFFINE])
@promise("combine")
def test_different_sizes_sum(sample, layer):
    """A sum of changes: of weights, or of outputs given the same input, which is the same thing where both exist."""
    fields = {"rank": 4, "size": 5}
    known = {field.name for field in dataclasses.fields(sample.method)}
    other = copy.copy(sample)
    other.method = dataclasses.replace(sample.method, **{k: v for k, v in fields.items() if k in known})
    model = toy()
    where = LAYERS[layer]
    called = not where.read and not (sample.method.acts_on == "parameter" and layer in TIED)
    adapted(model, sample, layer, "a")
    adapted(model, other if layer not in (*TIED, "embedding") else sample, layer, "b", seed=1)
    seen = {
        name: effect(model, where.path, where.parameter or "weight", called, active)
        for name, active in (("0", None), ("a", "a"), ("b", "b"), ("sum", at.Sum("a", "b")))
    }
    changed = seen["a"] - seen["0"] + seen["b"] - seen["0"]
    assert distance(seen["sum"], seen["0"] + changed) <= EXACT
    assert distance(under(model, at.Sum("a", "b")), under(model, at.Sum("b", "a"))) <= EXACT


ROWS = ("a", "b", None, "a", at.Stack("a", "b"))


@every_cell
@promise("rows")
def test_rows_are_a_loop_over_rows(sample, layer):
    model = toy()
    adapted(model, sample, layer, "a")
    adapted(model, sample, layer, "b", seed=1)
    _rows_equal_a_loop(model)


@every_sample
@promise("rows")
@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_train_as_a_loop_over_rows(sample, batch_first):
    model = toy(batch_first=batch_first)
    adapters = [adapted(model, sample, name="a"), adapted(model, sample, name="b", seed=1)]
    _rows_equal_a_loop(model)
    plain = copy.deepcopy(model)
    given = ids(len(ROWS))
    with at.using(model, at.Rows(ROWS)):
        logits = model(given)
    loss(logits).backward()
    rows = []
    for row, item in enumerate(ROWS):
        with at.using(plain, item):
            rows.append(plain(given[row : row + 1]))
    loss(torch.cat(rows)).backward()
    for adapter in adapters:
        expected = gradients(at.adapters(plain)[adapter.name])
        for name, gradient in gradients(adapter).items():
            assert distance(gradient, expected[name]) <= 1e-8, name


def _rows_equal_a_loop(model: nn.Module) -> None:
    given = ids(len(ROWS))
    together = under(model, at.Rows(ROWS), given)
    for row, item in enumerate(ROWS):
        assert distance(together[row], under(model, item, given[row : row + 1])[0]) <= EXACT, item
    with pytest.raises(at.AttunementError, match="rows"):
        under(model, at.Rows(ROWS), given[:-1])


FIRST = [sample for i, sample in enumerate(SAMPLES) if sample.name not in {s.name for s in SAMPLES[:i]}]
PAIRS = [(one, two) for one in FIRST for two in FIRST if one is not two]


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=[f"{one.id}+{two.id}" for one, two in PAIRS])
def test_unlike_methods_compose_train_and_merge(one, two, tmp_path):
    model = toy()
    base, before = out(model), bits(model)
    a, b = adapted(model, one, name="a"), adapted(model, two, name="b", seed=1)
    nested = at.Average(at.Stack("a", "b"), at.Weighted({at.Sum("a", "b"): 0.5, "b": -0.25}), None)
    for active in (at.Sum("a", "b"), at.Stack("a", "b"), at.Stack("b", "a"), at.Average("a", "b"), nested):
        mixed = under(model, active)
        assert torch.isfinite(mixed).all(), active
        assert distance(mixed, base) > 1e-4, active
    at.use(model, nested)
    loss(model(ids())).backward()
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


@every_sample
@promise("compose")
def test_one_adapter_of_unlike_methods(sample, tmp_path):
    """A method beside others in one recipe: saved as one, loaded as one."""
    recipe = {
        sample.everywhere(): sample.method,
        "spread": at.LoRA(rank=3),
        "blocks[1].mlp": at.Bottleneck(size=2),
        "blocks.1.mlp_norm": at.Train(),
    }
    model = toy()
    if sample.name == "bottleneck/bottleneck":
        recipe.pop("blocks[1].mlp")  # the sample is there already
    adapter = perturb(at.adapt(model, recipe))
    expected = out(model)
    adapter.save(tmp_path / "mixed")
    fresh = toy()
    at.load(fresh, tmp_path / "mixed")
    assert distance(out(fresh), expected) <= 1e-12
