"""Precisions, gradients, recomputation and compilation."""

from __future__ import annotations

import contextlib
import functools
import sys

import pytest
import torch
from grid import LIVES, SAMPLES, adapted, dealt, every_cell, every_home, gradients, loss, perturb, promise
from homes import HOMES, PLACES, SPOTS, Spot, data, given, home, out, run
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from toy_model import TIED, bits, distance

import attunement as at

ROUNDINGS = 3  # adapted and bare model round alike: their errors are of one size


def error(found, exact) -> float:
    """Relative, over all values: the largest of them is too much a matter of chance to bound closely."""
    return float((found.double() - exact).norm() / exact.norm())


def in_double(model):
    """The same base with all arithmetic in float64."""
    double = home(model.home)
    double.load_state_dict({key: value.double() for key, value in bits(model).items()})
    return double


def with_the_adapter_of(model, double, sample, layer):
    state = at.adapters(model)["a"].state()
    adapted(double, sample, layer).load_state({key: value.double() for key, value in state.items()})
    return double


@functools.cache
def bound(name, dtype, autocast=None) -> float:
    """On the error of an adapted model: some times that of the bare one."""
    model = home(name, torch.float32).to(dtype)
    with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
        base = out(model, given(model, 12))
    double = in_double(model)
    return ROUNDINGS * error(base, out(double, given(double, 12)))


@every_cell
@promise("half")
def test_half_precision_adds_no_more_error_than_the_base_has(sample, layer):
    no_more_error(PLACES[layer].home, torch.bfloat16, sample, layer)


@every_home
@promise("half")
def test_float16_adds_no_more_error_than_the_base_has(sample, where):
    no_more_error(where, torch.float16, sample, None)


def no_more_error(where, dtype, sample, layer) -> None:
    model = home(where, torch.float32).to(dtype)
    many = given(model, 12)
    adapter = adapted(model, sample, layer)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    double = with_the_adapter_of(model, in_double(model), sample, layer)
    expected = run(double, given(double, 12))
    logits = run(model, many)
    assert logits.dtype == dtype
    assert error(logits.detach(), expected.detach()) <= bound(where, dtype)
    loss(logits.float()).backward()
    loss(expected).backward()
    exactly = gradients(at.adapters(double)["a"])
    # a gradient that is zero, or cancels to nothing, keeps some roundings of the terms that cancelled
    noise = 0.02 * max(float(gradient.norm()) for gradient in exactly.values())
    for name, gradient in gradients(adapter).items():
        assert gradient.dtype == torch.float32
        assert (gradient - exactly[name]).norm() <= 0.25 * exactly[name].norm() + noise, name
    if "merge" not in sample.method.cannot:
        adapter.merge(untie=layer in TIED)
        assert error(out(model, many), expected.detach()) <= bound(where, dtype), "merged"


@every_cell
@promise("autocast")
def test_autocast_adds_no_more_error_than_the_base_has(sample, layer):
    model = home(PLACES[layer].home, torch.float32)
    many = given(model, 12)
    adapter = adapted(model, sample, layer)
    double = with_the_adapter_of(model, in_double(model), sample, layer)
    with torch.autocast("cpu", torch.bfloat16):
        logits = run(model, many)
    expected = out(double, given(double, 12))
    assert error(logits.detach(), expected) <= bound(model.home, torch.float32, autocast=torch.bfloat16)
    loss(logits.float()).backward()
    assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in gradients(adapter).values())


@every_cell
@promise("gradcheck")
def test_gradients_are_those_of_the_function(sample, layer, monkeypatch):
    # where it fails, it would go on to compute whole Jacobians for its message
    checking = sys.modules["torch.autograd.gradcheck"]
    monkeypatch.setattr(checking, "_run_slow_mode_and_get_error", lambda *_: "", raising=False)
    model = home(PLACES[layer].home)
    adapter = adapted(model, sample, layer)
    function = lambda *_: loss(run(model))  # noqa: E731 - the parameters are moved in place
    assert torch.autograd.gradcheck(function, tuple(adapter.parameters()), fast_mode=True, raise_exception=False)


@every_home
@promise("checkpointing")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved"])
def test_recomputed_gradients_are_equal(sample, where, reentrant):
    model, plain = home(where), home(where)
    if where == "toy":
        model._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one in (model, plain):
        one.train()
        torch.manual_seed(0)
        adapted(one, sample, name="a")
        adapted(one, sample, name="b", seed=1)
        with at.using(one, "a"):
            logits = run(one)
        loss(logits).backward()  # the recomputation runs after the block has ended, when "b" is active
    expected = gradients(at.adapters(plain)["a"])
    for name, gradient in gradients(at.adapters(model)["a"]).items():
        assert distance(gradient, expected[name]) <= 1e-10, name
    assert all(p.grad is None or not p.grad.any() for p in at.adapters(model)["b"].parameters())


def together() -> list[tuple[str, dict]]:
    """Models and recipes: every layer and every spot has a method, and every method a place; as few as possible."""
    samples = [sample for sample in SAMPLES if "compile" not in sample.method.cannot]
    plain = [sample for sample in samples if not sample.spotted and sample.first]
    used = dict.fromkeys(samples, 0)
    found = []
    while not all(used[sample] for sample in plain):
        found.append(("toy", dealt(plain, used)))
    for name in HOMES[1:]:
        recipe = {}
        for spot, kind in ((word, kind) for word, place in SPOTS.items() if place.home == name for kind in place.kinds):
            able = [sample for sample in samples if sample.method.acts_on == kind and sample.takes(spot)]
            if able:
                chosen = min(able, key=lambda sample: used[sample])
                used[chosen] += 1
                recipe[functools.partial(Spot.__call__, SPOTS[spot])] = chosen.method
        found.append((name, recipe))
    left = [sample for sample in samples if sample.spotted and not used[sample]]
    for sample in left:
        where = next(name for one, name in LIVES if one is sample)
        found.append((where, {sample.everywhere(where): sample.method}))
    return found


TOGETHER = together()


@pytest.mark.parametrize(
    "turn", range(len(TOGETHER)), ids=[f"{name}-{turn}" for turn, (name, _) in enumerate(TOGETHER)]
)
def test_one_graph_and_no_recompilation_on_a_swap(turn, fresh_compiler):
    """Compiling takes seconds, so all methods stand in few models."""
    one_graph(*TOGETHER[turn])


UNCOMPILED = [(sample, where) for sample, where in LIVES if "compile" in sample.method.cannot]


@pytest.mark.parametrize(("sample", "where"), UNCOMPILED, ids=[f"{sample.id}-{where}" for sample, where in UNCOMPILED])
@promise("compile")
def test_what_cannot_be_compiled_indeed_cannot(sample, where, fresh_compiler):
    one_graph(where, {sample.everywhere(where): sample.method})


def one_graph(where, recipe) -> None:
    model = home(where, torch.float32)
    inputs = given(model)
    expected = {}
    for seed, name in enumerate("ab"):
        perturb(at.adapt(model, recipe, name=name, data=data(model)), seed)
        expected[name] = out(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert distance(out(compiled, inputs), expected["b"]) <= 1e-5
    for name in "aba":
        at.use(model, name)
        assert distance(out(compiled, inputs), expected[name]) <= 1e-5
    assert counter.frame_count == 1
